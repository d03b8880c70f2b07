"""Ways to choose layers, side by side."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go

from core.methods import MethodResult, MethodsComparison
from core.selection import METHOD
from ui.figures.style import ACCENT, QUIET, base_figure, layer_ticks, number

CHART_HOW_TO_READ = (
    "Lower is better: perplexity on held-out text, which chose none of the sets. Hover for the set "
    "and for the evaluations it took."
)
MAP_HOW_TO_READ = "One row per method, best first: filled squares are the layers it drops."
AGREEMENT_HOW_TO_READ = "The share of dropped layers that two methods have in common."
# Apart for every common colour blindness (Okabe and Ito), and again by their symbols.
COLOURS = ("#c2570c", "#009e73", "#a6559d", "#b8860b", "#56b4e9", "#7a5195", "#8c564b", "#8b93a1")
SYMBOLS = ("square", "diamond", "triangle-up", "triangle-down", "cross", "x", "star", "pentagon")
ROW_PIXELS, MARGIN_PIXELS = 26, 90


def methods_chart(comparison: MethodsComparison) -> go.Figure:
    """Held-out perplexity, logarithmic, against layers dropped; one line per method."""
    figure = base_figure(
        height=430, title_x="layers dropped", title_y="held-out perplexity (log scale)"
    )
    depths = list(range(1, comparison.deepest + 1))
    full = float(np.exp(comparison.full_held_out))
    figure.add_scatter(
        name="full model",
        x=[0, comparison.deepest + 0.5],
        y=[full, full],
        mode="lines",
        line={"color": QUIET, "dash": "dot", "width": 1.5},
        hovertemplate="full model %{y:.4g}<extra></extra>",
    )
    others = [r for r in comparison.results if r.frontier.method != METHOD]
    styles = {r.frontier.method: place for place, r in enumerate(others)}
    for result in sorted(comparison.results, key=lambda r: r.frontier.method == METHOD):
        method = result.frontier.method
        ours = method == METHOD
        place = styles.get(method, 0)
        figure.add_scatter(
            name=method,
            x=depths,
            y=_perplexities(result.held_out),
            mode="lines+markers",
            line={
                "color": ACCENT if ours else COLOURS[place % len(COLOURS)],
                "width": 3 if ours else 1.5,
            },
            marker={
                "size": 8 if ours else 6,
                "symbol": "circle" if ours else SYMBOLS[place % len(SYMBOLS)],
            },
            text=[_hover(result, k) for k in depths],
            hovertemplate="%{text}<extra></extra>",
        )
    figure.update_layout(
        showlegend=True,
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        margin_t=70,
    )
    figure.update_xaxes(range=[0, comparison.deepest + 0.5], tickformat="d")
    figure.update_yaxes(type="log", tickformat="~g", dtick="D2", minor={"ticks": ""})
    return figure


def methods_map(comparison: MethodsComparison, dropped: int) -> go.Figure:
    """Which layers each method drops at one depth, the best on held-out text first."""
    ranked = _ranked(comparison, dropped)
    n = comparison.n_layers
    cells = np.array([np.isin(np.arange(n), r.frontier.sets[dropped - 1]) for r in ranked])
    names = [
        f"{r.frontier.method} ({number(float(np.exp(r.held_out[dropped - 1])))})" for r in ranked
    ]
    figure = base_figure(
        height=MARGIN_PIXELS + ROW_PIXELS * len(ranked),
        title_x=f"layer, where {dropped} {'is' if dropped == 1 else 'are'} dropped",
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
        text=np.where(cells, "dropped", "kept"),
        hovertemplate="%{y}<br>layer %{x} %{text}<extra></extra>",
    )
    figure.update_xaxes(tickvals=layer_ticks(n), showgrid=False)
    figure.update_yaxes(autorange="reversed", showgrid=False)
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


def _hover(result: MethodResult, k: int) -> str:
    frontier = result.frontier
    return (
        f"<b>{frontier.method}</b>, {k} dropped: {', '.join(map(str, frontier.sets[k - 1]))}<br>"
        f"held-out {number(float(np.exp(result.held_out[k - 1])))}, calibration "
        f"{number(float(np.exp(result.calibration[k - 1])))}<br>"
        f"{frontier.evaluations[k - 1]} model evaluations"
    )
