"""The same seed, model, text and number format give the same study file, byte for byte.

Two processes that differ in hash seed and in number of threads each write the study of every way of
running the same analysis.
"""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import WORDS

ROOT = Path(__file__).parents[1]
SCRIPT = """
import sys
from pathlib import Path

import torch

from core.__main__ import main
from core.analysis import AnalysisSettings, analyze, run
from core.cache import EvaluationCache
from core.evaluation import Evaluator
from core.game import LayerGame
from core.models import load_model
from core.study import Study, TextInfo
from core.text import load_text

model_folder, book, out = sys.argv[1], sys.argv[2], Path(sys.argv[3])
models = {dtype: load_model(model_folder, dtype=dtype) for dtype in ("float32", "bfloat16")}
text = load_text(book, models["float32"].tokenizer, blocks=3, block_length=16, held_out_blocks=3)


def study(name, dtype="float32", players="blocks", stop_after=None, **plan):
    model = models[dtype]
    game = LayerGame(model, text.calibration, EvaluationCache(out / name), players=players)
    game.evaluator = Evaluator(model, text.calibration, players=players, **plan)
    if stop_after:
        told = []
        list(run(game, AnalysisSettings(50), lambda: told.append(1) or len(told) >= stop_after))
        assert 0 < len(game.cache) < 50
    result = analyze(game, evaluations=50, on_progress=lambda step: None)
    parameters = model.player_parameters(players)
    made = Study(result, model.info, TextInfo.of(text), player_parameters=parameters)
    (out / f"{name}.json").write_text(made.to_json())


for dtype in models:
    for players in ("blocks", "sub-blocks"):
        name = f"{dtype}-{players}"
        study(name, dtype, players)
        study(f"{name}-group-1", dtype, players, group=1)
        study(f"{name}-group-5", dtype, players, group=5)
        study(f"{name}-little-memory", dtype, players, memory_budget=16 * 32 * 4 * 24)
        study(f"{name}-stopped", dtype, players, stop_after=20)
command = ["analyze", "--model", model_folder, "--text", book, "--dtype", "float32"]
command += ["--blocks", "3", "--block-length", "16", "--held-out-blocks", "3"]
command += ["--evaluations", "50", "--out", str(out / "float32-blocks-command.json")]
assert main(command) == 0
"""


def without_time(file):
    """A study's bytes but for the line that says when it was made."""
    lines = file.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if not line.startswith(b' "created": ')]
    assert len(kept) == len(lines) - 1
    return b"".join(kept)


@pytest.fixture(scope="module")
def studies(tiny_folder, tmp_path_factory):
    """The studies of both processes: {process: {way of running: bytes}}."""
    folder = tmp_path_factory.mktemp("reproduced")
    book = folder / "book.txt"
    book.write_text(" ".join(random.Random(0).choices(WORDS, k=3000)))
    processes = {}
    for seed, threads in (("1", "1"), ("2", "2")):
        out = folder / f"process-{seed}"
        out.mkdir()
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "PYTHONHASHSEED": seed,
            "OMP_NUM_THREADS": threads,
            "LAYERSHAP_CACHE": str(out / "cache"),
        }
        command = [sys.executable, "-c", SCRIPT, str(tiny_folder), str(book), str(out)]
        processes[out] = subprocess.Popen(command, env=environment)
    assert [process.wait() for process in processes.values()] == [0, 0]
    return [{file.stem: without_time(file) for file in out.glob("*.json")} for out in processes]


@pytest.mark.parametrize("players", ["blocks", "sub-blocks"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_neither_batches_nor_memory_nor_a_stop_change_a_byte(studies, dtype, players):
    for process in studies:
        reference = process[f"{dtype}-{players}"]
        for way in ("group-1", "group-5", "little-memory", "stopped"):
            assert process[f"{dtype}-{players}-{way}"] == reference, way


def test_the_command_line_writes_what_the_library_does(studies):
    for process in studies:
        assert process["float32-blocks-command"] == process["float32-blocks"]


def test_another_process_with_another_hash_seed_and_more_threads_writes_the_same(studies):
    first, second = studies
    assert first.keys() == second.keys()
    assert {name for name in first if first[name] != second[name]} == set()


def test_what_should_differ_does(studies):
    first, _ = studies
    names = ("float32-blocks", "float32-sub-blocks", "bfloat16-blocks", "bfloat16-sub-blocks")
    assert len({first[name] for name in names}) == 4
