"""Find, load and describe a causal language model.

A model comes from the bundled weights, the Hugging Face Hub, a local folder or a local GGUF file.
Only safetensors and GGUF are read, and no code from a model's repository is ever run.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from core.blocks import PROBE_TOKENS, BlockStack, TakenApart, find_blocks, take_apart
from core.bundled import bundled_folder, cache_root, gguf_folder
from core.errors import LayerShapError, advice, first_line
from core.packing import pack_linears
from core.players import PLAYER_KINDS, PlayerKind, Players
from core.quantization import counted_module, held_tensors, quantization_name
from core.skipping import check_skipping
from core.sub_blocks import Branches, find_branches, halves

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

Progress = Callable[[str, float | None], None]

BUNDLED = "bundled"
BUNDLED_NAME = "SmolLM2-135M-Instruct (bundled)"
DEVICES = ("auto", "cuda", "mps", "cpu")
DTYPES = ("auto", "bfloat16", "float16", "float32")
HUB_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "README.md")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
# A branch, tag or commit; the Hub's client makes file names of it.
_REVISION = re.compile(r"\w[\w.-]*(/\w[\w.-]*)*", re.ASCII)
# Of one GPU's free memory, what activations and masks in flight may need besides the weights.
GPU_RESERVE = 0.2
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
        return find_branches(parts.blocks, state, calls)

    def players(self, kind: PlayerKind = "blocks") -> Players:
        """The players that `kind` makes of this model.

        Raises:
            LayerShapError: an unknown kind, or sub-blocks that this model does not have.
        """
        _one_of("players", kind, PLAYER_KINDS)
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


class _Unreadable(LayerShapError):
    """A model's files are not what they should be."""


def load_model(
    source: str = BUNDLED,
    *,
    revision: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    progress: Progress | None = None,
) -> LayeredModel:
    """Load a causal LM for analysis.

    Args:
        source: "bundled", a Hugging Face Hub id, a local folder, or a local `.gguf` file.
        revision: branch, tag or commit of a Hub id.
        device: "auto" takes CUDA, then MPS, then the CPU.
        dtype: "auto" takes bfloat16 where the hardware has it natively.
        progress: told what is happening, with the fraction done where it is known.

    Raises:
        LayerShapError: the model cannot be found, read, or analysed.
    """
    _one_of("device", device, DEVICES)
    _one_of("dtype", dtype, DTYPES)
    report = progress or (lambda stage, fraction: None)
    source = source.strip()
    folder, name = _locate(source, revision, report)
    report("Loading the model", None)
    target = resolve_device(device)
    kind = resolve_dtype(dtype, target)
    try:
        module, tokenizer = _read(folder, name, target, kind)
    except _Unreadable as error:
        if folder.is_relative_to(cache_root()):
            raise LayerShapError(
                f"The converted model in {folder} is damaged; delete that folder and start again, "
                "and it is made anew."
            ) from error
        raise
    if target.type == "cpu":
        _detach_from_files(module)
    report("Finding the layers", None)
    model = describe(module, tokenizer, name=name, source=source, revision=revision)
    report("Ready", 1.0)
    return model


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


def resolve_device(device: str = "auto") -> torch.device:
    """The device that `device` stands for on this machine.

    Raises:
        LayerShapError: a device was asked for that this machine does not have.
    """
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise LayerShapError("This machine has no CUDA GPU that PyTorch can use; choose auto.")
    if device == "mps" and not torch.backends.mps.is_available():
        raise LayerShapError("This machine has no Apple GPU that PyTorch can use; choose auto.")
    return torch.device(device)


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The dtype that `dtype` stands for on `device`: bfloat16 only where it is native."""
    if dtype != "auto":
        return getattr(torch, dtype)
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float16
    if device.type == "mps":
        return torch.float32
    return torch.bfloat16 if _cpu_has_bfloat16() else torch.float32


def _cpu_has_bfloat16() -> bool:
    try:
        with open("/proc/cpuinfo") as lines:
            flags = next(line for line in lines if line.startswith(("flags", "Features"))).split()
    except (OSError, StopIteration):
        return False
    if platform.machine() in ("aarch64", "arm64"):
        return "bf16" in flags
    return "avx512_bf16" in flags or "amx_bf16" in flags


def _locate(source: str, revision: str | None, report: Progress) -> tuple[Path, str]:
    """The local folder of a source's weights, fetched if need be, and its display name."""
    if source == BUNDLED:
        return bundled_folder(report), BUNDLED_NAME
    try:
        path = Path(source).expanduser()
        is_gguf = path.suffix.lower() == ".gguf"
        found = path.is_file() if is_gguf else path.is_dir()
    except (OSError, RuntimeError) as error:
        raise LayerShapError(
            f"{source[:80]!r} cannot be opened ({getattr(error, 'strerror', None) or error}); "
            "check the path and its permissions."
        ) from error
    if is_gguf:
        if not found:
            raise LayerShapError(f"There is no GGUF file at {source[:200]!r}; check the path.")
        return gguf_folder(path, report), path.name
    if found:
        return path, path.resolve().name
    if not _HUB_ID.fullmatch(source):
        raise LayerShapError(
            f"There is no folder at {source[:200]!r}, and it is not a Hugging Face id such as "
            "HuggingFaceTB/SmolLM2-135M; check the spelling."
        )
    return _from_hub(source, revision, report), source


