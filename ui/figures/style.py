"""One look for all figures: quiet greys, one accent, transparent on light and dark pages.

The page's stylesheet gives text its final colour, so figures follow a change of colour scheme
without being drawn again; the greys here are what a downloaded image shows.
"""

from __future__ import annotations

import math
import textwrap

import numpy as np
import plotly.graph_objects as go
from numpy.typing import ArrayLike, NDArray

from core.players import Players

# Of one lightness, half-way between a white page and a dark one, and of two hues that no common
# colour blindness confuses.
ACCENT = "#2f6fdf"
CONTRAST = "#c2570c"
QUIET = "#8b93a1"
TEXT = "#667085"
GRID = "rgba(128, 136, 150, 0.22)"
# Whiskers in a downloaded image, where they lie on bars and on white; the page has its own.
WHISKER = "#344054"
HOVER_BACK = "#28303f"
# Zero is the page itself, light or dark; from there the lightness changes evenly to either end.
DIVERGING = [
    [0.0, "rgba(194, 87, 12, 1)"],
    [0.5, "rgba(194, 87, 12, 0)"],
    [0.5, "rgba(47, 111, 223, 0)"],
    [1.0, "rgba(47, 111, 223, 1)"],
]
# Few to many: a straight line through CIELAB from light amber to darker blue, so that equal steps
# look equal and their order survives every common colour blindness; no end is lost on either page.
SEQUENTIAL = [
    [place / 8, colour]
    for place, colour in enumerate(
        (
            "#db9531",
            "#cf8f49",
            "#c2895c",
            "#b4836e",
            "#a47e7f",
            "#937990",
            "#7e74a0",
            "#636fb1",
            "#386bc1",
        )
    )
]
# Above the chart on the left, of one size whatever the width: nothing is taken from the columns.
COLOUR_BAR = {
    "orientation": "h",
    "thickness": 10,
    "outlinewidth": 0,
    "lenmode": "pixels",
    "len": 250,
    "x": 0,
    "xanchor": "left",
    "xpad": 0,
    # Of the whole chart: against the plot area, Plotly misplaces the title of the axis below. Words
    # stand under its numbers: a title of its own, Plotly would draw over it.
    "yref": "container",
    "y": 1,
    "yanchor": "top",
    "ypad": 4,
    "tickangle": 0,
    "tickfont": {"size": 11},
    # Otherwise a narrow chart is silent about its highest value.
    "ticklabeloverflow": "allow",
}
COLOUR_BAR_PIXELS = 66
LEGEND = {
    "orientation": "h",
    "xref": "container",
    "x": 0.01,
    "xanchor": "left",
    "yref": "container",
    "y": 1,
    "yanchor": "top",
    # As many rows as a narrow screen needs; never a scroll bar.
    "maxheight": 1,
    "font": {"size": 11},
}
# What fits across a chart on a phone.
LINE_CHARACTERS = 38
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def base_figure(*, height: int, title_x: str = "", title_y: str = "") -> go.Figure:
    """An empty figure in the house style; axis titles carry the units."""
    figure = go.Figure()
    figure.update_layout(
        template="none",
        autosize=True,
        height=height,
        # The title's place is fixed: Plotly's own search for it does not always end well.
        margin={"l": 10, "r": 16, "t": 14, "b": 48 if title_x else 10},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "system-ui, sans-serif", "size": 12, "color": TEXT},
        hoverlabel={
            "align": "left",
            "bgcolor": HOVER_BACK,
            "bordercolor": HOVER_BACK,
            "font": {"color": "#ffffff", "size": 12},
            "namelength": -1,
        },
        showlegend=False,
        dragmode=False,
    )
    axis = {
        "automargin": True,
        "gridcolor": GRID,
        "zeroline": False,
        "ticks": "",
        "title": {"standoff": 8, "font": {"size": 12}},
        "minor": {"ticks": ""},
    }
    figure.update_xaxes(**axis, title_text=title_x, tickangle=0)
    figure.update_yaxes(**axis, title_text=title_y, ticklabelstandoff=4)
    return figure


def empty_figure(message: str) -> go.Figure:
    """A place-holder that says what to do to see something here."""
    figure = base_figure(height=220)
    figure.update_layout(meta={"empty": message})
    figure.update_xaxes(visible=False)
    figure.update_yaxes(visible=False)
    figure.add_annotation(
        text=wrapped(message),
        showarrow=False,
        x=0.5,
        y=0.5,
        xref="paper",
        yref="paper",
        font={"size": 14},
    )
    return figure


def whole_layers(n: int, players: Players | None) -> Players:
    """The players that n columns stand for: by default whole layers."""
    return players or Players("blocks", n)


