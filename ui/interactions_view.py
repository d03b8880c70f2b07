"""Interactions: which layers need each other, and which stand in for each other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import gradio as gr
import numpy as np

from core.errors import LayerShapError
from core.masks import leave_out
from ui.figures import empty_figure, interaction_graph, interaction_heatmap, pair_utilities
from ui.figures.interactions import (
    GRAPH_HOW_TO_READ,
    HEATMAP_HOW_TO_READ,
    PAIR_HOW_TO_READ,
    strongest_pairs,
)
from ui.parts import read_line
from ui.session import Session
from ui.setup_view import whole
from ui.status import guarded, news, progress_bar

NOTHING_YET = "Press Analyse: interactions appear here while masks are measured."
NO_PAIR = "Choose a pair in the list, or type two layers, and press Measure."


@dataclass(frozen=True)
class InteractionsView:
    heatmap: gr.Plot
    graph: gr.Plot
    pairs: gr.Dataframe
    first: gr.Number
    second: gr.Number
    measure: gr.Button
    utilities: gr.Plot

    def draw(self, session: Session) -> dict[Any, Any]:
        """Updates that show the session's interactions."""
        if session.analysis is None:
            empty = empty_figure(NOTHING_YET)
            return {self.heatmap: empty, self.graph: empty, self.pairs: None}
        interactions = session.analysis.estimates.interactions
        return {
            self.heatmap: interaction_heatmap(interactions),
            self.graph: interaction_graph(interactions, dropped=session.dropped),
            self.pairs: strongest_pairs(interactions),
        }


def interactions_view() -> InteractionsView:
    """Lay out the tab."""
    empty = empty_figure(NOTHING_YET)
    with gr.Row(equal_height=False):
        with gr.Column(scale=1, min_width=340):
            gr.Markdown("### Every pair of layers")
            heatmap = gr.Plot(empty, show_label=False, elem_id="interaction-heatmap")
            read_line(HEATMAP_HOW_TO_READ)
        with gr.Column(scale=1, min_width=340):
            gr.Markdown("### The strongest pairs")
            graph = gr.Plot(empty, show_label=False, elem_id="interaction-graph")
            read_line(GRAPH_HOW_TO_READ)
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
            first = gr.Number(0, label="First layer", precision=0)
            second = gr.Number(1, label="Second layer", precision=0)
            measure = gr.Button("Measure this pair", elem_id="measure-pair")
        with gr.Column(scale=3, min_width=340):
            utilities = gr.Plot(empty_figure(NO_PAIR), show_label=False, elem_id="pair")
            read_line(PAIR_HOW_TO_READ)
    return InteractionsView(heatmap, graph, pairs, first, second, measure, utilities)


def chosen_pair(event: gr.SelectData, rows: Any) -> tuple[int, int]:
    """The layers of the list's row that was clicked."""
    row = rows.iloc[event.index[0]]
    return int(row.iloc[0]), int(row.iloc[1])


def pair_handler(view: InteractionsView, status: gr.HTML) -> Any:
    """Handler that measures the four utilities of a pair on the real model."""

    @guarded(status)
    def measure(session: Session, first: float, second: float) -> Iterator[dict]:
        i, j = whole("First layer", first), whole("Second layer", second)
        if i == j:
            raise LayerShapError("Choose two different layers.")
        game = session.need_workspace().calibration
        n = session.n_layers
        masks = np.array([leave_out(n, dropped) for dropped in ((), (i,), (j,), (i, j))])
        losses = np.empty(len(masks))
        yield {status: progress_bar("Measuring the pair", 0.0)}
        for done, (row, loss) in enumerate(game.measure(masks), start=1):
            losses[row] = loss
            yield {status: progress_bar("Measuring the pair", done / len(masks))}
        utilities = np.exp(losses[0] - losses)
        yield {
            view.utilities: pair_utilities(i, j, utilities.tolist()),
            status: news(f"Layers {i} and {j}: four utilities measured on the calibration text."),
        }

    return measure
