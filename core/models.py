"""A causal language model taken as a list of layers: what it is, its blocks, and its players."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from core.blocks import PROBE_TOKENS, BlockStack, TakenApart, find_blocks, take_apart
from core.errors import LayerShapError, check_one_of
from core.packing import pack_linears
from core.players import PLAYER_KINDS, PlayerKind, Players
from core.quantization import counted_module, held_tensors, keep_packing, quantization_name
from core.skipping import check_skipping
from core.sub_blocks import Branches, find_branches, halves

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BUNDLED = "bundled"
# Roundings of the largest logit by which a prediction may move when only later tokens change.
CAUSAL_ROUNDINGS = 8


@dataclass(frozen=True)
class ModelInfo:
    """What a loaded model is.

    Attributes:
        parameters: of the whole model; of quantized weights, the numbers they stand for.
        block_parameters: the same of each layer.
        dtype: what the model computes in.
        fingerprint: identifies its weights and configuration.
        quantization: how its weights are packed, such as "bitsandbytes 4-bit".
        tower_parameters: how many of the parameters are outside the language model, in what sees or
            hears; text never passes them.
    """

    name: str
    source: str
    revision: str | None
    architecture: str
    n_layers: int
    hidden_size: int
    parameters: int
    block_parameters: tuple[int, ...]
    dtype: str
    device: str
    fingerprint: str
    context_length: int | None
    quantization: str | None = None
    tower_parameters: int = 0


@dataclass(frozen=True)
class LayeredModel:
    """A causal LM, its tokenizer and its decoder blocks in order.

    `mixes_rows` says that a text's predictions depend on what else is in the batch, as those of
    some quantized models do.
    """

    module: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    stack: BlockStack
    info: ModelInfo
    mixes_rows: bool = False

    @property
    def location(self) -> str:
        """Where other tools can read the whole model: its Hub id, or a local folder."""
        folder = self.module.name_or_path
        is_hub_id = self.info.source not in ("", BUNDLED) and not Path(self.info.source).exists()
        return self.info.source if is_hub_id else folder

    @property
    def blocks(self) -> tuple[nn.Module, ...]:
        return self.stack.blocks

    @cached_property
    def taken_apart(self) -> TakenApart:
        """The model's parts, ready to be run one by one, as every evaluation does."""
        return take_apart(self.module, self.stack, pack_linears)

    @cached_property
    def branches(self) -> tuple[Branches, ...]:
        """The attention and the MLP branch of each block.

        Raises:
            LayerShapError: the blocks do not consist of these two.
        """
        parts = self.taken_apart
        tokens = torch.arange(PROBE_TOKENS, device=self.device).unsqueeze(0)
        with torch.inference_mode():
            state, calls = parts.stand_ins.record(
                lambda: parts.shell(input_ids=tokens, use_cache=False)
            )
        # The model's own blocks: packed copies go on with the weights that they were packed with.
        return find_branches(self.blocks, state, calls)

    def players(self, kind: PlayerKind = "blocks") -> Players:
        """The players that `kind` makes of this model.

        Raises:
            LayerShapError: an unknown kind, or sub-blocks that this model does not have.
        """
        check_one_of("players", kind, PLAYER_KINDS)
        if kind == "sub-blocks":
            self.branches  # noqa: B018 (raises where there are none)
        return Players(kind, self.n_layers)

    def steps(self, kind: PlayerKind = "blocks") -> tuple[nn.Module, ...]:
        """One module per player, to be run in order on the hidden state; copies, weights shared."""
        blocks = self.taken_apart.blocks
        if kind == "blocks":
            return blocks
        pairs = zip(blocks, self.branches, strict=True)
        return tuple(half for block, found in pairs for half in halves(block, found))

    def player_parameters(self, kind: PlayerKind = "blocks") -> tuple[int, ...]:
        """Parameters that dropping each player saves."""
        if kind == "blocks":
            return self.info.block_parameters
        blocks = counted_module(self.module).get_submodule(self.stack.path)
        return tuple(
            sum(count_parameters(block._modules[name]) for name in parts)
            for block, found in zip(blocks, self.branches, strict=True)
            for parts in found.both
        )

    @property
    def blocks_path(self) -> str:
        return self.stack.path

    @property
    def n_layers(self) -> int:
        return len(self.stack.blocks)

    @property
    def device(self) -> torch.device:
        """Where token ids go in."""
        return self.module.get_input_embeddings().weight.device


