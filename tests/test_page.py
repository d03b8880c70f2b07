"""What a visitor sees first and how views hang together, in a browser on the ready-made study."""

import json
import re
import urllib.request

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, expect

from browsing import OUTPUT, dashboard, layer, open_page, shot, tab
from ui import shelf

pytestmark = [pytest.mark.browser, pytest.mark.bundled]

LAYERS = 30
MEASURE_MS = 180_000
VIEWS = (
    "Layer contributions",
    "Interactions",
    "Methods",
    "Prune and compare",
    "Accuracy",
    "Heal and share",
    "Study",
)
WCAG = {"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"]}
# The bar or cell of a layer, in pixels of the window, from Plotly's own axes.
PLACE = """
([id, x, y]) => {
  const plot = document.querySelector(`#${id} .js-plotly-plot`);
  const { xaxis, yaxis } = plot._fullLayout;
  const box = plot.getBoundingClientRect();
  return [box.left + xaxis._offset + xaxis.c2p(x), box.top + yaxis._offset + yaxis.c2p(y)];
}
"""
# What goes to the server without the queue is half a second late.
SLOW_LINE = """
() => {
  const send = window.fetch;
  window.fetch = async (...request) => {
    if (String(request[0]).includes('/run/')) await new Promise((done) => setTimeout(done, 500));
    return send(...request);
  };
}
"""
TWO_AT_ONCE = """
[13, 4].forEach((n) => document.querySelector(`#layer-strip [data-player="${n}"]`).click())
"""


@pytest.fixture(scope="module")
def address(real_cache):
    with dashboard(real_cache, "page") as address:
        yield address


@pytest.fixture
def page(browser, address):
    visitor = open_page(browser, address)
    yield visitor
    assert visitor.errors == []
    visitor.context.close()


def press(page: Page, chart: str, x: float, y: float):
    """Move to a place of a chart, given on its axes, and press there."""
    page.locator(f"#{chart} .main-svg").first.scroll_into_view_if_needed()
    marked = page.locator("#layer-strip .ls-marked")
    page.mouse.move(0, 0)
    expect(marked).to_have_count(0)
    # Plotly looks where the pointer is a few times a second only, on a busy machine less often.
    for _ in range(50):
        left, top = page.evaluate(PLACE, [chart, x, y])
        for place in (left - 1, left):
            page.mouse.move(place, top)
            page.wait_for_timeout(200)
        if marked.count():
            break
    page.mouse.click(left, top)


def test_the_page_holds_a_finished_study_when_it_arrives(address):
    with urllib.request.urlopen(f"{address}/config") as answer:
        config = json.load(answer)
    values = {
        block["props"].get("elem_id"): block["props"].get("value") for block in config["components"]
    }
    [bars] = json.loads(values["bars"])["data"]
    assert len(bars["customdata"]) == LAYERS
    study = json.loads(shelf.READY_MADE.read_text())
    assert f"study of {len(study['measurements']['masks'])} masks" in values["model-line"]
    assert len(values["layer-strip"]["layers"]) == LAYERS


def test_the_ready_made_study_is_of_the_bundled_model_and_says_what_made_it():
    study = shelf.ready_made()
    assert study.model.source == "bundled"
    assert study.analysis.complete
    assert len(study.analysis.masks) >= 512
    assert study.comparisons
    assert study.versions["torch"]


def test_a_layer_is_marked_in_every_view(page):
    expect(page.locator("#bars .bars .point")).to_have_count(LAYERS)
    layer(page, 7).hover()
    for chart in ("bars", "heatmap"):
        expect(page.locator(f"#{chart} .ls-here")).to_have_count(1)
    order = page.evaluate(
        "JSON.parse(document.querySelector('#bars .js-plotly-plot')._fullLayout"
        ".meta ? JSON.stringify(document.querySelector('#bars .js-plotly-plot')"
        ".layout.meta.order) : 'null')"
    )
    page.mouse.move(*page.evaluate(PLACE, ["bars", 0.001, order.index(0)]))
    expect(layer(page, 0)).to_have_class(re.compile("ls-marked"))
    expect(layer(page, 7)).not_to_have_class(re.compile("ls-marked"))


def test_layers_are_dropped_by_pressing_a_bar_or_a_cell(page):
    expect(page.locator("#bars .bars .point")).to_have_count(LAYERS)
    order = page.evaluate("document.querySelector('#bars .js-plotly-plot').layout.meta.order")
    press(page, "bars", 0.1, order.index(0))
    expect(layer(page, 0)).to_have_attribute("aria-pressed", "true")
    press(page, "heatmap", 11, 29)
    expect(layer(page, 11)).to_have_attribute("aria-pressed", "true")
    for chart in ("bars", "heatmap"):
        expect(page.locator(f"#{chart} .ls-gone")).to_have_count(2)
    shot(page, "linked")
    tab(page, "Interactions")
    expect(page.locator("#interaction-heatmap .ls-gone")).to_have_count(4)
    expect(page.locator("#interaction-graph .ls-gone")).to_have_count(2)
    tab(page, "Prune and compare")
    expect(page.locator("#dropped textarea")).to_have_value("0, 11")


