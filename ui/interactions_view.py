"""Interactions: which layers need each other, and which stand in for each other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import gradio as gr
import numpy as np

from core.errors import LayerShapError
from core.masks import leave_out
from core.players import Players
from ui.chart import Chart
from ui.figures import empty_figure, interaction_graph, interaction_heatmap, pair_utilities
from ui.figures.interactions import (
    GRAPH_HOW_TO_READ,
    HEATMAP_HOW_TO_READ,
    PAIR_HOW_TO_READ,
    strongest_pairs,
)
from ui.session import Session
from ui.status import guarded, news, progress_bar

NOTHING_YET = "Press Analyse: interactions appear here while masks are measured."
NO_PAIR = "No pair chosen yet."
PICK = "Press a cell or an arc above, a row of the list, or name two layers here."


@dataclass(frozen=True)
class InteractionsView:
    heatmap: Chart
    graph: Chart
    pairs: gr.Dataframe
    picker: gr.HTML
    first: gr.Textbox
    second: gr.Textbox
    measure: gr.Button
    utilities: Chart

    def draw(self, session: Session) -> dict[Any, Any]:
        """Updates that show the session's interactions."""
        if session.analysis is None:
            empty = empty_figure(NOTHING_YET)
            return {self.heatmap: empty, self.graph: empty, self.pairs: None}
        interactions = session.analysis.estimates.interactions
        return {
            self.heatmap: interaction_heatmap(interactions, session.players),
            self.graph: interaction_graph(interactions, session.players),
            self.pairs: strongest_pairs(interactions, players=session.players),
        }


def interactions_view() -> InteractionsView:
    """Lay out the tab."""
    empty = empty_figure(NOTHING_YET)
    with gr.Row(equal_height=False):
        with gr.Column(scale=1, min_width=340):
            gr.Markdown("### Every pair of layers")
            heatmap = Chart(
                empty,
                name="Interaction of every pair of layers",
                how_to_read=HEATMAP_HOW_TO_READ,
                elem_id="interaction-heatmap",
            )
        with gr.Column(scale=1, min_width=340):
            gr.Markdown("### The strongest pairs")
            graph = Chart(
                empty,
                name="The strongest pairs of layers",
                how_to_read=GRAPH_HOW_TO_READ,
                elem_id="interaction-graph",
            )
            pairs = gr.Dataframe(
                headers=["layer i", "layer j", "interaction", "standard error", "meaning"],
                label="Strongest pairs: choose a row to measure it",
                interactive=False,
                max_height=280,
                elem_id="pairs",
            )
    gr.Markdown("### The four utilities behind a pair")
    with gr.Row(equal_height=False):
        with gr.Column(scale=1, min_width=260):
            picker = gr.HTML(
                f'<p class="ls-read">{PICK}</p>',
                js_on_load="LayerShap.usePairs((pair) => trigger('select', { pair }));",
                elem_id="pair-picker",
            )
            first = gr.Textbox("0", label="First layer", max_length=10)
            second = gr.Textbox("1", label="Second layer", max_length=10)
            measure = gr.Button("Measure this pair", elem_id="measure-pair")
        with gr.Column(scale=3, min_width=340):
            utilities = Chart(
                empty_figure(NO_PAIR),
                name="The four utilities behind a pair",
                how_to_read=PAIR_HOW_TO_READ,
                elem_id="pair",
            )
    return InteractionsView(heatmap, graph, pairs, picker, first, second, measure, utilities)


def chosen_pair(event: gr.SelectData, rows: Any) -> tuple[str, str]:
    """The labels of the pair in the list's row that was clicked."""
    row = rows.iloc[event.index[0]]
    return str(row.iloc[0]), str(row.iloc[1])


def pressed_pair(view: InteractionsView, status: gr.HTML) -> Any:
    """Handler that names the pair that was pressed in a chart."""

    @guarded(status)
    def name(session: Session, event: gr.EventData) -> Iterator[dict]:
        pair = event._data.get("pair") if isinstance(event._data, dict) else None
        players = session.players
        if not (
            isinstance(pair, list)
            and len(pair) == 2
            and all(type(player) is int and 0 <= player < players.count for player in pair)
        ):
            raise LayerShapError("The chart sent something that is not a pair of layers.")
        yield {view.first: players.label(pair[0]), view.second: players.label(pair[1])}

    return name


def pair_handler(view: InteractionsView, status: gr.HTML) -> Any:
    """Handler that measures the four utilities of a pair on the real model."""

    @guarded(status)
    def measure(session: Session, first: str, second: str) -> Iterator[dict]:
        game, players = session.need_workspace().calibration, session.players
        i, j = _one(players, "First layer", first), _one(players, "Second layer", second)
        if i == j:
            raise LayerShapError("Choose two different layers.")
        sets = ((), (i,), (j,), (i, j))
        masks = np.array([leave_out(players.count, dropped) for dropped in sets])
        losses = np.empty(len(masks))
        yield {status: progress_bar("Measuring the pair", 0.0)}
        for done, (row, loss) in enumerate(game.measure(masks), start=1):
            losses[row] = loss
            yield {status: progress_bar("Measuring the pair", done / len(masks))}
        utilities = np.exp(losses[0] - losses)
        yield {
            view.utilities: pair_utilities(players.label(i), players.label(j), utilities.tolist()),
            status: news(
                f"Layers {players.label(i)} and {players.label(j)}: four utilities measured on the "
                "calibration text."
            ),
        }

    return measure


def _one(players: Players, name: str, text: str) -> int:
    chosen = players.parse(name, str(text))
    if len(chosen) != 1:
        example = f", such as {players.label(0)}" if players.per_layer > 1 else ""
        raise LayerShapError(f"{name} must name one {players.noun}{example}.")
    return chosen[0]
