"""Prune and compare: choose layers to drop, see what it costs, keep the result."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np

from core.bundled import cache_root
from core.card import Measured, Perplexities
from core.comparing import compare_cut, full_and_pruned
from core.continuing import continue_prompt
from core.errors import LayerShapError
from core.footprint import footprint, measure_speeds
from core.methods import MethodsComparison
from core.players import Players
from core.pruning import prune
from core.recipe import mergekit_yaml
from core.saving import save_pruned
from core.study import Comparison, TextInfo, with_comparison
from ui.chart import Chart
from ui.figures import comparison_chart, empty_figure
from ui.figures.comparisons import HOW_TO_READ
from ui.measured import MeasuredFigures, cut_name, perplexity_text
from ui.methods_view import chosen_set
from ui.parts import read_line
from ui.session import Session, StopSignals
from ui.settings import AppSettings
from ui.setup_view import whole
from ui.status import guarded, news, progress_bar, streamed
from ui.strip import strip_selection
from ui.target_view import TargetView, search_target, summary, target_view
from ui.workspace import CutCosts

NOTHING_TRIED = "Drop some layers and press Measure: every set you try appears here."
PROMPT = "The first thing a new government should do is"
MAX_NEW_TOKENS = 200
FOLDER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
TRIED_COLUMNS = ["dropped", "which", "held-out", "calibration", "predicted", "parameters"]
TRIED_WIDTHS = ["12%", "24%", "14%", "18%", "15%", "17%"]


@dataclass(frozen=True)
class PruneView:
    dropped: gr.Textbox
    count: gr.Slider
    drop_least: gr.Button
    keep_all: gr.Button
    target: TargetView
    predicted: gr.HTML
    measure: gr.Button
    figures: gr.HTML
    chart: Chart
    tried: gr.Dataframe
    prompt: gr.Textbox
    new_tokens: gr.Slider
    go_on: gr.Button
    full_text: gr.Textbox
    pruned_text: gr.Textbox
    name: gr.Textbox
    save: gr.Button
    recipe: gr.Textbox
    own_machine: bool

    def draw_selection(self, session: Session) -> dict[Any, Any]:
        """Updates that follow from a changed selection: cheap, so that a click answers at once."""
        return {
            self.dropped: session.players.labels(session.dropped),
            self.predicted: _prediction(session),
            self.recipe: _recipe(session, self.own_machine),
        }

    def draw_tried(self, tried: tuple[Comparison, ...], players: Players) -> dict[Any, Any]:
        """Updates that show every set tried."""
        if not tried:
            return {
                self.chart: empty_figure(NOTHING_TRIED),
                self.tried: gr.update(value=[], visible=False),
            }
        rows = [
            [
                len(c.dropped),
                players.labels(c.dropped),
                perplexity_text(c.held_out_pruned),
                perplexity_text(c.calibration_pruned),
                "" if c.predicted is None else perplexity_text(c.predicted),
                f"{c.parameters_pruned / 1e6:,.1f} M",
            ]
            for c in sorted(tried, key=lambda c: (len(c.dropped), c.held_out_pruned))
        ]
        return {
            self.chart: comparison_chart(tried, players),
            self.tried: gr.update(value=rows, visible=True),
        }


def prune_view(own_machine: bool) -> PruneView:
    """Lay out the tab; on the visitor's own machine the recipe may name its folders."""
    with gr.Row(equal_height=False):
        with gr.Column(scale=5, min_width=340):
            gr.Markdown("### Choose layers to drop")
            read_line("Click layers in the strip above, type their numbers, or take a preset.")
            dropped = gr.Textbox(
                label="Dropped layers", placeholder="none, e.g. 13, 17", elem_id="dropped"
            )
            count = gr.Slider(1, 12, value=3, step=1, label="k, how many layers to drop")
            with gr.Row():
                drop_least = gr.Button("Drop the k least needed", elem_id="drop-least")
                keep_all = gr.Button("Keep all layers", elem_id="keep-all")
            with gr.Accordion("Or find the best set for a target", open=False):
                target = target_view()
            predicted = gr.HTML(_prediction(Session()), elem_id="predicted")
            measure = gr.Button(
                "Measure full and pruned model", variant="primary", elem_id="measure"
            )
            figures = gr.HTML(elem_id="figures")
        with gr.Column(scale=6, min_width=340):
            gr.Markdown("### Every set tried")
            chart = Chart(
                empty_figure(NOTHING_TRIED),
                name="Perplexity of every set tried",
                how_to_read=HOW_TO_READ,
                elem_id="tried-chart",
            )
            tried = gr.Dataframe(
                headers=TRIED_COLUMNS,
                column_widths=TRIED_WIDTHS,
                wrap=True,
                label="Perplexities of the sets tried",
                interactive=False,
                visible=False,
                max_height=340,
                elem_id="tried",
            )
    gr.Markdown("### The same prompt, continued by both")
    with gr.Row():
        prompt = gr.Textbox(PROMPT, label="Prompt", scale=4, lines=2, max_lines=4)
        new_tokens = gr.Slider(
            8, MAX_NEW_TOKENS, value=40, step=8, label="New tokens", scale=1, min_width=160
        )
        go_on = gr.Button("Continue", scale=0, min_width=120, elem_id="continue")
    with gr.Row():
        full_text = gr.Textbox(label="Full model", lines=4, interactive=False)
        pruned_text = gr.Textbox(
            label="Pruned model", lines=4, interactive=False, elem_id="pruned-text"
        )
    gr.Markdown("### Keep the result")
    with gr.Row(equal_height=False):
        with gr.Column(scale=1, min_width=300):
            name = gr.Textbox(
                "pruned-model", label="Name of the folder to save in", elem_id="save-name"
            )
            save = gr.Button("Save pruned model", elem_id="save")
        with gr.Column(scale=2, min_width=300):
            recipe = gr.Textbox(
                label="mergekit recipe of the same cut",
                lines=4,
                max_lines=14,
                interactive=False,
                buttons=["copy"],
                elem_id="recipe",
            )
    return PruneView(
        dropped,
        count,
        drop_least,
        keep_all,
        target,
        predicted,
        measure,
        figures,
        chart,
        tried,
        prompt,
        new_tokens,
        go_on,
        full_text,
        pruned_text,
        name,
        save,
        recipe,
        own_machine,
    )


