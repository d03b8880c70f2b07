"""Thousands of hostile uploads and calls: no failure that was not foreseen, no file outside the
app's folders, no pickle, no markup on the page."""

import json
import math
from contextlib import suppress
from copy import deepcopy
from inspect import signature
from pathlib import Path

import gradio as gr
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import core.loading
import core.study
import ui.prune_view
import ui.setup_view
import ui.workspace
from conftest import WORDS
from core.errors import LayerShapError
from core.footprint import Speed
from core.loading import load_model
from core.study import Comparison, Study
from core.text import load_text
from siege import (
    CASES,
    HOSTILE_NUMBERS,
    HOSTILE_TEXTS,
    MARKUP,
    PATHS,
    RAW,
    WATCH,
    Refused,
    ask,
    handlers,
    payload,
    shown,
)
from ui.page import build
from ui.session import Session
from ui.settings import AppSettings
from ui.workspace import TextChoice, Workspaces

SHARED = AppSettings(allowed_models=("bundled",), max_evaluations=40)
OWN = AppSettings(max_evaluations=40)
SPEECHES = [" ".join(np.random.default_rng(n).choice(WORDS, 400)) for n in range(6)]


@pytest.fixture(scope="module")
def siege(cache, tiny_folder):
    """The tiny model stands in for the bundled one, a few words for its text, and nobody answers on
    the Hub; the rest is the app as it is."""
    real = ui.workspace.load_pruned
    patch = pytest.MonkeyPatch()
    tiny = load_model(str(tiny_folder))
    patch.setattr(
        ui.workspace,
        "load_pruned",
        lambda source, **kw: tiny if source == "bundled" else real(source, **kw),
    )
    patch.setattr("core.text._speeches", lambda: SPEECHES)
    patch.setattr("huggingface_hub.snapshot_download", _no_hub)
    patch.setattr("core.text._data_set_documents", _no_hub)
    patch.setattr("ui.accuracy_view.compare_accuracy", _no_hub)
    patch.setattr("ui.heal_view.heal", _no_hub)
    patch.setattr(ui.prune_view, "measure_speeds", lambda models: (Speed(1.0, 1.0),) * 2)
    yield cache
    patch.undo()


# A click on a row needs the table that was sent, which is not what a handler gets.
UNASKED = ["chosen_pair"]


def _no_hub(*_, **__):
    raise LayerShapError("The Hugging Face Hub cannot be reached.")


@pytest.fixture(scope="module")
def study(siege):
    """A study of the tiny model with one set tried, as text."""
    workspace = Workspaces().open(
        ui.workspace.ModelChoice(),
        TextChoice(blocks=2, block_length=8, held_out_blocks=2),
        lambda *_: None,
    )
    analysis = core.study.from_measurements(
        core.study.AnalysisSettings(20, strata=(7, 6, 5)),
        workspace.calibration.players,
        masks := np.unique(np.random.default_rng(0).random((20, 8)) < 0.8, axis=0),
        workspace.calibration.losses(masks),
        workspace.calibration.full_loss,
        20,
    )
    tried = Comparison((1, 3), 9.0, 8.0, 10.0, 7.0, 9.5, 7.5, math.inf, 100, 90)
    return workspace, Study(analysis, workspace.model.info, workspace.text_info, (tried,))


@pytest.fixture(scope="module")
def pages(siege, study):
    """A dashboard open to others, and the owner's own, each with what a visitor has loaded."""
    workspace, saved = study
    loaded = Session.of_workspace(workspace)
    sessions = (
        Session(),
        loaded,
        ui.setup_view.replace(loaded, analysis=saved.analysis, comparisons=saved.comparisons),
        Session.of_study(saved),
    )
    return {name: (build(rules), sessions) for name, rules in (("shared", SHARED), ("own", OWN))}


def state(component, parameter, session):
    """What a visitor's states may hold, which is not theirs to send."""
    if isinstance(component.value, Session):
        return st.just(session)
    if parameter == "tried":
        return st.just(session.comparisons)
    if component.value == () and session.n_layers:
        return st.sampled_from(((), (1, 3), tuple(range(session.n_layers))))
    return st.just(component.value)


@pytest.mark.parametrize(("which", "cases"), [("shared", 16), ("own", 8)])
def test_calls_with_anything_in_them_are_answered(pages, siege, tmp_path_factory, which, cases):
    page, sessions = pages[which]
    upload = tmp_path_factory.mktemp("gradio") / "book.txt"
    upload.write_text(SPEECHES[0])
    answered = {}
    for name, function in handlers(page).items():
        answered[name] = 0
        for steps in besiege(function, sessions, cases, siege, upload, which == "own"):
            answered[name] += 1
            for step in steps:
                assert not any(raw in shown(step) for raw in RAW), name
    # The cases mean something: nearly everything was asked, not only refused by Gradio itself.
    assert [name.split("-")[0] for name, count in answered.items() if not count] == UNASKED


