"""Workers on this machine: one process per GPU, or several that share the CPU's cores."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess

import torch

from core.workers.protocol import Failed, Idle, Lost, Measured, Recipe, Report, Task
from core.workers.worker import Worker, sentence

# A worker that was told to end and has not after so many seconds is killed.
PATIENCE_SECONDS = 5.0
CANCEL = None


class LocalCrew:
    """Processes that talk through pipes; a pipe that closes tells each side that the other is gone.

    Args:
        recipe: of the model that each loads.
        size: how many.
        gpus: of each worker, the GPUs it may use as `CUDA_VISIBLE_DEVICES` names them; empty where
            it uses none.
    """

    largest_task = 64

    def __init__(self, recipe: Recipe, size: int, gpus: Sequence[str]) -> None:
        self.size = size
        self.device = recipe.device
        self._recipe = recipe
        self._gpus = gpus
        self._context = multiprocessing.get_context("spawn")
        self._running: dict[int, tuple[SpawnProcess, Connection]] = {}

    @property
    def pids(self) -> dict[int, int]:
        """The process of each worker."""
        return {worker: process.pid for worker, (process, _) in self._running.items()}

    def start(self, worker: int) -> None:
        ours, theirs = self._context.Pipe()
        gpus = self._gpus[worker] if self._gpus else None
        process = self._context.Process(
            target=serve, args=(theirs, worker, self._recipe, gpus), daemon=True
        )
        process.start()
        theirs.close()
        self._running[worker] = process, ours

    def submit(self, worker: int, task: Task) -> None:
        self._send(worker, task)

    def cancel(self, worker: int) -> None:
        self._send(worker, CANCEL)

    def reports(self) -> list[Report]:
        workers = {ours: worker for worker, (_, ours) in self._running.items()}
        reports: list[Report] = []
        for ours in wait(list(workers)):
            try:
                reports.append(ours.recv())
            except (EOFError, OSError):
                reports.append(self._bury(workers[ours]))
        return reports

    def close(self) -> None:
        for process, ours in self._running.values():
            ours.close()
            process.terminate()
        for process, _ in self._running.values():
            _end(process)
        self._running.clear()

    def _send(self, worker: int, message: Task | None) -> None:
        # Where it is gone, its pipe reports that.
        with suppress(OSError):
            self._running[worker][1].send(message)

    def _bury(self, worker: int) -> Lost:
        process, ours = self._running.pop(worker)
        ours.close()
        _end(process)
        code = process.exitcode
        ended = f"killed by signal {-code}" if code and code < 0 else f"with exit status {code}"
        return Lost(worker, ended)


def _end(process: SpawnProcess) -> None:
    process.join(PATIENCE_SECONDS)
    if process.is_alive():
        process.kill()
        process.join()


def serve(theirs: Connection, worker: int, recipe: Recipe, gpus: str | None) -> None:
    """A worker's whole life: load, then tasks until the pipe closes."""
    # Ctrl-C goes to every process of a terminal; the one that started this one ends it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if gpus is not None:
        # Read when CUDA starts, which nothing before this does.
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus
    try:
        loaded = Worker(recipe)
        theirs.send(Idle(worker))
        while True:
            task = theirs.recv()
            if task is CANCEL:
                continue  # It came when the task had ended.
            for offset, loss in loaded.losses(task):
                theirs.send(Measured(worker, task.serial, offset, loss))
                if theirs.poll():
                    break  # A cancellation, or the end of the pipe.
            theirs.send(Idle(worker))
    except (EOFError, ConnectionError):
        return
    except Exception as error:
        theirs.send(Failed(worker, sentence(error)))


def gpus_of_workers(size: int | None) -> list[str]:
    """This machine's GPUs, shared out: one string for each worker, as `CUDA_VISIBLE_DEVICES` wants.

    With fewer workers than GPUs each gets several; with more, GPUs have several workers.
    """
    total = torch.cuda.device_count()
    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    gpus = named[:total] or [str(index) for index in range(total)]
    size = size or total
    if size >= total:
        return [gpus[worker % total] for worker in range(size)]
    ends = [worker * total // size for worker in range(size + 1)]
    return [",".join(gpus[ends[worker] : ends[worker + 1]]) for worker in range(size)]
