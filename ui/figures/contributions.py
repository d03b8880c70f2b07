"""What each layer is worth, and how far the surrogate behind it can be trusted."""

from __future__ import annotations

from typing import Literal

import numpy as np
import plotly.graph_objects as go

from core.analysis import Analysis
from core.contributions import Contributions
from core.players import Players
from ui.figures.style import (
    ACCENT,
    COLOUR_BAR,
    COLOUR_BAR_PIXELS,
    QUIET,
    SEQUENTIAL,
    WHISKER,
    base_figure,
    cell_gap,
    layer_ticks,
    log_axis,
    number,
    player_ticks,
    root_scale,
    signed_root,
    whole_layers,
)

BARS_HOW_TO_READ = (
    "A longer bar means the model needs it more; bars whose whiskers (95 % intervals) "
    "overlap cannot be ranked apart. Utility is PPL(full) / PPL(pruned), or its logarithm where "
    "Set-up says so."
)
HEATMAP_HOW_TO_READ = (
    "Each cell is what adding the layer is worth when that many other layers are kept: blue helps, "
    "orange hurts. The colour scale is a square root, so small values stay visible."
)
SCATTER_HOW_TO_READ = (
    "Every dot is a mask the surrogate was tested on without having seen it; dots on the line were "
    "predicted exactly."
)
# Beyond so many bars they stand closer: 126 layers are otherwise two screens tall.
MANY_BARS = 40
BAR_PIXELS, DENSE_PIXELS = 17, 13


def contribution_bars(
    contributions: Contributions,
    players: Players | None = None,
    *,
    sort: Literal["rank", "depth"] = "rank",
) -> go.Figure:
    """Horizontal bars with 95 % whiskers, the most needed player on top."""
    values, intervals = contributions.values, contributions.intervals
    n = len(values)
    players = whole_layers(n, players)
    # Plotly's first category is at the bottom.
    order = np.argsort(values, kind="stable") if sort == "rank" else np.arange(n)[::-1]
    ranks = np.empty(n, dtype=int)
    ranks[np.argsort(-values, kind="stable")] = np.arange(1, n + 1)
    figure = base_figure(
        height=70 + max(6, n) * (DENSE_PIXELS if n > MANY_BARS else BAR_PIXELS),
        title_x="contribution (needed more →)",
    )
    labels = [players.name(player) for player in order]
    figure.add_bar(
        x=values[order],
        y=labels,
        orientation="h",
        marker={"color": ACCENT},
        error_x={
            "type": "data",
            "symmetric": False,
            "array": (intervals[order, 1] - values[order]),
            "arrayminus": (values[order] - intervals[order, 0]),
            "color": WHISKER,
            "thickness": 1.2,
            "width": 2,
        },
        customdata=[_bar_hover(players.name(p), p, values, intervals, ranks) for p in order],
        hovertemplate="%{customdata}<extra></extra>",
    )
    figure.update_layout(bargap=0.3, margin={"t": 48, "b": 10}, meta={"order": order.tolist()})
    figure.update_yaxes(showgrid=False, tickfont={"size": 10 if n > MANY_BARS else 11}, dtick=1)
    # On top, where reading starts: the lower end may be a screen further down.
    figure.update_xaxes(side="top", nticks=6, zeroline=True, zerolinecolor=QUIET, zerolinewidth=1)
    return figure


def contribution_heatmap(contributions: Contributions, players: Players | None = None) -> go.Figure:
    """Player (depth order) by number of others kept; colour is the contribution there."""
    n = len(contributions.values)
    players = whole_layers(n, players)
    by_size = contributions.by_size.T
    figure = base_figure(
        height=320 if len(by_size) < 16 else min(620, 130 + 15 * len(by_size)),
        title_x=f"{players.noun}, in depth order",
        title_y=f"other {players.noun}s kept",
    )
    hover = [
        [
            f"{players.name(player)}, with {size} others kept<br>contribution "
            f"{number(contributions.by_size[player, row])} ± "
            f"{number(contributions.by_size_errors[player, row])} (standard error)"
            for player in range(n)
        ]
        for row, size in enumerate(contributions.sizes)
    ]
    figure.add_heatmap(
        x=list(range(n)),
        y=contributions.sizes.tolist(),
        z=signed_root(by_size),
        customdata=hover,
        hovertemplate="%{customdata}<extra></extra>",
        xgap=cell_gap(n),
        ygap=cell_gap(n),
        **root_scale(by_size, ("hurts", "contribution", "helps")),
    )
    figure.update_layout(margin_t=COLOUR_BAR_PIXELS, meta={"x": "player"})
    figure.update_xaxes(showgrid=False, **player_ticks(players))
    sizes = contributions.sizes
    figure.update_yaxes(showgrid=False, tickvals=[int(sizes[i]) for i in layer_ticks(len(sizes))])
    return figure


def surrogate_scatter(analysis: Analysis) -> go.Figure:
    """Predicted against measured perplexity of masks not seen in training, logarithmic axes."""
    surrogate = analysis.surrogate
    measured = np.exp(analysis.full_loss + surrogate.measured)
    predicted = np.exp(analysis.full_loss + surrogate.out_of_fold)
    kept, noun = analysis.masks.sum(axis=1), analysis.players.noun
    least, most = int(kept.min()), int(kept.max())
    figure = base_figure(
        height=380, title_x="measured perplexity (log scale)", title_y="predicted perplexity (log)"
    )
    ends = [
        float(min(measured.min(), predicted.min())),
        float(max(measured.max(), predicted.max())),
    ]
    figure.add_scatter(
        x=ends, y=ends, mode="lines", line={"color": QUIET, "width": 1}, hoverinfo="skip"
    )
    figure.add_scatter(
        x=measured,
        y=predicted,
        mode="markers",
        marker={
            "size": 6,
            "color": kept,
            "colorscale": SEQUENTIAL,
            "opacity": 0.8,
            "colorbar": {
                **COLOUR_BAR,
                "len": 160,
                "tickvals": [least, (least + most) / 2, most],
                "ticktext": [str(least), f"{noun}s kept", str(most)],
            },
            "line": {"width": 0},
        },
        text=[
            f"{k} {noun}s kept<br>measured {number(m)}<br>predicted {number(p)}"
            for m, p, k in zip(measured, predicted, kept, strict=True)
        ],
        hovertemplate="%{text}<extra></extra>",
    )
    figure.update_layout(margin_t=COLOUR_BAR_PIXELS)
    figure.update_xaxes(**log_axis(ends, most=5))
    figure.update_yaxes(**log_axis(ends))
    return figure


def _bar_hover(
    name: str, player: int, values: np.ndarray, intervals: np.ndarray, ranks: np.ndarray
) -> str:
    low, high = intervals[player]
    overlapping = int(((intervals[:, 0] <= high) & (intervals[:, 1] >= low)).sum()) - 1
    return (
        f"{name}<br>contribution {number(values[player])}<br>"
        f"95 % interval {number(low)} to {number(high)}<br>rank {ranks[player]} of {len(values)}; "
        f"not told apart from {overlapping} other{'' if overlapping == 1 else 's'}"
    )
