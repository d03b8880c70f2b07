"""Zero-shot accuracy of the full and the pruned model, through lm-evaluation-harness.

Both models stay in memory and answer the same questions, so their difference has the standard
error of paired answers. `lm-eval` is optional and imported only when accuracy is asked for.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from core.errors import LayerShapError, first_line
from core.models import LayeredModel
from core.pruning import prune

if TYPE_CHECKING:
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager

# Tasks offered by name: lm-eval's name, and how the task is known.
OFFERED = {
    "piqa": "PIQA",
    "hellaswag": "HellaSwag",
    "winogrande": "WinoGrande",
    "arc_easy": "ARC-easy",
    "arc_challenge": "ARC-challenge",
    "boolq": "BoolQ",
    "openbookqa": "OpenBookQA",
}
# Where lm-eval keeps them: reading these folders takes a moment, reading all of its files half a
# minute.
OFFERED_FOLDERS = ("piqa", "hellaswag", "winogrande", "arc", "super_glue/boolq", "openbookqa")
# Length-normalised accuracy first, as published tables give it where a task has it.
METRICS = ("acc_norm", "acc")
DEFAULT_QUESTIONS = 100
INSTALL = (
    "Zero-shot accuracy needs the lm-eval library: run `pip install lm-eval`, then start again."
)
# Answers of this many models and tasks are remembered, so that a full model is asked once.
REMEMBERED = 256
# Rows scored at once: few where the processor computes, and on a GPU as many as their logits, at
# this length, leave seven eighths of its memory to the rest.
SMALL_BATCH, LARGE_BATCH = 8, 64
ROW_TOKENS, BYTES_PER_LOGIT, GPU_SHARE = 512, 8, 8


@dataclass(frozen=True)
class TaskAccuracy:
    """One task's accuracy, full and pruned, as shares of its questions with standard errors.

    Attributes:
        task: lm-eval's name of the task.
        metric: "acc_norm" where the task has it (the choice likeliest per character), else "acc".
        change_error: standard error of the paired difference, pruned minus full.
        questions: how many both models answered.
        chance: the accuracy of guessing; None where the task does not list its choices.
    """

    task: str
    metric: str
    full: float
    full_error: float
    pruned: float
    pruned_error: float
    change_error: float
    questions: int
    chance: float | None = None

    @property
    def change(self) -> float:
        """Pruned minus full."""
        return self.pruned - self.full

    @property
    def label(self) -> str:
        """The task's name as it is known."""
        return OFFERED.get(self.task, self.task)


@dataclass(frozen=True)
class AccuracyProgress:
    """Where a comparison is.

    Attributes:
        stage: what is being done; "Done" or "Stopped" at the end.
        done, total: questions answered, each model's counted; total is 0 until they are known.
        results: the tasks that are finished.
    """

    stage: str
    done: int = 0
    total: int = 0
    seconds_left: float | None = None
    results: tuple[TaskAccuracy, ...] = ()


@dataclass(frozen=True)
class Answers:
    """How one model did on one task: float [questions], 1 where it was right."""

    metric: str
    scores: NDArray[np.float64]
    chance: float | None


def installed() -> bool:
    """Whether the optional library is there."""
    return find_spec("lm_eval") is not None


def parse_tasks(text: str) -> tuple[str, ...]:
    """Task names separated by commas or spaces."""
    return tuple(text.replace(",", " ").split())


