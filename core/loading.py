"""Find and load a causal language model.

A model comes from the bundled weights, the Hugging Face Hub, a local folder or a local GGUF file.
Only safetensors and GGUF are read, and no code from a model's repository is ever run.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from core.bundled import bundled_folder, cache_root, gguf_folder
from core.errors import LayerShapError, advice, check_one_of, first_line
from core.models import BUNDLED, LayeredModel, describe
from core.quantization import quantization_name

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

Progress = Callable[[str, float | None], None]

BUNDLED_NAME = "SmolLM2-135M-Instruct (bundled)"
DEVICES = ("auto", "cuda", "mps", "cpu")
DTYPES = ("auto", "bfloat16", "float16", "float32")
HUB_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "README.md")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
# A branch, tag or commit; the Hub's client makes file names of it.
_REVISION = re.compile(r"\w[\w.-]*(/\w[\w.-]*)*", re.ASCII)
# Of one GPU's free memory, what activations and masks in flight may need besides the weights.
GPU_RESERVE = 0.2


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
    check_one_of("device", device, DEVICES)
    check_one_of("dtype", dtype, DTYPES)
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