def besiege(function, sessions, cases, folder, upload, may_read):
    """The answers of a handler to that many cases, less those that Gradio itself refuses."""
    parameters = list(zip(function.inputs, signature(function.fn).parameters, strict=False))
    answers = []

    @settings(CASES, max_examples=cases)
    @given(st.data())
    def call(data):
        session = data.draw(st.sampled_from(sessions))
        pair = st.lists(st.integers(0, 9), min_size=2, max_size=2)
        pair |= st.lists(HOSTILE_NUMBERS | HOSTILE_TEXTS)
        payloads = {"event": {"pair": data.draw(pair)}}
        for component, parameter in parameters:
            if isinstance(component, gr.State):
                payloads[component] = data.draw(state(component, parameter, session))
            elif isinstance(component, gr.File):
                payloads[component] = data.draw(st.sampled_from((None, str(upload))))
            else:
                payloads[component] = data.draw(payload(component))
        with WATCH.watching(folder, upload.parent) as seen, suppress(Refused):
            answers.append(ask(function, payloads))
        if may_read:
            # On their own machine people may name any file of it.
            seen = [each for each in seen if each[0] != "reads"]
        assert not seen, (function.name, seen)

    call()
    return answers


def numbers_of(study):
    for value in (study.model.parameters, *study.model.block_parameters, *study.parameters):
        assert 0 <= value < 2**53
    assert math.isfinite(study.analysis.full_loss)
    assert not np.isnan(study.analysis.losses).any()
    for tried in study.comparisons:
        assert set(tried.dropped) < set(range(study.analysis.players.count))


HOSTILE_JSON = st.one_of(
    HOSTILE_TEXTS,
    HOSTILE_NUMBERS,
    st.sampled_from(
        (
            True,
            [],
            {},
            [[]],
            {"__class__": "os.system"},
            [1] * 2000,
            [None],
            ["1" * 8],
            2**63,
            10**400,
            1e-320,
        )
    ),
    st.recursive(st.none() | st.integers() | HOSTILE_TEXTS, lambda inner: st.lists(inner)),
)


