"""Heal and share: a short LoRA fine-tune of the pruned model, what it gained, and where it goes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from typing import Any

import gradio as gr
import numpy as np
from numpy.typing import NDArray

from core.card import Measured, Perplexities
from core.errors import LayerShapError
from core.healing import (
    DIVERGED,
    STOPPED,
    Healing,
    HealingProgress,
    HealingSettings,
    heal,
    save_healed,
)
from core.models import LayeredModel
from core.pruning import prune
from core.publishing import push
from ui.chart import Chart
from ui.figures import empty_figure, healing_curve
from ui.figures.healing import HOW_TO_READ
from ui.measured import cut_name, perplexity_text
from ui.parts import read_line
from ui.prune_view import saved_folder
from ui.session import Session, StopSignals
from ui.settings import AppSettings
from ui.setup_view import REFRESH_SECONDS, whole
from ui.status import duration, guarded, news, progress_bar, streamed

NOT_HEALED = "Drop some layers, then press Heal: the loss appears here as it falls."
WHAT_IT_IS = (
    "The layers that are left learn to do without the others: a short LoRA fine-tune on the "
    "calibration side of the text. No held-out document is trained on."
)
WHOSE_LOGIN = (
    "Uploads a saved folder, with its model card, under the login of this machine "
    "(made with: hf auth login)."
)
NOT_HERE = (
    "Pushing is possible only where LayerShap runs on your own machine: here it would use the "
    "login of this dashboard's owner."
)
MOST_STEPS, MOST_RANK = 2000, 128
# The curve is drawn again at most this often, and a healed model that nobody saves is let go.
CURVE_SECONDS, KEPT_SECONDS = 2.0, 2 * 3600


@dataclass(frozen=True)
class Healed:
    """A healed model with the model that it was cut from, and the mask of the cut."""

    healing: Healing
    full: LayeredModel
    keep: NDArray[np.bool_]


@dataclass(frozen=True)
class HealView:
    steps: gr.Slider
    rank: gr.Slider
    learning_rate: gr.Number
    heal: gr.Button
    chart: Chart
    figures: gr.HTML
    name: gr.Textbox
    save: gr.Button
    repo: gr.Textbox
    private: gr.Checkbox
    push: gr.Button

    def draw_nothing(self) -> dict[Any, Any]:
        """Updates that show that nothing is healed."""
        return {self.chart: empty_figure(NOT_HEALED), self.figures: ""}


def heal_view(settings: AppSettings) -> HealView:
    """Lay out the tab."""
    defaults = HealingSettings()
    with gr.Row(equal_height=False):
        with gr.Column(scale=2, min_width=320):
            gr.Markdown("### Heal the pruned model")
            read_line(WHAT_IT_IS)
            steps = gr.Slider(10, MOST_STEPS, value=defaults.steps, step=10, label="Steps")
            rank = gr.Slider(1, MOST_RANK, value=defaults.rank, step=1, label="Adapter rank")
            learning_rate = gr.Number(
                defaults.learning_rate, label="Learning rate", elem_id="learning-rate"
            )
            start = gr.Button("Heal", variant="primary", elem_id="heal")
        with gr.Column(scale=3, min_width=340):
            gr.Markdown("### Loss while healing")
            chart = Chart(
                empty_figure(NOT_HEALED),
                name="Loss while healing",
                how_to_read=HOW_TO_READ,
                elem_id="healing-chart",
            )
    figures = gr.HTML(elem_id="healed-figures")
    with gr.Row(equal_height=False):
        with gr.Column(scale=1, min_width=320):
            gr.Markdown("### Keep the healed model")
            name = gr.Textbox("healed-model", label="Name of the folder", elem_id="healed-name")
            save = gr.Button("Save healed model", elem_id="save-healed")
        with gr.Column(scale=1, min_width=320):
            gr.Markdown("### Push to the Hugging Face Hub")
            read_line(WHOSE_LOGIN if settings.local_files else NOT_HERE)
            with gr.Group(visible=settings.local_files):
                repo = gr.Textbox(
                    label="Repository", placeholder="owner/name", elem_id="push-repository"
                )
                private = gr.Checkbox(True, label="Private")
            button = gr.Button(
                "Push the saved folder", elem_id="push", visible=settings.local_files
            )
    return HealView(
        steps, rank, learning_rate, start, chart, figures, name, save, repo, private, button
    )


class HealHandlers:
    """What the tab's controls do; each yields {component: value}."""

    def __init__(
        self,
        view: HealView,
        settings: AppSettings,
        stops: StopSignals,
        healed: gr.State,
        status: gr.HTML,
    ) -> None:
        self._view, self._settings, self._stops = view, settings, stops
        self._healed, self._status = healed, status
        guard = guarded(status)
        self.heal = guard(self._heal)
        self.save = guard(self._save)
        self.push = guard(self._push)

    def _heal(
        self,
        session: Session,
        selection: tuple[int, ...],
        steps: float,
        rank: float,
        learning_rate: float,
        request: gr.Request,
    ) -> Iterator[dict]:
        session = session.dropping(selection)
        workspace = session.need_workspace()
        if not session.dropped:
            raise LayerShapError("Drop some layers first: there is nothing to heal yet.")
        settings = _settings(steps, rank, learning_rate)
        stop = self._stops.begin(request.session_hash)
        view, drawn, shown = self._view, 0.0, 0.0
        yield {
            self._healed: None,
            self._status: progress_bar("Reading the text to train on", None),
            **view.draw_nothing(),
        }
        training = workspace.training_blocks(settings.blocks_wanted)
        pruned = prune(workspace.model, session.keep)
        measured = None
        for step in heal(
            pruned, training, workspace.text, settings, full=workspace.model, stop=stop.is_set
        ):
            now = time.monotonic()
            updates: dict[Any, Any] = {}
            if step.measured is not None and step.measured != measured:
                measured = step.measured
                updates[view.figures] = healed_table(
                    measured, pruned, session.players.labels(session.dropped)
                )
            if step.healing is not None:
                updates[self._healed] = Healed(step.healing, workspace.model, session.keep)
            if step.curve.validations and (step.healing or now - drawn > CURVE_SECONDS):
                drawn = now
                updates[view.chart] = healing_curve(step.curve, settings.steps)
            if updates or now - shown > REFRESH_SECONDS:
                shown = now
                yield {**updates, self._status: _status(step)}

    def _save(self, healed: Healed | None, name: str) -> Iterator[dict]:
        self._settings.check_may_write()
        if healed is None:
            raise LayerShapError("There is no healed model yet; press Heal first.")
        folder = saved_folder(name)
        for item in streamed(
            lambda report: save_healed(healed.healing, healed.full, healed.keep, folder, report)
        ):
            if isinstance(item, tuple):
                yield {self._status: progress_bar(*item)}
            else:
                yield {self._status: news(f"Saved in {item}")}

    def _push(self, name: str, repo: str, private: bool) -> Iterator[dict]:
        if not self._settings.local_files:
            raise LayerShapError(NOT_HERE)
        self._settings.check_may_write()
        folder = saved_folder(name)
        for item in streamed(
            lambda report: push(folder, repo or "", private=bool(private), progress=report)
        ):
            if isinstance(item, tuple):
                yield {self._status: progress_bar(*item)}
            else:
                yield {self._status: news(f"Pushed to {item}")}