def describe(
    module: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    name: str = "",
    source: str = "",
    revision: str | None = None,
) -> LayeredModel:
    """Wrap a causal LM that is already in memory.

    Raises:
        LayerShapError: its decoder blocks cannot be located, or not be skipped one by one.
    """
    module.eval()
    _disable_rescaling(module)
    keep_packing(module)
    stack = find_blocks(module)
    mixes_rows = _check_causal(module)
    config = module.config.get_text_config()
    first = next(module.parameters())
    counted = counted_module(module)
    info = ModelInfo(
        name=name or type(module).__name__,
        source=source,
        revision=revision,
        architecture=type(module).__name__,
        n_layers=len(stack.blocks),
        hidden_size=module.get_input_embeddings().weight.shape[1],
        parameters=count_parameters(counted),
        block_parameters=tuple(map(count_parameters, counted.get_submodule(stack.path))),
        dtype=str(module.dtype).removeprefix("torch."),
        device=_device_name(module, first),
        fingerprint=fingerprint(module),
        context_length=getattr(config, "max_position_embeddings", None),
        quantization=quantization_name(module.config),
        tower_parameters=_tower_parameters(counted, stack.path),
    )
    model = LayeredModel(module, tokenizer, stack, info, mixes_rows)
    check_skipping(model)
    return model


def count_parameters(module: nn.Module) -> int:
    """A module's parameters, shared ones once."""
    return sum(parameter.numel() for parameter in module.parameters())


def _tower_parameters(module: nn.Module, path: str) -> int:
    """Parameters outside the language model, whose blocks are at `path`; embeddings belong to it.

    Only a model whose configuration has a part for text has others.
    """
    if module.config.get_text_config() is module.config:
        return 0
    parts = (
        module.get_submodule(path.rpartition(".")[0]),
        module.get_input_embeddings(),
        module.get_output_embeddings(),
    )
    language = {id(p) for part in parts if part is not None for p in part.parameters()}
    return sum(p.numel() for p in module.parameters() if id(p) not in language)


def fingerprint(module: PreTrainedModel, *, buffers: bool = True) -> str:
    """A hash of every weight's bytes and of the configuration, 32 hex digits.

    Two models that could give different numbers differ in it, whatever they are called. Without
    buffers, which devices may compute with other roundings, it is the same on every device.
    """
    config = {
        key: value
        for key, value in module.config.to_dict().items()
        if key not in ("_name_or_path", "transformers_version")
    }
    named = list(held_tensors(module).items() if buffers else module.named_parameters())
    if any(tensor.is_meta for _, tensor in named):
        raise LayerShapError(
            "The model does not fit in the memory of this machine's devices; choose a smaller "
            "model or a smaller dtype."
        )
    with ThreadPoolExecutor() as pool:
        digests = list(pool.map(lambda item: _digest(*item), named))
    whole = hashlib.blake2b(json.dumps(config, sort_keys=True, default=str).encode())
    for digest in digests:
        whole.update(digest)
    return whole.hexdigest()[:32]


def _disable_rescaling(module: nn.Module) -> None:
    """RWKV halves the stream between blocks against float16 overflow; here blocks are replayed
    one by one, and the unscaled stream is the same function."""
    scaled = any(getattr(part, "layers_are_rescaled", False) for part in module.modules())
    if getattr(module.config, "rescale_every", 0) and not scaled:
        module.config.rescale_every = 0


@torch.inference_mode()
def _check_causal(module: PreTrainedModel) -> bool:
    """Refuse a model whose predictions look at tokens to come, such as BERT's.

    Returns whether what else is in a batch moves a text's predictions.
    """
    device = module.get_input_embeddings().weight.device
    tokens = torch.arange(2 * PROBE_TOKENS, device=device)
    changed = torch.cat([tokens[:PROBE_TOKENS]] * 2)

    def first_row(*rows: Tensor) -> Tensor:
        return module(input_ids=torch.stack(rows), use_cache=False).logits[0].float()

    whole = first_row(tokens)
    moved = (whole - first_row(changed))[:PROBE_TOKENS].abs().max()
    allowed = CAUSAL_ROUNDINGS * torch.finfo(module.dtype).eps * whole[:PROBE_TOKENS].abs().max()
    mixes = False
    if quantization_name(module.config):
        # Some choose how to round for a whole batch at once: the text to come may matter no more
        # than another row does.
        other = (first_row(tokens, tokens) - first_row(tokens, changed)).abs().max()
        mixes = bool(other > allowed)
        allowed = max(allowed, CAUSAL_ROUNDINGS * other)
    if moved > allowed:
        raise LayerShapError(
            f"{type(module).__name__} looks at the words to come, so it is not a causal language "
            "model; choose a decoder-only model such as Llama, Qwen or Mistral."
        )
    return mixes


def _digest(name: str, tensor: Tensor) -> bytes:
    header = f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode()
    content = tensor.detach().contiguous().flatten().view(torch.uint8).cpu().numpy()
    return hashlib.blake2b(content, key=hashlib.sha256(header).digest()).digest()


def _device_name(module: nn.Module, first: Tensor) -> str:
    devices = {p.device for p in module.parameters()}
    return str(first.device) if len(devices) == 1 else f"{len(devices)} devices"
