"""What can go wrong with processes, disks, files, memory and clocks, and what is left after it."""

import json
import os
import random
import resource
import shutil
import sqlite3
import struct
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from html import escape
from pathlib import Path
from types import SimpleNamespace

import diskcache
import pytest
import torch
from transformers import AutoModelForCausalLM

from conftest import WORDS
from core.__main__ import main
from core.analysis import analyze
from core.bundled import BUNDLED_FOLDER
from core.cache import RETRY_SECONDS, EvaluationCache
from core.errors import LayerShapError
from core.game import LayerGame
from core.loading import load_model
from core.masks import all_masks
from core.models import describe
from core.study import Study, TextInfo, installed_versions
from core.text import TextBlocks
from ui.session import Session, StopSignals
from ui.settings import AppSettings
from ui.setup_view import analyse_handler
from ui.status import guarded
from ui.study_view import cache_line
from ui.workspace import TextChoice, Workspace

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
KILLS = 50
TOKENS = torch.randint(0, 128, (3, 16), generator=torch.Generator().manual_seed(1))
TEXT = TextBlocks(TOKENS, TOKENS + 1, "made up")


VERSIONS = installed_versions()


def studied(game, **options):
    """The study of a game, as it is saved."""
    analysis = analyze(game, evaluations=40, **options)
    # Another user may not be able to read what is installed here.
    study = Study(analysis, game.model.info, TextInfo.of(TEXT), created="", versions=VERSIONS)
    return study.to_json()


def without_time(file):
    lines = file.read_text().splitlines()
    return [line for line in lines if not line.startswith(' "created": ')]


@pytest.fixture(scope="module")
def model(tiny_llama):
    return describe(tiny_llama(8), name="tiny")


@pytest.fixture
def game(model, tmp_path):
    """A game whose cache the test chooses."""
    return LayerGame(model, TOKENS, EvaluationCache(tmp_path / "unused"))


@pytest.fixture(scope="module")
def undisturbed(model, tmp_path_factory):
    game = LayerGame(model, TOKENS, EvaluationCache(tmp_path_factory.mktemp("undisturbed")))
    return studied(game)


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
            at = len(truth) - 1, rng.uniform(0, 20)  # among the estimates
        elif kill % 10 == 9:
            at = 0, rng.uniform(0, 30)  # opening the cache and reading it
        else:
            # Among the evaluations; a fast machine makes a few more in that time.
            at = min(len(kept) - 1 + rng.randint(1, 8), len(truth) - 2), rng.uniform(0, 2)
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


