"""The README's threat model for a dashboard open to others: one test a line, against a real server
with the rules of a public Space and a tiny model in the place of the bundled one."""

import json
import math
import re
import socket
import threading
from html import unescape
from pathlib import Path

import httpx
import numpy as np
import pytest
from gradio_client import Client, handle_file

import ui.workspace
from conftest import WORDS
from core.cache import EvaluationCache
from core.errors import LayerShapError
from core.loading import HUB_FILES, load_model
from core.study import Study
from core.text import load_text
from siege import MARKUP, PATHS, RAW, WATCH
from ui.page import MAX_SESSIONS, launch
from ui.settings import AppSettings
from ui.setup_view import FROM_BUNDLE, TEXT_BUNDLED, TEXT_FILE
from ui.study_view import MAX_STUDY_BYTES

SPEECHES = [" ".join(np.random.default_rng(n).choice(WORDS, 400)) for n in range(6)]
README = Path(__file__).resolve().parent.parent / "README.md"


@pytest.fixture(scope="module")
def space(cache, tiny_folder, tmp_path_factory):
    """A public Space: its address, its page, and the folder it keeps."""
    patch = pytest.MonkeyPatch()
    gradio_folder = tmp_path_factory.mktemp("gradio")
    patch.setenv("GRADIO_TEMP_DIR", str(gradio_folder))
    tiny = load_model(str(tiny_folder))
    patch.setattr(ui.workspace, "load_pruned", lambda source, **_: tiny)
    patch.setattr("core.text._speeches", lambda: SPEECHES)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = AppSettings.read(
        ["--host", "127.0.0.1", "--port", str(port)],
        {"SPACE_ID": "someone/space", "LAYERSHAP_MAX_UPLOAD_MB": "1"},
    )
    page = launch(settings, wait=False)
    yield page.local_url.rstrip("/"), page, gradio_folder
    page.close()
    patch.undo()


@pytest.fixture
def address(space):
    return space[0]


@pytest.fixture
def visitor(address):
    return Client(address, verbose=False)


def load(visitor, **changes):
    return visitor.predict(
        **{
            "model_source": "",
            "revision": "",
            "text_file": None,
            "blocks": 2,
            "block_length": 8,
            "held_out_blocks": 2,
            **changes,
        },
        api_name="/load",
    )


def said(result):
    parts = result if isinstance(result, (tuple, list)) else [result]
    [line] = [p for p in parts if isinstance(p, str) and re.search("ls-(news|alert|progress)", p)]
    return unescape(re.sub("<[^>]+>", "", line))


@pytest.fixture
def loaded(visitor):
    assert "Ready" in said(load(visitor))
    return visitor


@pytest.fixture(scope="module")
def saved(space):
    """The text of a real study."""
    visitor = Client(space[0], verbose=False)
    load(visitor)
    visitor.predict(evaluations=20, strata="", api_name="/analyze")
    return Path(visitor.predict(api_name="/export")[2]["value"]).read_text()


@pytest.fixture
def study(saved):
    return json.loads(saved)


def raw_call(address, endpoint, values):
    """The server's last word to a call made without a client, which would upload the files."""
    url = f"{address}/gradio_api/call/{endpoint}"
    event = httpx.post(url, json={"data": values}).json()["event_id"]
    events = re.findall(r"^event: (\w+)", httpx.get(f"{url}/{event}", timeout=60).text, re.M)
    return events[-1]


def opened(visitor, document, tmp_path, name="study.json"):
    file = tmp_path / name
    file.write_text(json.dumps(document))
    return visitor.predict(path=handle_file(str(file)), api_name="/open_study")


def test_each_line_of_the_readme_has_its_test():
    lines = re.findall(r"`(test_\w+)`", README.read_text())
    own = [name for name in globals() if name.startswith("test_") and "readme" not in name]
    assert sorted(set(lines)) == sorted(own)


def test_only_listed_models_and_data_sets_are_loaded(visitor):
    for name in (*PATHS[:10], "owner/name"):
        assert "allows only these models" in said(
            load(visitor, model_from="Hugging Face id", model_source=name)
        )
        assert "allows only these data sets" in said(
            load(visitor, text_from="Hugging Face data set", text_set=name)
        )
    with pytest.raises(LayerShapError, match="not a revision"):
        load_model("owner/name", revision="../../../../etc/passwd")


