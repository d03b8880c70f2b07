"""Evaluations spread over worker processes: the same numbers, whatever becomes of the workers."""

import json
import os
import signal
import sys
from dataclasses import replace
from multiprocessing import resource_tracker

import numpy as np
import psutil
import pytest
import torch

from core.__main__ import main
from core.analysis import analyze
from core.cache import EvaluationCache
from core.errors import LayerShapError
from core.evaluation import Evaluator, prefix_order
from core.game import LayerGame
from core.loading import load_model
from core.masks import all_masks, sample_masks
from core.models import describe, fingerprint
from core.workers import start_workers
from core.workers.launch import _Specification
from core.workers.local import LocalCrew, gpus_of_workers
from core.workers.pool import RESTARTS, WorkerPool, _Queue
from core.workers.protocol import Recipe
from core.workers.worker import Worker

N = 8
TOKENS = torch.randint(0, 60, (3, 24), generator=torch.Generator().manual_seed(0))
MASKS = all_masks(N)[1:]


@pytest.fixture(scope="module")
def model(tiny_folder):
    return load_model(str(tiny_folder), device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def truth(model):
    """Every mask's loss in one process."""
    return dict(Evaluator(model, TOKENS).losses(MASKS))


@pytest.fixture(scope="module")
def pool(model):
    with start_workers("local:2", model, "cpu") as workers:
        yield workers


def recipe_of(model):
    return Recipe(
        model.info.source, None, "float32", "cpu", fingerprint(model.module, buffers=False), 1, 0.5
    )


def processes(pool):
    return [psutil.Process(pid) for pid in pool._crew.pids.values()]


def test_losses_are_those_of_one_process_to_the_bit(pool, model, truth):
    assert len(processes(pool)) == 2
    assert dict(pool.evaluator(model, TOKENS).losses(MASKS)) == truth


def test_parts_of_layers_and_another_text_are_evaluated_by_the_same_workers(pool, model):
    other = TOKENS.flip(0)[:2, :16]
    masks = sample_masks(2 * N, (15, 12, 9), 24, seed=0)
    expected = dict(Evaluator(model, other, players="sub-blocks").losses(masks))
    assert dict(pool.evaluator(model, other, "sub-blocks").losses(masks)) == expected


def test_an_analysis_is_the_same_and_its_progress_counts_every_evaluation(pool, model, tmp_path):
    counted = []
    spread = LayerGame(
        model, TOKENS, EvaluationCache(tmp_path / "a"), evaluator=pool.evaluator(model, TOKENS)
    )
    result = analyze(
        spread, evaluations=60, on_progress=lambda p: counted.append((p.stage, p.done))
    )
    alone = analyze(LayerGame(model, TOKENS, EvaluationCache(tmp_path / "b")), evaluations=60)
    assert [done for stage, done in counted if stage == "Measuring layer masks"] == list(
        range(1, 61)
    )
    assert (result.losses == alone.losses).all()
    assert (result.contributions == alone.contributions).all()
    # What workers measured is in the one cache, under the keys that one process looks for.
    again = LayerGame(model, TOKENS, EvaluationCache(tmp_path / "a"))
    assert len(again.cache) == 61
    again.evaluator.losses = lambda masks: pytest.fail("measured again")
    assert (again.losses(result.masks) == result.losses).all()


def test_ending_early_frees_the_workers_for_the_next_measurement(pool, model, truth):
    evaluator = pool.evaluator(model, TOKENS)
    measuring = evaluator.losses(MASKS)
    seen = [next(measuring) for _ in range(3)]
    assert all(truth[row] == loss for row, loss in seen)
    with pytest.raises(LayerShapError, match="busy with another measurement"):
        next(evaluator.losses(MASKS))
    measuring.close()
    assert dict(evaluator.losses(MASKS[:40])) == {row: truth[row] for row in range(40)}


def test_a_worker_killed_in_mid_run_is_replaced_and_nothing_is_missing(pool, model, truth):
    before = dict(pool._crew.pids)
    rows, killed = [], None
    for row, loss in pool.evaluator(model, TOKENS).losses(MASKS):
        assert truth[row] == loss
        rows.append(row)
        if killed is None and len(rows) == 20:
            killed = busy_worker(pool)
            os.kill(before[killed], signal.SIGKILL)
    assert sorted(rows) == list(range(len(MASKS)))
    assert pool._crew.pids[killed] != before[killed]


def busy_worker(pool):
    """One that has been given masks and has not reported them all."""
    return min({0, 1} - pool._idle)


def test_a_worker_that_stays_dead_leaves_its_share_and_closing_in_mid_run_no_process(model, truth):
    """The second worker can never load its model."""

    class HalfDead(LocalCrew):
        def start(self, worker):
            super().start(worker)
            if worker == 1:
                os.kill(self.pids[1], signal.SIGKILL)

    with WorkerPool(model, HalfDead(recipe_of(model), 2, [])) as pool:
        assert dict(pool.evaluator(model, TOKENS).losses(MASKS)) == truth
        [left] = processes(pool)
        measuring = pool.evaluator(model, TOKENS).losses(MASKS)
        next(measuring)
    assert not left.is_running()


def test_when_all_workers_are_lost_one_sentence_says_so(model):
    starts = []

    class Doomed(LocalCrew):
        def start(self, worker):
            starts.append(worker)
            super().start(worker)
            os.kill(self.pids[worker], signal.SIGKILL)

    with WorkerPool(model, Doomed(recipe_of(model), 2, [])) as pool:
        with pytest.raises(LayerShapError, match=r"All workers were lost.*killed by signal 9"):
            dict(pool.evaluator(model, TOKENS).losses(MASKS))
        assert sorted(starts) == [0] * (RESTARTS + 1) + [1] * (RESTARTS + 1)
        with pytest.raises(LayerShapError, match="start new ones"):
            dict(pool.evaluator(model, TOKENS).losses(MASKS))


def test_an_error_in_a_worker_reaches_the_user_and_ends_the_workers(model):
    with WorkerPool(model, LocalCrew(recipe_of(model), 1, [])) as pool:
        started = processes(pool)
        with pytest.raises(LayerShapError, match=r"A worker could not go on .*what was measured"):
            dict(pool.evaluator(model, TOKENS + 10_000).losses(MASKS))
    assert not any(process.is_running() for process in started)


def test_other_weights_than_were_meant_are_refused(model):
    with pytest.raises(LayerShapError, match="found other weights"):
        Worker(replace(recipe_of(model), weights="0" * 32, threads=None))


def test_a_worker_ends_by_itself_when_the_other_end_of_its_pipe_is_gone(model):
    """As it is when the process that started it is killed."""
    with WorkerPool(model, LocalCrew(recipe_of(model), 1, [])) as pool:
        measuring = pool.evaluator(model, TOKENS).losses(MASKS)
        next(measuring)
        process, ours = pool._crew._running[0]
        ours.close()
        process.join(60)
        assert process.exitcode == 0


def test_a_model_that_is_only_in_memory_is_refused(tiny_llama):
    with pytest.raises(LayerShapError, match="exists only in memory"):
        start_workers("local:2", describe(tiny_llama()), "cpu")


def test_workers_of_another_model_are_refused(pool, tiny_llama):
    with pytest.raises(LayerShapError, match="hold another model"):
        pool.evaluator(describe(tiny_llama(N, seed=1)), TOKENS)


@pytest.mark.parametrize(("masks", "workers"), [(1, 3), (5, 8), (16, 4), (255, 2), (4000, 7)])
def test_chunks_hold_every_mask_once_in_order_and_share_the_end(masks, workers):
    order = np.random.default_rng(0).permutation(masks)
    queue = _Queue(order, workers, 64)
    chunks = []
    while queue:
        chunks.append(queue.take())
    assert [row for chunk in chunks for row in chunk] == order.tolist()
    assert max(map(len, chunks)) <= 64
    assert len(chunks) >= min(masks, workers)
    assert len(chunks[-1]) <= 4


def test_chunks_keep_most_of_the_sharing():
    """Distinct (prefix, kept layer) pairs over chunks, against those of one walk over all."""
    masks = sample_masks(30, (28, 26, 24, 22, 20, 18), 512, seed=0)

    def executions(rows):
        return len({tuple(m[: i + 1]) for m in masks[rows] for i in range(30) if m[i]})

    queue = _Queue(prefix_order(masks), 4, 64)
    spread = 0
    while queue:
        spread += executions(queue.take())
    assert executions(np.arange(512)) <= spread <= 1.15 * executions(np.arange(512))


@pytest.mark.parametrize(
    ("count", "visible", "expected"),
    [
        (None, "", ["0", "1", "2", "3"]),
        (2, "", ["0,1", "2,3"]),
        (3, "", ["0", "1", "2,3"]),
        (6, "", ["0", "1", "2", "3", "0", "1"]),
        (2, "4,5,6,7", ["4,5", "6,7"]),
    ],
)
def test_gpus_are_shared_out(monkeypatch, count, visible, expected):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert gpus_of_workers(count) == expected


@pytest.mark.parametrize(
    ("text", "ray", "count", "address", "cpus", "gpus"),
    [
        ("local", False, None, "", None, None),
        ("local:auto", False, None, "", None, None),
        ("local:4", False, 4, "", None, None),
        ("ray", True, None, "", None, None),
        ("ray://auto", True, None, "auto", None, None),
        ("ray://head.lan:10001?gpus=2&cpus=8", True, None, "head.lan:10001", 8, 2),
    ],
)
def test_workers_are_named_by_a_short_text(text, ray, count, address, cpus, gpus):
    assert _Specification.parse(text) == _Specification(ray, count, address, cpus, gpus)


@pytest.mark.parametrize("text", ["", "4", "local:0", "local:-1", "ray:2", "ray://", "dask://a:1"])
def test_other_texts_are_refused(text, model):
    with pytest.raises(LayerShapError, match="write local, local:4, ray"):
        start_workers(text, model)


def test_the_command_line_spreads_an_analysis(tiny_folder, isolated_cache, tmp_path):
    words = tmp_path / "text.txt"
    rng = np.random.default_rng(0)
    words.write_text(" ".join(f"w{number}" for number in rng.integers(0, 60, 4000)))
    arguments = ["analyze", "--model", str(tiny_folder), "--device", "cpu", "--text", str(words)]
    arguments += ["--block-length", "32", "--evaluations", "24"]
    spread, alone = tmp_path / "spread.json", tmp_path / "alone.json"
    before = psutil.Process().children(recursive=True)
    assert main([*arguments, "--out", str(spread), "--workers", "local"]) == 0
    assert set(psutil.Process().children(recursive=True)) <= {*before, tracker()}
    assert main([*arguments, "--out", str(alone)]) == 0
    studies = [json.loads(file.read_text()) for file in (spread, alone)]
    assert studies[0]["measurements"] == studies[1]["measurements"]
    assert studies[0]["model"] == {**studies[1]["model"], "device": "1 x cpu"}


def tracker():
    """The process by which Python itself watches over what spawned ones share."""
    return psutil.Process(resource_tracker._resource_tracker._pid)


def test_ray_actors_do_the_same_and_one_may_be_killed(model, truth):
    ray = pytest.importorskip("ray")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=80 << 20)
    try:
        with start_workers("ray?cpus=1", model, "cpu") as pool:
            assert (pool.size, pool.device) == (2, "cpu")
            actors = pool._crew.actors
            pids = {
                worker: ray.get(actor.__ray_call__.remote(lambda _: os.getpid()))
                for worker, actor in actors.items()
            }
            rows = []
            for row, loss in pool.evaluator(model, TOKENS).losses(MASKS):
                assert truth[row] == loss
                rows.append(row)
                if len(rows) == 20:
                    os.kill(pids[busy_worker(pool)], signal.SIGKILL)
            assert sorted(rows) == list(range(len(MASKS)))
            with pytest.raises(LayerShapError, match="A worker could not go on"):
                dict(pool.evaluator(model, TOKENS + 10_000).losses(MASKS))
    finally:
        ray.shutdown()


def test_without_ray_one_sentence_says_what_to_install(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(LayerShapError, match="pip install 'ray"):
        start_workers("ray://nowhere:10001", model)
