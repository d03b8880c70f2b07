"""The first minute: three steps that say what to do next, and go there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gradio as gr

from ui.session import Session

TEMPLATE = """
<ol class="ls-steps" aria-label="What to do here">
${value.map((step, index) =>
  '<li class="ls-step' + (step.done ? ' ls-done' : '') + '">'
  + '<button type="button" data-step="' + index + '">'
  + '<span class="ls-step-number" aria-hidden="true">'
  + (step.done ? '✓' : index + 1) + '</span><span><b>' + step.name + '</b>'
  + (step.done ? '<span class="ls-hidden"> (done)</span>' : '')
  + '<span class="ls-step-what">' + step.what + '</span></span></button></li>').join('')}
</ol>
<button type="button" class="ls-dismiss" aria-label="Hide this guide">✕</button>
"""
SCRIPT = "LayerShap.guide(element);"


@dataclass(frozen=True)
class Step:
    name: str
    what: str
    done: bool


def guide(session: Session) -> gr.HTML:
    """Lay out the guide; it never blocks anything, and can be hidden for good."""
    return gr.HTML(
        guide_value(session),
        html_template=TEMPLATE,
        js_on_load=SCRIPT,
        apply_default_css=False,
        elem_id="guide",
        elem_classes="ls-guide",
    )


def guide_value(session: Session, tried: bool = False) -> list[dict[str, Any]]:
    """The three steps, and which of them are done."""
    ready_made = session.origin is not None
    steps = (
        Step(
            "Load",
            "a model and a text of your own, or stay with this one"
            if session.model
            else "a model and a text",
            session.workspace is not None,
        ),
        Step(
            "Analyse",
            "already measured here; press Analyse for other settings"
            if ready_made
            else "what each layer is worth, measured in minutes",
            session.analysis is not None,
        ),
        Step("Prune", "click layers in the strip, then measure what it costs", tried),
    )
    return [vars(step) for step in steps]