class PruneHandlers:
    """What the tab's controls do; each yields {component: value}."""

    def __init__(
        self,
        view: PruneView,
        settings: AppSettings,
        stops: StopSignals,
        selection: gr.State,
        tried: gr.State,
        status: gr.HTML,
        strip: gr.HTML,
    ) -> None:
        self._view, self._settings, self._stops = view, settings, stops
        self._selection, self._tried = selection, tried
        self._status, self._strip = status, strip
        guard = guarded(status)
        self.clicked = guard(self._clicked)
        self.typed = guard(self._typed)
        self.drop_least = guard(self._drop_least)
        self.keep_all = guard(self._keep_all)
        self.take = guard(self._take)
        self.find = guard(self._find)
        self.measure = guard(self._measure)
        self.go_on = guard(self._go_on)
        self.save = guard(self._save)

    def _clicked(self, session: Session, layers: object) -> Iterator[dict]:
        if not isinstance(layers, list) or any(type(layer) is not int for layer in layers):
            raise LayerShapError("The strip sent something that is not a list of layers.")
        chosen = session.dropping(tuple(layers))
        yield {self._selection: chosen.dropped, **self._view.draw_selection(chosen)}

    def _typed(self, session: Session, text: str) -> Iterator[dict]:
        yield self._select(session, session.players.parse("Dropped layers", text or ""))

    def _drop_least(self, session: Session, count: float) -> Iterator[dict]:
        values = session.need_analysis().contributions
        k = whole("k", count)
        players = session.players
        if not 1 <= k < players.count:
            raise LayerShapError(
                f"k is {k}, but this model has {players.count} {players.noun}s; choose k from 1 to "
                f"{players.count - 1}."
            )
        least = np.argsort(values, kind="stable")[:k]
        yield self._select(session, tuple(int(layer) for layer in least))

    def _keep_all(self, session: Session) -> Iterator[dict]:
        yield self._select(session, ())

    def _take(
        self, session: Session, compared: MethodsComparison | None, method: str, dropped: float
    ) -> Iterator[dict]:
        layers = chosen_set(compared, method, dropped)
        yield {
            **self._select(session, layers),
            self._status: news(
                f"{method} drops {session.players.labels(layers)}: the set is in Prune and compare."
            ),
        }

    def _find(
        self,
        session: Session,
        rise: float | None,
        saved: float | None,
        resource: str,
        keep: str,
        request: gr.Request,
    ) -> Iterator[dict]:
        for item in search_target(session, self._stops, request, rise, saved, resource, keep):
            if isinstance(item, str):
                yield {self._status: item}
            else:
                yield {
                    **self._select(session, item.dropped),
                    self._status: news(summary(session, item, rise, resource)),
                }
                return
        yield {self._status: news("Stopped: what was measured is kept. Search again to go on.")}

    def _select(self, session: Session, layers: tuple[int, ...]) -> dict:
        chosen = session.dropping(layers)
        return {
            self._selection: chosen.dropped,
            self._strip: strip_selection(chosen),
            **self._view.draw_selection(chosen),
        }

    def _measure(
        self, session: Session, text: str, tried: tuple[Comparison, ...]
    ) -> Iterator[dict]:
        session = session.dropping(session.players.parse("Dropped layers", text or ""))
        workspace = session.need_workspace()
        keep = session.keep
        if not keep.any():
            raise LayerShapError("No layers are kept; keep at least one.")
        yield {self._status: progress_bar("Measuring calibration perplexity", 0.1)}
        calibration = full_and_pruned(workspace.calibration, keep)
        without = session.players.labels(session.dropped)
        partly = MeasuredFigures(without, calibration)
        yield {
            self._view.figures: partly.table(),
            self._status: progress_bar("Measuring held-out perplexity", 0.4),
        }
        held_out = full_and_pruned(workspace.held_out, keep)
        recent = workspace.recent.get(keep)
        if recent is None:
            pruned = prune(workspace.model, keep)
            sizes = footprint(workspace.model), footprint(pruned)
        else:
            sizes = recent.sizes
        compared = compare_cut(
            workspace.calibration, workspace.held_out, keep, session.analysis, sizes
        )
        tried = with_comparison(tried, compared)
        partly = MeasuredFigures(without, calibration, held_out, sizes)
        yield {
            self._tried: tried,
            self._view.figures: partly.table(),
            self._status: progress_bar("Timing both models", 0.7),
        }
        if recent is None:
            full_speed, pruned_speed = measure_speeds((workspace.model, pruned))
            recent = CutCosts(sizes, (full_speed, pruned_speed))
            workspace.recent.put(keep, recent)
        yield {
            self._tried: tried,
            self._view.figures: MeasuredFigures(
                without, calibration, held_out, sizes, recent.speeds
            ).table(),
            self._status: news("Measured. The set is in the list of sets tried."),
            **self._view.draw_tried(tried, session.players),
        }

    def _go_on(
        self,
        session: Session,
        selection: tuple[int, ...],
        prompt: str,
        count: float,
        request: gr.Request,
    ) -> Iterator[dict]:
        session = session.dropping(selection)
        workspace = session.need_workspace()
        new_tokens = whole("New tokens", count)
        if not 1 <= new_tokens <= MAX_NEW_TOKENS:
            raise LayerShapError(
                f"New tokens is {new_tokens}; it must be from 1 to {MAX_NEW_TOKENS}."
            )
        stop = self._stops.begin(request.session_hash)
        pruned = prune(workspace.model, session.keep)
        name = cut_name(session.players.labels(session.dropped))
        yield {self._view.full_text: "", self._view.pruned_text: gr.update(value="", label=name)}
        for model, box, stage in (
            (workspace.model, self._view.full_text, "The full model is writing"),
            (pruned, self._view.pruned_text, "The pruned model is writing"),
        ):
            yield {self._status: progress_bar(stage, None)}
            for text in continue_prompt(
                model, prompt or "", max_new_tokens=new_tokens, stop=stop.is_set
            ):
                yield {box: text}
        yield {self._status: news("Both continuations are greedy: the likeliest word each time.")}

    def _save(
        self,
        session: Session,
        selection: tuple[int, ...],
        name: str,
        tried: tuple[Comparison, ...],
    ) -> Iterator[dict]:
        self._settings.check_may_write()
        session = session.dropping(selection)
        workspace = session.need_workspace()
        folder = saved_folder(name)
        measured = _measured(workspace.text_info, session.dropped, tried)
        for item in streamed(
            lambda report: save_pruned(workspace.model, session.keep, folder, report, measured)
        ):
            if isinstance(item, tuple):
                yield {self._status: progress_bar(*item)}
            else:
                yield {self._status: news(f"Saved in {item}")}


