"""Evaluate masks on a GPU that Hugging Face ZeroGPU lends for a minute at a time.

There the program itself has no GPU. A function decorated with `spaces.GPU` runs in a forked process
that has one until the function returns, within the time it asked for. So the model stays on the CPU
here, and masks go to such a function in chunks that take a fraction of that time.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace

import gradio as gr
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from core.errors import LayerShapError
from core.evaluation import Evaluator
from core.masks import Masks
from core.models import LayeredModel
from core.players import PlayerKind

DEVICE = "cuda"
# What a call asks for, and what a chunk is meant to take of it: the rest is for moving the model
# to the GPU, and for masks that share less work than those that were timed before.
LIMIT_SECONDS, CHUNK_SECONDS = 60, 15

Measured = tuple[list[tuple[int, float]], float]


class ZeroGpuEvaluator:
    """Mean negative log-likelihood of masks, like `core.evaluation.Evaluator`, on a lent GPU.

    Args:
        model: the language model, on the CPU.
        tokens: LongTensor [blocks, length].
        players: what a column of a mask stands for.
    """

    def __init__(
        self, model: LayeredModel, tokens: Tensor, *, players: PlayerKind = "blocks"
    ) -> None:
        self.model, self.tokens, self.players = model, tokens, players
        self._measure = _lent(weakref.ref(self))
        self._seconds: float | None = None

    @property
    def device(self) -> str:
        return DEVICE

    def of_whole_layers(self) -> ZeroGpuEvaluator:
        """The evaluator of the same model and text whose players are whole blocks."""
        return ZeroGpuEvaluator(self.model, self.tokens)

    def losses(self, masks: Masks) -> Iterator[tuple[int, float]]:
        """Evaluate masks, bool [m, players]; yield (row of `masks`, mean NLL) chunk by chunk.

        Raises:
            LayerShapError: no GPU was lent, or one mask does not fit in its memory.
        """
        order = np.lexsort(masks.T[::-1])[::-1]
        while len(order):
            runs = _runs(masks[order])
            part, order = np.split(order, [self._fitting(runs)])
            losses, seconds = self._on_gpu(masks[part])
            self._seconds = seconds / runs[: len(part)].sum()
            for offset, loss in losses:
                yield int(part[offset]), loss

    def hidden_states(self) -> list[Tensor]:
        """As `Evaluator.hidden_states`, on the CPU: one forward pass is not worth a GPU's call."""
        return Evaluator(self.model, self.tokens, players=self.players).hidden_states()

    def _fitting(self, runs: NDArray[np.int_]) -> int:
        """How many masks make the next chunk; one, while none has been timed."""
        if self._seconds is None:
            return 1
        return max(1, int(np.searchsorted(np.cumsum(runs) * self._seconds, CHUNK_SECONDS)))

    def _on_gpu(self, masks: Masks) -> Measured:
        try:
            measured = self._measure(masks)
        except gr.Error as error:
            raise LayerShapError(
                f"ZeroGPU lent no GPU ({error.message}); what was measured is kept, so try again "
                "later to go on from there."
            ) from error
        if isinstance(measured, str):
            raise LayerShapError(measured)
        return measured


def _runs(masks: Masks) -> NDArray[np.int_]:
    """What each mask costs at most, in runs of a player: those it keeps, and the head."""
    return masks.sum(axis=1) + 1


def announce() -> None:
    """Tell ZeroGPU, before the page starts, that this Space uses it.

    A Space that has decorated nothing by then is stopped, and evaluators are made later.
    """
    import spaces

    spaces.GPU(_nothing, duration=1)


def _nothing() -> None:
    """Stands for the evaluators to come; never called."""


def _lent(evaluator: weakref.ref[ZeroGpuEvaluator]) -> Callable[[Masks], Measured | str]:
    """The function that measures masks where the GPU is: losses and seconds, or what went wrong.

    Each evaluator has its own: a forked process serves one function as long as it lives, and knows
    the models that were loaded before it was forked. `spaces` keeps decorated functions for good,
    hence the weak reference.
    """
    import spaces

    there: list[Evaluator] = []

    @spaces.GPU(duration=LIMIT_SECONDS)
    def measure(masks: Masks) -> Measured | str:
        try:
            if not there:
                there.append(_moved(evaluator()))
            started = time.perf_counter()
            return list(there[0].losses(masks)), time.perf_counter() - started
        except LayerShapError as error:
            # Of an exception raised here `spaces` tells the caller the class only.
            return str(error)

    return measure


def _moved(here: ZeroGpuEvaluator | None) -> Evaluator:
    """The evaluator on the GPU; the model moves in the forked process only."""
    assert here is not None
    # A fresh copy of the dataclass forgets the parts that were made for the CPU.
    model = replace(here.model, module=here.model.module.to(DEVICE))
    return Evaluator(model, here.tokens, players=here.players)
