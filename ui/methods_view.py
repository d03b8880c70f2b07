"""Methods: what other ways of choosing would drop, and what each costs on held-out text."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import gradio as gr

from core.errors import LayerShapError
from core.methods import (
    PARTS,
    MethodsComparison,
    MethodsProgress,
    available,
    compare_methods,
    cost,
)
from core.players import Players
from core.selection import METHOD
from ui.chart import Chart
from ui.figures import (
    agreement_heatmap,
    empty_figure,
    methods_chart,
    methods_cost,
    methods_map,
)
from ui.figures.methods import (
    AGREEMENT_HOW_TO_READ,
    AXES,
    BY_DEPTH,
    CHART_HOW_TO_READ,
    COST_HOW_TO_READ,
    MAP_HOW_TO_READ,
)
from ui.session import Session, StopSignals
from ui.setup_view import REFRESH_SECONDS, whole
from ui.status import duration, guarded, news, progress_bar

NOTHING_YET = "Choose methods and press Compare methods: each is measured on held-out text."
NOT_COMPARED = "Nothing compared yet."
DEFAULT_METHODS = (METHOD, "Leave one out", "Block Influence", "Angular distance")
DEFAULT_DEEPEST, DEFAULT_SHOWN = 8, 4


@dataclass(frozen=True)
class MethodsView:
    methods: gr.CheckboxGroup
    deepest: gr.Slider
    compare: gr.Button
    price: gr.HTML
    axis: gr.Radio
    chart: Chart
    shown: gr.Slider
    method: gr.Dropdown
    take: gr.Button
    spent: Chart
    map: Chart
    agreement: Chart

    def draw(self, comparison: MethodsComparison | None, axis: str | None = None) -> dict[Any, Any]:
        """Updates that show a comparison, or what to do to see one; `axis` as for `draw_axis`."""
        if comparison is None or not comparison.results:
            return {
                self.chart: empty_figure(NOTHING_YET),
                self.spent: empty_figure(NOT_COMPARED),
                self.map: empty_figure(NOT_COMPARED),
                self.agreement: empty_figure(NOT_COMPARED),
                self.method: gr.update(choices=[], value=None),
                self.shown: gr.update(maximum=DEFAULT_DEEPEST, value=DEFAULT_SHOWN),
            }
        names = [result.frontier.method for result in comparison.results]
        shown = min(DEFAULT_SHOWN, comparison.deepest)
        return {
            self.chart: self.draw_axis(comparison, axis),
            self.method: gr.update(choices=names, value=METHOD if METHOD in names else names[0]),
            self.shown: gr.update(maximum=max(2, comparison.deepest), value=shown),
            **self.draw_depth(comparison, shown),
        }

    def draw_choices(self, session: Session) -> dict[Any, Any]:
        """Updates that offer what can choose among the session's players."""
        players = session.players
        names = available(players)
        chosen = [*(name for name in PARTS if name in names), *DEFAULT_METHODS]
        return {
            self.methods: gr.update(choices=list(names), value=chosen),
            self.deepest: gr.update(maximum=max(2, players.n_layers // 2)),
        }

    def draw_axis(self, comparison: MethodsComparison | None, axis: str | None) -> Any:
        """The chart against a measure of what a cut saves; where none is chosen, by depth."""
        return methods_chart(comparison, axis or BY_DEPTH) if comparison else gr.skip()

    def draw_depth(self, comparison: MethodsComparison | None, dropped: float) -> dict[Any, Any]:
        """Updates of the charts that are about one number of dropped layers."""
        if comparison is None or not comparison.results:
            return {self.spent: gr.skip(), self.map: gr.skip(), self.agreement: gr.skip()}
        depth = min(max(1, int(dropped or 1)), comparison.deepest)
        return {
            self.spent: methods_cost(comparison, depth),
            self.map: methods_map(comparison, depth),
            self.agreement: agreement_heatmap(comparison, depth),
        }


def methods_view() -> MethodsView:
    """Lay out the tab."""
    # Every method is offered to the API; what the page offers follows from the players loaded.
    choices = list(available(Players("sub-blocks", 1)))
    with gr.Row(equal_height=False):
        with gr.Column(scale=3, min_width=340):
            methods = gr.CheckboxGroup(
                choices,
                value=list(DEFAULT_METHODS),
                label="Methods",
                elem_id="methods",
            )
        with gr.Column(scale=1, min_width=240):
            deepest = gr.Slider(
                1, 15, value=DEFAULT_DEEPEST, step=1, label="Up to how many layers dropped"
            )
            compare = gr.Button("Compare methods", variant="primary", elem_id="compare-methods")
            price = gr.HTML(elem_id="methods-cost")
    gr.Markdown("### Held-out perplexity of every method's choice")
    axis = gr.Radio(
        list(AXES), value=BY_DEPTH, label="Against what is saved", elem_id="methods-axis"
    )
    chart = Chart(
        empty_figure(NOTHING_YET),
        name="Held-out perplexity of every method",
        how_to_read=CHART_HOW_TO_READ,
        elem_id="methods-chart",
    )
    with gr.Row(equal_height=False):
        shown = gr.Slider(
            1, DEFAULT_DEEPEST, value=DEFAULT_SHOWN, step=1, label="Layers dropped", scale=2
        )
        method = gr.Dropdown([], label="Method", scale=1, min_width=200, elem_id="method")
        take = gr.Button(
            "Try this set in Prune and compare", scale=1, min_width=220, elem_id="take-set"
        )
    with gr.Row(equal_height=False):
        with gr.Column(scale=3, min_width=340):
            gr.Markdown("### Which layers each drops")
            layers = Chart(
                empty_figure(NOT_COMPARED),
                name="Which layers each method drops",
                how_to_read=MAP_HOW_TO_READ,
                elem_id="methods-map",
            )
        with gr.Column(scale=2, min_width=340):
            gr.Markdown("### How far they agree")
            agreement = Chart(
                empty_figure(NOT_COMPARED),
                name="How far methods agree",
                how_to_read=AGREEMENT_HOW_TO_READ,
                elem_id="methods-agreement",
            )
    gr.Markdown("### What each choice took")
    spent = Chart(
        empty_figure(NOT_COMPARED),
        name="Perplexity against evaluations spent",
        how_to_read=COST_HOW_TO_READ,
        elem_id="methods-spent",
    )
    return MethodsView(
        methods, deepest, compare, price, axis, chart, shown, method, take, spent, layers, agreement
    )


def cost_line(session: Session, methods: list[str], deepest: float) -> str:
    """What the chosen methods will take, in model evaluations."""
    if not session.n_layers or not methods:
        return ""
    depth = int(deepest or 1)
    chosen = [cost(name, session.players, depth) for name in methods]
    judging = 2 * depth * len(methods)
    return (
        f'<p class="ls-read">At most {sum(chosen):,} evaluations to choose, and {judging:,} to '
        "judge; what was measured before costs nothing.</p>"
    )


def methods_handler(
    view: MethodsView, stops: StopSignals, compared: gr.State, status: gr.HTML
) -> Any:
    """Handler that runs the chosen methods, showing each as it finishes."""

    @guarded(status)
    def compare(
        session: Session, methods: list[str], deepest: float, axis: str, request: gr.Request
    ) -> Iterator[dict]:
        workspace = session.need_workspace()
        depth = whole("Up to how many layers dropped", deepest)
        contributions = None
        if session.analysis is not None:
            contributions = (session.analysis.contributions, len(session.analysis.masks))
        stop = stops.begin(request.session_hash)
        yield {status: progress_bar("Measuring the full model and the time of its parts", 0.0)}
        resources = workspace.resources
        finished, shown = 0, 0.0
        for step in compare_methods(
            workspace.calibration,
            workspace.held_out,
            methods or [],
            depth,
            contributions=contributions,
            resources=resources,
            stop=stop.is_set,
        ):
            if len(step.comparison.results) > finished:
                finished = len(step.comparison.results)
                yield {compared: step.comparison, **view.draw(step.comparison, axis)}
            elif time.monotonic() - shown < REFRESH_SECONDS:
                continue
            shown = time.monotonic()
            yield {status: _progress(step)}
        yield {status: news(_summary(step))}

    return compare


def chosen_set(
    comparison: MethodsComparison | None, method: str, dropped: float
) -> tuple[int, ...]:
    """The layers that a method drops at one depth.

    Raises:
        LayerShapError: nothing was compared yet, or not to that depth.
    """
    if comparison is None or not method:
        raise LayerShapError("Compare methods first; then choose one of them.")
    depth = whole("Layers dropped", dropped)
    sets = comparison.result(method).frontier.sets
    if not 1 <= depth <= len(sets):
        raise LayerShapError(f"Layers dropped is {depth}; choose from 1 to {len(sets)}.")
    return sets[depth - 1]


def _progress(step: MethodsProgress) -> str:
    left = f", about {duration(step.seconds_left)} left" if step.seconds_left else ""
    return progress_bar(
        step.stage, step.done / max(step.total, 1), f"{step.done} of {step.total} evaluations{left}"
    )


def _summary(step: MethodsProgress) -> str:
    count = len(step.comparison.results)
    if step.stage == "Done":
        return f"Done: {count} method{'s' if count > 1 else ''} measured on held-out text."
    return (
        f"Stopped: {count} finished. What was measured is kept; compare again to go on from here."
    )
