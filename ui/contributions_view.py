"""Layer contributions: ranked bars, heatmap by coalition size, and whether to trust them."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from typing import Any

import gradio as gr

from core.contributions import Contributions
from ui.chart import Chart
from ui.figures import contribution_bars, contribution_heatmap, empty_figure, surrogate_scatter
from ui.figures.contributions import (
    BARS_HOW_TO_READ,
    HEATMAP_HOW_TO_READ,
    SCATTER_HOW_TO_READ,
)
from ui.session import Session

OPERATING_RANGE = "Operating range"
SHAPLEY = "Shapley value (all sizes)"
NOTHING_YET = "Press Analyse: contributions appear here while masks are measured."
KINDS_OF_VALUE = (
    "Operating range: averaged over the sizes of model you may prune to. Shapley value: averaged "
    "over all sizes, down to no layers at all."
)


@dataclass(frozen=True)
class ContributionsView:
    value: gr.Radio
    order: gr.Radio
    note: gr.HTML
    bars: Chart
    heatmap: Chart
    scatter: Chart
    verdict: gr.HTML

    def draw(self, session: Session, value: str, order: str) -> dict[Any, Any]:
        """Updates that show the session's contributions."""
        if session.analysis is None:
            empty = empty_figure(NOTHING_YET)
            return {
                self.bars: empty,
                self.heatmap: empty,
                self.scatter: empty,
                self.verdict: "",
                self.note: "",
            }
        estimates = session.analysis.estimates
        shown = estimates.shapley if value == SHAPLEY else estimates.operating_range
        return {
            self.bars: contribution_bars(
                shown,
                session.players,
                sort="depth" if order == "By depth" else "rank",
            ),
            self.heatmap: contribution_heatmap(shown, session.players),
            self.scatter: surrogate_scatter(session.analysis),
            self.verdict: _verdict(session),
            self.note: _note(shown),
        }


def contributions_view() -> ContributionsView:
    """Lay out the tab."""
    with gr.Row():
        value = gr.Radio(
            [OPERATING_RANGE, SHAPLEY],
            value=OPERATING_RANGE,
            label="Average over",
            info=KINDS_OF_VALUE,
            scale=3,
            min_width=320,
        )
        order = gr.Radio(
            ["By rank", "By depth"], value="By rank", label="Order of bars", scale=1, min_width=240
        )
    empty = empty_figure(NOTHING_YET)
    with gr.Row(equal_height=False):
        with gr.Column(scale=5, min_width=340):
            gr.Markdown("### What each layer is worth")
            bars = Chart(
                empty,
                name="What each layer is worth",
                how_to_read=BARS_HOW_TO_READ,
                elem_id="bars",
            )
            # Below all else of its column: while masks stream in it comes and goes.
            note = gr.HTML()
        with gr.Column(scale=6, min_width=340):
            gr.Markdown("### Can the ranking be trusted?")
            verdict = gr.HTML(elem_id="verdict")
            scatter = Chart(
                empty,
                name="Predicted against measured perplexity",
                how_to_read=SCATTER_HOW_TO_READ,
                elem_id="scatter",
            )
            gr.Markdown("### Worth by number of layers kept")
            heatmap = Chart(
                empty,
                name="Worth by number of layers kept",
                how_to_read=HEATMAP_HOW_TO_READ,
                elem_id="heatmap",
            )
    return ContributionsView(value, order, note, bars, heatmap, scatter, verdict)


def _verdict(session: Session) -> str:
    analysis = session.analysis
    assert analysis is not None
    partial = (
        "" if analysis.complete else f"So far, from {len(analysis.masks)} of {analysis.planned}: "
    )
    kinds = {name: quality.r2 for name, quality in analysis.surrogate.candidates.items()}
    chosen = f"Surrogate: {analysis.surrogate.kind}"
    if len(kinds) > 1:
        chosen += " (best of " + ", ".join(f"{k} R² {v:.2f}" for k, v in kinds.items()) + ")"
    return (
        f'<p class="ls-verdict">{escape(partial + analysis.verdict())}</p>'
        f'<p class="ls-read">{escape(chosen)}.</p>'
    )


def _note(shown: Contributions) -> str:
    if not shown.extrapolated:
        return ""
    return (
        '<p class="ls-read">No masks this small were measured: below the sampled strata these '
        "values are extrapolated by the surrogate. To measure them, add smaller numbers to the "
        "strata.</p>"
    )
