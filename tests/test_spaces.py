"""The repository as a Hugging Face Space: its settings, its limits, and ZeroGPU."""

import os
import socket
import subprocess
import sys
import time
import types
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import gradio as gr
import httpx
import numpy as np
import pytest
import torch
from gradio_client import Client
from huggingface_hub import metadata_load
from packaging.requirements import Requirement

from conftest import TINY_LAYERS
from core import EvaluationCache, LayerGame, load_model, run
from core.analysis import AnalysisSettings
from core.bundled import cache_root
from core.errors import LayerShapError
from core.evaluation import Evaluator
from test_ui import load, said
from ui import zero_gpu
from ui.page import build
from ui.settings import AppSettings
from ui.workspace import ModelChoice, TextChoice, Workspaces

REPOSITORY = Path(__file__).parents[1]
LAYERS = TINY_LAYERS
# Where the bundled model is, before a test says otherwise.
BUNDLED_CACHE = cache_root()


# The repository is a Space


def test_the_readme_describes_a_space_that_runs_this_code():
    head = metadata_load(REPOSITORY / "README.md")
    pinned = {
        requirement.name: str(requirement.specifier).removeprefix("==")
        for requirement in map(
            Requirement, (REPOSITORY / "requirements.txt").read_text().splitlines()
        )
    }
    assert head["sdk"] == "gradio"
    assert head["sdk_version"] == pinned["gradio"]
    assert (REPOSITORY / head["app_file"]).is_file()
    assert head["python_version"] in ("3.11", "3.12")
    assert all(version[0].isdigit() for version in pinned.values())


# Settings by environment


def test_the_owner_sets_limits_by_environment():
    set_by = {
        "SPACE_ID": "someone/space",
        "GRADIO_SERVER_PORT": "7000",
        "LAYERSHAP_QUEUE_SIZE": "5",
        "LAYERSHAP_QUICK_JOBS": "3",
        "LAYERSHAP_READ_ONLY": "1",
        "LAYERSHAP_MCP": "true",
        "SPACES_ZERO_GPU": "true",
    }
    settings = AppSettings.read([], set_by)
    assert (settings.host, settings.port) == ("0.0.0.0", 7000)
    assert (settings.queue_size, settings.quick_jobs) == (5, 3)
    assert settings.read_only
    assert settings.mcp
    assert settings.zero_gpu
    defaults = AppSettings.read([], {})
    assert defaults.queue_size is None
    assert {defaults.read_only, defaults.mcp, defaults.zero_gpu} == {False}
    assert AppSettings.read(["--mcp"], {"LAYERSHAP_MCP": "0"}).mcp
    for name, value in (
        ("LAYERSHAP_QUEUE_SIZE", "0"),
        ("LAYERSHAP_QUICK_JOBS", "-1"),
        ("LAYERSHAP_READ_ONLY", "perhaps"),
    ):
        with pytest.raises(LayerShapError, match=f"{name} is '{value}'"):
            AppSettings.read([], {name: value})


def test_a_read_only_dashboard_measures_everything_and_keeps_nothing(cache, tiny_folder, text_file):
    page = build(AppSettings(read_only=True, queue_size=5, quick_jobs=3))
    assert page._queue.max_size == 5
    assert page._queue.default_concurrency_limit == 3
    for name in ("save", "save-healed", "push", "clear-cache"):
        [button] = [b for b in page.blocks.values() if getattr(b, "elem_id", None) == name]
        assert button.interactive is False
    _, url, _ = page.launch(prevent_thread_lock=True, quiet=True)
    try:
        visitor = Client(url, verbose=False)
        load(visitor, tiny_folder, text_file)
        _, status = visitor.predict(first="2", second="3", api_name="/pair")
        assert "Layers 2 and 3" in said(status)
        for asked in (
            {"name": "mine", "api_name": "/save"},
            {"name": "mine", "api_name": "/save_healed"},
            {"name": "mine", "repo": "me/mine", "private": True, "api_name": "/push"},
        ):
            assert "read-only" in said(visitor.predict(**asked))
        assert not (cache / "pruned").exists()
        assert any((cache / "evaluations").iterdir())
    finally:
        page.close()