ENTRIES = {f"v1/model/text/{number:03d}": float(number) / 7 for number in range(300)}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A cache folder with `ENTRIES`, as a finished process leaves it."""
    folder = tmp_path_factory.mktemp("written")
    cache = EvaluationCache(folder)
    for key, loss in ENTRIES.items():
        cache.put(key, loss)
    cache._close()
    return folder


def overwritten(start, content):
    def damage(database):
        data = bytearray(database.read_bytes())
        at = int(len(data) * start)
        data[at : at + len(content)] = content
        database.write_bytes(data)

    return damage


def cut(share):
    return lambda database: os.truncate(database, int(database.stat().st_size * share))


def no_text(database):
    """SQLite quotes the schema in its complaint."""
    data = database.read_bytes()
    assert data.count(b"CREATE TABLE Cache") == 1
    database.write_bytes(data.replace(b"CREATE TABLE Cache", b"CREATE \xd2\xe9\xf4LE Cache"))


def another_layout(database):
    database.unlink()
    with closing(sqlite3.connect(database)) as connection:
        connection.execute("CREATE TABLE Cache (name TEXT)")
        connection.execute("CREATE TABLE Settings (key TEXT NOT NULL UNIQUE, value)")
        connection.commit()


@pytest.mark.parametrize(
    "damage",
    [
        lambda database: database.write_text("not a database, but text as long as it takes" * 99),
        cut(0.001),
        cut(0.5),
        cut(0.99),
        overwritten(0, bytes(64)),
        overwritten(0.4, random.Random(0).randbytes(9000)),
        overwritten(0.6, bytes(5000)),
        no_text,
        another_layout,
    ],
    ids=["text", "cut-start", "half", "cut-end", "header", "garbage", "zeros", "no-text", "layout"],
)
def test_a_damaged_cache_is_set_aside_and_a_new_one_begun(written, tmp_path, damage, caplog):
    folder = tmp_path / "cache"
    shutil.copytree(written, folder)
    damage(folder / "cache.db")
    damaged = (folder / "cache.db").stat()
    cache = EvaluationCache(folder)
    for key, loss in zip(ENTRIES, cache.get(ENTRIES), strict=True):
        assert loss in (None, ENTRIES[key])
    aside = folder / "cache.db.damaged-1"
    assert aside.stat().st_ino == damaged.st_ino
    assert f"was damaged, so it was set aside as {aside} and a new one begun" in cache.notice
    assert caplog.messages == [cache.notice]
    cache.put("new", 1.5)
    again = EvaluationCache(folder)
    assert again.get(["new"]) == [1.5]
    assert again.notice is None


def test_damage_met_while_running_is_survived_and_named_apart_from_the_last(written, tmp_path):
    folder = tmp_path / "cache"
    shutil.copytree(written, folder)
    for number in (1, 2):
        cache = EvaluationCache(folder)
        cache.put("new", 1.5)
        cache._close()
        overwritten(0, bytes(9000))(folder / "cache.db")
        assert cache.get(["new"]) == [None]
        assert f"damaged-{number}" in cache.notice
        cache.put("new", 2.5)
        assert stored(folder) == {"new": 2.5}


def test_a_changed_bit_makes_an_entry_unknown_never_wrong(written, tmp_path):
    folder = tmp_path / "cache"
    shutil.copytree(written, folder)
    database = folder / "cache.db"
    data = database.read_bytes()
    key = "v1/model/text/123"
    assert data.count(struct.pack(">d", ENTRIES[key])) == 1
    changed = struct.pack(">d", ENTRIES[key] + 1e-3)
    database.write_bytes(data.replace(struct.pack(">d", ENTRIES[key]), changed))
    assert stored(folder)[key] == ENTRIES[key] + 1e-3
    cache = EvaluationCache(folder)
    expected = [None if name == key else loss for name, loss in ENTRIES.items()]
    assert cache.get(ENTRIES) == expected
    cache.put(key, ENTRIES[key])
    assert EvaluationCache(folder).get([key]) == [ENTRIES[key]]


def test_a_cache_of_an_earlier_version_is_read_and_its_outdated_keys_are_not(tmp_path, tiny_llama):
    earlier = diskcache.Cache(str(tmp_path), eviction_policy="none")  # mapped, without checksums
    model = describe(tiny_llama(4))
    game = LayerGame(model, TOKENS, EvaluationCache(tmp_path / "fresh"))
    masks = all_masks(4)
    losses = game.losses(masks)
    for number, (key, loss) in enumerate(stored(tmp_path / "fresh").items()):
        earlier.set(key, loss)
        earlier.set(f"v0/{key.partition('/')[2]}", 9.0 + number)
    earlier.close()
    cache = EvaluationCache(tmp_path)
    again = LayerGame(model, TOKENS, cache)
    again.evaluator.losses = lambda masks: pytest.fail("measured again")
    assert (again.losses(masks) == losses).all()
    assert cache.notice is None


def test_a_cache_deleted_while_it_is_in_use_is_made_again(tmp_path):
    folder = tmp_path / "cache"
    cache = EvaluationCache(folder)
    cache.put("before", 1.0)
    for remove in (lambda: (folder / "cache.db").unlink(), lambda: shutil.rmtree(folder)):
        remove()
        assert cache.get(["before"]) == [None]
        cache.put("after", 2.0)
        with ThreadPoolExecutor(1) as other_thread:
            assert other_thread.submit(cache.get, ["after"]).result() == [2.0]
        assert EvaluationCache(folder).get(["after"]) == [2.0]
        assert cache.notice is None


class Full:
    """Makes a cache's database full, as SQLite sees it: no page more than it has."""

    def __init__(self, monkeypatch):
        self.full = True
        con = diskcache.Cache._con.fget

        def limited(cache):
            connection = con(cache)
            pages = 1 if self.full else 2**31
            connection.execute(f"PRAGMA max_page_count = {pages}")
            return connection

        monkeypatch.setattr(diskcache.Cache, "_con", property(limited))