def player_ticks(players: Players, most: int = 15) -> dict:
    """Labels of a depth axis on which every player has its own place: whole layers' first ones."""
    most = most if players.kind == "blocks" else min(most, 10)
    places = [players.per_layer * layer for layer in layer_ticks(players.n_layers, most)]
    return {"tickvals": places, "ticktext": [players.label(place) for place in places]}


def cell_gap(columns: int) -> int:
    """Pixels between the cells of a heatmap: none where a narrow screen has few for a cell."""
    return 1 if columns <= 40 else 0


def layer_ticks(n: int, most: int = 15) -> list[int]:
    """Layer numbers to label on a depth axis: at most `most`, evenly spaced."""
    # Three digits need more room.
    most = min(most, 10) if n > 100 else most
    for step in (1, 2, 5, 10, 20, 50, 100):
        if n / step <= most:
            return list(range(0, n, step))
    return list(range(0, n, max(1, n // most)))


def log_ticks(low: float, high: float, most: int = 7) -> list[float]:
    """At most `most` round numbers to label between two values on a logarithmic axis.

    They are 1, 2, 5, 10, …, or powers of ten alone where these would be too many, or evenly spaced
    where they would be too few.
    """
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits, every in (((1, 2, 5), 1), ((1, 3), 1), ((1,), 1), ((1,), 2), ((1,), 3), ((1,), 5)):
        ticks = [digit * 10.0**decade for decade in decades[::every] for digit in digits]
        inside = [tick for tick in ticks if low <= tick <= high]
        if 3 <= len(inside) <= most:
            return inside
    step = 10.0 ** math.floor(math.log10((high - low) / 2)) if high > low else 1.0
    step *= max(1, round((high - low) / 4 / step))
    return [step * place for place in range(math.floor(low / step), math.ceil(high / step) + 1)]


# A logarithmic axis that follows what the reader shows and hides. With more labels than these
# Plotly would write every digit between two powers of ten, one over the other.
FREE_LOG_AXIS = {"type": "log", "tickformat": "~s", "nticks": 3}


def log_axis(values: ArrayLike, most: int = 7) -> dict:
    """A logarithmic axis over positive values, with some room and round labels."""
    low, high = float(np.min(values)), float(np.max(values))
    room = max(0.06 * math.log10(high / low), 0.005)
    ends = [math.log10(low) - room, math.log10(high) + room]
    ticks = log_ticks(10 ** ends[0], 10 ** ends[1], most)
    return {
        "type": "log",
        "range": ends,
        "tickvals": ticks,
        "ticktext": [number(tick) for tick in ticks],
    }


def signed_root(values: ArrayLike) -> NDArray[np.float64]:
    """Square root with the sign kept: small values stay apart beside a few that are huge."""
    array = np.asarray(values, dtype=float)
    return np.sign(array) * np.sqrt(np.abs(array))


def root_scale(values: ArrayLike, words: tuple[str, str, str] = ("", "", "")) -> dict:
    """Colours centred on zero for values drawn as `signed_root`; the ticks are true values.

    `words` say what the negative end, the value itself and the positive end mean.
    """
    finite = np.abs(np.asarray(values, dtype=float))
    largest = float(np.nanmax(finite, initial=0.0)) or 1.0
    decade = 10.0 ** math.floor(math.log10(largest / 4))
    between = decade * max(digit for digit in (1, 2, 5) if digit * decade <= largest / 4)
    ticks = np.array([-largest, -between, 0.0, between, largest])
    limit = float(np.sqrt(largest))
    return {
        "colorscale": DIVERGING,
        "zmin": -limit,
        "zmax": limit,
        "zmid": 0.0,
        "colorbar": {
            **COLOUR_BAR,
            "tickvals": signed_root(ticks).tolist(),
            "ticktext": [
                f"{number(tick)}<br>{word}" if word else number(tick)
                for tick, word in zip(ticks, (words[0], "", words[1], "", words[2]), strict=True)
            ],
        },
    }


def wrapped(text: str, width: int = LINE_CHARACTERS) -> str:
    """Text broken into lines that fit a narrow screen."""
    return "<br>".join(textwrap.wrap(text, width, break_on_hyphens=False))


def number(value: float) -> str:
    """A value to about three significant digits, with a true minus sign."""
    if not np.isfinite(value):
        return "not finite"
    if not value:
        return "0"
    if 1e-4 <= abs(value) < 999.5:
        shown = f"{value:.3g}"
    elif 1 <= abs(value) < 999_500:
        shown = f"{float(f'{value:.3g}'):,.0f}"
    else:
        digits, _, exponent = f"{value:.2e}".partition("e")
        digits = digits.rstrip("0").rstrip(".")
        power = f"10{str(int(exponent)).translate(SUPERSCRIPTS)}"
        shown = {"1": power, "-1": f"-{power}"}.get(digits, f"{digits} × {power}")
    return shown.replace("-", "−")


def signed(value: float) -> str:
    return f"+{number(value)}" if value > 0 else number(value)
