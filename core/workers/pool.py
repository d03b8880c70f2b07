"""Spread evaluations over workers: chunks of sorted masks, handed out as workers become idle.

Chunks are runs of neighbours in the order that shares most prefixes; they start large and become
small, so that most sharing stays and all workers end together (guided self-scheduling). What a
lost worker had not reported goes back into the queue. Only this process writes the cache.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import count

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from core.errors import LayerShapError
from core.evaluation import Evaluator, prefix_order
from core.masks import Masks
from core.models import LayeredModel
from core.players import PlayerKind
from core.workers.protocol import Crew, Failed, Idle, Lost, Measured, Report, Task

# Fewer masks in a task share too little, where there are enough for everyone.
SMALLEST_TASK = 4
# How often a worker is started again without having measured anything in between.
RESTARTS = 2


class WorkerPool:
    """Workers that hold copies of one model, for any number of texts; a context manager.

    Args:
        model: the model, as this process has it.
        crew: its workers; they are started here.
    """

    def __init__(self, model: LayeredModel, crew: Crew) -> None:
        self.model = model
        self._crew = crew
        self._in_use = threading.Lock()
        self._serials = count()
        self._inbox: deque[Report] = deque()
        self._idle: set[int] = set()
        self._starts = dict.fromkeys(range(crew.size), 0)
        self._closed = False
        for worker in range(crew.size):
            crew.start(worker)

    @property
    def device(self) -> str:
        """What the workers evaluate on: "cpu", "cuda" or "mps"."""
        return self._crew.device

    @property
    def size(self) -> int:
        return self._crew.size

    def evaluator(
        self, model: LayeredModel, tokens: Tensor, players: PlayerKind = "blocks"
    ) -> PoolEvaluator:
        """An evaluator on token blocks, LongTensor [blocks, length], that asks these workers.

        Raises:
            LayerShapError: they hold another model.
        """
        if model.info.fingerprint != self.model.info.fingerprint:
            raise LayerShapError(
                "These workers hold another model; start workers with the model of the game."
            )
        return PoolEvaluator(self, tokens, players)

    def losses(
        self, tokens: NDArray[np.int64], players: PlayerKind, masks: Masks
    ) -> Iterator[tuple[int, float]]:
        """Yield (row of `masks`, mean NLL) as workers report them; ending early stops the workers.

        Raises:
            LayerShapError: a worker met an error, all were lost, or they are in use or closed.
        """
        if not self._in_use.acquire(blocking=False):
            raise LayerShapError(
                "These workers are busy with another measurement; wait until it has ended."
            )
        try:
            if self._closed:
                raise LayerShapError("These workers have ended; start new ones.")
            yield from self._losses(tokens, players, masks)
        finally:
            self._in_use.release()

    def close(self) -> None:
        """End every worker; may be called twice."""
        self._closed = True
        self._crew.close()

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _losses(
        self, tokens: NDArray[np.int64], players: PlayerKind, masks: Masks
    ) -> Iterator[tuple[int, float]]:
        serial = next(self._serials)
        queue = _Queue(prefix_order(masks), self.size, self._crew.largest_task)
        # Of each worker's task, the rows that it has not reported, by their place in the task.
        out: dict[int, dict[int, int]] = {}
        left = len(masks)
        try:
            while left:
                while queue and self._idle:
                    worker = self._idle.pop()
                    rows = queue.take()
                    out[worker] = dict(enumerate(rows))
                    self._crew.submit(worker, Task(serial, tokens, players, masks[rows]))
                if not self._inbox:
                    self._inbox.extend(self._crew.reports())
                report = self._inbox.popleft()
                match report:
                    case Measured():
                        if report.serial == serial:
                            row = out[report.worker].pop(report.offset)
                            self._starts[report.worker] = 0
                            left -= 1
                            yield row, report.loss
                    case Idle():
                        self._idle.add(report.worker)
                    case Lost():
                        queue.put_back(out.pop(report.worker, {}).values())
                        self._replace(report)
                    case Failed():
                        self.close()
                        raise LayerShapError(report.message)
        finally:
            for worker, rows in out.items():
                if rows and not self._closed:
                    self._crew.cancel(worker)

    def _replace(self, lost: Lost) -> None:
        self._idle.discard(lost.worker)
        self._starts[lost.worker] += 1
        if self._starts[lost.worker] <= RESTARTS:
            self._crew.start(lost.worker)
        elif all(starts > RESTARTS for starts in self._starts.values()):
            self.close()
            raise LayerShapError(
                f"All workers were lost, the last one {lost.reason}; what was measured is kept. "
                "If memory ran out, try fewer workers, a smaller dtype or shorter blocks."
            )


class PoolEvaluator:
    """What a game asks for losses, answered by a pool of workers."""

    def __init__(self, pool: WorkerPool, tokens: Tensor, players: PlayerKind) -> None:
        self._pool = pool
        self._tokens = tokens
        self._players = players

    @property
    def device(self) -> str:
        return self._pool.device

    def of_whole_layers(self) -> PoolEvaluator:
        """See `Evaluator.of_whole_layers`."""
        return PoolEvaluator(self._pool, self._tokens, "blocks")

    def losses(self, masks: Masks) -> Iterator[tuple[int, float]]:
        """See `Evaluator.losses`."""
        tokens = np.ascontiguousarray(self._tokens.cpu().numpy(), dtype=np.int64)
        return self._pool.losses(tokens, self._players, masks)

    def hidden_states(self) -> list[Tensor]:
        """See `Evaluator.hidden_states`; one pass, made by this process itself."""
        return Evaluator(self._pool.model, self._tokens, players=self._players).hidden_states()


class _Queue:
    """Rows of masks that no worker has, in an order to be kept."""

    def __init__(self, order: NDArray[np.intp], workers: int, largest: int) -> None:
        self._rows = order.tolist()
        self._workers = workers
        self._largest = largest
        # Where there are few masks, every worker gets some.
        self._smallest = min(SMALLEST_TASK, -(-len(order) // workers))

    def __bool__(self) -> bool:
        return bool(self._rows)

    def take(self) -> list[int]:
        """The next chunk: half of an even share of what is left, within bounds."""
        share = -(-len(self._rows) // (2 * self._workers))
        size = min(self._largest, max(self._smallest, share))
        taken, self._rows = self._rows[:size], self._rows[size:]
        return taken

    def put_back(self, rows: Iterable[int]) -> None:
        self._rows = [*rows, *self._rows]
