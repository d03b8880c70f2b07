"""Really remove layers, or parts of them: in memory, on disk, and as a mergekit recipe.

A block that loses both branches is deleted. One that loses one of them keeps its place and skips
the branch; on disk the branch is there with zeros for weights, so that any program computes the
same.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from pathlib import Path
from threading import Event, Thread
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from numpy.typing import ArrayLike, NDArray
from safetensors import SafetensorError
from torch import nn

from core.blocks import PROBE_TOKENS, copy_sharing_weights
from core.card import CARD_FILE, Measured, model_card, origin
from core.errors import LayerShapError
from core.evaluation import Evaluator
from core.game import check_masks
from core.masks import dropped_players, leave_out, mask_key
from core.models import LayeredModel, ModelInfo, auto_class, count_parameters, load_model
from core.players import ATTENTION, BRANCH_NAMES, MLP, Players, players_of_mask
from core.quantization import check_packing, counted_module, quantization_settings
from core.sub_blocks import Branches, Silenced

# Names under which blocks and their parts remember their own position.
POSITION_NAMES = (
    "layer_idx",
    "layer_id",
    "layer_number",
    "layer_num",
    "layer_index",
    "block_idx",
    "block_id",
)
# Names under which configurations state how many layers there are.
DEPTH_NAMES = (
    "num_hidden_layers",
    "num_layers",
    "decoder_layers",
    "num_decoder_layers",
    "num_blocks",
)
# Attributes that say how a module is being used, not what it computes.
USAGE_NAMES = ("training", "gradient_checkpointing")
PROVENANCE_FILE = "layershap.json"
MAX_PROMPT_CHARACTERS = 50_000
PROCESSOR_FILES = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)


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
    cut = _Cut.of(model, keep)
    module = copy_sharing_weights(model.module)
    parent_path, _, name = model.stack.path.rpartition(".")
    parent = module.get_submodule(parent_path)
    blocks = nn.ModuleList(getattr(parent, name)[layer] for layer in cut.layers)
    setattr(parent, name, blocks)
    config = _shortened_config(model, cut.layers)
    for part in module.modules():
        if part.__dict__.get("config") is not None:
            part.config = _matching(part.config, config)
    _match_description(module, model.stack.path)
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


def load_pruned(source: str, **settings: Any) -> LayeredModel:
    """Load a model as `load_model` does; of a folder that `save_pruned` made, branches that the
    cut dropped are skipped instead of computed with zeros.

    Raises:
        LayerShapError: the model cannot be loaded, or what it says of its cut is damaged.
    """
    model = load_model(source, **settings)
    saved = Path(model.module.name_or_path) / PROVENANCE_FILE
    if not saved.is_file():
        return model
    keep = np.ones((model.n_layers, 2), dtype=bool)
    try:
        skipped = json.loads(saved.read_text(encoding="utf-8")).get("skipped_branches", {})
        for branch, name in ((ATTENTION, "attention"), (MLP, "mlp")):
            keep[[_position(layer, model.n_layers) for layer in skipped.get(name, [])], branch] = (
                False
            )
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise LayerShapError(
            f"{saved} is damaged ({error}); delete it to load the model without skipping."
        ) from error
    if keep.all():
        return model
    with _speaking(model.blocks):
        model.branches  # noqa: B018 (found now, and remembered)
    return prune(model, keep.ravel())


def save_pruned(
    model: LayeredModel,
    keep: ArrayLike,
    folder: str | Path,
    progress: Callable[[str, float | None], None] | None = None,
    measured: Measured | None = None,
) -> Path:
    """Write the pruned model, its tokenizer, the cut and a model card to a new folder.

    Plain `AutoModelForCausalLM.from_pretrained(folder)` loads it; `load_pruned(folder)` also skips
    branches that were dropped alone. The folder appears at once when it is whole.

    Args:
        measured: what the card may say of this cut.

    Raises:
        LayerShapError: the folder exists and is not empty, or cannot be written.
    """
    pruned = prune(model, keep)
    whole = _Cut.of(model, keep).whole
    check_saving(pruned)
    # mergekit knows layers of text models.
    known = whole and not model.info.tower_parameters
    recipe = mergekit_yaml(model.info, keep, origin(model).location) if known else None
    card = model_card(
        model,
        pruned,
        _one_mask(keep, model.n_layers),
        measured=measured,
        recipe=recipe,
    )
    return write_model(pruned, folder, provenance(model, keep), card, progress)


def check_saving(pruned: LayeredModel) -> None:
    """Refuse to save a pruned model that could not be read back as it is.

    Raises:
        LayerShapError: it could not.
    """
    check_packing(pruned.module, pruned.stack.path)
    silenced = any(isinstance(part, Silenced) for part in pruned.module.modules())
    if silenced and pruned.info.quantization:
        raise LayerShapError(
            "Quantized weights cannot be made zero, which a saved model needs where a part of a "
            "layer is dropped; drop whole layers, or cut the unquantized model."
        )
    if auto_class(pruned.module.config) is None:
        raise LayerShapError(
            f"transformers cannot read a {type(pruned.module).__name__} by itself, so this cut "
            "cannot be saved; its measured perplexity still holds."
        )


def write_model(
    model: LayeredModel,
    folder: str | Path,
    made_by: Mapping[str, Any],
    card: str,
    progress: Callable[[str, float | None], None] | None = None,
) -> Path:
    """Write a model that is already pruned, its tokenizer, provenance and card to a new folder.

    Raises:
        LayerShapError: the folder exists and is not empty, or cannot be written.
    """
    folder = Path(folder).expanduser()
    report = progress or (lambda stage, fraction: None)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise LayerShapError(f"{folder} exists already; choose another name.")
    report("Writing the model", None)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".saving-") as scratch:
            made = Path(scratch) / "model"
            # Packed weights cannot be turned back into the format they were first read from.
            _neutral(model.module).save_pretrained(
                made, save_original_format=not model.info.quantization
            )
            if model.tokenizer is not None:
                model.tokenizer.save_pretrained(made)
            _copy_processors(Path(model.module.name_or_path), made)
            (made / PROVENANCE_FILE).write_text(json.dumps(made_by, indent=1), encoding="utf-8")
            (made / CARD_FILE).write_text(card, encoding="utf-8")
            if folder.exists():
                folder.rmdir()
            shutil.move(made, folder)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise LayerShapError(
            f"The model could not be written to {folder} ({reason}); free some space or choose "
            "another place."
        ) from error
    report("Saved", 1.0)
    return folder


def _copy_processors(source: Path, made: Path) -> None:
    """Take along what prepares images and sound for a model's towers, which a cut leaves as is."""
    for name in PROCESSOR_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, made / name)


