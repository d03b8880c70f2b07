"""What passes between the pool, which hands out masks, and workers, which evaluate them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from numpy.typing import NDArray

from core.masks import Masks
from core.players import PlayerKind


@dataclass(frozen=True)
class Recipe:
    """How a worker loads its own copy of the model.

    Attributes:
        source, revision, dtype: as for `load_model`.
        device: "cpu", "cuda" or "mps"; of several GPUs a worker sees only its own.
        weights: fingerprint of the parameters that it must find there.
        threads: CPU threads for arithmetic, None for as many as PyTorch takes by itself.
        memory_share: how much of its device's free memory it may reckon with.
    """

    source: str
    revision: str | None
    dtype: str
    device: str
    weights: str
    threads: int | None = None
    memory_share: float = 1.0


@dataclass(frozen=True)
class Task:
    """A chunk of masks to evaluate on a text; small enough to carry the text along.

    Attributes:
        serial: which call to the pool it belongs to; measurements repeat it.
        tokens: int64 [blocks, length].
        players: what the columns of the masks stand for.
        masks: bool [m, players].
    """

    serial: int
    tokens: NDArray
    players: PlayerKind
    masks: Masks


@dataclass(frozen=True)
class Measured:
    """A worker evaluated row `offset` of the masks of its task."""

    worker: int
    serial: int
    offset: int
    loss: float


@dataclass(frozen=True)
class Idle:
    """A worker has loaded its model, or ended a task, and waits for the next."""

    worker: int


@dataclass(frozen=True)
class Failed:
    """A worker met an error that would come again; `message` is a sentence for the user."""

    worker: int
    message: str


@dataclass(frozen=True)
class Lost:
    """A worker is gone, and with it what it had not reported."""

    worker: int
    reason: str


Report = Measured | Idle | Failed | Lost


class Crew(Protocol):
    """Workers of one kind, numbered from 0.

    Attributes:
        size: how many there are.
        device: what they evaluate on, "cpu", "cuda" or "mps".
        largest_task: masks in one task at most.
    """

    size: int
    device: str
    largest_task: int

    def start(self, worker: int) -> None:
        """Start a worker, or another in the place of one that was lost."""
        ...

    def submit(self, worker: int, task: Task) -> None:
        """Give an idle worker a task."""
        ...

    def cancel(self, worker: int) -> None:
        """Ask a worker to end its task early."""
        ...

    def reports(self) -> Sequence[Report]:
        """Wait until there is something to report."""
        ...

    def close(self) -> None:
        """End every worker; may be called twice."""
        ...
