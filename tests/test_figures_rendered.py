"""Every figure really drawn, in a browser: nothing overlaps, nothing is cut off, all is legible."""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import plotly
import pytest
from playwright.sync_api import sync_playwright

import made_up
from browsing import CHROMIUM, FLAGS
from colours import DARK, LIGHT, contrast, rgba
from core.players import Players
from ui import shelf
from ui.figures import (
    accuracy_chart,
    agreement_heatmap,
    comparison_chart,
    contribution_bars,
    contribution_heatmap,
    empty_figure,
    healing_curve,
    interaction_graph,
    interaction_heatmap,
    methods_chart,
    methods_cost,
    methods_map,
    pair_utilities,
    surrogate_scatter,
)
from ui.figures.methods import AXES, BY_DEPTH

pytestmark = pytest.mark.browser

ROOT = Path(__file__).parents[1]
OUTPUT = Path(__file__).parent / "output" / "figures"
WIDTHS = (360, 700, 1200)
PLAYERS = {f"{n} layers": Players("blocks", n) for n in (12, 30, 80, 126)}
PLAYERS["30 layers in parts"] = Players("sub-blocks", 30)
# Boxes of text have some air above and below the letters.
TOLERANCE = 1.5
LEAST_CONTRAST = 4.5
SCRIPT = """
async ([figures, widths]) => {
  document.querySelectorAll(".js-plotly-plot").forEach(Plotly.purge);
  document.body.replaceChildren();
  const boxOf = element => {
    const box = element.getBoundingClientRect();
    return [box.left, box.top, box.right, box.bottom];
  };
  const measured = [];
  for (const [name, figure] of Object.entries(figures)) for (const width of widths) {
    const sheet = document.createElement("figure");
    sheet.innerHTML = `<figcaption>${name}, ${width} px</figcaption><div></div>`;
    document.body.append(sheet);
    const chart = sheet.querySelector("div");
    chart.style.width = width + "px";
    const { data, layout: given } = structuredClone(figure);
    await Plotly.newPlot(chart, data, given, { displayModeBar: false });
    const root = boxOf(chart);
    const place = box => [box[0] - root[0], box[1] - root[1], box[2] - root[0], box[3] - root[1]];
    const found = selector => [...chart.querySelectorAll(selector)]
      .filter(element => element.getBoundingClientRect().width > 0)
      .map(element => ({
        text: element.textContent,
        box: place(boxOf(element)),
        turned: /rotate\\((?!0)/.test(element.getAttribute("transform") ?? ""),
      }));
    // Text in several lines is not a block: others may stand beside its shorter ones.
    const lines = selector => [...found(`${selector}:not(:has(tspan))`),
      ...found(`${selector} tspan.line`)];
    const layout = chart._fullLayout;
    const parts = {
      plot: layout.xaxis.visible ? [{
        text: "plot area",
        box: [
          layout.xaxis._offset, layout.yaxis._offset,
          layout.xaxis._offset + layout.xaxis._length, layout.yaxis._offset + layout.yaxis._length,
        ],
      }] : [],
      xticks: found(".xtick text"), yticks: found(".ytick text"),
      titles: found(".g-xtitle, .g-ytitle"),
      legends: found(".legend"), entries: found(".legendtext"), scrolled: found(".scrollbar"),
      bars: found(".colorbar"), barTicks: lines(".colorbar .cbaxis text"),
      barFills: found(".colorbar .cbfill"), barTitles: found(".colorbar .cbtitle text"),
      annotations: found(".annotation"), values: found(".bartext, .textpoint text"),
      texts: found("svg text"),
    };
    const hovers = [];
    chart.data.forEach((trace, curveNumber) => {
      if (trace.hoverinfo === "skip" || !trace.x?.length || trace.type === "heatmap") return;
      if (curveNumber % 5) return;
      for (const pointNumber of [0, trace.x.length - 1]) {
        Plotly.Fx.hover(chart, [{ curveNumber, pointNumber }]);
        hovers.push(...found(".hovertext"));
        Plotly.Fx.unhover(chart);
      }
    });
    measured.push({ name, width, height: root[3] - root[1], parts, hovers });
  }
  return measured;
}
"""
COLOURS_OF_TEXT = """
() => [...document.querySelectorAll(".js-plotly-plot svg text")]
  .filter(text => text.getBoundingClientRect().width > 0)
  .map(text => [text.textContent, getComputedStyle(text).fill, getComputedStyle(text).opacity])
"""


