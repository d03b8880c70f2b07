"""Really remove layers, or parts of them, in memory.

A block that loses both branches is deleted. One that loses one of them keeps its place and skips
the branch.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from torch import nn

from core.blocks import PROBE_TOKENS, copy_sharing_weights
from core.cut import Cut
from core.description import POSITION_NAMES, match_description, matching, shortened_config
from core.errors import LayerShapError
from core.evaluation import Evaluator
from core.masks import dropped_players, leave_out, mask_key
from core.models import LayeredModel, ModelInfo, count_parameters
from core.quantization import counted_module
from core.sub_blocks import Branches, Silenced


def prune(model: LayeredModel, keep: ArrayLike) -> LayeredModel:
    """The model without what is dropped; weights are shared with `model`, not copied.

    Depth, per-layer lists in the configuration and every block's own position agree, so the result
    generates and saves like any other model.

    Args:
        keep: True = kept; bool [n_layers], or [2 n_layers] for attention and MLP of each layer.

    Raises:
        LayerShapError: no layer is kept, or this architecture cannot be described without what is
            dropped, or computes something else once it is gone.
    """
    cut = Cut.of(model, keep)
    module = copy_sharing_weights(model.module)
    parent_path, _, name = model.stack.path.rpartition(".")
    parent = module.get_submodule(parent_path)
    blocks = nn.ModuleList(getattr(parent, name)[layer] for layer in cut.layers)
    setattr(parent, name, blocks)
    config = shortened_config(model, cut.layers)
    for part in module.modules():
        if part.__dict__.get("config") is not None:
            part.config = matching(part.config, config)
    match_description(module, model.stack.path)
    if not cut.whole:
        branches = [model.branches[layer] for layer in cut.layers]
        _silence(blocks, branches, cut.silenced)
        _renumber_caches(config.get_text_config(), blocks, branches)
    _check_same_function(model, cut, module)
    counted = counted_module(module)
    if counted is not module and not cut.whole:
        _silence(counted.get_submodule(model.stack.path), branches, cut.silenced)
    return LayeredModel(
        module,
        model.tokenizer,
        replace(
            model.stack,
            blocks=tuple(blocks),
            returns=tuple(model.stack.returns[layer] for layer in cut.layers),
        ),
        replace(
            model.info,
            n_layers=len(cut.layers),
            parameters=count_parameters(counted),
            block_parameters=tuple(map(count_parameters, counted.get_submodule(model.stack.path))),
            fingerprint=_fingerprint(model.info, cut),
        ),
        model.mixes_rows,
    )


def _fingerprint(info: ModelInfo, cut: Cut) -> str:
    """The cut's own fingerprint: measurements of different cuts must not be taken for each
    other, and hashing the shared weights again would say no more."""
    if cut.mask.all():
        return info.fingerprint
    layers = cut.players.whole_layers(dropped_players(cut.mask))
    mask = cut.mask if layers is None else leave_out(info.n_layers, layers)
    return hashlib.blake2b(
        f"{info.fingerprint}|{mask_key(mask)}".encode(), digest_size=16
    ).hexdigest()


def _silence(
    blocks: nn.ModuleList, branches: Sequence[Branches], silenced: Sequence[tuple[int, ...]]
) -> None:
    """Skip branches, in place; the blocks are the pruned model's own copies."""
    for block, found, skipped in zip(blocks, branches, silenced, strict=True):
        for branch in skipped:
            for name, described in found.both[branch].items():
                block._modules[name] = Silenced(block._modules[name], described)


def _renumber_caches(config: Any, blocks: nn.ModuleList, branches: Sequence[Branches]) -> None:
    """Let the attentions that are left use the first key/value caches of their kind.

    Models read off the first cache how much text they have seen, and off the configuration which
    kind of attention each cache serves.
    """
    kinds = getattr(config, "layer_types", None) or ["attention"] * len(blocks)
    places = {kind: [i for i, other in enumerate(kinds) if other == kind] for kind in set(kinds)}
    for block, found, kind in zip(blocks, branches, kinds, strict=True):
        parts = [block._modules[name] for name in found.attention]
        if any(isinstance(part, Silenced) for part in parts):
            continue
        place = places[kind].pop(0)
        for part in (inner for outer in parts for inner in outer.modules()):
            for position in POSITION_NAMES:
                if position in vars(part):
                    setattr(part, position, place)


@torch.inference_mode()
def _check_same_function(model: LayeredModel, cut: Cut, module: nn.Module) -> None:
    """See on a few tokens that the pruned model runs, with its cache, and is what was measured.

    Raises:
        LayerShapError: it does not run, or its loss is not that of skipping the same players.
    """
    tokens = torch.arange(PROBE_TOKENS, device=model.device).unsqueeze(0)
    evaluator = Evaluator(model, tokens, group=1, players=cut.players.kind)
    [(_, skipped)] = evaluator.losses(cut.mask[None])
    try:
        logits = module(input_ids=tokens, use_cache=True).logits.float()
        continued = logits if cut.whole else _in_two_parts(module, tokens)
    except Exception as error:
        raise LayerShapError(
            f"{type(module).__name__} does not run with what is kept alone "
            f"({type(error).__name__}: {error}); keep another layer, such as one with attention."
        ) from error
    tolerance = max(1e-4, torch.finfo(module.dtype).eps)
    if not math.isfinite(skipped):
        return
    for found in (logits, continued):
        loss = float(F.cross_entropy(found[0, :-1], tokens[0, 1:].to(found.device)))
        if not math.isclose(loss, skipped, rel_tol=tolerance):
            raise LayerShapError(
                f"{type(module).__name__} computes something else once this much is gone, so this "
                "cut cannot be made a model of its own; its measured perplexity still holds."
            )


def _in_two_parts(module: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Logits of a text read in two parts, the second with what the cache holds of the first."""
    first, second = tokens.tensor_split(2, dim=1)
    begun = module(input_ids=first, use_cache=True)
    rest = module(input_ids=second, past_key_values=begun.past_key_values, use_cache=True)
    return torch.cat([begun.logits, rest.logits], dim=1).float()
