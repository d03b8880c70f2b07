"""Run a model's linear layers on weights laid out once for the CPU's matrix units.

PyTorch hands a bfloat16 matrix product to oneDNN, which re-orders the weight at every call. Here
the weight is re-ordered once. The products are the same to the bit; where a probe says otherwise,
where memory is short, or where PyTorch has no such operators, the plain path stays.
"""

from __future__ import annotations

from functools import partial

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Rows of input that the layout is chosen for, and rows that the products are compared on.
USUAL_ROWS, PROBE_ROWS = 1024, 64
# Share of the free memory that packed weights may take.
MEMORY_SHARE = 0.25


def pack_linears(module: nn.Module) -> None:
    """Give every bfloat16 CPU `nn.Linear` under `module` a packed forward, in place.

    Call it on a copy whose modules no one else uses. Weights stay as they are; the packed ones
    take as many bytes again.
    """
    if not available():
        return
    linears = [
        part for part in module.modules() if type(part) is nn.Linear and _packable(part.weight)
    ]
    needed = sum({id(part.weight): part.weight.nbytes for part in linears}.values())
    if needed > MEMORY_SHARE * psutil.virtual_memory().available:
        return
    for linear in linears:
        packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), USUAL_ROWS)
        forward = partial(_packed_linear, packed, linear.bias)
        if _same_product(linear, forward):
            linear.forward = forward


def available() -> bool:
    """Whether this processor and this PyTorch have packed bfloat16 products."""
    operators = ("_is_mkldnn_bf16_supported", "_reorder_linear_weight", "_linear_pointwise")
    known = all(hasattr(torch.ops.mkldnn, name) for name in operators)
    return known and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _packable(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype == torch.bfloat16


def _packed_linear(packed: Tensor, bias: Tensor | None, input: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(input, packed, bias, "none", [], "")


@torch.inference_mode()
def _same_product(linear: nn.Linear, forward: partial[Tensor]) -> bool:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(PROBE_ROWS, linear.in_features, generator=generator).bfloat16()
    return torch.equal(forward(rows), F.linear(rows, linear.weight, linear.bias))