def test_what_a_full_disk_cannot_take_waits_in_memory_until_it_can(written, tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    shutil.copytree(written, folder)
    now = [100.0]
    monkeypatch.setattr("core.cache.time.monotonic", lambda: now[0])
    cache = EvaluationCache(folder)
    disk = Full(monkeypatch)
    more = {f"more-{number}": float(number) for number in range(100)}
    for key, loss in more.items():
        cache.put(key, loss)
    assert "(database or disk is full), so what is measured is kept in memory" in cache.notice
    assert cache.get([*ENTRIES, *more]) == [*ENTRIES.values(), *more.values()]
    assert len(cache) == len(ENTRIES) + len(more)
    assert len(stored(folder)) < len(ENTRIES) + len(more)
    disk.full = False
    now[0] += RETRY_SECONDS
    assert cache.get(["more-7"]) == [7.0]
    assert cache.notice is None
    assert stored(folder) == ENTRIES | more


@contextmanager
def unprivileged():
    """Permissions bind root no more than they bind anyone."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def read_only(written):
    """A cache folder that holds `ENTRIES`, in which nothing may be written."""
    with tempfile.TemporaryDirectory() as outer:
        folder = Path(outer) / "cache"
        shutil.copytree(written, folder)
        Path(outer).chmod(0o755)
        (folder / "cache.db").chmod(0o444)
        folder.chmod(0o555)
        yield folder
        folder.chmod(0o755)


def blocked(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    return tmp_path / "file" / "cache"


def test_a_read_only_cache_leaves_the_analysis_as_it_would_have_been(game, read_only, undisturbed):
    before = (read_only / "cache.db").read_bytes()
    with unprivileged():
        game.cache = EvaluationCache(read_only)
        result = studied(game)
        kept = len(game.cache)
        with pytest.raises(LayerShapError, match="cannot be used"):
            game.cache.clear()
    assert result == undisturbed
    assert game.cache.notice.startswith(f"The evaluation cache in {read_only} cannot be used (")
    assert kept == 41
    assert (read_only / "cache.db").read_bytes() == before


def test_a_folder_that_cannot_be_made_leaves_the_analysis_as_it_would_have_been(
    game, tmp_path, undisturbed
):
    game.cache = EvaluationCache(blocked(tmp_path))
    assert studied(game) == undisturbed
    assert "(Not a directory)" in game.cache.notice
    game.evaluator.losses = lambda masks: pytest.fail("measured again")
    assert studied(game) == undisturbed


def test_a_disk_that_fills_up_leaves_the_analysis_as_it_would_have_been(
    game, tmp_path, undisturbed, monkeypatch
):
    game.cache = EvaluationCache(tmp_path / "cache")
    disk = Full(monkeypatch)
    disk.full = False

    def fill(step):
        disk.full = step.done >= 10

    assert studied(game, on_progress=fill) == undisturbed
    assert "disk is full" in game.cache.notice
    assert 11 <= len(stored(tmp_path / "cache")) < 41


def test_the_dashboard_says_that_nothing_is_kept_on_disk(
    model, tmp_path, isolated_cache, monkeypatch
):
    monkeypatch.setenv("LAYERSHAP_CACHE", str(blocked(tmp_path)))
    game = LayerGame(model, TOKENS)
    workspace = Workspace(model, TEXT, game, game, TextChoice())
    settings = AppSettings()
    parts = ("session", "status", "model_line", "strip")
    analyse = analyse_handler(settings, StopSignals(), *parts, lambda *_: {})
    visitor = SimpleNamespace(session_hash="visitor")
    chosen = (40, "", "ratio", "auto", 0, "", "", visitor)
    *_, last = analyse(Session.of_workspace(workspace), *chosen)
    notice = escape(game.cache.notice)
    assert last["status"] == (
        f'<p class="ls-alert" role="alert">Done: 40 masks measured. {notice}</p>'
    )
    assert "kept in memory" in notice
    assert notice in cache_line()


@contextmanager
def room_for(size):
    """No file may grow beyond `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_the_command_line_finishes_without_room_for_a_cache_and_says_so(
    tiny_folder, tmp_path, monkeypatch, capsys, caplog
):
    words = " ".join(random.Random(0).choices(WORDS, k=2000))
    (tmp_path / "book.txt").write_text(words)
    command = ["analyze", "--model", str(tiny_folder), "--text", str(tmp_path / "book.txt")]
    command += ["--blocks", "2", "--block-length", "16", "--held-out-blocks", "2"]
    command += ["--evaluations", "40", "--dtype", "float32", "--out"]
    monkeypatch.setenv("LAYERSHAP_CACHE", str(tmp_path / "roomy"))
    assert main([*command, str(tmp_path / "roomy.json")]) == 0
    assert caplog.messages == []
    monkeypatch.setenv("LAYERSHAP_CACHE", str(tmp_path / "tight"))
    with room_for(300 << 10):
        assert main([*command, str(tmp_path / "tight.json")]) == 0
    [notice] = caplog.messages
    assert "kept in memory until it can; free some disk space" in notice
    assert 0 < len(stored(tmp_path / "tight" / "evaluations")) < 41
    assert without_time(tmp_path / "tight.json") == without_time(tmp_path / "roomy.json")
    capsys.readouterr()
    with room_for(1 << 10):
        assert main([*command, str(tmp_path / "none.json")]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("layershap: The study could not be written to")
    assert said.endswith("free some disk space, or name another place with --out.")


ONE_OF_TWO = """
import sys
from core.cache import EvaluationCache
print("ready", flush=True)
for folder in sys.stdin:
    cache = EvaluationCache(folder.strip())
    for number in range(300):
        key = f"{sys.argv[1]}-{number}" if number % 3 else f"shared-{number}"
        cache.put(key, float(number))
        assert cache.get([key]) == [float(number)]
    print(cache.notice, flush=True)
"""


def test_two_processes_share_one_cache_even_when_both_find_it_damaged(tmp_path):
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", ONE_OF_TWO, name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=ENVIRONMENT,
        )
        for name in ("one", "two")
    ]
    assert [run.stdout.readline() for run in runs] == ["ready\n"] * 2
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "cache.db").write_bytes(b"damaged" * 1000)
    for folder in (tmp_path / "new", tmp_path / "damaged"):
        for run in runs:
            run.stdin.write(f"{folder}\n")
            run.stdin.flush()
        notices = [run.stdout.readline() for run in runs]
        damaged = folder.name == "damaged"
        assert sum("was set aside as" in notice for notice in notices) == damaged
        assert sum(notice == "None\n" for notice in notices) == 2 - damaged
        assert len(list(folder.glob("cache.db.damaged-?"))) == damaged
        found = stored(folder)
        assert len(found) == 100 + 2 * 200
        assert all(float(key.partition("-")[2]) == loss for key, loss in found.items())
    for run in runs:
        run.kill()
        run.wait()


def test_a_lock_that_is_not_given_up_is_waited_for_once_and_then_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr("core.cache.LOCK_TIMEOUT_SECONDS", 0.05)
    now = [0.0]
    monkeypatch.setattr("core.cache.time.monotonic", lambda: now[0])
    cache = EvaluationCache(tmp_path)
    with closing(sqlite3.connect(tmp_path / "cache.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        cache.put("a", 1.0)
        cache.put("b", 2.0)
        assert "(database is locked)" in cache.notice
        assert cache.get(["a", "b"]) == [1.0, 2.0]
        other.execute("ROLLBACK")
    now[0] += RETRY_SECONDS
    cache.put("c", 3.0)
    assert cache.notice is None
    assert stored(tmp_path) == {"a": 1.0, "b": 2.0, "c": 3.0}


def test_a_device_without_memory_halves_its_work_and_the_study_is_the_same(
    game, tmp_path, undisturbed, monkeypatch
):
    evaluator = game.evaluator
    real, calls = evaluator.run_step, []

    def scarce(*arguments):
        calls.append(1)
        if evaluator.plan.group > 1 and len(calls) % 7 == 0:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return real(*arguments)

    monkeypatch.setattr(evaluator, "run_step", scarce)
    game.cache = EvaluationCache(tmp_path)
    assert studied(game) == undisturbed
    assert evaluator.plan.group == 1


def test_a_device_that_stays_full_is_one_sentence_and_can_be_used_again(
    game, tmp_path, undisturbed, monkeypatch
):
    def none(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    game.cache = EvaluationCache(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(game.evaluator, "run_step", none)
        with pytest.raises(LayerShapError, match="does not fit in the device's memory"):
            analyze(game, evaluations=40)
    assert studied(game) == undisturbed


def test_a_device_too_small_for_the_model_is_one_sentence(tiny_folder, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", full)
    with pytest.raises(LayerShapError, match="The device's memory is full; choose a smaller dtype"):
        load_model(str(tiny_folder))


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA"), OSError(28, "No space left")])
def test_what_runs_out_anywhere_in_the_dashboard_is_one_sentence(error):
    def handler():
        raise error
        yield

    [update] = guarded("status")(handler)()
    assert "memory is full" in update["status"] or "free some disk space" in update["status"]
    assert "unforeseen" not in update["status"]


def test_files_that_vanish_under_a_loaded_model_change_nothing(tiny_folder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    model = load_model(str(folder), dtype="float32", device="cpu")
    weights = folder / "model.safetensors"
    # A file written over in place is still the one that was mapped.
    with weights.open("r+b") as file:
        file.write(bytes(weights.stat().st_size))
    shutil.rmtree(folder)
    other = load_model(str(tiny_folder), dtype="float32", device="cpu")
    masks = all_masks(model.n_layers)[-20:]
    mine, true = (
        LayerGame(m, TOKENS % 61, EvaluationCache(tmp_path / name)).losses(masks)
        for name, m in (("mine", model), ("true", other))
    )
    assert (mine == true).all()
    with pytest.raises(LayerShapError, match="There is no folder at"):
        load_model(str(folder))


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_converted_model_with_a_file_missing_says_which_folder_to_delete(
    tiny_folder, isolated_cache, missing
):
    folder = isolated_cache / "models" / BUNDLED_FOLDER
    shutil.copytree(tiny_folder, folder)
    (folder / missing).unlink()
    with pytest.raises(LayerShapError, match=f"{folder} is damaged; delete that folder"):
        load_model("bundled")


def test_a_clock_that_jumps_moves_neither_progress_nor_the_cache(
    game, tmp_path, undisturbed, monkeypatch
):
    moment = [2e9]

    def jumping():
        moment[0] = -moment[0] * 0.9  # years forth and back, before 1970 too
        return moment[0]

    monkeypatch.setattr("time.time", jumping)
    game.cache = EvaluationCache(tmp_path)
    left = []
    result = studied(game, on_progress=lambda step: left.append(step.seconds_left))
    assert result == undisturbed
    assert all(seconds is None or 0 <= seconds < 600 for seconds in left)
    assert any(left)
    again = LayerGame(game.model, game.tokens, EvaluationCache(tmp_path))
    again.evaluator.losses = lambda masks: pytest.fail("measured again")
    assert studied(again) == undisturbed
