"""Models whose weights are stored in fewer bits: what they are, what they hold, what they count.

They are analysed as they are. Their packed tensors are not the parameters they stand for, and some
of what they compute with is in no parameter at all.
"""

from __future__ import annotations

import json
import re
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from core.errors import LayerShapError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_BITS = ("bits", "w_bit", "nbits")


def quantization_settings(config: PreTrainedConfig) -> dict[str, Any] | None:
    """How a model's weights are packed, as its configuration says; None where they are not."""
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return None
    return settings if isinstance(settings, dict) else settings.to_dict()


def quantization_name(config: PreTrainedConfig) -> str | None:
    """The method and, where it is stated plainly, the bits: "bitsandbytes 4-bit"."""
    settings = quantization_settings(config)
    if settings is None:
        return None
    method = settings.get("quant_method")
    name = str(getattr(method, "value", method) or "bitsandbytes")
    if settings.get("load_in_4bit") or settings.get("load_in_8bit"):
        return f"{name} {4 if settings.get('load_in_4bit') else 8}-bit"
    bits = next((settings[key] for key in _BITS if type(settings.get(key)) is int), None)
    return name if bits is None else f"{name} {bits}-bit"


def held_tensors(module: PreTrainedModel) -> dict[str, Tensor]:
    """Every tensor that a model computes with, by name; shared ones once.

    Of packed weights, scales and codes too: they are in the state dict alone.
    """
    held = dict([*module.named_parameters(), *module.named_buffers()])
    if quantization_settings(module.config) is not None:
        known = {tensor.data_ptr() for tensor in held.values()}
        for name, tensor in module.state_dict().items():
            if isinstance(tensor, Tensor) and tensor.data_ptr() not in known:
                held[f"state.{name}"] = tensor
    return held


def counted_module(module: PreTrainedModel) -> nn.Module:
    """A module whose parameters can be counted: of a packed model, its plain counterpart, empty."""
    if quantization_settings(module.config) is None:
        return module
    config = deepcopy(module.config)
    del config.quantization_config
    with torch.device("meta"):
        return type(module)(config)


def keep_packing(module: nn.Module) -> None:
    """Have 4-bit weights stay as they were stored, in place.

    Where a CPU has bfloat16 products, bitsandbytes lays weights out anew, with coarser scales, when
    they are first used, and computes in bfloat16 whatever was asked for. Layers, copies of the
    model and threads share those weights, and a cut is to be written with the scales it came with.
    """
    for part in module.modules():
        if hasattr(part, "support_avx512bf16_for_cpu"):
            part.support_avx512bf16_for_cpu = False


def check_packing(module: PreTrainedModel, path: str) -> None:
    """Refuse to write packed weights that would not be read back as they are.

    Args:
        module: the pruned model.
        path: where its blocks are.

    Raises:
        LayerShapError: the packing cannot be written, or names layers by their old numbers.
    """
    settings = quantization_settings(module.config)
    if settings is None:
        return
    name = quantization_name(module.config)
    quantizer = getattr(module, "hf_quantizer", None)
    if quantizer is None or not quantizer.is_serializable():
        raise LayerShapError(
            f"Weights quantized with {name} cannot be saved; cut the unquantized model instead."
        )
    last = path.rpartition(".")[2]
    if re.search(rf"\b{re.escape(last)}\.\d", json.dumps(settings, default=str)):
        raise LayerShapError(
            f"The {name} settings name single layers by their numbers, which a cut changes, so it "
            "cannot be saved; cut the unquantized model instead."
        )
