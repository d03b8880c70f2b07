"""What a visitor sees first: the study that the address names, then the model underneath it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from urllib.parse import parse_qsl

import gradio as gr

from core.models import BUNDLED
from core.text import BUNDLED as BUNDLED_TEXT
from core.text import BUNDLED_NAME as BUNDLED_TEXT_NAME
from ui import shelf
from ui.session import Session
from ui.settings import AppSettings
from ui.setup_view import READY, describe
from ui.status import guarded, news, progress_bar, streamed
from ui.workspace import ModelChoice, TextChoice, Workspaces

LOADING = "Loading the model for live comparisons; everything below works meanwhile"
LOAD_FIRST = "Load a model in Set-up to begin."
STUDY_ONLY = (
    "Study opened: charts and predictions work. To measure, load its model and text in Set-up."
)


def first_session(settings: AppSettings) -> Session:
    """The ready-made study, where visitors may use its model."""
    if not settings.allows(BUNDLED):
        return Session()
    return Session.of_study(shelf.ready_made())


def link_handler(session: gr.State, status: gr.HTML, show: Any) -> Any:
    """Handler that restores what the page's address names; `show` makes the page's updates for a
    session and a selection."""

    @guarded(status)
    def follow(current: Session, search: str | None) -> Iterator[dict]:
        asked = dict(parse_qsl((search or "").removeprefix("?")))
        # Said once and at a stroke: outside the queue only a generator's first answer arrives.
        restored: dict[Any, Any] = {status: progress_bar(LOADING, None)}
        study, drop = asked.get("study"), asked.get("drop")
        if study:
            current = Session.of_study(shelf.find(study), study)
            restored[session] = current
        if study or drop:
            restored |= show(current, current.players.parse("The address", drop or ""))
        yield restored

    return follow


def model_handler(
    settings: AppSettings,
    workspaces: Workspaces,
    session: gr.State,
    status: gr.HTML,
    model_line: gr.HTML,
) -> Any:
    """Handler that loads the bundled model under the study on screen, if it is of that model."""

    @guarded(status)
    def load(current: Session) -> Iterator[dict]:
        if current.model is None or current.text is None or current.workspace is not None:
            yield {status: news(LOAD_FIRST if current.model is None else READY)}
            return
        known = current.model.source == BUNDLED and current.text.source == BUNDLED_TEXT_NAME
        if not known or not settings.allows(BUNDLED):
            yield {status: news(STUDY_ONLY), model_line: describe(current)}
            return
        text = TextChoice(
            BUNDLED_TEXT,
            current.text.blocks,
            current.text.block_length,
            current.text.held_out_blocks,
        )
        kind = current.players.kind
        loaded = None
        for item in streamed(lambda report: workspaces.open(ModelChoice(), text, report, kind)):
            if isinstance(item, tuple):
                yield {status: progress_bar(LOADING, item[1], item[0])}
            else:
                loaded = item
        if not current.fits(loaded):
            yield {status: news(STUDY_ONLY), model_line: describe(current)}
            return
        current = replace(current, workspace=loaded, model=loaded.model.info)
        yield {session: current, status: news(READY), model_line: describe(current)}

    return load
