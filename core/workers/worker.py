"""A worker: one copy of the model in a process of its own, evaluating the masks it is given."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import torch

from core.allocator import keep_freed_memory
from core.errors import LayerShapError, first_line
from core.evaluation import Evaluator
from core.models import fingerprint
from core.players import PlayerKind
from core.saving import load_pruned
from core.workers.protocol import Recipe, Task

# Texts whose evaluators, with what they know of the text, a worker keeps.
KEPT_TEXTS = 4


class Worker:
    """Loads a model by its recipe and evaluates tasks.

    Raises:
        LayerShapError: the model cannot be loaded here, or is not the one that was meant.
    """

    def __init__(self, recipe: Recipe) -> None:
        keep_freed_memory()
        if recipe.threads:
            torch.set_num_threads(recipe.threads)
        self._model = load_pruned(
            recipe.source, revision=recipe.revision, device=recipe.device, dtype=recipe.dtype
        )
        if fingerprint(self._model.module, buffers=False) != recipe.weights:
            raise LayerShapError(
                f"A worker found other weights at {recipe.source} than this process did; make "
                "sure that the same files are there on every machine, or name a revision."
            )
        self._memory_share = recipe.memory_share
        self._evaluator = lru_cache(KEPT_TEXTS)(self._make_evaluator)

    def losses(self, task: Task) -> Iterator[tuple[int, float]]:
        """Yield (row of the task's masks, mean NLL), as `Evaluator.losses` does."""
        evaluator = self._evaluator(task.tokens.tobytes(), task.tokens.shape[1], task.players)
        return evaluator.losses(task.masks)

    def _make_evaluator(self, tokens: bytes, length: int, players: PlayerKind) -> Evaluator:
        ids = torch.frombuffer(bytearray(tokens), dtype=torch.int64).view(-1, length)
        return Evaluator(self._model, ids, players=players, memory_share=self._memory_share)


def sentence(error: Exception) -> str:
    """What the user is told of an error in a worker."""
    if isinstance(error, LayerShapError):
        return str(error)
    return (
        f"A worker could not go on ({type(error).__name__}: {first_line(error)}); what was "
        "measured is kept. Try fewer workers, or none, to see whether the model runs at all."
    )
