"""The dashboard in a real browser, on the real 30-layer model: a user's whole path."""

import json
import re
import subprocess
import sys

import pytest
from playwright.sync_api import Page, expect

from browsing import dashboard, layer, open_page, shifted, shot, tab
from ui import shelf

pytestmark = [pytest.mark.browser, pytest.mark.bundled]

LAYERS = 30
EVALUATIONS = 32
ANALYSE_MS, MEASURE_MS, HEAL_MS = 400_000, 180_000, 900_000
# What a page may move by itself while it is used; a tenth is what the web calls good.
SHIFT = 0.02
RELOAD = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
inputs = tokenizer("We the people", return_tensors="pt")
written = model.generate(**inputs, max_new_tokens=5, min_new_tokens=5, do_sample=False)
print(model.config.num_hidden_layers, written.shape[1] - inputs["input_ids"].shape[1])
"""


@pytest.fixture(scope="module")
def address(real_cache):
    with dashboard(real_cache) as address:
        yield address


def analyse(page: Page):
    page.locator("#evaluations input").fill(str(EVALUATIONS))
    page.locator("#analyse").click()


@pytest.fixture(scope="module")
def page(browser, address):
    """One visitor's page, shared by the tests below, which follow one another."""
    visitor = open_page(browser, address)
    yield visitor
    assert visitor.errors == []


def test_the_page_opens_with_the_real_model(page):
    expect(page.locator("#model-line")).to_contain_text("30 layers")
    expect(page.locator("#layer-strip .ls-layer")).to_have_count(LAYERS)
    shot(page, "start")


def test_an_analysis_shows_progress_stops_and_goes_on(page):
    analyse(page)
    bar = page.get_by_role("progressbar")
    expect(page.locator("#status")).to_contain_text(f"of {EVALUATIONS} masks", timeout=60_000)
    expect(bar).to_have_attribute("aria-valuenow", re.compile(r"\d+"))
    expect(page.locator("#status")).to_contain_text("left")
    page.locator("#stop").click()
    expect(page.locator("#status")).to_contain_text("Stopped", timeout=60_000)
    expect(page.locator("#status")).to_contain_text("measured and kept")
    moved = shifted(page)
    analyse(page)
    expect(page.locator("#status")).to_contain_text(f"Done: {EVALUATIONS}", timeout=ANALYSE_MS)
    expect(page).to_have_url(re.compile(r"study=[0-9a-f]{32}"))
    assert shifted(page) - moved < SHIFT
    expect(page.locator("#model-line")).to_contain_text(
        f"study of {EVALUATIONS} masks, seed 0, measured here"
    )


def test_its_link_opens_it_for_somebody_else(page, browser):
    other = open_page(browser, page.url)
    expect(other.locator("#model-line")).to_contain_text(f"study of {EVALUATIONS} masks")
    expect(other.locator("#scatter .scatterlayer .point")).to_have_count(EVALUATIONS)
    assert shifted(other) < SHIFT
    assert other.errors == []
    other.context.close()


def test_each_chart_holds_what_it_should(page):
    expect(page.locator("#bars .bars .point")).to_have_count(LAYERS, timeout=30_000)
    expect(page.locator("#bars .errorbar")).to_have_count(LAYERS)
    expect(page.locator("#scatter .scatterlayer .point")).to_have_count(EVALUATIONS)
    expect(page.locator("#heatmap .heatmaplayer image")).to_have_count(1)
    expect(page.locator("#verdict")).to_contain_text("never saw")
    assert "contribution" in layer(page, 0).get_attribute("aria-label")
    shot(page, "contributions")
    page.get_by_label("Shapley value (all sizes)").check()
    expect(page.get_by_text("No masks this small were measured")).to_be_visible(timeout=20_000)


