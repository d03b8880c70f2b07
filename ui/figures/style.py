"""One look for all figures: quiet greys, one accent, transparent on light and dark pages.

The page's stylesheet gives text its final colour, so figures follow a change of colour scheme
without being drawn again; the greys here are what a downloaded image shows.
"""

from __future__ import annotations

import math

import numpy as np
import plotly.graph_objects as go
from numpy.typing import ArrayLike, NDArray

from core.players import Players

ACCENT = "#2f6fdf"
CONTRAST = "#c2570c"
QUIET = "#8b93a1"
TEXT = "#667085"
GRID = "rgba(128, 136, 150, 0.22)"
# Zero is as good as transparent, so it recedes on a light page and on a dark one.
DIVERGING = [
    [0.0, "rgb(176, 74, 6)"],
    [0.25, "rgba(214, 122, 50, 0.75)"],
    [0.5, "rgba(140, 146, 158, 0.10)"],
    [0.75, "rgba(74, 132, 226, 0.75)"],
    [1.0, "rgb(20, 80, 190)"],
]
# From few kept layers to many; as readable on a dark page as on a light one, and apart for every
# common colour blindness.
SEQUENTIAL = [[0.0, CONTRAST], [0.5, QUIET], [1.0, ACCENT]]
COLOUR_BAR = {"thickness": 10, "outlinewidth": 0, "len": 0.9}


def base_figure(*, height: int, title_x: str = "", title_y: str = "") -> go.Figure:
    """An empty figure in the house style; axis titles carry the units."""
    figure = go.Figure()
    figure.update_layout(
        template="none",
        autosize=True,
        height=height,
        margin={"l": 10, "r": 16, "t": 14, "b": 10},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "system-ui, sans-serif", "size": 12, "color": TEXT},
        hoverlabel={"align": "left"},
        showlegend=False,
        dragmode=False,
    )
    axis = {
        "automargin": True,
        "gridcolor": GRID,
        "zeroline": False,
        "ticks": "",
        "title": {"standoff": 8},
    }
    figure.update_xaxes(**axis, title_text=title_x)
    figure.update_yaxes(**axis, title_text=title_y)
    return figure


def empty_figure(message: str) -> go.Figure:
    """A place-holder that says what to do to see something here."""
    figure = base_figure(height=220)
    figure.update_layout(meta={"empty": message})
    figure.update_xaxes(visible=False)
    figure.update_yaxes(visible=False)
    figure.add_annotation(
        text=message, showarrow=False, x=0.5, y=0.5, xref="paper", yref="paper", font={"size": 14}
    )
    return figure


def whole_layers(n: int, players: Players | None) -> Players:
    """The players that n columns stand for: by default whole layers."""
    return players or Players("blocks", n)


def player_ticks(players: Players) -> dict:
    """Labels of a depth axis on which every player has its own place."""
    places = layer_ticks(players.count)
    return {"tickvals": places, "ticktext": [players.label(place) for place in places]}


def layer_ticks(n: int, most: int = 16) -> list[int]:
    """Layer numbers to label on a depth axis: at most about `most`, evenly spaced."""
    for step in (1, 2, 5, 10, 20, 50, 100):
        if n / step <= most:
            return list(range(0, n, step))
    return list(range(0, n, max(1, n // most)))


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers to label between two values on a logarithmic axis: 1, 2, 5, 10, …, or evenly
    spaced ones where these would be too few."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [digit * 10.0**decade for decade in decades for digit in (1, 2, 5)]
    inside = [tick for tick in ticks if low <= tick <= high]
    if len(inside) >= 3:
        return inside
    step = 10.0 ** math.floor(math.log10((high - low) / 2)) if high > low else 1.0
    step *= max(1, round((high - low) / 4 / step))
    return [step * place for place in range(math.floor(low / step), math.ceil(high / step) + 1)]


def signed_root(values: ArrayLike) -> NDArray[np.float64]:
    """Square root with the sign kept: small values stay apart beside a few that are huge."""
    array = np.asarray(values, dtype=float)
    return np.sign(array) * np.sqrt(np.abs(array))


def root_scale(values: ArrayLike) -> dict:
    """Colours centred on zero for values drawn as `signed_root`; the ticks are true values."""
    finite = np.abs(np.asarray(values, dtype=float))
    largest = float(np.nanmax(finite, initial=0.0)) or 1.0
    ticks = largest * np.array([-1.0, -0.25, -0.04, 0.0, 0.04, 0.25, 1.0])
    limit = float(np.sqrt(largest))
    return {
        "colorscale": DIVERGING,
        "zmin": -limit,
        "zmax": limit,
        "zmid": 0.0,
        "colorbar": {
            **COLOUR_BAR,
            "tickvals": signed_root(ticks).tolist(),
            "ticktext": [number(tick) for tick in ticks],
        },
    }


def number(value: float) -> str:
    """A value to about three significant digits, with a true minus sign."""
    if not np.isfinite(value):
        return "not finite"
    return f"{value:.3g}".replace("-", "−") if value else "0"


def signed(value: float) -> str:
    return f"+{number(value)}" if value > 0 else number(value)
