"""Workers on a Ray cluster, or on a Ray of this machine: one actor for each worker."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import core
from core.errors import LayerShapError, first_line
from core.workers.protocol import Failed, Idle, Lost, Measured, Recipe, Report, Task
from core.workers.worker import Worker, sentence

_MISSING = (
    "Workers on a cluster need Ray, which is not installed whole; run `pip install 'ray[client]'`."
)


@dataclass(frozen=True)
class Placement:
    """What Ray sets aside for each worker, and how many of them the cluster holds."""

    device: str
    workers: int
    cpus: int
    gpus: int
    per_node: int


def connect(address: str) -> None:
    """Join a cluster: "auto" for one that runs here, "host:port", or "" for whichever Ray finds,
    its own on this machine if there is none.

    Raises:
        LayerShapError: Ray is not installed, or there is no cluster at that address.
    """
    ray = _ray()
    if ray.is_initialized():
        return
    target = f"ray://{address}" if ":" in address else address or None
    if ":" in address and find_spec("grpc") is None:
        raise LayerShapError(_MISSING)
    try:
        ray.init(
            address=target,
            log_to_driver=False,
            # The nodes need the requirements, not this program.
            runtime_env={"py_modules": [str(Path(core.__file__).parent)]},
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise LayerShapError(
            f"No Ray cluster answers at {target or 'this machine'} ({first_line(error)}); start "
            "one with `ray start --head`, or check the address, and the token if it asks for one."
        ) from error


def place(device: str, cpus: int | None, gpus: int | None) -> Placement:
    """As many workers as fit the cluster's nodes, by default one per GPU, or else one per node.

    Args:
        device: "auto", "cuda" or "cpu".
        cpus, gpus: of each worker.

    Raises:
        LayerShapError: no node has what one worker needs.
    """
    nodes = [node["Resources"] for node in _ray().nodes() if node["Alive"]]
    has_gpus = any(node.get("GPU", 0) for node in nodes)
    device = ("cuda" if has_gpus else "cpu") if device == "auto" else device
    gpus = (gpus or 1) if device == "cuda" else 0
    if cpus is None:
        cpus = 1 if gpus else int(min(n["CPU"] for n in nodes if n.get("CPU")))
    held = [
        int(min(n.get("CPU", 0) // cpus, n.get("GPU", 0) // gpus if gpus else n.get("CPU", 0)))
        for n in nodes
    ]
    if not sum(held):
        raise LayerShapError(
            f"No node of the Ray cluster has {gpus} GPUs and {cpus} CPUs for a worker; ask for "
            "fewer, such as --workers 'ray?gpus=1&cpus=1'."
        )
    return Placement(device, sum(held), cpus, gpus, max(held))


class RayCrew:
    """Actors that answer a task with all its losses at once, so tasks are small.

    Args:
        recipe: of the model that each loads.
        placement: how many, and what each may use.
    """

    largest_task = 8

    def __init__(self, recipe: Recipe, placement: Placement) -> None:
        self.size = placement.workers
        self.device = placement.device
        self._ray = _ray()
        share = 1.0 if placement.gpus else 1 / placement.per_node
        recipe = replace(recipe, memory_share=share, threads=placement.cpus)
        self._recipe = self._ray.put(recipe)
        self._remote = self._ray.remote(_Actor).options(
            num_cpus=placement.cpus, num_gpus=placement.gpus, max_restarts=0
        )
        self.actors: dict[int, Any] = {}
        self._answers: dict[Any, int] = {}
        """What each worker is asked for now: the answer to come, and whose it is."""

    def start(self, worker: int) -> None:
        self.actors[worker] = actor = self._remote.remote()
        self._answers[actor.load.remote(worker, self._recipe)] = worker

    def submit(self, worker: int, task: Task) -> None:
        self._answers[self.actors[worker].evaluate.remote(worker, task)] = worker

    def cancel(self, worker: int) -> None:
        """Nothing: what Ray runs it runs to the end, which is near."""

    def reports(self) -> list[Report]:
        ready, _ = self._ray.wait(list(self._answers), num_returns=1)
        reports: list[Report] = []
        for answer in ready:
            worker = self._answers.pop(answer)
            try:
                reports += self._ray.get(answer)
            except self._ray.exceptions.RayError as error:
                self._end(worker)
                reports.append(Lost(worker, f"because {first_line(error)}"))
        return reports

    def close(self) -> None:
        for worker in list(self.actors):
            self._end(worker)
        self._answers.clear()

    def _end(self, worker: int) -> None:
        self._ray.kill(self.actors.pop(worker))


class _Actor:
    """A worker as Ray runs it. Errors are answers: only a lost process raises at the other end."""

    def load(self, worker: int, recipe: Recipe) -> list[Report]:
        try:
            self._loaded = Worker(recipe)
        except Exception as error:
            return [Failed(worker, sentence(error))]
        return [Idle(worker)]

    def evaluate(self, worker: int, task: Task) -> list[Report]:
        return list(self._reports(worker, task))

    def _reports(self, worker: int, task: Task) -> Iterator[Report]:
        try:
            for offset, loss in self._loaded.losses(task):
                yield Measured(worker, task.serial, offset, loss)
            yield Idle(worker)
        except Exception as error:
            yield Failed(worker, sentence(error))


def _ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise LayerShapError(_MISSING) from error
    return ray
