"""Every set of layers tried, by what it costs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go

from core.players import Players
from core.study import Comparison
from ui.figures.style import (
    ACCENT,
    CONTRAST,
    LEGEND,
    QUIET,
    base_figure,
    layer_ticks,
    log_axis,
    number,
    wrapped,
)

HOW_TO_READ = (
    "Lower is better. Blue dots, on held-out text, are what counts; a diamond is the measured "
    "calibration perplexity, to compare with its hollow prediction and 90 % range."
)


def comparison_chart(
    comparisons: Sequence[Comparison], players: Players | None = None
) -> go.Figure:
    """Perplexity, logarithmic, against the number of layers dropped, or of parts of them."""
    noun = players.noun if players else "layer"
    figure = base_figure(
        height=360, title_x=f"{noun}s dropped", title_y="← better   perplexity (log scale)"
    )
    named = players.labels if players else lambda dropped: ", ".join(map(str, dropped))
    counts = [len(c.dropped) for c in comparisons]
    hover = [
        wrapped(f"dropped {named(c.dropped) or 'nothing'}")
        + f"<br>held-out {number(c.held_out_pruned)} (full model {number(c.held_out_full)})"
        f"<br>calibration {number(c.calibration_pruned)} (full model "
        f"{number(c.calibration_full)})"
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
            hovertemplate=f"full model, held-out {number(full)}<extra></extra>",
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
        text=[
            f"predicted {number(c.predicted)}, calibration<br>90 % range "
            f"{number(c.predicted_low)} to {number(c.predicted_high)}"
            for _, c in predicted
        ],
        hovertemplate="%{text}<extra></extra>",
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
    figure.update_layout(showlegend=True, legend=LEGEND)
    most = max(counts, default=1) + 1
    figure.update_xaxes(range=[0, most], tickvals=layer_ticks(most + 1))
    reached = [value for trace in figure.data for value in trace.y]
    reached += [end for _, c in predicted for end in (c.predicted_low, c.predicted_high)]
    shown = [value for value in reached if np.isfinite(value)]
    figure.update_yaxes(**log_axis(shown or [1, 100]))
    return figure