def mergekit_yaml(info: ModelInfo, keep: ArrayLike, location: str | None = None) -> str:
    """A mergekit `passthrough` recipe of the same cut; layer ranges end before their last number.

    Args:
        location: the folder or Hub id to read the model from; by default where it came from.

    Raises:
        LayerShapError: no layer is kept, or only a part of one is dropped.
    """
    mask = _one_mask(keep, info.n_layers)
    dropped = players_of_mask(len(mask), info.n_layers).whole_layers(dropped_players(mask))
    if dropped is None:
        raise LayerShapError("mergekit knows whole layers only; save the pruned model instead.")
    mask = leave_out(info.n_layers, dropped)
    runs = [
        [layer for layer, _ in run]
        for kept, run in groupby(enumerate(mask), key=lambda item: bool(item[1]))
        if kept
    ]
    model = location or info.source or info.name
    recipe = {
        "merge_method": "passthrough",
        "dtype": info.dtype,
        "slices": [
            {"sources": [{"model": model, "layer_range": [run[0], run[-1] + 1]}]} for run in runs
        ],
    }
    return yaml.safe_dump(recipe, sort_keys=False, default_flow_style=None, width=200)


def continue_prompt(
    model: LayeredModel,
    prompt: str,
    *,
    max_new_tokens: int = 40,
    stop: Callable[[], bool] | None = None,
) -> Iterator[str]:
    """Continue a prompt greedily; yield the continuation so far, again after every word.

    Generation ends early when `stop` says so or when the iterator is closed.

    Raises:
        LayerShapError: the prompt is empty, not text, or leaves no room in the model's context.
    """
    from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

    if model.tokenizer is None:
        raise LayerShapError("This model has no tokenizer, so it cannot continue text.")
    if len(prompt) > MAX_PROMPT_CHARACTERS or not _is_text(prompt):
        raise LayerShapError(
            f"The prompt must be text of at most {MAX_PROMPT_CHARACTERS:,} characters; shorten it."
        )
    encoded = model.tokenizer(prompt, return_tensors="pt").to(model.device)
    # Some tokenizers return more, such as segment ids, which causal models refuse.
    inputs = {name: encoded[name] for name in ("input_ids", "attention_mask") if name in encoded}
    length, context = inputs["input_ids"].shape[1], model.info.context_length
    if length == 0:
        raise LayerShapError("The prompt is empty; type the beginning of a text.")
    if context is not None and length + max_new_tokens > context:
        raise LayerShapError(
            f"The prompt has {length} tokens; with {max_new_tokens} new ones that is more than "
            f"this model's context of {context}; shorten it or ask for fewer."
        )

    abandoned = Event()

    class Stop(StoppingCriteria):
        def __call__(self, input_ids: Any, scores: Any, **_: Any) -> torch.Tensor:
            stopped = abandoned.is_set() or bool(stop and stop())
            return torch.full((len(input_ids),), stopped, device=input_ids.device)

    streamer = TextIteratorStreamer(model.tokenizer, skip_prompt=True, skip_special_tokens=True)
    failures: list[Exception] = []

    def generate() -> None:
        try:
            model.module.generate(
                **inputs,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                streamer=streamer,
                stopping_criteria=StoppingCriteriaList([Stop()]),
                pad_token_id=model.tokenizer.pad_token_id or model.tokenizer.eos_token_id,
            )
        except Exception as error:
            failures.append(error)
            streamer.end()

    thread = Thread(target=generate, daemon=True)
    thread.start()
    text = ""
    try:
        for piece in streamer:
            text += piece
            yield text
    finally:
        abandoned.set()
        thread.join()
    if failures:
        raise failures[0]


