"""Accuracy on tasks: the full model beside the pruned one."""

from __future__ import annotations

from collections.abc import Sequence

import plotly.graph_objects as go

from core.accuracy import TaskAccuracy
from ui.figures.style import ACCENT, LEGEND, QUIET, base_figure, signed

HOW_TO_READ = (
    "Further right is better; whiskers are 95 % intervals, and a small upright line is what "
    "guessing would score. Both models answer the same questions, so the change, in the table, is "
    "usually surer than two separate intervals suggest."
)
# Standard errors to either side that hold 95 %.
INTERVAL = 1.96
ROW_PIXELS, MARGIN_PIXELS = 58, 96
# Rows are one apart; the two models stand this far above and below the middle of theirs.
APART = 0.17


def accuracy_chart(results: Sequence[TaskAccuracy]) -> go.Figure:
    """Accuracy, one row per task in the order measured, first on top."""
    figure = base_figure(
        height=MARGIN_PIXELS + ROW_PIXELS * max(len(results), 2), title_x="accuracy (better →)"
    )
    rows = range(len(results))
    chances = [(row, r.chance) for row, r in zip(rows, results, strict=True) if r.chance]
    figure.add_scatter(
        name="guessing",
        x=[chance for _, chance in chances],
        y=[row for row, _ in chances],
        mode="markers",
        marker={"symbol": "line-ns", "size": 26, "line": {"width": 1.5, "color": QUIET}},
        hovertemplate="guessing scores %{x:.1%}<extra></extra>",
    )
    hover = [_hover(result) for result in results]
    for name, colour, symbol, side in (
        ("full model", QUIET, "circle-open", -APART),
        ("pruned model", ACCENT, "circle", APART),
    ):
        full = side < 0
        values = [result.full if full else result.pruned for result in results]
        reaches = [INTERVAL * (r.full_error if full else r.pruned_error) for r in results]
        figure.add_scatter(
            name=name,
            x=values,
            y=[row + side for row in rows],
            mode="markers",
            marker={
                "size": 11,
                "color": colour,
                "symbol": symbol,
                "line": {"width": 2, "color": colour},
            },
            error_x={
                "type": "data",
                "symmetric": False,
                # No share of the questions is below none or above all of them.
                "array": [min(reach, 1 - v) for v, reach in zip(values, reaches, strict=True)],
                "arrayminus": [min(reach, v) for v, reach in zip(values, reaches, strict=True)],
                "thickness": 1.2,
                "width": 4,
                "color": colour,
            },
            text=hover,
            hovertemplate="%{text}<extra></extra>",
        )
    figure.update_layout(showlegend=True, legend={**LEGEND, "itemsizing": "constant"})
    figure.update_xaxes(range=[0, 1.02], tickformat=".0%", dtick=0.25)
    figure.update_yaxes(
        tickvals=list(rows),
        ticktext=[result.label for result in results],
        range=[max(len(results), 1) - 0.5, -0.5],
        showgrid=False,
    )
    return figure


def _hover(result: TaskAccuracy) -> str:
    return (
        f"{result.label}, {result.questions:,} questions ({result.metric})"
        f"<br>full {_percent(result.full, result.full_error)}"
        f"<br>pruned {_percent(result.pruned, result.pruned_error)}"
        f"<br>change {signed(100 * result.change)} ± "
        f"{100 * INTERVAL * result.change_error:.1f} points"
    )


def _percent(value: float, error: float) -> str:
    return f"{value:.1%} ± {100 * INTERVAL * error:.1f}"