def test_no_code_comes_with_a_file(loaded, space, cache, tmp_path, tiny_folder):
    # Only safetensors are fetched or read; a folder with a pickle alone holds no model.
    assert not [pattern for pattern in HUB_FILES if re.search("bin|pt|pkl|py", pattern)]
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_text((tiny_folder / "config.json").read_text())
    (pickled / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch owned'\ntR.")
    with WATCH.watching(cache, space[2], tmp_path) as seen:
        with pytest.raises(LayerShapError):
            load_model(str(pickled))
        # An evaluation cache that somebody tampered with gives no value.
        store = EvaluationCache(tmp_path / "cache")
        store.put("key", 1.0)
        assert store.get(["key", "other"]) == [1.0, None]
        loaded.predict(text="1", api_name="/compare")
    assert [each for each in seen if each[0] == "pickle.find_class"] == []


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: d["measurements"].__setitem__("full_loss", math.nan),
        lambda d: d["measurements"]["losses"].__setitem__(0, math.inf),
        lambda d: d["measurements"]["losses"].__setitem__(0, True),
        lambda d: d["measurements"].__setitem__(
            "masks", ["1" * 8] * len(d["measurements"]["masks"])
        ),
        lambda d: d["model"].__setitem__("n_layers", 10**9),
        lambda d: d["model"].__setitem__("parameters", 10**400),
        lambda d: d["model"].__setitem__("name", {"a": 1}),
        lambda d: d["model"].__setitem__("name", "x" * 100_000),
        lambda d: d["settings"].__setitem__("utility", "shell"),
        lambda d: d["settings"].__setitem__("strata", list(range(5000))),
        lambda d: d.__setitem__("comparisons", [{}] * 20_000),
        lambda d: d.__setitem__("versions", {str(n): "1" for n in range(1000)}),
        lambda d: d.__setitem__("more", 1),
    ],
)
def test_a_study_holds_what_the_schema_says_or_is_refused(saved, study, damage):
    damage(study)
    for text in (json.dumps(study), saved.replace('"seed"', '"seed": 1, "seed"', 1)):
        with pytest.raises(LayerShapError) as caught:
            Study.from_json(text)
        assert "\n" not in str(caught.value)


def test_names_from_files_are_shown_as_text(visitor, study, tmp_path, address):
    for place, key in (("model", "name"), ("model", "dtype"), ("text", "source")):
        study[place][key] = "".join(MARKUP)[:99] if key == "dtype" else "".join(MARKUP)
    study["versions"] = {MARKUP[0]: MARKUP[1]}
    study["created"] = MARKUP[2]
    result = opened(visitor, study, tmp_path, "x onerror=alert(1).json")
    assert said(result) == "Study opened."
    rendered = []
    for part in result:
        value = part.get("value", part) if isinstance(part, dict) else part
        if isinstance(value, dict) and "plot" in value:
            rendered.append(value["plot"])
        elif isinstance(value, str) and value.lstrip().startswith("<"):
            rendered.append(value)
    assert any("&lt;script&gt;" in part for part in rendered)
    assert not any(raw in part for part in rendered for raw in RAW)
    # An upload is handed back as a file to keep, not as a page.
    for name in ("page.html", "page.svg"):
        sent = httpx.post(
            f"{address}/gradio_api/upload", files={"files": (name, MARKUP[1].encode())}
        ).json()[0]
        answer = httpx.get(f"{address}/gradio_api/file={sent}")
        assert "attachment" in answer.headers["content-disposition"]


def test_no_file_of_the_server_is_read_or_written(space, loaded, cache, tmp_path):
    address, _, folder = space
    secret = tmp_path / "secret.txt"
    secret.write_text(" ".join(WORDS * 50))
    usual = [FROM_BUNDLE, "", "", "auto", "auto", TEXT_BUNDLED, None, "", 2, 8, 2, 0, "blocks"]
    assert raw_call(address, "load", usual) == "complete"
    with WATCH.watching(cache, folder) as seen:
        for path in (secret, "/etc/passwd", README, f"{folder}/../secret.txt"):
            answer = httpx.get(f"{address}/gradio_api/file={path}")
            assert answer.status_code in (403, 404)
            # A file that was never uploaded is not opened by naming it.
            named = {"path": str(path), "meta": {"_type": "gradio.FileData"}}
            uploaded = [*usual[:5], TEXT_FILE, named, *usual[7:]]
            assert raw_call(address, "open_study", [named]) == "error"
            assert raw_call(address, "load", uploaded) == "error"
    assert [each for each in seen if str(secret) in each[1] or "/etc/passwd" in each[1]] == []
    assert [each for each in seen if each[0] == "writes"] == []