def test_interactions_and_the_measured_pair(page):
    tab(page, "Interactions")
    expect(page.locator("#interaction-heatmap .heatmaplayer image")).to_have_count(1)
    expect(page.locator("#interaction-graph .js-line")).to_have_count(12, timeout=20_000)
    expect(page.locator("#interaction-graph .point")).to_have_count(LAYERS)
    page.locator('#pairs [data-row="0"]').first.click()
    expect(page.locator("#status")).to_contain_text("four utilities measured", timeout=MEASURE_MS)
    expect(page.locator("#pair .bars .point")).to_have_count(4)
    page.get_by_label("Second layer").fill("17")
    page.locator("#measure-pair").click()
    expect(page.locator("#status")).to_contain_text("and 17: four utilities", timeout=MEASURE_MS)
    shot(page, "interactions")


def test_methods_are_compared_and_one_set_is_tried(page):
    tab(page, "Methods")
    for name in ("LayerShap search", "Leave one out", "Angular distance"):
        page.get_by_label(name).uncheck()
    page.get_by_label("Last layers").check()
    page.get_by_label("number input for Up to how many layers dropped").fill("2")
    expect(page.locator("#methods-cost")).to_contain_text("At most 1 evaluations to choose")
    page.locator("#compare-methods").click()
    expect(page.locator("#status")).to_contain_text("Done: 2 methods", timeout=MEASURE_MS)
    lines = page.locator("#methods-chart .scatterlayer .trace")
    expect(lines).to_have_count(3)
    expect(page.locator("#methods-map")).to_contain_text("Last layers")
    shot(page, "methods")
    page.locator("#method input").click()
    page.get_by_role("option", name="Last layers").click()
    page.locator("#take-set").click()
    expect(page.locator("#status")).to_contain_text("Last layers drops 28, 29")
    expect(page.locator(".ls-dropped")).to_have_text(["28", "29"])
    tab(page, "Prune and compare")
    page.get_by_role("button", name="Keep all layers").click()
    expect(page.locator(".ls-dropped")).to_have_count(0)


def test_layers_are_dropped_by_mouse_and_by_keyboard(page):
    tab(page, "Prune and compare")
    layer(page, 13).click()
    expect(layer(page, 13)).to_have_attribute("aria-pressed", "true")
    expect(page.locator("#dropped textarea")).to_have_value("13")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Space")
    expect(layer(page, 15)).to_have_attribute("aria-pressed", "true")
    expect(page.locator("#dropped textarea")).to_have_value("13, 15")
    page.keyboard.press("Home")
    expect(layer(page, 0)).to_be_focused()
    page.keyboard.press("End")
    expect(layer(page, LAYERS - 1)).to_be_focused()
    expect(page.locator("#predicted")).to_contain_text("predicted calibration perplexity")
    assert "dropped" in layer(page, 15).get_attribute("aria-label")
    for number in (20, 21, 22):
        layer(page, number).click(delay=0)
    expect(page.locator("#dropped textarea")).to_have_value("13, 15, 20, 21, 22")
    for number in (20, 21, 22):
        layer(page, number).click(delay=0)
    expect(page.locator("#dropped textarea")).to_have_value("13, 15")


def test_a_cut_is_measured_and_listed(page):
    page.locator("#measure").click()
    expect(page.locator("#status")).to_contain_text("Measured.", timeout=MEASURE_MS)
    rows = page.locator("#figures tbody tr")
    expect(rows).to_have_count(7)
    expect(page.locator("#figures")).to_contain_text("Without 13, 15")
    full, pruned = rows.nth(0).locator("td").all_inner_texts()[:2]
    assert 10 < float(full) < float(pruned) < 1000
    expect(page.locator("#tried-chart .scatterlayer .point")).to_have_count(
        3 * (1 + len(shelf.ready_made().comparisons))
    )
    page.locator("#drop-least").click()
    expect(page.locator("#dropped textarea")).not_to_have_value("13, 15")
    page.locator("#continue").click()
    expect(page.locator("#status")).to_contain_text("greedy", timeout=MEASURE_MS)
    expect(page.locator("#pruned-text")).to_contain_text("Without ")
    assert page.locator("#pruned-text textarea").input_value().strip()
    shot(page, "prune")


