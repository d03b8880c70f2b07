"""How pairs of layers depend on one another."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from core.interactions import Interactions
from core.players import Players
from ui.figures.style import (
    ACCENT,
    COLOUR_BAR_PIXELS,
    CONTRAST,
    GRID,
    QUIET,
    base_figure,
    cell_gap,
    number,
    player_ticks,
    root_scale,
    signed,
    signed_root,
    whole_layers,
)

HEATMAP_HOW_TO_READ = (
    "Blue pairs need each other; orange pairs stand in for each other, so dropping both costs more "
    "than the sum of the parts. The colour scale is a square root."
)
GRAPH_HOW_TO_READ = (
    "An arc joins each of the strongest pairs, wider for stronger: blue above the line need each "
    "other, orange below it stand in for each other. Dotted arcs could be chance: less than twice "
    "their standard error."
)
PAIR_HOW_TO_READ = (
    "Four measured utilities. If the last bar falls short of the dashed line, which is what the "
    "two single drops add up to, the layers stand in for each other; if it passes the line, "
    "they need each other."
)
ARC_POINTS = 33


def strongest_pairs(
    interactions: Interactions, count: int = 12, players: Players | None = None
) -> pd.DataFrame:
    """The strongest pairs by absolute interaction, strongest first.

    Columns: layer i, layer j (as labels), interaction, standard error, meaning.
    """
    players = whole_layers(len(interactions.values), players)
    first, second = np.triu_indices(len(interactions.values), 1)
    values = interactions.values[first, second]
    errors = interactions.errors[first, second]
    order = np.argsort(-np.abs(values), kind="stable")[:count]
    return pd.DataFrame(
        {
            "layer i": [players.label(int(player)) for player in first[order]],
            "layer j": [players.label(int(player)) for player in second[order]],
            "interaction": values[order].round(5),
            "standard error": errors[order].round(5),
            "meaning": [_meaning(values[k], errors[k]) for k in order],
        }
    )


def interaction_heatmap(interactions: Interactions, players: Players | None = None) -> go.Figure:
    """Player by player, centred on zero, the diagonal blank."""
    values = interactions.values.copy()
    n = len(values)
    players = whole_layers(n, players)
    np.fill_diagonal(values, np.nan)
    figure = base_figure(height=540, title_x=players.noun, title_y=players.noun)
    hover = [
        [
            f"{players.name(i)} and {players.name(j)}<br>interaction "
            f"{signed(interactions.values[i, j])} ± "
            f"{number(interactions.errors[i, j])} (standard error)<br>"
            f"{_meaning(interactions.values[i, j], interactions.errors[i, j])}"
            for j in range(n)
        ]
        for i in range(n)
    ]
    figure.add_heatmap(
        x=list(range(n)),
        y=list(range(n)),
        z=signed_root(values),
        customdata=hover,
        hovertemplate="%{customdata}<extra></extra>",
        hoverongaps=False,
        xgap=cell_gap(n),
        ygap=cell_gap(n),
        **root_scale(values, ("stand in", "interaction", "need")),
    )
    figure.update_layout(
        margin_t=COLOUR_BAR_PIXELS, margin_r=24, meta={"x": "player", "y": "player"}
    )
    ticks = player_ticks(players)
    figure.update_xaxes(showgrid=False, **ticks, constrain="domain", constraintoward="left")
    figure.update_yaxes(
        showgrid=False,
        **ticks,
        autorange="reversed",
        scaleanchor="x",
        constrain="domain",
        constraintoward="top",
    )
    return figure


def interaction_graph(
    interactions: Interactions,
    players: Players | None = None,
    *,
    strongest: int = 12,
) -> go.Figure:
    """The strongest pairs as arcs over the line of players in depth order."""
    n = len(interactions.values)
    players = whole_layers(n, players)
    pairs = strongest_pairs(interactions, strongest, players)
    place = {players.label(player): player for player in range(n)}
    figure = base_figure(
        height=340,
        title_x=f"{players.noun}, in depth order",
        title_y="     ".join(
            words
            for words, there in (
                ("← stand in", (pairs["interaction"] < 0).any()),
                ("need each other →", (pairs["interaction"] >= 0).any()),
            )
            if there
        ),
    )
    largest = float(pairs["interaction"].abs().max()) if len(pairs) else 1.0
    for row in pairs.itertuples(index=False):
        i, j, value, error = place[row[0]], place[row[1]], row[2], row[3]
        angle = np.linspace(0, np.pi, ARC_POINTS)
        side = 1 if value >= 0 else -1
        figure.add_scatter(
            x=(i + j) / 2 + (j - i) / 2 * np.cos(angle),
            y=side * np.sqrt(j - i) * np.sin(angle),
            mode="lines",
            line={
                "color": ACCENT if value >= 0 else CONTRAST,
                "width": 1 + 5 * abs(value) / (largest or 1.0),
                "dash": "solid" if _is_clear(value, error) else "dot",
            },
            opacity=0.75,
            meta={"pair": [i, j]},
            text=f"{players.name(i)} and {players.name(j)}<br>interaction {signed(value)} ± "
            f"{number(error)}<br>{row[4]}",
            hovertemplate="%{text}<extra></extra>",
        )
    figure.add_scatter(
        x=list(range(n)),
        y=[0] * n,
        mode="markers",
        marker={
            "size": 9 if n <= 40 else 5,
            "color": QUIET,
        },
        text=[players.name(player) for player in range(n)],
        hovertemplate="%{text}<extra></extra>",
    )
    figure.update_layout(meta={"x": "player"})
    figure.update_xaxes(showgrid=False, **player_ticks(players), range=[-1, n])
    figure.update_yaxes(
        showgrid=False, showticklabels=False, zeroline=True, zerolinecolor=GRID, zerolinewidth=1
    )
    return figure


def pair_utilities(first: str, second: str, utilities: Sequence[float]) -> go.Figure:
    """Measured utilities: full model, without `first`, without `second`, without both."""
    full, without_first, without_second, _ = utilities
    additive = without_first + without_second - full
    figure = base_figure(height=320, title_y="utility, PPL(full) / PPL(mask)")
    names = ["full model", f"without {first}", f"without {second}", "without both"]
    figure.add_bar(
        x=names,
        y=list(utilities),
        marker={"color": [QUIET, ACCENT, ACCENT, CONTRAST]},
        text=[number(value) for value in utilities],
        textposition="outside",
        cliponaxis=False,
        hovertemplate="%{x}: %{y:.4f} (measured)<extra></extra>",
    )
    figure.add_shape(
        type="line",
        x0=2.5,
        x1=3.5,
        y0=additive,
        y1=additive,
        line={"color": QUIET, "width": 2, "dash": "dash"},
    )
    figure.add_annotation(
        x=1,
        y=1,
        xref="paper",
        yref="paper",
        xanchor="right",
        yanchor="bottom",
        yshift=20,
        showarrow=False,
        text=f"dashed line: sum of the parts, {number(additive)}",
    )
    # In two lines, a narrow screen has room for all four.
    figure.update_xaxes(
        showgrid=False, tickvals=names, ticktext=[name.replace(" ", "<br>", 1) for name in names]
    )
    figure.update_layout(bargap=0.35, margin_t=50)
    return figure


def _meaning(value: float, error: float) -> str:
    if not _is_clear(value, error):
        return "no clear interaction"
    return "need each other" if value > 0 else "stand in for each other"


def _is_clear(value: float, error: float) -> bool:
    return abs(value) >= 2 * error