def _from_hub(repo: str, revision: str | None, report: Progress) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if revision is not None and not _REVISION.fullmatch(revision):
        raise LayerShapError(
            f"{revision[:100]!r} is not a revision; name a branch, a tag or a commit."
        )
    report(f"Fetching {repo} from the Hugging Face Hub", None)
    at = f" at revision {revision!r}" if revision else ""
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=list(HUB_FILES)))
    except GatedRepoError as error:
        raise LayerShapError(
            f"{repo} is gated: accept its terms on the Hub and log in with `hf auth login`."
        ) from error
    except RevisionNotFoundError as error:
        raise LayerShapError(f"{repo} has no revision {revision!r} on the Hub.") from error
    except RepositoryNotFoundError as error:
        raise LayerShapError(
            f"There is no model {repo!r} on the Hugging Face Hub, nor a folder of that name here; "
            "check the spelling (private models need `hf auth login`)."
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise LayerShapError(
            f"{repo}{at} could not be fetched: the Hugging Face Hub cannot be reached and no local "
            "copy exists; check the connection, or use the bundled model or a local folder."
        ) from error


def _read(
    folder: Path, name: str, device: torch.device, dtype: torch.dtype
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    from transformers import AutoConfig, AutoTokenizer

    if not (folder / "config.json").is_file():
        raise _Unreadable(f"{name} has no config.json, so it is not a transformers model.")
    weights = list(folder.glob("*.safetensors"))
    if not weights:
        raise _Unreadable(
            f"{name} has no .safetensors weights; other formats are not read because they can "
            "carry code. Convert it with save_pretrained first."
        )
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, KeyError, OSError) as error:
        raise _Unreadable(
            f"The configuration of {name} cannot be read: this transformers version does not know "
            "its architecture, or it needs code from its own repository, which is never run."
        ) from error
    loader = auto_class(config)
    if loader is None or getattr(config, "is_encoder_decoder", False):
        raise LayerShapError(
            f"{name} is a {config.model_type} model, not a causal language model; choose a "
            "decoder-only model such as Llama, Qwen or Mistral."
        )
    size = sum(file.stat().st_size for file in weights)
    try:
        module = loader.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            device_map="auto" if _needs_several_gpus(size, device) else {"": device},
        )
    except torch.OutOfMemoryError as error:
        raise LayerShapError(advice(error)) from error
    except ImportError as error:
        packed = quantization_name(config)
        needed = f"is quantized with {packed}" if packed else "needs another package"
        raise LayerShapError(
            f"{name} {needed}, and what reads it is not installed ({first_line(error)}); install "
            "it, or choose an unquantized version of the model."
        ) from error
    except Exception as error:
        raise _Unreadable(
            f"The weights of {name} cannot be loaded ({first_line(error)}); the files may be "
            "incomplete: fetch or save the model again."
        ) from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        raise _Unreadable(
            f"{name} has no readable tokenizer ({first_line(error)}); put the tokenizer's files "
            "beside the weights."
        ) from error
    return module, tokenizer


def _detach_from_files(module: nn.Module) -> None:
    """Copy weights that are mapped from a file: what is written to it later would change them, and
    cutting it short would end the process."""
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.data = tensor.data.clone()


def auto_class(config: PreTrainedConfig) -> Any:
    """The transformers class that reads every weight of a language model with this configuration.

    A model that also sees or hears is read whole, its towers included. None where transformers
    knows no language model of this kind.
    """
    import transformers
    from transformers.models.auto import modeling_auto

    multimodal = type(config) in modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING
    if multimodal and config.get_text_config() is not config:
        return transformers.AutoModelForMultimodalLM
    if type(config) in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING:
        return transformers.AutoModelForCausalLM
    return transformers.AutoModelForMultimodalLM if multimodal else None


def _needs_several_gpus(weight_bytes: int, device: torch.device) -> bool:
    if device.type != "cuda" or torch.cuda.device_count() < 2:
        return False
    free, _ = torch.cuda.mem_get_info()
    return weight_bytes > free * (1 - GPU_RESERVE)


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


def _one_of(parameter: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise LayerShapError(f"{parameter} is {value!r}; it must be one of {', '.join(allowed)}.")