def _is_text(prompt: str) -> bool:
    """Whether there is no half of a surrogate pair in it, which no tokenizer takes."""
    try:
        prompt.encode()
    except UnicodeEncodeError:
        return False
    return True


@dataclass(frozen=True)
class _Cut:
    """What is dropped: `mask` over `players`; the `layers` of which something stays, and of each
    of these the branches that are skipped."""

    players: Players
    mask: NDArray[np.bool_]
    layers: list[int]
    silenced: list[tuple[int, ...]]

    @classmethod
    def of(cls, model: LayeredModel, keep: ArrayLike) -> _Cut:
        mask = _one_mask(keep, model.n_layers)
        players = players_of_mask(len(mask), model.n_layers)
        stays = mask.reshape(model.n_layers, players.per_layer)
        layers = [int(layer) for layer in np.flatnonzero(stays.any(axis=1))]
        silenced = [tuple(int(b) for b in np.flatnonzero(~stays[layer])) for layer in layers]
        return cls(players, mask, layers, silenced)

    @property
    def whole(self) -> bool:
        """Whether only whole layers are dropped."""
        return not any(self.silenced)

    def skipping(self, branch: int) -> list[int]:
        """The blocks of the pruned model that skip this branch."""
        return [number for number, skipped in enumerate(self.silenced) if branch in skipped]


def _one_mask(keep: ArrayLike, n_layers: int) -> NDArray[np.bool_]:
    """A single mask, bool [n_layers] or [2 n_layers], that keeps something."""
    length = np.shape(keep)[-1] if np.ndim(keep) else 0
    masks = check_masks(keep, 2 * n_layers if length == 2 * n_layers else n_layers)
    if len(masks) != 1:
        raise LayerShapError(f"There are {len(masks)} masks; a model is pruned by one.")
    if not masks.any():
        raise LayerShapError("No layers are kept; keep at least one.")
    return masks[0]


def _fingerprint(info: ModelInfo, cut: _Cut) -> str:
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


def _neutral(module: nn.Module) -> nn.Module:
    """The model with zeros for the weights of skipped branches, which plain transformers needs."""
    if not any(isinstance(part, Silenced) for part in module.modules()):
        return module
    whole = copy_sharing_weights(module)
    for parent in list(whole.modules()):
        for name, child in parent.named_children():
            if isinstance(child, Silenced):
                # A deep copy of what was silenced, because its weights are not the module's.
                for parameter in child.part.parameters():
                    parameter.data.zero_()
                setattr(parent, name, child.part)
    return whole


