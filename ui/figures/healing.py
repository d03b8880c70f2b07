"""What healing sees while it trains."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go

from core.healing import HealingCurve
from ui.figures.style import ACCENT, CONTRAST, LEGEND, QUIET, base_figure

HOW_TO_READ = (
    "Grey is the loss of each step's text, blue that of calibration blocks set apart from "
    "training. The state with the lowest blue point, ringed, is the one that is kept."
)


def healing_curve(curve: HealingCurve, steps: int) -> go.Figure:
    """Loss in nats per token against steps made, of `steps` in all."""
    figure = base_figure(
        height=320, title_x="training step", title_y="← better   loss, nats per token"
    )
    # A loss that is not finite leaves a gap.
    losses = [loss if np.isfinite(loss) else None for loss in curve.losses]
    figure.add_scatter(
        name="training text",
        x=list(range(len(losses))),
        y=losses,
        mode="lines",
        line={"color": QUIET, "width": 1},
        hovertemplate="step %{x}: %{y:.3f}<extra>training text</extra>",
    )
    looks = [(step, loss) for step, loss in curve.validations if np.isfinite(loss)]
    figure.add_scatter(
        name="blocks set apart",
        x=[step for step, _ in looks],
        y=[loss for _, loss in looks],
        mode="lines+markers",
        line={"color": ACCENT, "width": 2.5},
        marker={"size": 7},
        hovertemplate="after %{x} steps: %{y:.3f}<extra>blocks set apart</extra>",
    )
    best = min(looks, key=lambda look: look[1], default=None)
    figure.add_scatter(
        name="best so far",
        x=[best[0]] if best else [],
        y=[best[1]] if best else [],
        mode="markers",
        marker={
            "size": 15,
            "color": CONTRAST,
            "symbol": "circle-open",
            "line": {"width": 2.5},
        },
        hoverinfo="skip",
        cliponaxis=False,
    )
    figure.update_layout(showlegend=True, legend=LEGEND)
    figure.update_xaxes(range=[-0.01 * steps, 1.02 * steps], tickformat="d")
    return figure