def test_sizes_are_bounded(space, loaded, tmp_path):
    address = space[0]
    big = httpx.post(f"{address}/gradio_api/upload", files={"files": ("a.txt", b"x" * (2 << 20))})
    assert big.status_code == 413
    assert MAX_STUDY_BYTES <= 64 << 20
    assert MAX_SESSIONS <= 1000
    settings = AppSettings.read([], {"SPACE_ID": "x"})
    for call in (
        {"evaluations": settings.max_evaluations + 1, "strata": "", "api_name": "/analyze"},
        {"prompt": "w1 " * 100_000, "count": 8, "api_name": "/continue_prompt"},
    ):
        assert re.search("at most", said(loaded.predict(**call)))
    tokenizer = ui.workspace.load_pruned("bundled").tokenizer
    with pytest.raises(LayerShapError, match="too many"):
        load_text("bundled", tokenizer, blocks=10**9, block_length=10**9)
    deep = tmp_path / "deep.json"
    deep.write_text("[" * 200_000)
    assert "not the JSON of a study" in said(
        loaded.predict(path=handle_file(str(deep)), api_name="/open_study")
    )


def test_visitors_leave_nothing_on_the_machine(space, loaded, cache):
    _, page, _ = space
    for call in (
        {"name": "mine", "api_name": "/save"},
        {"name": "mine", "api_name": "/save_healed"},
        {"name": "mine", "repo": "a/b", "private": True, "api_name": "/push"},
    ):
        assert "your own machine" in said(loaded.predict(**call))
    assert not (cache / "pruned").exists()
    [clear] = [f for f in page.fns.values() if f.name == "clear"]
    [answer] = list(clear.fn())
    assert "your own machine" in next(iter(answer.values()))
    frequency, age = page.delete_cache
    assert 0 < frequency <= 3600
    assert 0 < age <= 24 * 3600


def test_visitors_do_not_see_each_other(address):
    clients = [Client(address, verbose=False) for _ in range(6)]
    for client in clients:
        load(client)
    wrong = []

    def click(number):
        for _ in range(4):
            text = f"{number}"
            answer = clients[number].predict(text=text, api_name="/select")
            if answer[0] != text:
                wrong.append((text, answer[0]))

    threads = [threading.Thread(target=click, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    # What one has loaded or tried is not there for the next.
    stranger = Client(address, verbose=False)
    assert "needs the model itself" in said(stranger.predict(text="", api_name="/compare"))


def test_failures_tell_nothing_about_the_server(loaded, monkeypatch, tiny_folder):
    recipe = loaded.predict(text="2", api_name="/select")[2]
    assert f"model: {tiny_folder.name}" in recipe
    assert str(tiny_folder.parent) not in recipe

    def broken(*_, **__):
        raise RuntimeError("/home/owner/secret")

    monkeypatch.setattr("ui.prune_view.prune", broken)
    answer = loaded.predict(text="5", api_name="/compare")
    assert "not foreseen" in said(answer)
    assert "secret" not in str(answer)


def test_quick_actions_do_not_wait_for_long_ones(loaded, address, monkeypatch):
    """While one visitor's analysis stands still, another selects and downloads."""
    held, may_go_on = threading.Event(), threading.Event()

    def still(*_, **__):
        held.set()
        may_go_on.wait(60)
        yield from ()

    other = Client(address, verbose=False)
    load(other)
    monkeypatch.setattr("ui.setup_view.run", still)
    job = loaded.submit(evaluations=20, strata="", api_name="/analyze")
    try:
        assert held.wait(60)
        assert other.predict(text="1", api_name="/select")[0] == "1"
        assert other.predict(api_name="/export")
        assert said(other.predict(text="1", api_name="/compare")).startswith("Measured")
    finally:
        may_go_on.set()
    job.cancel()
