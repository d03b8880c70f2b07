"""Every set of layers tried, by what it costs."""

from __future__ import annotations

from collections.abc import Sequence

import plotly.graph_objects as go

from core.players import Players
from core.study import Comparison
from ui.figures.style import ACCENT, CONTRAST, QUIET, base_figure, layer_ticks

HOW_TO_READ = (
    "Lower is better. Blue dots, on held-out text, are what counts; a diamond is the measured "
    "calibration perplexity, to compare with its hollow prediction and 90 % range."
)


def comparison_chart(
    comparisons: Sequence[Comparison], players: Players | None = None
) -> go.Figure:
    """Perplexity, logarithmic, against the number of layers dropped, or of parts of them."""
    noun = players.noun if players else "layer"
    figure = base_figure(height=340, title_x=f"{noun}s dropped", title_y="perplexity (log scale)")
    named = players.labels if players else lambda dropped: ", ".join(map(str, dropped))
    counts = [len(c.dropped) for c in comparisons]
    hover = [
        f"dropped {named(c.dropped) or 'nothing'}<br>held-out "
        f"{c.held_out_pruned:.4g} (full model {c.held_out_full:.4g})<br>calibration "
        f"{c.calibration_pruned:.4g} (full model {c.calibration_full:.4g})"
        for c in comparisons
    ]
    sets = {"sets": [list(c.dropped) for c in comparisons]}
    if comparisons:
        full = comparisons[-1].held_out_full
        figure.add_scatter(
            name="full model, held-out",
            x=[0, max(counts) + 1],
            y=[full, full],
            mode="lines",
            line={"color": QUIET, "dash": "dot", "width": 1.5},
            hovertemplate="full model, held-out %{y:.4g}<extra></extra>",
        )
    predicted = [
        (k, c)
        for k, c in zip(counts, comparisons, strict=True)
        if c.predicted is not None and c.predicted_low is not None and c.predicted_high is not None
    ]
    figure.add_scatter(
        name="predicted, calibration",
        x=[k for k, _ in predicted],
        y=[c.predicted for _, c in predicted],
        mode="markers",
        marker={"size": 9, "color": CONTRAST, "symbol": "circle-open", "line": {"width": 2}},
        error_y={
            "type": "data",
            "symmetric": False,
            "array": [c.predicted_high - c.predicted for _, c in predicted],
            "arrayminus": [c.predicted - c.predicted_low for _, c in predicted],
            "thickness": 1,
            "color": CONTRAST,
        },
        hovertemplate="predicted %{y:.4s}<extra></extra>",
    )
    figure.add_scatter(
        name="measured, calibration",
        x=counts,
        y=[c.calibration_pruned for c in comparisons],
        mode="markers",
        marker={"size": 6, "color": CONTRAST, "symbol": "diamond"},
        meta=sets,
        text=hover,
        hovertemplate="%{text}<extra></extra>",
    )
    figure.add_scatter(
        name="measured, held-out",
        x=counts,
        y=[c.held_out_pruned for c in comparisons],
        mode="markers",
        marker={"size": 10, "color": ACCENT},
        meta=sets,
        text=hover,
        hovertemplate="%{text}<extra></extra>",
    )
    figure.update_layout(
        showlegend=True,
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        margin_t=40,
    )
    most = max(counts, default=1) + 1
    figure.update_xaxes(range=[0, most], tickvals=layer_ticks(most + 1))
    figure.update_yaxes(type="log", tickformat="~g", minor={"ticks": ""})
    return figure