def figures(kind):
    """The figures of one kind, by name, over depths and awkward results."""
    layers = PLAYERS.items()
    if kind == "bars":
        return {n: contribution_bars(made_up.contributions(p), p) for n, p in layers}
    if kind == "bars by depth":
        return {
            name: contribution_bars(made_up.contributions(p), p, sort="depth")
            for name, p in list(layers)[1::2]
        }
    if kind == "heatmap":
        drawn = {n: contribution_heatmap(made_up.contributions(p), p) for n, p in layers}
        thirty = PLAYERS["30 layers"]
        drawn["all sizes"] = contribution_heatmap(made_up.contributions(thirty, 30), thirty)
        return drawn
    if kind == "scatter":
        drawn = {name: surrogate_scatter(made_up.analysis(p)) for name, p in list(layers)[2:]}
        for decades in (0.1, 1, 3):
            analysis = made_up.analysis(PLAYERS["12 layers"], decades)
            drawn[f"{decades} decades"] = surrogate_scatter(analysis)
        return drawn
    if kind == "interactions":
        return {name: interaction_heatmap(made_up.interactions(p), p) for name, p in layers}
    if kind == "arcs":
        return {n: interaction_graph(made_up.interactions(p), p) for n, p in layers}
    if kind == "pair":
        return {
            "apart": pair_utilities("3", "9", (1.0, 0.8, 0.7, 0.3)),
            "as added": pair_utilities("27m", "28a", (1.0, 0.82, 0.73, 0.551)),
            "in vain": pair_utilities("120", "121", (1.0, 1.02, 0.0004, 0.00001)),
        }
    if kind == "tried":
        drawn = {name: comparison_chart(made_up.comparisons(p), p) for name, p in layers}
        return drawn | {"nothing": comparison_chart([])}
    if kind == "accuracy":
        return {f"{k} tasks": accuracy_chart(made_up.accuracies(k)) for k in (1, 8)}
    if kind == "healing":
        return {f"{n} of 200": healing_curve(made_up.healing(n), 200) for n in (0, 7, 200)}
    if kind == "empty":
        return {"words": empty_figure("Press Analyse: contributions appear here while measuring.")}
    depths = {name: max(3, p.n_layers // 3) for name, p in layers}
    compared = {name: made_up.methods(p, depths[name]) for name, p in layers}
    if kind == "methods":
        drawn = {name: methods_chart(comparison) for name, comparison in compared.items()}
        others = [axis for axis in AXES if axis != BY_DEPTH]
        drawn |= {axis: methods_chart(compared["30 layers"], axis) for axis in others}
        measured = shelf.ready_made().methods
        for least in range(len(measured.results)):
            few = replace(measured, results=measured.results[least:])
            drawn[f"measured, {len(few.results)} of them"] = methods_chart(few)
        return drawn
    drawing = {"map": methods_map, "cost": methods_cost, "agreement": agreement_heatmap}[kind]
    if kind == "agreement":  # the same for any number of layers
        del compared["12 layers"], compared["80 layers"], compared["126 layers"]
    return {name: drawing(comparison, depths[name]) for name, comparison in compared.items()}


KINDS = (
    "bars",
    "bars by depth",
    "heatmap",
    "scatter",
    "interactions",
    "arcs",
    "pair",
    "tried",
    "accuracy",
    "healing",
    "empty",
    "methods",
    "map",
    "cost",
    "agreement",
)


@pytest.fixture(scope="module")
def browser():
    OUTPUT.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def page(browser):
    sheet = browser.new_page(viewport={"width": sum(WIDTHS) + 120, "height": 900})
    sheet.set_content("<!doctype html><html><body></body></html>")
    sheet.add_style_tag(path=ROOT / "assets" / "layershap.css")
    sheet.add_style_tag(
        content=f"""
        body {{ --body-text-color: #1f2937; background: {LIGHT}; margin: 8px; display: flex;
          flex-wrap: wrap; font: 12px system-ui }}
        .dark body {{ --body-text-color: #f1f5f9; background: {DARK}; color: #a7b0bf }}
        figure {{ margin: 8px }}
        """
    )
    sheet.add_script_tag(path=Path(plotly.__file__).parent / "package_data" / "plotly.min.js")
    return sheet


@pytest.mark.parametrize("kind", KINDS)
def test_every_figure_is_legible_at_every_width_and_in_both_schemes(page, kind):
    drawings = {name: drawing(figure) for name, figure in figures(kind).items()}
    measured = page.evaluate(SCRIPT, [drawings, WIDTHS])
    faults = [fault for drawn in measured for fault in faults_of(drawn)]
    name = kind.replace(" ", "-")
    for scheme, background in (("light", LIGHT), ("dark", DARK)):
        page.evaluate(f"document.documentElement.classList.toggle('dark', {scheme == 'dark':d})")
        for text, fill, opacity in page.evaluate(COLOURS_OF_TEXT):
            ratio = contrast(rgba(fill)[:3], background)
            if ratio < LEAST_CONTRAST or float(opacity) < 1:
                faults.append(f"{scheme}: {text!r} stands out by {ratio:.1f} : 1 only")
        path = OUTPUT / f"{name}-{scheme}.jpg"
        page.screenshot(path=path, full_page=scheme == "light", type="jpeg")
    assert not faults, "\n".join(faults)


def drawing(figure):
    """What Plotly is given, without what heatmaps show under the pointer: megabytes of text."""
    for trace in figure.data:
        if trace.type == "heatmap":
            trace.customdata = None
    return json.loads(figure.to_json())


def faults_of(drawn):
    """What is wrong with one figure, in words."""
    where = f"{drawn['name']} at {drawn['width']} px: "
    parts, faults = drawn["parts"], []
    for text in parts["texts"] + drawn["hovers"]:
        left, top, right, bottom = text["box"]
        if min(left, top) < -1 or right > drawn["width"] + 1 or bottom > drawn["height"] + 1:
            faults.append(f"{text['text']!r} is cut off: {text['box']}")
    for kind in ("xticks", "yticks", "barTicks", "entries", "values", "annotations"):
        faults += overlaps(itertools.combinations(parts[kind], 2))
    faults += [f"{tick['text']!r} is turned" for tick in parts["xticks"] if tick["turned"]]
    apart = ("plot", "titles", "legends", "bars", "annotations")
    faults += overlaps(itertools.combinations([part for kind in apart for part in parts[kind]], 2))
    ticks = parts["xticks"] + parts["yticks"]
    beside = [part for kind in apart for part in parts[kind]]
    faults += overlaps(itertools.product(ticks, beside))
    faults += overlaps(itertools.product(parts["xticks"], parts["yticks"]))
    words = parts["barTicks"] + parts["barTitles"]
    faults += overlaps(itertools.product(parts["barFills"], words))
    faults += overlaps(itertools.product(parts["barTicks"], parts["barTitles"]))
    faults += overlaps(itertools.product(parts["values"], ticks + parts["annotations"]))
    faults += ["the legend scrolls" for _ in parts["scrolled"]]
    for plot in parts["plot"]:
        left, top, right, bottom = plot["box"]
        if right - left < 0.5 * min(drawn["width"], drawn["height"]) or bottom - top < 100:
            faults.append(f"only {right - left:.0f} x {bottom - top:.0f} px are left to draw in")
    return [where + fault for fault in faults]


def overlaps(pairs):
    return [
        f"{first['text']!r} overlaps {second['text']!r}"
        for first, second in pairs
        if all(
            min(first["box"][axis + 2], second["box"][axis + 2])
            - max(first["box"][axis], second["box"][axis])
            > TOLERANCE
            for axis in (0, 1)
        )
    ]
