"""What can go wrong with processes, disks, files, memory and clocks, and what is left after it."""

import json
import os
import random
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
KILLS = 50


def stored(folder):
    """What a cache's database holds, read without the code under test."""
    database = Path(folder) / "cache.db"
    if not database.exists():
        return {}
    with closing(sqlite3.connect(database)) as connection:
        if not connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'Cache'").fetchall():
            return {}  # killed before the table was made
        return dict(connection.execute("SELECT key, value FROM Cache"))


@pytest.fixture(scope="module")
def worker():
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "tests" / "killed_worker.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )
    assert process.stdout.readline() == "ready\n"

    def work(folder, out, evaluations, milliseconds):
        process.stdin.write(f"{folder} {out} {evaluations} {milliseconds}\n")
        process.stdin.flush()
        return json.loads(process.stdout.readline())

    yield work
    process.kill()
    process.wait()


def test_fifty_kills_lose_nothing_and_change_nothing(worker, tmp_path):
    to_the_end = 10**6
    undisturbed = worker(tmp_path / "whole", tmp_path / "whole.json", to_the_end, 0)
    assert not undisturbed["killed"]
    truth = stored(tmp_path / "whole")
    rng = random.Random(0)
    folder, out = tmp_path / "killed", tmp_path / "killed.json"
    kept, grew, early, estimating = {}, 0, 0, 0
    for kill in range(KILLS):
        if kill >= KILLS - 5:
            at = len(truth) - 1, rng.uniform(0, 80)  # among the estimates
        elif kill % 10 == 9:
            at = 0, rng.uniform(0, 30)  # opening the cache and reading it
        else:
            at = len(kept) - 1 + rng.randint(1, 8), rng.uniform(0, 5)  # among the evaluations
        told = worker(folder, out, *at)
        assert told["killed"], told
        assert not out.exists()
        now = stored(folder)
        assert now.items() <= truth.items()
        assert kept.items() <= now.items()
        measured = told["said"].count("Measuring layer masks")
        # What was told had been stored; and the full model is there with the first of them.
        assert len(now) >= measured + (measured > 0)
        grew += len(now) > len(kept)
        early += measured < len(truth) - 1
        estimating += "Estimating" in told["said"]
        kept = now
    assert grew >= 35
    assert early >= 40
    assert estimating >= 4
    finished = worker(folder, out, to_the_end, 0)
    assert not finished["killed"]
    assert stored(folder) == truth
    assert out.read_bytes() == (tmp_path / "whole.json").read_bytes()
    assert not list(folder.glob("*damaged*"))
