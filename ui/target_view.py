"""Find the best set for a target: what may be lost, what must be saved, what must stay."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import gradio as gr

from core.errors import LayerShapError
from core.targets import Found, Target, find_set
from ui.figures.methods import RESOURCE_OF
from ui.measured import perplexity_text
from ui.parts import read_line
from ui.session import Session, StopSignals
from ui.setup_view import REFRESH_SECONDS
from ui.status import duration, progress_bar

DEFAULT_RISE = 20


@dataclass(frozen=True)
class TargetView:
    rise: gr.Number
    saved: gr.Number
    resource: gr.Dropdown
    keep: gr.Textbox
    find: gr.Button

    @property
    def inputs(self) -> list:
        return [self.rise, self.saved, self.resource, self.keep]


def target_view() -> TargetView:
    """Lay out the controls; an empty number sets no limit."""
    with gr.Row():
        rise = gr.Number(
            DEFAULT_RISE, label="Perplexity may rise by at most (%)", min_width=150, elem_id="rise"
        )
        saved = gr.Number(None, label="Save at least (%)", min_width=150, elem_id="saved")
        resource = gr.Dropdown(list(RESOURCE_OF), label="of", min_width=150)
        keep = gr.Textbox(label="Keep these layers", placeholder="none", min_width=150)
    find = gr.Button("Find the best set", elem_id="find-set")
    read_line(
        "LayerShap's search chooses on calibration text; held-out text then says whether the limit "
        "is kept. Leave a number empty to set no limit."
    )
    return TargetView(rise, saved, resource, keep, find)


def search_target(
    session: Session,
    stops: StopSignals,
    request: gr.Request,
    rise: float | None,
    saved: float | None,
    resource: str,
    keep: str,
) -> Iterator[str | Found]:
    """Progress bars, then what was found; nothing after a stop.

    Raises:
        LayerShapError: the target cannot be read, or is not reached.
    """
    workspace, players = session.need_workspace(), session.players
    if resource not in RESOURCE_OF:
        raise LayerShapError(f"Choose what to save: {', '.join(RESOURCE_OF)}.")
    target = Target(
        most_rise=None if rise is None else rise / 100,
        least_saved=None if saved is None else saved / 100,
        resource=RESOURCE_OF[resource],
        keep=players.parse("Keep these layers", keep or ""),
    )
    stop = stops.begin(request.session_hash)
    yield progress_bar("Timing the model's parts", None)
    resources = workspace.resources
    shown = 0.0
    for step in find_set(workspace.calibration, workspace.held_out, target, resources, stop.is_set):
        if step.found is not None:
            yield step.found
        elif time.monotonic() - shown >= REFRESH_SECONDS:
            shown = time.monotonic()
            left = f", about {duration(step.seconds_left)} left" if step.seconds_left else ""
            detail = f"{step.done} of at most {step.total} evaluations{left}"
            yield progress_bar("Searching for the best set", step.done / step.total, detail)


def summary(session: Session, found: Found, rise: float | None, resource: str) -> str:
    """What was found, in words."""
    full, pruned = found.held_out
    target = Target(most_rise=None if rise is None else rise / 100)
    kept = "" if found.keeps(target) else " That is above your limit: allow less, and search again."
    noun = "predicted writing time" if RESOURCE_OF[resource] == "time" else resource
    return (
        f"Drop {session.players.labels(found.dropped)}: saves {found.saved:.1%} of {noun}; "
        f"held-out perplexity {perplexity_text(full)} → {perplexity_text(pruned)} "
        f"({found.held_out_rise:+.1%}, measured), after {found.evaluations} evaluations.{kept}"
    )