@st.composite
def damaged(draw, valid):
    """A study with one to three of its values replaced, taken away, doubled or added to."""
    document = json.loads(valid)
    for _ in range(draw(st.integers(1, 3))):
        place = document
        while True:
            if isinstance(place, dict):
                keys = [key for key in place if key != "estimates"]
            else:
                keys = list(range(len(place)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            deeper = isinstance(place[key], dict | list) and place[key]
            if deeper and draw(st.integers(0, 3)):
                place = place[key]
                continue
            what = draw(st.sampled_from(("replace", "replace", "remove", "add", "repeat")))
            if what == "replace":
                place[key] = deepcopy(draw(HOSTILE_JSON))
            elif what == "remove":
                del place[key]
            elif what == "repeat" and isinstance(place, list):
                place.append(place[key])
            elif isinstance(place, dict):
                place[draw(HOSTILE_TEXTS)] = deepcopy(draw(HOSTILE_JSON))
            break
    return json.dumps(document)


@pytest.fixture(scope="module")
def opener(pages, study):
    """Opens a file as the page does, its estimates as they were; the real ones take a second."""
    known = handlers(pages["shared"][0])
    [function] = [f for name, f in known.items() if name.startswith("open_study")]
    patch = pytest.MonkeyPatch()
    _, saved = study
    patch.setattr(core.study, "from_measurements", lambda *_: saved.analysis)
    yield lambda path: ask(function, {function.inputs[0]: str(path)})
    patch.undo()


def test_damaged_studies_open_to_sound_numbers_or_say_what_is_wrong(
    opener, study, siege, tmp_path_factory
):
    _, saved = study
    file = tmp_path_factory.mktemp("gradio") / "study.json"
    opened, refused = [], []

    @settings(CASES, max_examples=900)
    @given(damaged(saved.to_json()))
    def open_it(text):
        file.write_text(text)
        with WATCH.watching(siege, file.parent) as seen:
            steps = opener(file)
        assert not seen, seen
        said = "".join(shown(step) for step in steps)
        assert not any(raw in said for raw in RAW)
        kept = [v for step in steps for v in step.values() if isinstance(v, Session)]
        (opened if kept else refused).append(text)
        if kept:
            numbers_of(Study.from_json(text))
        else:
            assert "ls-alert" in said

    open_it()
    assert opened
    assert len(refused) > 300


def test_bytes_that_are_no_study_are_one_sentence(opener, siege, tmp_path_factory):
    file = tmp_path_factory.mktemp("gradio") / "<img src=x onerror=alert(1)>.json"

    @settings(CASES, max_examples=150)
    @given(st.binary(max_size=200) | st.text(max_size=200).map(lambda t: t.encode(errors="ignore")))
    @example(b"[" * 100_000)
    @example(b'{"a":' * 100_000)
    @example(b'{"format": "layershap-study", "format_version": NaN}')
    @example(b"\x80\x04\x95" + b"cos\nsystem\n(S'id'\ntR.")
    @example(b"9" * 10_000)
    def open_it(content):
        file.write_bytes(content)
        with WATCH.watching(siege, file.parent) as seen:
            [*_, last] = opener(file)
        assert not seen, seen
        assert "ls-alert" in shown(last)
        assert "<img" not in shown(last)

    open_it()


def test_a_study_of_extreme_numbers_gives_estimates_and_charts(study, pages, siege, tmp_path):
    """Real estimates of what the schema lets through, drawn on the whole page."""
    known = handlers(pages["shared"][0])
    [function] = [f for name, f in known.items() if name.startswith("open_study")]
    _, saved = study
    masks = [f"{n:08b}" for n in (255, 254, 253, 251, 247, 3, 1, 0)]

    @settings(CASES, max_examples=12)
    @given(
        st.lists(st.sampled_from((0.0, 1e-300, 1.0, 700.0, 1e6, None)), min_size=8, max_size=8),
        st.sampled_from((0.0, 1e-300, 3.0, 1e6)),
        st.sampled_from(("ratio", "log")),
    )
    def open_it(losses, full, utility):
        document = json.loads(saved.to_json())
        document["measurements"] |= {"masks": masks, "losses": losses, "full_loss": full}
        document["settings"] |= {"utility": utility, "surrogate": "ridge"}
        file = tmp_path / "study.json"
        file.write_text(json.dumps(document))
        with WATCH.watching(siege, tmp_path) as seen:
            steps = ask(function, {function.inputs[0]: str(file)})
        assert not seen, (seen, losses, full)
        assert any(isinstance(v, Session) for v in steps[-1].values())

    open_it()


@pytest.mark.parametrize("suffix", [".txt", ".md", ".jsonl"])
def test_uploaded_text_is_read_or_refused(siege, study, tmp_path, suffix):
    workspace, _ = study
    words = " ".join(WORDS * 3)
    line = st.one_of(
        st.builds(lambda text: json.dumps({"text": text}), HOSTILE_TEXTS | st.just(words)),
        HOSTILE_JSON.map(lambda value: json.dumps({"text": value})),
        st.text(max_size=30),
    )
    contents = st.one_of(
        st.binary(max_size=300),
        st.lists(line, max_size=4).map(lambda lines: "\n".join(lines).encode(errors="ignore")),
        st.text(max_size=30).map(lambda text: (text + words).encode(errors="ignore")),
    )
    file = tmp_path / f"book{suffix}"

    @settings(CASES, max_examples=130)
    @given(contents)
    @example(b'{"text": "\\ud800 ' + words.encode() + b'"}')
    def read(content):
        file.write_bytes(content)
        with WATCH.watching(siege, tmp_path) as seen, suppress(LayerShapError):
            blocks = load_text(
                str(file), workspace.model.tokenizer, blocks=1, block_length=4, seed=0
            )
            assert blocks.calibration.shape == blocks.held_out.shape == torch.Size([1, 4])
        assert not seen, seen

    read()


@pytest.mark.parametrize("name", [*PATHS, *MARKUP, "owner/name", "../models/bundled"])
def test_no_model_id_reaches_this_machine_where_others_look_in(
    pages, siege, tmp_path, monkeypatch, name
):
    """Folders that are called like ids stand in the working directory; they stay closed."""
    for folder in ("bundled", "owner/name"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LayerShapError, match="allows only these models"):
        ui.setup_view._model_choice(SHARED, ui.setup_view.FROM_HUB, name, "", "cpu", "auto")
    with pytest.raises(LayerShapError, match="allows only these data sets"):
        ui.setup_view._text_source(SHARED, ui.setup_view.TEXT_HUB, None, name)
    chosen = ui.setup_view._model_choice(SHARED, ui.setup_view.FROM_BUNDLE, name, "", "cpu", "auto")
    assert chosen.source == "bundled"


def test_the_bundled_model_is_not_a_folder_of_that_name(monkeypatch, tmp_path):
    (tmp_path / "bundled").mkdir()
    monkeypatch.chdir(tmp_path)
    asked = []
    monkeypatch.setattr("core.loading.bundled_folder", lambda report: asked.append(1) or Path("m"))
    folder, _ = core.loading._locate("bundled", None, lambda *_: None)
    assert asked
    assert folder == Path("m")


@pytest.mark.parametrize(
    "revision", ["../../../etc/passwd", "/etc", "a/../b", "~", "a\0", "..", "-x"]
)
def test_a_revision_is_never_a_path(revision):
    with pytest.raises(LayerShapError, match="is not a revision"):
        load_model("owner/name", revision=revision)


@settings(CASES, max_examples=200)
@given(HOSTILE_TEXTS)
def test_a_model_is_saved_under_a_plain_name_or_not_at_all(name):
    try:
        folder = ui.prune_view.saved_folder(name)
    except LayerShapError:
        return
    root = ui.prune_view.cache_root() / "pruned"
    assert folder.resolve().parent == root.resolve()