def healed_table(measured: Measured, pruned: LayeredModel, dropped: str) -> str:
    """Perplexities of the full, the pruned and the healed model, as HTML."""
    rows = "".join(
        f'<tr><th scope="row">{title}</th>'
        + "".join(
            f"<td>{escape('…' if value is None else perplexity_text(value))}</td>"
            for value in (of.full, of.pruned, of.healed)
        )
        + "</tr>"
        for title, of in (
            ("Held-out perplexity", measured.held_out),
            ("Calibration perplexity (documents trained on)", measured.calibration),
        )
    )
    return (
        '<table class="ls-figures"><thead><tr><th scope="col">Measured</th>'
        f'<th scope="col">Full</th><th scope="col">{escape(cut_name(dropped))}</th>'
        f'<th scope="col">Healed</th></tr></thead><tbody>{rows}</tbody></table>'
        f'<p class="ls-read">{escape(_reading(measured.held_out, pruned))}</p>'
    )


def _reading(held_out: Perplexities, pruned: LayeredModel) -> str:
    """What the held-out figures come to, in a sentence or two."""
    size = f"Pruned and healed have {pruned.info.parameters / 1e6:,.1f} M parameters each."
    if held_out.healed is None or not np.isfinite(held_out.pruned):
        return size
    lost = np.log(held_out.pruned / held_out.full)
    won = np.log(held_out.pruned / held_out.healed)
    if lost <= 0:
        return size
    share = f"Healing took back {won / lost:.0%} of the held-out loss that the cut cost. {size}"
    if won > lost:
        return (
            f"{share} It is below the full model because training also made it used to this kind "
            "of text."
        )
    return share


def _settings(steps: float, rank: float, learning_rate: float | None) -> HealingSettings:
    return HealingSettings(
        steps=whole("Steps", steps),
        rank=whole("Adapter rank", rank),
        learning_rate=float(learning_rate or 0),
    )


def _status(step: HealingProgress) -> str:
    if step.healing is not None:
        return news(_summary(step, step.healing))
    if step.done == 0 and not step.curve.validations:
        return progress_bar(step.stage, None)
    left = f", about {duration(step.seconds_left)} left" if step.seconds_left else ""
    return progress_bar(
        step.stage, step.done / max(step.total, 1), f"{step.done} of {step.total} steps{left}"
    )


def _summary(step: HealingProgress, healing: Healing) -> str:
    after = {
        STOPPED: f"Stopped after {step.done} of {step.total} steps: ",
        DIVERGED: f"The loss ceased to be finite after {step.done} steps; try a smaller learning "
        "rate. ",
    }.get(healing.ended, f"Healed in {duration(healing.seconds)}: ")
    if healing.kept_step == 0:
        return f"{after}no step helped on the blocks set apart, so the pruned model is unchanged."
    held_out = healing.measured.held_out
    return (
        f"{after}held-out perplexity {perplexity_text(held_out.pruned)} before, "
        f"{perplexity_text(held_out.healed)} now (step {healing.kept_step} kept)."
    )
