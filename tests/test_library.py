"""The README's own example and command line, as written, on the real model."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_top_level_holds_exactly_what_it_should():
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    top = {name.split("/")[0] for name in listed}
    allowed = {"app.py", "ui", "core", "assets", "tests", "requirements.txt", "README.md"}
    assert {name for name in top if not name.startswith(".")} <= allowed | {"pyproject.toml"}


def test_the_engine_knows_no_screen():
    script = "import core, core.__main__, core.saving, core.footprint, sys; print(*sys.modules)"
    modules = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    assert not {"gradio", "plotly", "ui"} & set(modules)


def test_every_picture_and_setting_the_readme_names_exists():
    for picture in re.findall(r"\]\((assets/[^)]+)\)", README):
        assert (ROOT / picture).stat().st_size > 10_000
    source = "\n".join(p.read_text() for p in (ROOT / "ui").rglob("*.py"))
    source += (ROOT / "core" / "bundled.py").read_text()
    for variable in set(re.findall(r"LAYERSHAP_[A-Z_]+", README)):
        assert variable in source


@pytest.mark.bundled
def test_the_library_example_works_as_written(bundled_model):
    example, *_ = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    names: dict = {}
    # The example's budget takes minutes; everything else is as a reader would type it.
    exec(example.replace("evaluations=512", "evaluations=40"), names)
    result = names["result"]
    assert result.contributions.shape == (30,)
    assert result.intervals.shape == (30, 2)
    assert result.interactions.shape == (30, 30)
    masks, game = names["masks"], names["game"]
    assert game.value(masks)[0] == 1.0
    full, pruned = game.perplexity(masks)
    assert 20 < full < pruned < 100
    # The first layer is close to irreplaceable; the middle ones are not.
    assert np.argmax(result.contributions) in (0, 1, 11, 28, 29)


@pytest.mark.bundled
def test_bfloat16_is_within_one_percent_of_float32(bundled_model):
    from core import LayerGame, load_model, load_text

    exact = load_model("bundled", dtype="float32")
    text = load_text("bundled", exact.tokenizer, blocks=3, block_length=64)
    masks = np.ones((4, 30), dtype=bool)
    masks[1, 13] = masks[2, [7, 17]] = masks[3, [4, 13, 17, 22]] = False
    quick, true = (LayerGame(m, text.calibration).perplexity(masks) for m in (bundled_model, exact))
    np.testing.assert_allclose(quick, true, rtol=0.01)


@pytest.mark.bundled
def test_the_command_line_writes_a_study_that_opens(bundled_model, tmp_path):
    from core import Study

    out = tmp_path / "study.json"
    command = [sys.executable, "-m", "core", "analyze", "--evaluations", "20", "--blocks", "2"]
    command += ["--block-length", "32", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "Study of 20 masks" in done.stdout
    assert "20/20" in done.stderr
    study = Study.from_json(out.read_text())
    assert study.model.n_layers == 30
    assert json.loads(out.read_text())["settings"]["evaluations"] == 20


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--model", "/no/such/folder", "--out", "x.json"], "no folder at"),
        (["--out", "/no/such/folder/x.json"], "There is no folder /no/such/folder"),
        (["--evaluations", "0", "--model", "/none", "--out", "x.json"], "no folder at"),
    ],
)
def test_the_command_line_says_what_is_wrong_in_one_line(options, sentence):
    done = subprocess.run(
        [sys.executable, "-m", "core", "analyze", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("layershap: ")
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr
