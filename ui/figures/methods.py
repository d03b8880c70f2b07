"""Ways to choose layers, side by side."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import plotly.graph_objects as go

from core.methods import PARTS, MethodResult, MethodsComparison
from core.resources import RESOURCES, Resource
from core.selection import METHOD
from ui.figures.style import (
    ACCENT,
    QUIET,
    base_figure,
    layer_ticks,
    log_ticks,
    number,
    player_ticks,
)

CHART_HOW_TO_READ = (
    "Lower is better: perplexity on held-out text, which chose none of the sets. Hover for the set "
    "and for the evaluations it took. Speed-up is predicted from the measured time of the model's "
    "parts; Prune and compare measures it."
)
MAP_HOW_TO_READ = (
    "One row per method, best first: filled squares are what it drops; of attention and MLP apart, "
    "a is attention and m the MLP."
)
COST_HOW_TO_READ = (
    "Down and to the left is better: a lower perplexity for fewer evaluations of the model."
)
AGREEMENT_HOW_TO_READ = "The share of what they drop that two methods have in common."
# What the depth of a cut can be measured by: axis title, and how a saved share is shown.
AXES: dict[str, tuple[str, Callable[[float], float]]] = {
    "layers dropped": ("layers dropped, or as much as so many layers save", lambda share: share),
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
# Apart for every common colour blindness (Okabe and Ito), and again by their symbols.
COLOURS = ("#c2570c", "#009e73", "#a6559d", "#b8860b", "#56b4e9", "#7a5195", "#8c564b", "#8b93a1")
SYMBOLS = ("square", "diamond", "triangle-up", "triangle-down", "cross", "x", "star", "pentagon")
# Methods that evaluate nothing stand at the left end of the logarithmic axis.
NO_EVALUATIONS = 0.5
EVALUATION_TICKS = (NO_EVALUATIONS, 1, 3, 10, 30, 100, 300, 1000, 3000, 10000)
DASHES = {"parameters": "dash", "cache": "dot", "time": "dashdot"}
ROW_PIXELS, MARGIN_PIXELS = 26, 90


def methods_chart(comparison: MethodsComparison, axis: str = BY_DEPTH) -> go.Figure:
    """Held-out perplexity, logarithmic, against what is saved; one line per method.

    `axis` is one of `AXES`.
    """
    title, _ = AXES[axis]
    figure = base_figure(height=430, title_x=title, title_y="held-out perplexity (log scale)")
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
        hovertemplate="full model %{y:.4g}<extra></extra>",
    )
    others = [r for r in comparison.results if not _is_ours(r)]
    styles = {r.frontier.method: number for number, r in enumerate(others)}
    for result in sorted(comparison.results, key=_is_ours):
        method = result.frontier.method
        ours = _is_ours(result)
        style = styles.get(method, 0)
        figure.add_scatter(
            name=method,
            x=places[method],
            y=_perplexities(result.held_out),
            mode="lines+markers",
            line={
                "color": ACCENT if ours else COLOURS[style % len(COLOURS)],
                "width": 3 if ours else 1.5,
                "dash": DASHES.get(PARTS.get(method, ""), "solid"),
            },
            marker={
                "size": 8 if ours else 6,
                "symbol": "circle" if ours else SYMBOLS[style % len(SYMBOLS)],
            },
            meta={"sets": [list(chosen) for chosen in result.frontier.sets]},
            text=[_hover(comparison, result, k) for k in depths],
            hovertemplate="%{text}<extra></extra>",
        )
    figure.update_layout(
        showlegend=True,
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        margin_t=70,
    )
    figure.update_xaxes(range=[start, end], tickformat="~g")
    if axis == BY_DEPTH:
        figure.update_xaxes(tickvals=layer_ticks(comparison.deepest + 1))
    shown = [value for trace in figure.data for value in trace.y if value is not None]
    ticks = log_ticks(min(shown), max(shown))
    figure.update_yaxes(type="log", tickformat="~g", tickvals=ticks, minor={"ticks": ""})
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
        title_x=f"{players.noun}, where {dropped} {'layer is' if dropped == 1 else 'layers are'} "
        + ("dropped" if players.kind == "blocks" else "dropped, or their worth saved"),
    )
    figure.add_heatmap(
        z=cells.astype(int),
        x=list(range(n)),
        y=names,
        colorscale=[[0.0, "rgba(128, 136, 150, 0.10)"], [1.0, ACCENT]],
        zmin=0,
        zmax=1,
        showscale=False,
        xgap=2,
        ygap=2,
        meta={"rows": [list(r.frontier.sets[dropped - 1]) for r in ranked]},
        text=[
            [f"{players.name(p)} {'dropped' if row[p] else 'kept'}" for p in range(n)]
            for row in cells
        ],
        hovertemplate="%{y}<br>%{text}<extra></extra>",
    )
    figure.update_layout(meta={"x": "player", "shows_dropped": False})
    figure.update_xaxes(**player_ticks(players), showgrid=False)
    figure.update_yaxes(autorange="reversed", showgrid=False)
    return figure


def methods_cost(comparison: MethodsComparison, dropped: int) -> go.Figure:
    """Held-out perplexity at one depth against the model evaluations spent, both logarithmic."""
    figure = base_figure(
        height=300,
        title_x="model evaluations spent on choosing",
        title_y="held-out perplexity (log scale)",
    )
    shown = []
    for result in _ranked(comparison, dropped):
        loss = result.held_out[dropped - 1]
        if not np.isfinite(loss):
            continue
        spent = result.frontier.evaluations[dropped - 1]
        shown.append(float(np.exp(loss)))
        figure.add_scatter(
            name=result.frontier.method,
            x=[max(spent, NO_EVALUATIONS)],
            y=[shown[-1]],
            mode="markers+text",
            text=[result.frontier.method],
            textposition="top center",
            cliponaxis=False,
            marker={"size": 11, "color": ACCENT if _is_ours(result) else QUIET},
            meta={"sets": [list(result.frontier.sets[dropped - 1])]},
            hovertext=[_hover(comparison, result, dropped)],
            hovertemplate="%{hovertext}<extra></extra>",
        )
    figure.update_xaxes(
        type="log",
        range=[np.log10(NO_EVALUATIONS / 2), 3.3],
        tickvals=EVALUATION_TICKS,
        ticktext=["0", *(f"{tick:,}" for tick in EVALUATION_TICKS[1:])],
        minor={"ticks": ""},
    )
    if shown:
        low, high = np.log10(min(shown)), np.log10(max(shown))
        room = 0.12 * (high - low) + 0.01
        figure.update_yaxes(
            type="log",
            tickformat="~g",
            range=[low - room, high + 2 * room],
            tickvals=log_ticks(min(shown), max(shown)),
            minor={"ticks": ""},
        )
    figure.update_layout(margin_t=24)
    return figure


def agreement_heatmap(comparison: MethodsComparison, dropped: int) -> go.Figure:
    """Share of dropped layers that methods have in common at one depth."""
    ranked = _ranked(comparison, dropped)
    order = [comparison.results.index(result) for result in ranked]
    shares = comparison.agreement(dropped)[np.ix_(order, order)]
    names = [result.frontier.method for result in ranked]
    figure = base_figure(height=MARGIN_PIXELS + 40 + ROW_PIXELS * len(names))
    figure.add_heatmap(
        z=shares,
        x=names,
        y=names,
        zmin=0,
        zmax=1,
        # Pale, so that the numbers stay readable on it, on light and dark pages.
        colorscale=[[0.0, "rgba(128, 136, 150, 0.08)"], [1.0, "rgba(47, 111, 223, 0.40)"]],
        showscale=False,
        xgap=2,
        ygap=2,
        text=[[f"{share:.0%}" for share in row] for row in shares],
        texttemplate="%{text}",
        hovertemplate="%{y} and %{x}: %{text} in common<extra></extra>",
    )
    figure.update_xaxes(showgrid=False, tickangle=-30)
    figure.update_yaxes(autorange="reversed", showgrid=False)
    return figure


def _ranked(comparison: MethodsComparison, dropped: int) -> list[MethodResult]:
    return sorted(comparison.results, key=lambda result: float(result.held_out[dropped - 1]))


def _perplexities(losses: np.ndarray) -> list[float | None]:
    """A set whose loss is not finite leaves a gap; its hover stays with the method's others."""
    return [float(np.exp(loss)) if np.isfinite(loss) else None for loss in losses]


def _is_ours(result: MethodResult) -> bool:
    return result.frontier.method == METHOD or result.frontier.method in PARTS


def _place(comparison: MethodsComparison, axis: str, result: MethodResult, depth: int) -> float:
    if axis == BY_DEPTH:
        return depth
    _, shown = AXES[axis]
    return shown(comparison.resources.saved(RESOURCE_OF[axis], result.frontier.sets[depth - 1]))


def _hover(comparison: MethodsComparison, result: MethodResult, k: int) -> str:
    frontier, resources = result.frontier, comparison.resources
    chosen = frontier.sets[k - 1]
    saved = [f"{100 * resources.saved(resource, chosen):.0f} %" for resource in RESOURCES]
    return (
        f"<b>{frontier.method}</b>, drops {comparison.players.labels(chosen)}<br>"
        f"held-out {number(float(np.exp(result.held_out[k - 1])))}, calibration "
        f"{number(float(np.exp(result.calibration[k - 1])))}<br>"
        f"saves {saved[0]} of parameters, {saved[1]} of the cache, {saved[2]} of the writing time "
        f"(predicted)<br>{frontier.evaluations[k - 1]} model evaluations"
    )