def compare_accuracy(
    model: LayeredModel,
    keep: ArrayLike,
    tasks: Sequence[str],
    *,
    limit: int | None = DEFAULT_QUESTIONS,
    tasks_folder: str | Path | None = None,
    seed: int = 0,
    stop: Callable[[], bool] | None = None,
) -> Iterator[AccuracyProgress]:
    """Ask the full and the pruned model the same questions, without examples in the prompt.

    Yields as answers are scored. After a stop the last yield holds the tasks finished so far.

    Args:
        keep: bool [n_layers], True = kept.
        tasks: lm-eval names of tasks or groups of tasks; a group counts as all of its tasks.
        limit: ask the first so many questions of each task; None asks all.
        tasks_folder: a folder with more task files (YAML). They can name Python functions, which
            are run, so it must be one that the user trusts.
        seed: for tasks that shuffle; the same seed asks the same questions.

    Raises:
        LayerShapError: lm-eval is not installed, a task is unknown, has no accuracy or cannot be
            fetched, or this cut cannot be made a model of its own.

    Source: EleutherAI's lm-evaluation-harness, https://github.com/EleutherAI/lm-evaluation-harness
    """
    stopped = stop or (lambda: False)
    _check(model, tasks, limit, tasks_folder)
    pruned = prune(model, keep)
    yield AccuracyProgress("Preparing the tasks")
    own = _own_tasks(tasks_folder) if tasks_folder else None
    managers = {name: _manager_of(name, own) for name in tasks}
    ready: dict[str, Task] = {}
    for name, manager in managers.items():
        yield AccuracyProgress(f"Reading the questions of {OFFERED.get(name, name)}")
        ready.update(_load(manager, name, seed))
        if stopped():
            yield AccuracyProgress("Stopped")
            return
    counts = {name: _questions(task, limit) for name, task in ready.items()}
    state = AccuracyProgress("", total=2 * sum(counts.values()))
    pace, before = _Pace(), 0
    for name, task in ready.items():
        pair = []
        for side, which in ((model, "full"), (pruned, "pruned")):
            stage = f"{OFFERED.get(name, name)}, {which} model"
            # The user's own files may change between two runs; lm-eval's do not.
            key = None if tasks_folder else (side.info.fingerprint, name, limit, seed)
            answers = _memory.get(key)
            if answers is None:
                pace.start()
                scoring = _score(side, name, task, limit, seed, stopped)
                while True:
                    try:
                        share = next(scoring)
                    except StopIteration as end:
                        answers = end.value
                        break
                    done = before + int(share * counts[name])
                    left = pace.left(done - before, state.total - done)
                    yield replace(state, stage=stage, done=done, seconds_left=left)
                if answers is None:
                    yield replace(state, stage="Stopped")
                    return
                pace.finish(counts[name])
                _memory.put(key, answers)
            pair.append(answers)
            before += counts[name]
            state = replace(state, stage=stage, done=before)
        state = replace(state, results=(*state.results, _compared(name, *pair)))
        yield replace(state, seconds_left=pace.left(0, state.total - before))
    yield replace(state, stage="Done", seconds_left=0.0)


class _Pace:
    """Time left, from the questions that were really asked: batches come in bursts, so only the
    mean over many says something."""

    def __init__(self) -> None:
        self._seconds, self._asked, self._started = 0.0, 0, 0.0

    def start(self) -> None:
        self._started = time.monotonic()

    def finish(self, asked: int) -> None:
        self._seconds += time.monotonic() - self._started
        self._asked += asked

    def left(self, asked: int, remaining: int) -> float | None:
        """Seconds for `remaining` questions, `asked` of the current ones being answered."""
        running = time.monotonic() - self._started if asked else 0.0
        known = self._asked + asked
        return remaining * (self._seconds + running) / known if known else None


class _Memory:
    """Answers given in this process, the least recently used forgotten first."""

    def __init__(self) -> None:
        self._answers: OrderedDict[tuple, Answers] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: tuple | None) -> Answers | None:
        with self._lock:
            if key not in self._answers:
                return None
            self._answers.move_to_end(key)
            return self._answers[key]

    def put(self, key: tuple | None, answers: Answers) -> None:
        if key is None:
            return
        with self._lock:
            self._answers[key] = answers
            while len(self._answers) > REMEMBERED:
                self._answers.popitem(last=False)


_memory = _Memory()


class _Stopped(Exception):
    """Scoring was told to stop."""


def _check(
    model: LayeredModel, tasks: Sequence[str], limit: int | None, folder: str | Path | None
) -> None:
    if not installed():
        raise LayerShapError(INSTALL)
    if not tasks:
        raise LayerShapError("No task chosen; choose at least one.")
    if limit is not None and limit < 1:
        raise LayerShapError(f"The number of questions is {limit}; it must be at least 1.")
    if folder is not None and not Path(folder).expanduser().is_dir():
        raise LayerShapError(f"There is no folder {folder} with task files; check the path.")
    if model.tokenizer is None:
        raise LayerShapError("This model has no tokenizer, so it cannot answer questions.")


def _own_tasks(folder: str | Path) -> TaskManager:
    """The user's own tasks by name."""
    return _manager(str(Path(folder).expanduser()), include_defaults=False)


@cache
def _offered_tasks() -> TaskManager:
    import lm_eval.tasks

    root = Path(lm_eval.tasks.__file__).parent
    return _manager(*(str(root / name) for name in OFFERED_FOLDERS), include_defaults=False)


@cache
def _all_tasks() -> TaskManager:
    return _manager(include_defaults=True)


def _manager(*folders: str, include_defaults: bool) -> TaskManager:
    # Its warnings are about options that are not used here.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=list(folders), include_defaults=include_defaults)


def _manager_of(name: str, own: TaskManager | None) -> TaskManager:
    """Where a task is found: among the user's own first, then where it takes least time."""
    for manager in (lambda: own, _offered_tasks, _all_tasks):
        found = manager()
        if found is not None and name in found.task_index:
            return found
    raise LayerShapError(
        f"lm-eval has no task {name!r}; `lm-eval ls tasks` lists all names (tasks of your own need "
        "their folder too)."
    )