def saved_folder(name: str | None) -> Path:
    """Where a saved model of that name is kept.

    Raises:
        LayerShapError: not a plain folder name.
    """
    if not FOLDER_NAME.fullmatch(name or ""):
        raise LayerShapError(
            "Name the folder with letters, digits, dots, dashes and underscores only."
        )
    return cache_root() / "pruned" / name


def _measured(
    text: TextInfo, dropped: tuple[int, ...], tried: tuple[Comparison, ...]
) -> Measured | None:
    """What a set's card can say, if the set was tried."""
    for c in tried:
        if c.dropped == dropped:
            return Measured(
                text,
                Perplexities(c.held_out_full, c.held_out_pruned),
                Perplexities(c.calibration_full, c.calibration_pruned),
            )
    return None


def _prediction(session: Session) -> str:
    if session.analysis is None:
        return '<p class="ls-read">Predictions appear here once the layers are analysed.</p>'
    if not session.keep.any():
        return '<p class="ls-read">No layers are kept; keep at least one.</p>'
    # The page greys it out while other layers are dropped than those it is of.
    of = ",".join(map(str, session.dropped))
    return f'<p class="ls-predicted" data-dropped="{of}">{_predicted(session)}</p>'


def _predicted(session: Session) -> str:
    analysis = session.need_analysis()
    full = f"full model {perplexity_text(float(np.exp(analysis.full_loss)))}, measured"
    if not session.dropped:
        return f"Nothing dropped: {full}."
    predicted, low, high = (float(v[0]) for v in analysis.predict_perplexity(session.keep))
    outside = session.keep.sum() < min(analysis.settings.strata)
    warning = " Less is kept than in any measured mask: a guess." if outside else ""
    return (
        f"<strong>{perplexity_text(predicted)}</strong>"
        "<span>predicted calibration perplexity</span>"
        f'<span class="ls-quiet">90 % range {perplexity_text(low)} to {perplexity_text(high)}; '
        f"{full}.{warning}</span>"
    )


def _recipe(session: Session, own_machine: bool) -> str:
    if session.model is None or not session.keep.any():
        return ""
    if session.players.whole_layers(session.dropped) is None:
        return "# mergekit knows whole layers only: save the pruned model instead."
    location = None
    if session.workspace:
        workspace = session.workspace
        location = workspace.model.location if own_machine else workspace.public_location
    return mergekit_yaml(session.model, session.keep, location)