@contextmanager
def _speaking(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Give weights that are all zero others for a while: what a branch does shows only then."""
    silent = [p for block in blocks for p in block.parameters() if not p.any()]
    generator = torch.Generator().manual_seed(0)
    try:
        for parameter in silent:
            noise = torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5
            parameter.data.copy_(noise)
        yield
    finally:
        for parameter in silent:
            parameter.data.zero_()


def _position(layer: Any, n_layers: int) -> int:
    if type(layer) is not int or not 0 <= layer < n_layers:
        raise ValueError(f"{layer!r} is not one of its layers")
    return layer


def _shortened_config(model: LayeredModel, kept: list[int]) -> Any:
    config = deepcopy(model.module.config)
    text = config.get_text_config()
    n = model.n_layers
    # Settings of single layers by their number; what they override can only be read without them.
    by_layer = text.to_dict().get("per_layer_config")
    if by_layer:
        text.per_layer_config = None
    for name, value in list(vars(text).items()):
        if _counts_first_layers(name, value, n):
            setattr(text, name, sum(layer < value for layer in kept))
        if not isinstance(value, list):
            continue
        if "layer" in name and _are_layer_numbers(value, n):
            setattr(text, name, [kept.index(layer) for layer in value if layer in kept])
        elif len(value) == n and not name.endswith("token_id"):
            # A list as long as the model is deep describes its layers one by one.
            setattr(text, name, [value[layer] for layer in kept])
    depths = [name for name in DEPTH_NAMES if getattr(text, name, None) == n]
    for name in depths or DEPTH_NAMES[:1]:
        setattr(text, name, len(kept))
    if by_layer:
        settings = {int(layer): values for layer, values in by_layer.items()}
        text.per_layer_config = {
            kept.index(layer): values for layer, values in settings.items() if layer in kept
        }
    return config


def _counts_first_layers(name: str, value: Any, n: int) -> bool:
    """Whether a setting says how many layers, from the first on, have no experts."""
    return "dense" in name and type(value) is int and 0 < value <= n


def _are_layer_numbers(values: Sequence[Any], n: int) -> bool:
    """Whether a list names some layers, such as those with experts, rather than describing all."""
    numbers = all(type(value) is int and 0 <= value < n for value in values)
    return numbers and all(first < second for first, second in pairwise(values))


def _matching(current: Any, config: Any) -> Any:
    """The shortened counterpart of one module's configuration."""
    if type(current) is type(config):
        return config
    text = config.get_text_config()
    return text if type(current) is type(text) else current


def _match_description(module: nn.Module, path: str) -> None:
    """Renumber the blocks under `path` as in a model built from the configuration alone.

    What plain transformers will build from the saved files must have the same weights and, in its
    blocks, the same settings.

    Raises:
        LayerShapError: it would not, because the architecture derives them from the position.
    """
    message = (
        f"{type(module).__name__} derives what a layer is from its position or from how many there "
        "are, so this cut cannot be written as a model of its own; its measured perplexity still "
        "holds."
    )
    config = module.config
    try:
        # As it would be read from a file, where transformers marks numbers that JSON does not have.
        settings = json.loads(config.to_json_string(), object_hook=_marked_number)
        saved = type(config).from_dict(settings)
        with torch.device("meta"):
            fresh = type(module)(saved)
    except Exception as error:
        raise LayerShapError(message) from error
    packed = quantization_settings(config) is not None
    if not packed and _shapes(fresh) != _shapes(module):
        raise LayerShapError(message)
    described = dict(fresh.get_submodule(path).named_modules())
    for name, part in module.get_submodule(path).named_modules():
        if type(described.get(name)) is not type(part):
            # In the place of a linear layer, a quantized model has one that unpacks its weights.
            if packed and isinstance(described.get(name), nn.Linear):
                continue
            raise LayerShapError(message)
        wanted = _settings(described[name])
        for position in POSITION_NAMES:
            if position in wanted:
                setattr(part, position, wanted[position])
        if _settings(part) != wanted:
            raise LayerShapError(message)


def _marked_number(part: dict) -> Any:
    return float(part["__float__"]) if part.keys() == {"__float__"} else part


def _shapes(module: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in module.state_dict().items()}


def _settings(part: nn.Module) -> dict[str, Any]:
    """The plain values a module was built with."""
    return {
        name: value
        for name, value in vars(part).items()
        if isinstance(value, bool | int | float | str | None)
        and not name.startswith("_")
        and name not in USAGE_NAMES
    }


@torch.inference_mode()
def _check_same_function(model: LayeredModel, cut: _Cut, module: nn.Module) -> None:
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


def provenance(model: LayeredModel, keep: ArrayLike) -> dict[str, Any]:
    """What a cut was made of; a local model goes by its name, for the file may be shared."""
    cut = _Cut.of(model, keep)
    gone = [layer for layer in range(model.n_layers) if layer not in cut.layers]
    made_of = {
        "source": origin(model).name,
        "revision": model.info.revision,
        "source_fingerprint": model.info.fingerprint,
        "source_layers": model.n_layers,
        "dropped_layers": gone,
    }
    if cut.whole:
        return made_of
    kept = np.array(cut.layers)
    return {
        **made_of,
        **{
            f"dropped_{BRANCH_NAMES[branch].lower()}": kept[cut.skipping(branch)].tolist()
            for branch in (ATTENTION, MLP)
        },
        # Numbers of the pruned model's own blocks: what `load_pruned` skips.
        "skipped_branches": {
            BRANCH_NAMES[branch].lower(): cut.skipping(branch) for branch in (ATTENTION, MLP)
        },
    }