def _load(manager: TaskManager, name: str, seed: int) -> dict[str, Task]:
    """A task, or all tasks of a group, with their questions, by lm-eval's names."""
    random.seed(seed)
    try:
        tasks = manager.load([name])["tasks"]
    except Exception as error:
        raise LayerShapError(
            f"The questions of {name} could not be read ({first_line(error)}); check the "
            "connection to the Hugging Face Hub or the task's own files, or leave this task out."
        ) from error
    for leaf, task in tasks.items():
        if not set(METRICS) & set(task.aggregation()):
            raise LayerShapError(
                f"{leaf} does not measure accuracy but {', '.join(task.aggregation())}; choose "
                "a task with acc or acc_norm."
            )
        task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=seed)
    return tasks


def _questions(task: Task, limit: int | None) -> int:
    count = len(task.eval_docs)
    return count if limit is None else min(limit, count)


def _score(
    model: LayeredModel,
    name: str,
    task: Task,
    limit: int | None,
    seed: int,
    stopped: Callable[[], bool],
) -> Generator[float, None, Answers | None]:
    """One model's answers to one task; yields the share that is scored, returns None if stopped."""
    from lm_eval.evaluator import evaluate

    reports: SimpleQueue[float | None] = SimpleQueue()
    abandoned = threading.Event()
    outcome: dict[str, Any] = {}

    def report(share: float) -> None:
        if abandoned.is_set() or stopped():
            raise _Stopped
        reports.put(share)

    def work() -> None:
        # Before each model, for tasks that shuffle whenever their questions are read.
        random.seed(seed)
        try:
            outcome["logged"] = evaluate(
                _wrapped(model, report),
                {"tasks": {name: task}, "groups": {}, "group_map": {}},
                limit=limit,
                bootstrap_iters=0,
                log_samples=True,
            )
        except BaseException as error:
            outcome["error"] = error
        finally:
            reports.put(None)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while (share := reports.get()) is not None:
            yield share
    finally:
        abandoned.set()
        thread.join()
    error = outcome.get("error")
    if isinstance(error, _Stopped):
        return None
    if isinstance(error, torch.OutOfMemoryError):
        raise LayerShapError(
            f"The device has too little memory left for {name}; stop other work on it, or load "
            "the model on the CPU."
        ) from error
    if error is not None:
        raise error
    return _answers(outcome["logged"]["samples"][name], task)


def _wrapped(model: LayeredModel, report: Callable[[float], None]) -> Any:
    """The module in memory as lm-eval's own model class; `report` hears the share scored."""
    from lm_eval.models.huggingface import HFLM

    class Hook:
        """lm-eval tells it of every request that is scored."""

        scored, requests = 0, 0

        def add_partial(self, *_: Any) -> None:
            self.scored += 1
            report(min(self.scored / self.requests, 1.0) if self.requests else 0.0)

    class InMemory(HFLM):
        def loglikelihood(self, requests: list, disable_tqdm: bool = True) -> list:
            self.cache_hook.requests = len(requests)
            return super().loglikelihood(requests, disable_tqdm=True)

    wrapped = InMemory(
        pretrained=model.module,
        # lm-eval gives it a padding token; others use the original.
        tokenizer=deepcopy(model.tokenizer),
        backend="causal",
        max_length=model.info.context_length,
        batch_size=_batch(model),
        trust_remote_code=False,
    )
    wrapped.set_cache_hook(Hook())
    return wrapped


def _batch(model: LayeredModel) -> int:
    """Rows scored at once, the same on the same device, so that results repeat."""
    if model.device.type != "cuda":
        return SMALL_BATCH
    vocabulary = model.module.get_input_embeddings().weight.shape[0]
    memory = torch.cuda.get_device_properties(model.device).total_memory
    rows = memory // GPU_SHARE // (ROW_TOKENS * vocabulary * BYTES_PER_LOGIT)
    return int(min(max(rows, 1), LARGE_BATCH))


def _answers(samples: list[dict[str, Any]], task: Task) -> Answers:
    """What lm-eval logged, question by question."""
    first = samples[0]
    # Some tasks read the same answers in several ways; the first is the one that counts.
    samples = [sample for sample in samples if sample["filter"] == first["filter"]]
    metric = next(metric for metric in METRICS if metric in first)
    chance = None
    if task.OUTPUT_TYPE == "multiple_choice":
        # Each choice is one request, and one more where it is also scored without its question.
        per_choice = 2 if "acc_mutual_info" in first else 1
        chance = float(np.mean([per_choice / len(sample["resps"]) for sample in samples]))
    return Answers(metric, np.array([float(s[metric]) for s in samples]), chance)


def _compared(name: str, full: Answers, pruned: Answers) -> TaskAccuracy:
    return TaskAccuracy(
        task=name,
        metric=full.metric,
        full=float(full.scores.mean()),
        full_error=_standard_error(full.scores),
        pruned=float(pruned.scores.mean()),
        pruned_error=_standard_error(pruned.scores),
        change_error=_standard_error(pruned.scores - full.scores),
        questions=len(full.scores),
        chance=full.chance,
    )


def _standard_error(values: NDArray[np.float64]) -> float:
    """Of the mean; zero where one question says nothing of the spread."""
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0
