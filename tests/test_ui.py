"""The dashboard through its API, as `gradio_client` and two people at once see it."""

import json
import re
import shutil
from html import unescape
from pathlib import Path

import pandas as pd
import pytest
import transformers
from gradio_client import Client, handle_file

from conftest import TINY_LAYERS
from core.errors import LayerShapError
from ui.opening import first_session
from ui.page import build
from ui.session import Session, StopSignals
from ui.settings import AppSettings
from ui.setup_view import TEXT_HUB, _text_source
from ui.status import alert, duration, guarded, progress_bar, streamed
from ui.strip import strip_value

LAYERS = TINY_LAYERS


@pytest.fixture(scope="module")
def address(cache):
    page = build(AppSettings(max_evaluations=500))
    _, url, _ = page.launch(prevent_thread_lock=True, quiet=True)
    yield url
    page.close()


@pytest.fixture
def visitor(address):
    return Client(address, verbose=False)


def load(visitor, source, text_file, **changes):
    settings = {
        "model_from": "Local folder",
        "model_source": str(source),
        "revision": "",
        "text_from": "Upload",
        "text_file": handle_file(str(text_file)) if text_file else None,
        "blocks": 3,
        "block_length": 16,
        "held_out_blocks": 4,
        **changes,
    }
    return visitor.predict(api_name="/load", **settings)


def said(result):
    """The words of the status line, wherever it is among the results."""
    parts = result if isinstance(result, (tuple, list)) else [result]
    [line] = [p for p in parts if isinstance(p, str) and re.search("ls-(news|alert|progress)", p)]
    return unescape(re.sub("<[^>]+>", "", line))


@pytest.fixture
def loaded(visitor, tiny_folder, text_file):
    assert "Ready" in said(load(visitor, tiny_folder, text_file))
    return visitor


def analyse(visitor, evaluations=40):
    return visitor.predict(evaluations=evaluations, strata="", api_name="/analyze")


def test_the_whole_path_from_loading_to_a_saved_cut(loaded, cache):
    result = analyse(loaded)
    assert said(result) == "Done: 40 masks measured. Every one is kept for next time."
    chosen = loaded.predict(count=2, api_name="/drop_least")
    dropped = [int(layer) for layer in chosen[0].split(",")]
    assert len(dropped) == 2
    assert "predicted calibration perplexity" in chosen[1]
    assert "passthrough" in chosen[2]
    compared = loaded.predict(text=chosen[0], api_name="/compare")
    assert "Measured" in said(compared)
    assert "Held-out perplexity" in compared[1]
    assert "…" not in compared[1]
    assert len(compared[3]["value"]["data"]) == 1
    full, pruned, _ = loaded.predict(prompt="w1 w2", count=8, api_name="/continue_prompt")
    assert full
    assert pruned
    where = said(loaded.predict(name="cut-1", api_name="/save")).removeprefix("Saved in ")
    assert Path(where).parent == cache / "pruned"
    saved = transformers.AutoModelForCausalLM.from_pretrained(where)
    assert saved.config.num_hidden_layers == LAYERS - 2
    assert "exists already" in said(loaded.predict(name="cut-1", api_name="/save"))


def test_attention_and_mlp_are_dropped_apart(visitor, tiny_folder, text_file, tmp_path, address):
    assert "Ready" in said(load(visitor, tiny_folder, text_file, players="sub-blocks"))
    analyse(visitor)
    chosen = visitor.predict(text="1a, 3 5M", api_name="/select")
    assert chosen[0] == "1a, 3, 5m"
    assert "predicted calibration perplexity" in chosen[1]
    assert "whole layers only" in chosen[2]
    assert "Measured" in said(visitor.predict(text=chosen[0], api_name="/compare"))
    _, status = visitor.predict(first="2a", second="2m", api_name="/pair")
    assert "Layers 2a and 2m" in said(status)
    assert "one part" in said(visitor.predict(first="2", second="2m", api_name="/pair"))
    names = ["LayerShap parts, by cache", "Leave one out", "Ascending contribution"]
    result = visitor.predict(methods=names, deepest=2, axis="key/value cache", api_name="/methods")
    assert "Done: 3 methods" in said(result)
    taken = visitor.predict(method=names[0], dropped=2, api_name="/take_set")
    assert [part[-1] for part in taken[0].split(", ")] == ["a", "a"]
    where = said(visitor.predict(name="parts", api_name="/save")).removeprefix("Saved in ")
    assert json.loads((Path(where) / "layershap.json").read_text())["dropped_layers"] == []
    study = visitor.predict(api_name="/export")[2]
    kept = shutil.copy(study["value"], tmp_path / "parts.json")
    other = Client(address, verbose=False)
    assert said(other.predict(path=handle_file(str(kept)), api_name="/open_study"))
    assert other.predict(text="1a, 3", api_name="/select")[0] == "1a, 3"


def test_the_best_set_for_a_target_is_found_and_selected(loaded):
    found = loaded.predict(
        rise=None, saved=20, resource="parameters", keep="0, 7", api_name="/find"
    )
    dropped = {int(layer) for layer in found[0].split(",")}
    assert len(dropped) >= 2
    assert not dropped & {0, 7}
    assert re.search(r"held-out perplexity .* → .* measured", said(found))
    for wrong, words in (
        ({"rise": None, "saved": None}, "Set a target"),
        ({"rise": 10, "saved": 99}, "choose more than 0 %"),
        ({"rise": 10, "saved": None, "keep": "x"}, "whole numbers"),
    ):
        asked = {"resource": "parameters", "keep": "", **wrong}
        assert words in said(loaded.predict(**asked, api_name="/find"))


def test_downloads_carry_what_made_them_and_a_study_opens_without_the_model(
    loaded, address, tmp_path
):
    analyse(loaded)
    loaded.predict(text="1, 3", api_name="/compare")
    _, about, study, contributions, interactions, measured, tried = loaded.predict(
        api_name="/export"
    )
    assert "transformers" in about
    document = json.loads(Path(study["value"]).read_text())
    assert document["model"]["name"] == "tiny"
    for file, rows in (
        (contributions, LAYERS),
        (interactions, LAYERS * (LAYERS - 1) // 2),
        (measured, 40),
        (tried, 1),
    ):
        assert Path(file["value"]).read_text().startswith("# created:")
        assert len(pd.read_csv(file["value"], comment="#")) == rows
    kept = shutil.copy(study["value"], tmp_path / "mine.json")
    other = Client(address, verbose=False)
    opened = other.predict(path=handle_file(str(kept)), api_name="/open_study")
    assert said(opened) == "Study opened."
    assert "opened from a saved study" in opened[1]
    selected = other.predict(text="1, 3", api_name="/select")
    assert "predicted calibration perplexity" in selected[1]
    assert "needs the model" in said(other.predict(text="1", api_name="/compare"))


def test_methods_are_compared_and_a_set_goes_to_the_prune_tab(loaded):
    result = loaded.predict(
        methods=["LayerShap search", "Leave one out"], deepest=3, api_name="/methods"
    )
    assert said(result) == "Done: 2 methods measured on held-out text."
    taken = loaded.predict(method="LayerShap search", dropped=2, api_name="/take_set")
    assert re.search(r"LayerShap search drops \d, \d: the set is in Prune", said(taken))
    assert re.fullmatch(r"\d, \d", taken[0])
    result = loaded.predict(methods=["Ascending contribution"], deepest=3, api_name="/methods")
    assert "press Analyse first" in said(result)


def test_two_visitors_do_not_see_each_others_selection(loaded, address, tiny_folder, text_file):
    other = Client(address, verbose=False)
    load(other, tiny_folder, text_file)
    loaded.predict(text="1", api_name="/select")
    other.predict(text="2, 4", api_name="/select")
    recipes = [
        v.predict(text=t, api_name="/select")[2] for v, t in ((loaded, "1"), (other, "2, 4"))
    ]
    assert recipes[0] != recipes[1]
    analyse(loaded)
    assert "Run the analysis first" in said(other.predict(count=1, api_name="/drop_least"))


def test_a_pair_is_measured_on_the_real_model(loaded):
    figure, status = loaded.predict(first=1, second=4, api_name="/pair")
    assert "four utilities measured" in status
    bars = json.loads(figure)["data"][0]
    assert bars["x"] == ["full model", "without 1", "without 4", "without both"]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda v: v.predict(evaluations=-5, strata="", api_name="/analyze"), "at least 1"),
        (lambda v: v.predict(evaluations=5000, strata="", api_name="/analyze"), "at most 500"),
        (lambda v: v.predict(evaluations=20, strata="9", api_name="/analyze"), "has 8"),
        (lambda v: v.predict(evaluations=20, strata="x", api_name="/analyze"), "whole numbers"),
        (lambda v: v.predict(text="8", api_name="/select"), "no layer 8"),
        (lambda v: v.predict(text="one", api_name="/select"), "whole numbers"),
        (lambda v: v.predict(text="0 1 2 3 4 5 6 7", api_name="/compare"), "No layers are kept"),
        (lambda v: v.predict(first=2, second=2, api_name="/pair"), "two different layers"),
        (lambda v: v.predict(first=2, second=77, api_name="/pair"), "no layer 77"),
        (lambda v: v.predict(prompt="", count=8, api_name="/continue_prompt"), "prompt is empty"),
        (lambda v: v.predict(name="../escape", api_name="/save"), "Name the folder"),
        (lambda v: v.predict(name="", api_name="/save"), "Name the folder"),
    ],
)
def test_wrong_input_is_one_sentence_and_the_app_goes_on(loaded, call, words):
    sentence = said(call(loaded))
    assert words in sentence
    assert "Traceback" not in sentence
    assert said(loaded.predict(text="1", api_name="/compare")).startswith("Measured")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_source": "/no/such/folder"}, "no folder"),
        ({"model_source": ""}, "Name the model"),
        ({"model_from": "GGUF file", "model_source": "/no/model.bin"}, "does not end in .gguf"),
        ({"model_from": "GGUF file", "model_source": "/no/model.gguf"}, "no GGUF file"),
        ({"blocks": 0, "held_out_blocks": 0}, "blocks is 0"),
        ({"block_length": 100_000}, "too short"),
        ({"block_length": 300}, "longer than this model's context"),
        ({"held_out_blocks": 1}, "at least blocks"),
    ],
)
def test_what_cannot_be_loaded_is_one_sentence(visitor, tiny_folder, text_file, changes, words):
    assert words in said(load(visitor, tiny_folder, text_file, **changes))