def _free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.mark.bundled
def test_a_space_starts_from_its_environment_and_keeps_to_its_limits(tmp_path):
    port = _free_port()
    environment = {
        "PATH": os.environ["PATH"],
        "SPACE_ID": "someone/layershap",
        "SPACE_HOST": "someone-layershap.hf.space",
        "SYSTEM": "spaces",
        "GRADIO_SERVER_NAME": "127.0.0.1",
        "GRADIO_SERVER_PORT": str(port),
        "HOME": "/proc/nowhere",
        "LAYERSHAP_CACHE": str(BUNDLED_CACHE),
        "LAYERSHAP_MAX_EVALUATIONS": "50",
        "LAYERSHAP_MCP": "1",
        "OMP_NUM_THREADS": "1",
    }
    log = tmp_path / "log"
    with log.open("w") as out:
        server = subprocess.Popen(
            [sys.executable, "app.py"], cwd=REPOSITORY, env=environment, stdout=out, stderr=out
        )
    try:
        url = f"http://127.0.0.1:{port}/"
        for _ in range(600):
            assert server.poll() is None, log.read_text()
            try:
                assert httpx.get(url).status_code == 200
                break
            except httpx.TransportError:
                time.sleep(0.2)
        visitor = Client(url, verbose=False)
        asked = {"model_from": "Hugging Face id", "model_source": "someone/other"}
        refused = visitor.predict(**asked, revision="", text_file=None, api_name="/load")
        assert "allows only these models: bundled" in said(refused)
        small = {"blocks": 1, "held_out_blocks": 1, "block_length": 16}
        loaded = visitor.predict(
            **small, model_source="", revision="", text_file=None, api_name="/load"
        )
        assert "Ready" in said(loaded), log.read_text()
        over = visitor.predict(evaluations=51, strata="", api_name="/analyze")
        assert "this dashboard allows at most 50" in said(over)
        pushed = visitor.predict(name="a", repo="me/x", private=True, api_name="/push")
        assert "only where LayerShap runs on your own machine" in said(pushed)
        cut = visitor.predict("13, 17", "bundled", "bundled", 1, 16, api_name="/measure_cut")
        assert cut["perplexity"]["held_out"]["pruned"] > 1
        tools = [tool["name"] for tool in httpx.get(f"{url}gradio_api/mcp/schema").json()]
        assert "layershap_measure_cut" in tools
        assert not any("load" in tool for tool in tools)
    finally:
        server.terminate()
        server.wait(30)


# ZeroGPU


class Lender(types.ModuleType):
    """A stand-in for the `spaces` package: each decorated function runs in a process forked at its
    first call and kept for later ones, as on ZeroGPU, and must be done within its time."""

    def __init__(self):
        super().__init__("spaces")
        self.calls = []
        self.processes = []
        self.refused = None

    def GPU(self, task=None, *, duration=60):
        return self._lend(task, duration) if task else lambda task: self._lend(task, duration)

    def _lend(self, task, duration):
        ends = []

        def call(*args):
            if self.refused:
                raise gr.Error(self.refused)
            if not ends:
                mine, theirs = get_context("fork").Pipe()
                process = get_context("fork").Process(target=_serve, args=(task, theirs))
                process.start()
                self.processes.append(process)
                ends.append(mine)
            ends[0].send(args)
            value, seconds, where = ends[0].recv()
            assert seconds < duration, "the function exceeded the time it asked for"
            self.calls.append((len(args[0]), seconds, duration, where))
            return value

        return call


def _serve(task, end):
    while True:
        args = end.recv()
        started = zero_gpu.time.perf_counter()
        # As on ZeroGPU: OpenMP's threads did not survive the fork in this one.
        with ThreadPoolExecutor(1) as thread:
            value = thread.submit(task, *args).result()
        end.send((value, zero_gpu.time.perf_counter() - started, os.getpid()))