def test_the_saved_cut_loads_in_a_fresh_process(page, real_cache):
    page.locator("#save-name textarea, #save-name input").fill("browser-cut")
    page.locator("#save").click()
    expect(page.locator("#status")).to_contain_text("Saved in", timeout=MEASURE_MS)
    folder = real_cache / "pruned" / "browser-cut"
    expect(page.locator("#recipe textarea")).to_have_value(re.compile("passthrough"))
    output = subprocess.run(
        [sys.executable, "-c", RELOAD, str(folder)], capture_output=True, text=True, check=True
    ).stdout
    assert output.split() == ["27", "5"]


def test_the_cut_is_healed_and_saved(page, real_cache):
    tab(page, "Heal and share")
    page.get_by_label("number input for Steps").fill("10")
    page.locator("#heal").click()
    expect(page.locator("#status")).to_contain_text("of 10 steps", timeout=MEASURE_MS)
    expect(page.locator("#status")).to_contain_text("Healed in", timeout=HEAL_MS)
    cells = page.locator("#healed-figures tbody tr").nth(0).locator("td").all_inner_texts()
    full, pruned, healed = map(float, cells)
    assert full < pruned
    assert healed < pruned
    expect(page.locator("#healing-chart .scatterlayer .trace")).to_have_count(3)
    page.locator("#save-healed").click()
    expect(page.locator("#status")).to_contain_text("Saved in", timeout=MEASURE_MS)
    folder = real_cache / "pruned" / "healed-model"
    output = subprocess.run(
        [sys.executable, "-c", RELOAD, str(folder)], capture_output=True, text=True, check=True
    ).stdout
    assert output.split() == ["27", "5"]
    shot(page, "heal")
    tab(page, "Prune and compare")


def test_wrong_input_is_one_sentence_in_the_page(page):
    dropped = page.locator("#dropped textarea")
    for text, sentence in (("99", "There is no layer 99"), ("x", "must be whole numbers")):
        dropped.fill(text)
        dropped.press("Enter")
        expect(page.locator("#status [role=alert]")).to_contain_text(sentence)
    page.locator("#evaluations input").fill("-5")
    page.locator("#analyse").click()
    expect(page.locator("#status [role=alert]")).to_contain_text("must be at least 1")
    page.locator("#keep-all").click()
    expect(dropped).to_have_value("")


def test_a_study_is_downloaded_and_opened_by_somebody_else(page, browser, address, tmp_path):
    tab(page, "Study")
    button = page.locator("#get-study-json")
    expect(button).to_be_enabled(timeout=30_000)
    with page.expect_download() as download:
        button.click()
    saved = tmp_path / "study.json"
    download.value.save_as(saved)
    assert len(json.loads(saved.read_text())["measurements"]["masks"]) == EVALUATIONS
    expect(page.locator("#cache")).to_contain_text("evaluations")
    shot(page, "study")
    other = open_page(browser, address, width=400, height=850, scheme="dark")
    expect(layer(other, 13)).to_have_attribute("aria-pressed", "false")
    tab(other, "Study")
    other.locator("#open-study input[type=file]").set_input_files(saved)
    expect(other.locator("#status")).to_contain_text("Study opened", timeout=60_000)
    expect(other.locator("#model-line")).to_contain_text("opened from a saved study")
    shot(other, "study-narrow-dark")
    assert other.errors == []


def test_dark_and_narrow_pages_show_the_same_charts(browser, address):
    for width, scheme in ((1440, "dark"), (400, "light")):
        other = open_page(browser, address, width=width, scheme=scheme)
        analyse(other)
        expect(other.locator("#status")).to_contain_text("Done", timeout=ANALYSE_MS)
        expect(other.locator("#bars .bars .point")).to_have_count(LAYERS, timeout=30_000)
        overflow = other.evaluate("document.documentElement.scrollWidth - window.innerWidth")
        assert overflow <= 0
        shot(other, f"contributions-{width}-{scheme}")
        assert other.errors == []