def test_an_upload_that_is_missing_is_one_sentence(visitor, tiny_folder):
    assert "Choose a text file" in said(load(visitor, tiny_folder, None))


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\xff", b"{}", b'{"format": "other"}'])
def test_a_file_that_is_no_study_is_one_sentence(visitor, tmp_path, content):
    file = tmp_path / "study.json"
    file.write_bytes(content)
    sentence = said(visitor.predict(path=handle_file(str(file)), api_name="/open_study"))
    assert "study" in sentence.lower() or "JSON" in sentence


def test_nothing_works_before_a_model_is_loaded_but_everything_says_so(visitor):
    assert "needs the model itself" in said(analyse(visitor))
    assert "needs the model itself" in said(visitor.predict(text="", api_name="/compare"))
    # The ready-made study is there already.
    assert "predicted calibration perplexity" in visitor.predict(text="13", api_name="/select")[1]
    with pytest.raises(LayerShapError, match="Load a model first"):
        first_session(AppSettings(allowed_models=("owner/other",))).need_workspace()


def test_stop_ends_an_analysis_and_keeps_what_was_measured(loaded):
    job = loaded.submit(evaluations=200, strata="7,6,5,4,3", api_name="/analyze")
    while not job.outputs():
        pass
    loaded.predict(api_name="/stop")
    assert said(job.result()).startswith(("Stopped", "Done"))
    assert "Done: 200" in said(
        loaded.predict(evaluations=200, strata="7,6,5,4,3", api_name="/analyze")
    )


def test_a_public_space_offers_only_what_its_owner_allows():
    closed = AppSettings.read([], {"SPACE_ID": "someone/space"})
    assert closed.allowed_models == ("bundled",)
    assert closed.host == "0.0.0.0"
    assert not closed.local_files
    with pytest.raises(LayerShapError, match="allows only these models: bundled"):
        closed.check_model("owner/other")
    opened = AppSettings.read([], {"SPACE_ID": "x", "LAYERSHAP_ALLOWED_MODELS": "bundled, a/b"})
    opened.check_model("a/b")
    assert AppSettings.read([], {}).local_files
    with pytest.raises(LayerShapError, match="LAYERSHAP_PORT"):
        AppSettings.read([], {"LAYERSHAP_PORT": "many"})


def test_names_are_shown_as_text_never_as_markup():
    assert "<script>" not in alert("<script>alert(1)</script>")
    assert "<b>" not in progress_bar("<b>", 0.5, "<b>")


def test_time_left_is_in_words():
    assert [duration(s) for s in (0.2, 40, 200, 4900)] == ["1 s", "40 s", "3 min", "1 h 22 min"]


def test_work_reports_its_stages_and_raises_its_errors():
    def fine(report):
        report("half way", 0.5)
        return 7

    assert list(streamed(fine)) == [("half way", 0.5), 7]

    def broken(report):
        raise LayerShapError("no")

    with pytest.raises(LayerShapError):
        list(streamed(broken))


def test_what_was_not_foreseen_is_logged_and_told_without_a_traceback(caplog):
    @guarded("status")
    def handler():
        yield {"a": 1}
        raise KeyError("secret detail")

    first, last = handler()
    assert first == {"a": 1}
    assert "not foreseen" in last["status"]
    assert "secret" not in last["status"]
    assert "secret detail" in caplog.text


def test_each_tab_has_its_own_stop():
    stops = StopSignals()
    mine, theirs = stops.begin("a"), stops.begin("b")
    assert stops.stop("a")
    assert mine.is_set()
    assert not theirs.is_set()
    assert not stops.stop("a")


def test_the_strip_is_empty_before_a_model_is_loaded():
    assert strip_value(Session()) == {"layers": [], "study": ""}


@pytest.mark.parametrize(
    "name", ["/etc", "/etc:default:train", "README.md", "core:x", "", "~", "~nobody", "x" * 9999]
)
def test_a_public_space_reads_no_file_of_its_own_machine(name):
    with pytest.raises(LayerShapError, match="only these data sets"):
        _text_source(AppSettings.read([], {"SPACE_ID": "x"}), TEXT_HUB, None, name)
