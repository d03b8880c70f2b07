"""See that skipping blocks, as every evaluation does, is what the model computes without them.

Evaluation runs blocks one by one on what a recording said they are given. That is the model only if
the hidden state is all that a block hands to later ones. Some architectures pass more, such as keys
and values that later layers share, or a router's state: their numbers would be wrong, silently.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.blocks import PROBE_ROWS, PROBE_TOKENS, split_hidden
from core.errors import LayerShapError, first_line
from core.evaluation import Evaluator

if TYPE_CHECKING:
    from core.models import LayeredModel

# Of a text longer than the probe that found the blocks, so that nothing kept from there fits.
CHECK_TOKENS = PROBE_TOKENS + 3
TOLERANCE = 1e-5


def check_skipping(model: LayeredModel) -> None:
    """Compare evaluation with the model's own forward pass, whole and with half the blocks gone.

    Raises:
        LayerShapError: they differ, or the model does not run without some of its blocks.
    """
    tokens = torch.arange(1, CHECK_TOKENS + 1).expand(PROBE_ROWS, -1)
    even = np.arange(model.n_layers) % 2 == 0
    masks = np.stack([np.ones_like(even), even, ~even])
    try:
        skipped = dict(Evaluator(model, tokens, group=1).losses(masks))
        truths = [_loss_without(model, ~mask, tokens) for mask in masks]
    except Exception as error:
        raise LayerShapError(
            f"{type(model.module).__name__} does not run without some of its layers "
            f"({first_line(error)}), so they cannot be skipped one by one; choose another model."
        ) from error
    tolerance = max(TOLERANCE, torch.finfo(model.module.dtype).eps)
    for row, truth in enumerate(truths):
        if math.isfinite(truth) and not math.isclose(skipped[row], truth, rel_tol=tolerance):
            raise LayerShapError(
                f"The layers of {type(model.module).__name__} hand one another more than one "
                "hidden state, so what the model does without some of them cannot be measured by "
                "skipping; choose another model."
            )


@torch.inference_mode()
def _loss_without(model: LayeredModel, dropped: Sequence[bool], tokens: Tensor) -> float:
    """The mean NLL of the model itself while these blocks hand on what they are given."""
    text = tokens.to(model.device)
    with _idle(
        [
            (block, returned)
            for block, returned, gone in zip(
                model.blocks, model.stack.returns, dropped, strict=True
            )
            if gone
        ]
    ):
        logits = model.module(input_ids=text, use_cache=False).logits[:, :-1].float()
    return float(F.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten().to(logits.device)))


@contextmanager
def _idle(blocks: Sequence[tuple[nn.Module, tuple[Any, ...] | None]]) -> Iterator[None]:
    """Let blocks return their hidden state, with the rest of what they usually return."""
    # Libraries that spread a model over devices put a `forward` of their own on each block.
    before = [vars(block).get("forward") for block, _ in blocks]
    for block, returned in blocks:
        block.forward = partial(_hand_on, returned)
    try:
        yield
    finally:
        for (block, _), forward in zip(blocks, before, strict=True):
            if forward is None:
                del block.forward
            else:
                block.forward = forward


def _hand_on(returned: tuple[Any, ...] | None, *args: Any, **kwargs: Any) -> Any:
    hidden, _, _ = split_hidden(args, kwargs)
    return hidden if returned is None else (hidden, *returned)