def test_of_quick_clicks_on_a_slow_line_none_is_lost(page):
    page.evaluate(SLOW_LINE)
    tab(page, "Prune and compare")
    for number in (13, 4, 20):
        layer(page, number).click()
    told = page.locator("#dropped textarea")
    outdated = page.locator('#predicted [aria-busy="true"]')
    expect(told).to_have_value("")
    expect(outdated).to_have_count(1)
    expect(told).to_have_value("4, 13, 20")
    expect(outdated).to_have_count(0)
    page.evaluate(TWO_AT_ONCE)
    expect(told).to_have_value("20")
    page.wait_for_timeout(2000)
    expect(told).to_have_value("20")


def test_a_pair_is_measured_by_pressing_its_cell(page):
    tab(page, "Interactions")
    expect(page.locator("#interaction-heatmap .heatmaplayer image")).to_have_count(1)
    press(page, "interaction-heatmap", 13, 17)
    expect(page.locator("#status")).to_contain_text(
        re.compile("Layers (13 and 17|17 and 13): four utilities"), timeout=MEASURE_MS
    )
    expect(page.locator("#pair .bars .point")).to_have_count(4)


def test_the_address_restores_view_and_selection(page, browser, address):
    layer(page, 13).click()
    layer(page, 4).click()
    tab(page, "Prune and compare")
    expect(page).to_have_url(re.compile(r"view=prune-and-compare"))
    expect(page).to_have_url(re.compile(r"drop=4%2C13"))
    expect(page.locator("#dropped textarea")).to_have_value("4, 13")
    other = open_page(browser, page.url)
    expect(other.get_by_role("tab", name="Prune and compare")).to_have_attribute(
        "aria-selected", "true"
    )
    for number in (4, 13):
        expect(layer(other, number)).to_have_attribute("aria-pressed", "true")
    expect(other.locator("#dropped textarea")).to_have_value("4, 13")
    assert other.locator("#predicted").inner_text() == page.locator("#predicted").inner_text()
    assert other.errors == []
    wrong = open_page(browser, f"{address}/?study={'0' * 32}")
    expect(wrong.locator("#layer-strip .ls-player")).to_have_count(LAYERS)
    for visitor in (other, wrong):
        visitor.context.close()


def test_charts_download_as_pictures(page):
    expect(page.locator("#bars .bars .point")).to_have_count(LAYERS)
    layer(page, 13).click()
    starts = {"png": b"\x89PNG\r\n", "svg": b"<svg"}
    for kind, start in starts.items():
        button = page.get_by_role("button", name=f"Download What each layer is worth as {kind}")
        with page.expect_download() as download:
            button.click()
        assert download.value.suggested_filename == f"bars.{kind}"
        kept = OUTPUT / f"bars.{kind}"
        download.value.save_as(kept)
        assert kept.read_bytes().startswith(start)
    drawn = kept.read_text()
    assert "layer 13" in drawn
    assert "rgb(110, 118, 132)" in drawn  # what is dropped is marked in the picture as well


def test_the_guide_leads_on_and_can_be_hidden(page):
    guide = page.locator("#guide")
    expect(guide.locator(".ls-done")).to_have_count(2)
    guide.get_by_role("button", name=re.compile("Load")).click()
    expect(page.get_by_label("Calibration blocks")).to_be_visible()
    guide.get_by_role("button", name=re.compile("Prune")).click()
    expect(page.locator("#measure")).to_be_visible()
    expect(layer(page, 0)).to_be_focused()
    guide.get_by_role("button", name="Hide this guide").click()
    expect(guide).to_be_hidden()
    page.reload()
    expect(page.locator("#status")).to_contain_text("Ready")
    expect(guide).to_be_hidden()


@pytest.mark.parametrize(("width", "scheme"), [(1440, "light"), (400, "dark")])
def test_every_view_passes_an_accessibility_audit(browser, address, width, scheme):
    page = open_page(browser, address, width=width, scheme=scheme)
    layer(page, 13).click()
    for view in VIEWS:
        tab(page, view)
        page.wait_for_timeout(1500)
        found = Axe().run(page, options=WCAG).response["violations"]
        assert [(v["id"], [n["target"] for n in v["nodes"]]) for v in found] == [], view
        overflow = page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
        assert overflow <= 0, view
        shot(page, f"{view.lower().replace(' ', '-')}-{width}-{scheme}")
    assert page.errors == []
    page.context.close()