@pytest.fixture
def lender(monkeypatch):
    """ZeroGPU as far as this program sees it, the CPU standing for the GPU that is lent.

    CUDA seems to be there, as `spaces` makes it seem, and is broken: who touches it fails.
    """
    lender = Lender()
    monkeypatch.setitem(sys.modules, "spaces", lender)
    monkeypatch.setattr(zero_gpu, "DEVICE", "cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    yield lender
    for process in lender.processes:
        process.kill()
        process.join()


@pytest.fixture
def opened(lender, cache, tiny_folder, text_file):
    workspaces = Workspaces(zero_gpu=True)

    def make(device="auto", players="blocks"):
        text = TextChoice(str(text_file), blocks=3, block_length=16, held_out_blocks=3)
        choice = ModelChoice(str(tiny_folder), device=device)
        return workspaces.open(choice, text, lambda *_: None, players)

    return make


@pytest.mark.parametrize("players", ["blocks", "sub-blocks"])
def test_lent_gpus_give_the_losses_of_the_plain_evaluator(lender, opened, players):
    game = opened(players=players).calibration
    rng = np.random.default_rng(0)
    masks = rng.random((100, game.n_players)) < 0.8
    found = dict(game.evaluator.losses(masks))
    plain = Evaluator(
        load_model(str(game.model.module.name_or_path), device="cpu"), game.tokens, players=players
    )
    truth = dict(plain.losses(masks))
    assert found == truth
    sizes = [count for count, *_ in lender.calls]
    assert sizes[0] == 1
    assert sum(sizes) == 100
    assert {where for *_, where in lender.calls}.isdisjoint({os.getpid()})
    whole = game.evaluator.of_whole_layers()
    assert dict(whole.losses(np.ones((1, LAYERS), dtype=bool)))[0] == pytest.approx(game.full_loss)


@pytest.mark.parametrize(("seconds", "calls"), [(0.001, 2), (0.1, 20), (2.2, 120)])
def test_no_chunk_takes_longer_than_it_asked_for(lender, opened, monkeypatch, seconds, calls):
    """By a clock that only the evaluation moves; masks differ threefold in how long they take."""
    now, rng = [0.0], np.random.default_rng(2)
    monkeypatch.setattr(zero_gpu, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))

    def slow(self, masks):
        for row, mask in enumerate(masks):
            now[0] += seconds * (mask.sum() + 1) * rng.uniform(1, 3)
            yield row, float(mask @ 2 ** np.arange(LAYERS))

    evaluator = opened().calibration.evaluator
    monkeypatch.setattr(Evaluator, "losses", slow)
    masks = np.random.default_rng(1).random((120, LAYERS)) < 0.8
    found = dict(evaluator.losses(masks))
    assert [found[row] for row in range(120)] == list(masks @ 2.0 ** np.arange(LAYERS))
    assert {duration for _, _, duration, _ in lender.calls} == {zero_gpu.LIMIT_SECONDS}
    assert all(took < zero_gpu.LIMIT_SECONDS for _, took, _, _ in lender.calls)
    assert len(lender.calls) <= calls


def test_an_analysis_uses_the_lent_gpu_and_this_process_never_does(lender, opened, tmp_path):
    workspace = opened()
    game = LayerGame(
        workspace.model,
        workspace.calibration.tokens,
        EvaluationCache(tmp_path),
        evaluator=workspace.calibration.evaluator,
    )
    *_, last = run(game, AnalysisSettings(evaluations=20))
    assert last.stage == "Done"
    assert sum(count for count, *_ in lender.calls) == 21
    before = len(lender.calls)
    game.losses(last.analysis.masks)
    assert len(lender.calls) == before
    assert workspace.model.device.type == "cpu"


def test_evaluations_of_the_lent_gpu_are_not_taken_for_those_of_the_cpu(opened, monkeypatch):
    lent = opened()
    monkeypatch.setattr(zero_gpu, "DEVICE", "cuda")
    assert opened().calibration._prefix != opened("cpu").calibration._prefix
    assert lent.calibration._prefix == opened("cpu").calibration._prefix


def test_what_zero_gpu_refuses_is_one_sentence(lender, opened):
    with pytest.raises(LayerShapError, match="leave the device at auto"):
        opened("cuda")
    assert isinstance(opened("cpu").calibration.evaluator, Evaluator)
    game = opened().calibration
    lender.refused = "quota exceeded"
    with pytest.raises(LayerShapError, match=r"ZeroGPU lent no GPU \(quota exceeded\)"):
        game.losses(~np.eye(LAYERS, dtype=bool)[:1])


def test_a_failure_on_the_lent_gpu_keeps_its_sentence(opened, monkeypatch):
    def full(self, masks):
        raise LayerShapError("One mask does not fit.")
        yield

    monkeypatch.setattr(Evaluator, "losses", full)
    with pytest.raises(LayerShapError, match="One mask does not fit"):
        list(opened().calibration.evaluator.losses(np.zeros((1, LAYERS), dtype=bool)))
