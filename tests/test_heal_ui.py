"""Healing, saving and pushing through the dashboard's API."""

import json
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import transformers
from gradio_client import Client
from huggingface_hub import ModelCard

from conftest import TINY_LAYERS, WORDS
from core.healing import HealingCurve
from test_ui import load, said
from ui.figures import healing_curve
from ui.page import build
from ui.settings import AppSettings

SETTINGS = {"steps": 30, "rank": 8, "learning_rate": 0.01}


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "book.txt"
    file.write_text(" ".join(WORDS[:12] * 300))
    return file


@pytest.fixture(scope="module")
def address(cache):
    page = build(AppSettings())
    _, url, _ = page.launch(prevent_thread_lock=True, quiet=True)
    yield url
    page.close()


@pytest.fixture
def loaded(address, tiny_folder, text_file):
    visitor = Client(address, verbose=False)
    assert "Ready" in said(load(visitor, tiny_folder, text_file))
    return visitor


def test_a_cut_is_healed_saved_and_pushed(loaded, cache, monkeypatch):
    loaded.predict(text="2, 5", api_name="/select")
    job = loaded.submit(**SETTINGS, api_name="/heal")
    status, figure, table = job.result()
    assert said(status).startswith("Healed in")
    assert "held-out perplexity" in said(status)
    assert "Held-out perplexity" in table
    assert "…" not in table
    assert "Without 2, 5" in table
    training, apart, best = json.loads(figure)["data"]
    assert training["name"] == "training text"
    assert apart["name"] == "blocks set apart"
    assert best["name"] == "best so far"
    assert any("ls-progress" in str(output) for output in job.outputs())
    where = Path(said(loaded.predict(name="healed-1", api_name="/save_healed"))[len("Saved in ") :])
    assert where.parent == cache / "pruned"
    saved = transformers.AutoModelForCausalLM.from_pretrained(where)
    assert saved.config.num_hidden_layers == TINY_LAYERS - 2
    assert "Healing" in ModelCard.load(where / "README.md").text
    asked = []
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_secret")
    monkeypatch.setattr(
        huggingface_hub.HfApi,
        "create_repo",
        lambda self, repo, **options: asked.append(options) or type("Made", (), {"repo_id": repo}),
    )
    monkeypatch.setattr(
        huggingface_hub.HfApi, "upload_folder", lambda self, **options: asked.append(options)
    )
    pushed = loaded.predict(name="healed-1", repo="me/small", private=True, api_name="/push")
    assert said(pushed) == "Pushed to https://huggingface.co/me/small"
    assert asked[0]["private"] is True
    assert asked[1]["folder_path"] == where


def test_stop_keeps_a_model_that_can_be_saved(loaded):
    loaded.predict(text="3", api_name="/select")
    job = loaded.submit(**{**SETTINGS, "steps": 2000}, api_name="/heal")
    while not any("steps" in str(output) for output in job.outputs()):
        assert not job.done()
    loaded.predict(api_name="/stop")
    assert said(job.result()[0]).startswith("Stopped after")
    assert "Saved in" in said(loaded.predict(name="stopped", api_name="/save_healed"))


def test_a_saved_cut_carries_what_was_measured_of_it(loaded):
    loaded.predict(text="1, 6", api_name="/select")
    unmeasured = said(loaded.predict(name="cut-a", api_name="/save"))
    assert "was not measured" in ModelCard.load(Path(unmeasured[9:]) / "README.md").text
    loaded.predict(text="1, 6", api_name="/compare")
    measured = said(loaded.predict(name="cut-b", api_name="/save"))
    card = ModelCard.load(Path(measured[9:]) / "README.md").text
    assert "Held-out perplexity" in card
    assert "book.txt" in card
    assert "passthrough" in card


def test_wrong_input_is_one_sentence(loaded):
    def status(**changes):
        result = loaded.predict(**{**SETTINGS, **changes}, api_name="/heal")
        return said(result)

    assert "Drop some layers first" in status()
    loaded.predict(text="1", api_name="/select")
    assert "Steps must be a whole number" in status(steps=20.5)
    assert "learning_rate is 0.0" in status(learning_rate=0)
    assert "no healed model yet" in said(loaded.predict(name="x", api_name="/save_healed"))
    for name, words in (("../x", "Name the folder"), ("nothing-there", "save one first")):
        result = loaded.predict(name=name, repo="me/x", private=True, api_name="/push")
        assert words in said(result)


def test_a_new_model_forgets_the_healed_one(loaded, tiny_folder, text_file):
    loaded.predict(text="2", api_name="/select")
    loaded.predict(**SETTINGS, api_name="/heal")
    load(loaded, tiny_folder, text_file)
    assert "no healed model yet" in said(loaded.predict(name="x", api_name="/save_healed"))


def test_text_that_changed_meanwhile_is_not_trained_on(tiny_folder, tmp_path, cache):
    from core.errors import LayerShapError
    from ui.workspace import ModelChoice, TextChoice, Workspaces

    file = tmp_path / "book.txt"
    file.write_text(" ".join(WORDS * 20))
    choice = TextChoice(str(file), blocks=3, block_length=16, held_out_blocks=4)
    workspace = Workspaces().open(ModelChoice(str(tiny_folder)), choice, lambda *_: None)
    assert workspace.training_blocks(20).shape == (20, 16)
    file.write_text(" ".join(reversed(WORDS * 20)))
    with pytest.raises(LayerShapError, match="has changed since"):
        workspace.training_blocks(20)


def test_visitors_of_a_public_space_cannot_push(cache, monkeypatch):
    def never(*_, **__):
        raise AssertionError("the owner's login was used")

    monkeypatch.setattr(huggingface_hub, "get_token", never)
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", never)
    folder = cache / "pruned" / "someones"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    page = build(AppSettings(allowed_models=("bundled",)))
    _, url, _ = page.launch(prevent_thread_lock=True, quiet=True)
    try:
        visitor = Client(url, verbose=False)
        result = visitor.predict(name="someones", repo="me/x", private=True, api_name="/push")
        assert "only where LayerShap runs on your own machine" in said(result)
    finally:
        page.close()


def test_the_curve_shows_every_step_and_the_state_that_is_kept():
    curve = HealingCurve((4.0, np.inf, 3.0), ((0, 4.2), (2, 3.1), (3, 3.4)))
    training, apart, best = healing_curve(curve, 20).data
    assert list(training.y) == [4.0, None, 3.0]
    assert list(apart.x) == [0, 2, 3]
    assert (list(best.x), list(best.y)) == ([2], [3.1])
    figure = healing_curve(HealingCurve(), 20)
    assert list(figure.data[2].x) == []
