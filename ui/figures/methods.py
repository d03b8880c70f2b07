"""Ways to choose layers, side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from core.methods import CONTRIBUTIONS, KINDS, PARTS, MethodResult, MethodsComparison
from core.resources import RESOURCES, Resource
from core.selection import METHOD
from ui.figures.style import (
    ACCENT,
    FREE_LOG_AXIS,
    LEGEND,
    QUIET,
    base_figure,
    cell_gap,
    layer_ticks,
    number,
    player_ticks,
    wrapped,
)

CHART_HOW_TO_READ = (
    "Lower is better: perplexity on held-out text, which chose none of the sets. Hover for the set "
    "and for the evaluations it took; click a method in the legend to hide it, and the scale "
    "follows. Speed-up is predicted from the measured time of the model's "
    "parts; Prune and compare measures it."
)
MAP_HOW_TO_READ = (
    "One row per method, best first, with its held-out perplexity: filled squares are what it "
    "drops; of attention and MLP apart, "
    "a is attention and m the MLP."
)
COST_HOW_TO_READ = (
    "Down and to the left is better: a lower perplexity for fewer evaluations of the model. "
    "Symbols are those of the chart above; a click in the legend hides one."
)
AGREEMENT_HOW_TO_READ = (
    "Of what two methods drop, how many percent they have in common; a column's number is that of "
    "its method's row."
)
# What the depth of a cut can be measured by: axis title, and how a saved share is shown.
AXES: dict[str, tuple[str, Callable[[float], float]]] = {
    "layers dropped": ("layers dropped, or as much saved", lambda share: share),
    "parameters": ("parameters saved (%)", lambda share: 100 * share),
    "key/value cache": ("key/value cache saved (%)", lambda share: 100 * share),
    "speed": ("predicted speed-up of writing (times)", lambda share: 1 / max(1 - share, 1e-3)),
}
BY_DEPTH, *_ = AXES
RESOURCE_OF: dict[str, Resource] = {
    "parameters": "parameters",
    "key/value cache": "cache",
    "speed": "time",
}
# A method looks the same whatever others are shown. All colours are seen on white and on a dark
# page (3 : 1); ten of them cannot be apart for every colour blindness, so the symbols are.
OTHERS = (*(name for name in KINDS if name != METHOD), CONTRIBUTIONS)
COLOURS = (
    "#c2570c",
    "#009e73",
    "#a6559d",
    "#b8860b",
    "#0e8a9c",
    "#d1699f",
    "#8b93a1",
    "#a8674a",
    "#7c8a1c",
    "#d14343",
)
SYMBOLS = (
    "square",
    "diamond",
    "triangle-up",
    "triangle-down",
    "cross",
    "x",
    "star",
    "pentagon",
    "hourglass",
    "bowtie",
)
OUR_SYMBOLS = {"parameters": "circle-open", "cache": "circle-x-open", "time": "circle-cross-open"}
DASHES = {"parameters": "dash", "cache": "dot", "time": "dashdot"}
# Beyond so many depths not every one has its symbol.
MOST_SYMBOLS = 16
# Methods that evaluate nothing stand at the left end of the logarithmic axis.
NO_EVALUATIONS = 0.4
EVALUATION_TICKS = (1, 10, 100, 1000, 10_000, 100_000)
# A row has room for a name in two lines; a pixel less and they touch the next row's.
ROW_PIXELS, MARGIN_PIXELS = 34, 90
NAME_CHARACTERS = 21
# On a phone the legend has a row for every method.
LEGEND_PIXELS = 15
# Pale, so that the numbers stay readable on it, on light and dark pages.
AGREEMENT_SCALE = [[0.0, "rgba(47, 111, 223, 0)"], [1.0, "rgba(47, 111, 223, 0.20)"]]


def methods_chart(comparison: MethodsComparison, axis: str = BY_DEPTH) -> go.Figure:
    """Held-out perplexity, logarithmic, against what is saved; one line per method.

    `axis` is one of `AXES`.
    """
    title, _ = AXES[axis]
    figure = base_figure(
        height=360 + LEGEND_PIXELS * len(comparison.results),
        title_x=title,
        title_y="← better   held-out perplexity, log",
    )
    depths = list(range(1, comparison.deepest + 1))
    places = {
        r.frontier.method: [_place(comparison, axis, r, depth) for depth in depths]
        for r in comparison.results
    }
    start = 1.0 if axis == "speed" else 0.0
    end = max((max(p) for p in places.values()), default=start + 1) * 1.04
    full = float(np.exp(comparison.full_held_out))
    figure.add_scatter(
        name="full model",
        x=[start, end],
        y=[full, full],
        mode="lines",
        line={"color": QUIET, "dash": "dot", "width": 1.5},
        hovertemplate=f"full model, held-out {number(full)}<extra></extra>",
    )
    for result in sorted(comparison.results, key=_is_ours):
        method = result.frontier.method
        ours = _is_ours(result)
        colour, symbol = _style(method)
        figure.add_scatter(
            name=method,
            x=places[method],
            y=_perplexities(result.held_out),
            mode="lines+markers",
            line={
                "color": colour,
                "width": 3 if ours else 1.5,
                "dash": DASHES.get(PARTS.get(method, ""), "solid"),
            },
            marker={
                "size": 8 if ours else 6,
                "symbol": symbol,
                "maxdisplayed": MOST_SYMBOLS,
            },
            meta={"sets": [list(chosen) for chosen in result.frontier.sets]},
            text=[_hover(comparison, result, k) for k in depths],
            hovertemplate="%{text}<extra></extra>",
        )
    figure.update_layout(showlegend=True, legend=LEGEND)
    figure.update_xaxes(range=[start, end], tickformat="~g")
    if axis == BY_DEPTH:
        figure.update_xaxes(tickvals=layer_ticks(comparison.deepest + 1))
    figure.update_yaxes(**FREE_LOG_AXIS)
    return figure


def methods_map(comparison: MethodsComparison, dropped: int) -> go.Figure:
    """Which players each method drops at one depth, the best on held-out text first."""
    ranked = _ranked(comparison, dropped)
    players = comparison.players
    n = players.count
    cells = np.array([np.isin(np.arange(n), r.frontier.sets[dropped - 1]) for r in ranked])
    names = [
        f"{r.frontier.method} ({number(float(np.exp(r.held_out[dropped - 1])))})" for r in ranked
    ]
    figure = base_figure(
        height=MARGIN_PIXELS + ROW_PIXELS * len(ranked),
        title_x=f"{players.noun}, at {dropped} {'layer' if dropped == 1 else 'layers'} "
        + ("dropped" if players.kind == "blocks" else "dropped or saved"),
        title_y="best first →",
    )
    figure.add_heatmap(
        z=cells.astype(int),
        x=list(range(n)),
        y=names,
        colorscale=[[0.0, "rgba(128, 136, 150, 0.14)"], [1.0, ACCENT]],
        zmin=0,
        zmax=1,
        showscale=False,
        xgap=cell_gap(n),
        ygap=4,
        meta={"rows": [list(r.frontier.sets[dropped - 1]) for r in ranked]},
        text=[
            [f"{players.name(p)} {'dropped' if row[p] else 'kept'}" for p in range(n)]
            for row in cells
        ],
        hovertemplate="%{y}<br>%{text}<extra></extra>",
    )
    figure.update_layout(meta={"x": "player", "shows_dropped": False})
    figure.update_xaxes(**player_ticks(players, most=8), showgrid=False)
    _name_rows(figure, names, names)
    return figure


def methods_cost(comparison: MethodsComparison, dropped: int) -> go.Figure:
    """Held-out perplexity at one depth against the model evaluations spent, both logarithmic."""
    figure = base_figure(
        height=320 + LEGEND_PIXELS * len(comparison.results),
        title_x="← better   model evaluations spent, log",
        title_y="← better   held-out perplexity, log",
    )
    most_spent = 1
    for result in _ranked(comparison, dropped):
        loss = result.held_out[dropped - 1]
        if not np.isfinite(loss):
            continue
        spent = result.frontier.evaluations[dropped - 1]
        most_spent = max(most_spent, spent)
        colour, symbol = _style(result.frontier.method)
        figure.add_scatter(
            name=result.frontier.method,
            x=[max(spent, NO_EVALUATIONS)],
            y=[float(np.exp(loss))],
            mode="markers",
            marker={"size": 12 if _is_ours(result) else 10, "color": colour, "symbol": symbol},
            meta={"sets": [list(result.frontier.sets[dropped - 1])]},
            hovertext=[_hover(comparison, result, dropped)],
            hovertemplate="%{hovertext}<extra></extra>",
        )
    figure.update_xaxes(
        type="log",
        range=[np.log10(NO_EVALUATIONS) - 0.2, np.log10(most_spent) + 0.2],
        tickvals=(NO_EVALUATIONS, *EVALUATION_TICKS),
        ticktext=["none", *map(number, EVALUATION_TICKS)],
    )
    figure.update_yaxes(**FREE_LOG_AXIS)
    figure.update_layout(showlegend=True, legend=LEGEND)
    return figure


def agreement_heatmap(comparison: MethodsComparison, dropped: int) -> go.Figure:
    """Share of dropped layers that methods have in common at one depth."""
    ranked = _ranked(comparison, dropped)
    order = [comparison.results.index(result) for result in ranked]
    shares = comparison.agreement(dropped)[np.ix_(order, order)]
    names = [result.frontier.method for result in ranked]
    numbers = [str(place) for place in range(1, len(names) + 1)]
    rows = [f"{place} {name}" for place, name in zip(numbers, names, strict=True)]
    # A method agrees with itself; of two others that drop the same, three digits are too many.
    texts = [
        [
            "" if i == j else "all" if share == 1 else f"{100 * share:.0f}"
            for j, share in enumerate(row)
        ]
        for i, row in enumerate(shares)
    ]
    figure = base_figure(
        height=MARGIN_PIXELS + ROW_PIXELS * len(names), title_x="% in common with method …"
    )
    figure.add_heatmap(
        z=shares,
        zmin=0,
        zmax=1,
        colorscale=AGREEMENT_SCALE,
        showscale=False,
        xgap=2,
        ygap=2,
        text=texts,
        texttemplate="%{text}",
        textfont={"size": 10},
        customdata=[
            [
                f"{a}<br>and {b}:<br>{share:.0%} in common"
                for b, share in zip(names, row, strict=True)
            ]
            for a, row in zip(names, shares, strict=True)
        ],
        hovertemplate="%{customdata}<extra></extra>",
    )
    places = list(range(len(names)))
    figure.update_layout(margin={"t": 48, "b": 10})
    figure.update_xaxes(
        showgrid=False, side="top", tickvals=places, ticktext=numbers, tickfont={"size": 10}
    )
    _name_rows(figure, places, rows)
    return figure


def _name_rows(figure: go.Figure, places: Sequence[Any], names: Sequence[str]) -> None:
    """One row per name, the first on top."""
    figure.update_yaxes(
        autorange="reversed",
        showgrid=False,
        tickvals=list(places),
        ticktext=[wrapped(name, NAME_CHARACTERS) for name in names],
        tickfont={"size": 11},
    )


def _ranked(comparison: MethodsComparison, dropped: int) -> list[MethodResult]:
    return sorted(comparison.results, key=lambda result: float(result.held_out[dropped - 1]))


def _perplexities(losses: np.ndarray) -> list[float | None]:
    """A set whose loss is not finite leaves a gap; its hover stays with the method's others."""
    return [float(np.exp(loss)) if np.isfinite(loss) else None for loss in losses]


def _is_ours(result: MethodResult) -> bool:
    return result.frontier.method == METHOD or result.frontier.method in PARTS


def _style(method: str) -> tuple[str, str]:
    """Colour and symbol of a method."""
    if method == METHOD or method in PARTS:
        return ACCENT, OUR_SYMBOLS.get(PARTS.get(method, ""), "circle")
    place = OTHERS.index(method)
    return COLOURS[place], SYMBOLS[place]


def _place(comparison: MethodsComparison, axis: str, result: MethodResult, depth: int) -> float:
    if axis == BY_DEPTH:
        return depth
    _, shown = AXES[axis]
    return shown(comparison.resources.saved(RESOURCE_OF[axis], result.frontier.sets[depth - 1]))


def _hover(comparison: MethodsComparison, result: MethodResult, k: int) -> str:
    frontier, resources = result.frontier, comparison.resources
    chosen = frontier.sets[k - 1]
    drops = f"drops {comparison.players.labels(chosen)}"
    saved = [f"{100 * resources.saved(resource, chosen):.0f} %" for resource in RESOURCES]
    return (
        f"<b>{frontier.method}</b><br>{wrapped(drops)}<br>"
        f"held-out {number(float(np.exp(result.held_out[k - 1])))}, calibration "
        f"{number(float(np.exp(result.calibration[k - 1])))}<br>"
        f"saves {saved[0]} of parameters, {saved[1]} of cache,<br>"
        f"{saved[2]} of writing time (predicted)<br>{frontier.evaluations[k - 1]:,} model "
        "evaluations"
    )
