"""Set-up: which model, which text, and how to analyse; loading and running."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from html import escape
from typing import Any

import gradio as gr

from core.analysis import AnalysisSettings, run
from core.errors import LayerShapError
from core.loading import DEVICES, DTYPES
from core.masks import default_strata
from core.models import BUNDLED
from core.surrogate import KINDS
from core.text import BUNDLED as BUNDLED_TEXT
from core.text import WIKITEXT
from ui import shelf
from ui.session import Session, StopSignals
from ui.settings import AppSettings
from ui.status import alert, duration, guarded, news, progress_bar, streamed
from ui.strip import strip_value
from ui.workspace import ModelChoice, TextChoice, Workspaces

FROM_BUNDLE = "SmolLM2-135M (bundled)"
FROM_HUB = "Hugging Face id"
FROM_FOLDER = "Local folder"
FROM_GGUF = "GGUF file"
TEXT_BUNDLED = "Presidential messages (bundled)"
TEXT_FILE = "Upload"
TEXT_HUB = "Hugging Face data set"
RECOMMENDED, PUBLISHED = "Recommended", "As published"
HINTS = {
    FROM_HUB: "owner/name, for example HuggingFaceTB/SmolLM2-135M",
    FROM_FOLDER: "a folder with config.json and .safetensors files",
    FROM_GGUF: "a file ending in .gguf",
}
READY = "Ready. Analyse the layers, or choose some to drop and measure."
# The page is told of progress at most this often.
REFRESH_SECONDS = 0.25


@dataclass(frozen=True)
class SetupView:
    """The controls of the set-up panel."""

    model_from: gr.Radio
    model_source: gr.Textbox
    revision: gr.Textbox
    device: gr.Dropdown
    dtype: gr.Dropdown
    text_from: gr.Radio
    text_file: gr.File
    text_set: gr.Textbox
    blocks: gr.Number
    block_length: gr.Number
    held_out_blocks: gr.Number
    text_seed: gr.Number
    players: gr.Radio
    load: gr.Button
    preset: gr.Radio
    strata: gr.Textbox
    utility: gr.Radio
    surrogate: gr.Dropdown
    seed: gr.Number

    @property
    def load_inputs(self) -> list:
        return [
            self.model_from,
            self.model_source,
            self.revision,
            self.device,
            self.dtype,
            self.text_from,
            self.text_file,
            self.text_set,
            self.blocks,
            self.block_length,
            self.held_out_blocks,
            self.text_seed,
            self.players,
        ]

    @property
    def run_inputs(self) -> list:
        return [self.strata, self.utility, self.surrogate, self.seed]


def setup_view(settings: AppSettings) -> SetupView:
    """Lay out the set-up panel."""
    sources = [FROM_BUNDLE, FROM_HUB]
    if settings.local_files:
        sources += [FROM_FOLDER, FROM_GGUF]
    defaults = AnalysisSettings()
    with gr.Row(equal_height=False):
        with gr.Column(min_width=300), gr.Group():
            model_from = gr.Radio(sources, value=FROM_BUNDLE, label="1 · Model")
            model_source = gr.Textbox(label="Model", visible=False)
            revision = gr.Textbox(label="Revision (optional)", visible=False)
            with gr.Row():
                device = gr.Dropdown(list(DEVICES), value="auto", label="Device", min_width=100)
                dtype = gr.Dropdown(
                    list(DTYPES), value="auto", label="Number format", min_width=100
                )
            players = gr.Radio(
                [("whole layers", "blocks"), ("attention and MLP apart", "sub-blocks")],
                value="blocks",
                label="What can be dropped",
            )
        with gr.Column(min_width=300), gr.Group():
            text_from = gr.Radio(
                [TEXT_BUNDLED, TEXT_FILE, TEXT_HUB], value=TEXT_BUNDLED, label="2 · Text"
            )
            text_file = gr.File(
                label="Text (.txt, .md, or .jsonl with a text field)",
                file_types=[".txt", ".md", ".jsonl"],
                visible=False,
                height=120,
            )
            text_set = gr.Textbox(
                WIKITEXT, label="Data set (owner/name:configuration:split)", visible=False
            )
            with gr.Row():
                blocks = gr.Number(10, label="Calibration blocks", precision=0, min_width=120)
                held_out_blocks = gr.Number(10, label="Held-out blocks", precision=0, min_width=120)
                block_length = gr.Number(128, label="Tokens per block", precision=0, min_width=120)
                text_seed = gr.Number(0, label="Text seed", precision=0, min_width=120)
            load = gr.Button("Load model and text", variant="secondary")
        with gr.Column(min_width=300), gr.Group():
            preset = gr.Radio([RECOMMENDED, PUBLISHED], value=RECOMMENDED, label="3 · Analysis")
            strata = gr.Textbox(
                label="How many are kept in a mask (strata)",
                placeholder="scaled to the model's depth",
            )
            with gr.Row():
                utility = gr.Radio(
                    [("perplexity ratio", "ratio"), ("log", "log")],
                    value=defaults.utility,
                    label="Utility",
                    min_width=120,
                )
                surrogate = gr.Dropdown(
                    list(KINDS), value=defaults.surrogate, label="Surrogate", min_width=120
                )
            seed = gr.Number(defaults.seed, label="Seed", precision=0, min_width=120)
    view = SetupView(
        model_from,
        model_source,
        revision,
        device,
        dtype,
        text_from,
        text_file,
        text_set,
        blocks,
        block_length,
        held_out_blocks,
        text_seed,
        players,
        load,
        preset,
        strata,
        utility,
        surrogate,
        seed,
    )
    _show_what_applies(view)
    return view


def _show_what_applies(view: SetupView) -> None:
    view.model_from.change(
        lambda chosen: (
            gr.update(visible=chosen != FROM_BUNDLE, label=chosen, placeholder=HINTS.get(chosen)),
            gr.update(visible=chosen == FROM_HUB),
        ),
        view.model_from,
        [view.model_source, view.revision],
        api_visibility="private",
        show_progress="hidden",
    )
    view.text_from.change(
        lambda chosen: (
            gr.update(visible=chosen == TEXT_FILE),
            gr.update(visible=chosen == TEXT_HUB),
        ),
        view.text_from,
        [view.text_file, view.text_set],
        api_visibility="private",
        show_progress="hidden",
    )


def load_handler(
    settings: AppSettings,
    workspaces: Workspaces,
    session: gr.State,
    status: gr.HTML,
    model_line: gr.HTML,
    strip: gr.HTML,
    strata: gr.Textbox,
    fresh: Callable[[Session], dict[Any, Any]],
) -> Any:
    """Handler that loads the chosen model and text into the session.

    `fresh` makes the updates of what else a new model resets: selection and sets tried.
    """

    @guarded(status)
    def load(
        model_from: str,
        model_source: str,
        revision: str,
        device: str,
        dtype: str,
        text_from: str,
        text_file: str | None,
        text_set: str,
        blocks: float,
        block_length: float,
        held_out_blocks: float,
        seed: float,
        players: str,
    ) -> Iterator[dict]:
        model = _model_choice(settings, model_from, model_source, revision, device, dtype)
        text = TextChoice(
            _text_source(settings, text_from, text_file, text_set),
            whole("Calibration blocks", blocks),
            whole("Tokens per block", block_length),
            whole("Held-out blocks", held_out_blocks),
            whole("Text seed", seed),
        )
        loaded = None
        for item in streamed(lambda report: workspaces.open(model, text, report, players)):
            if isinstance(item, tuple):
                yield {status: progress_bar(*item)}
            else:
                loaded = Session.of_workspace(item)
        ready_made = Session.of_study(shelf.ready_made())
        if ready_made.fits(loaded.workspace):
            loaded = replace(ready_made, workspace=loaded.workspace, model=loaded.model)
        yield {
            session: loaded,
            status: _news(
                READY,
                loaded.workspace.calibration.cache.notice,
            ),
            model_line: describe(loaded),
            strip: gr.update(value=strip_value(loaded), dropped=[]),
            **fresh(loaded),
            strata: ", ".join(map(str, default_strata(loaded.players.count))),
        }

    return load


def _model_choice(
    settings: AppSettings, came_from: str, source: str, revision: str, device: str, dtype: str
) -> ModelChoice:
    chosen = BUNDLED if came_from == FROM_BUNDLE else (source or "").strip()
    if not chosen:
        raise LayerShapError(f"Name the model: {HINTS.get(came_from, HINTS[FROM_HUB])}.")
    settings.check_model(chosen)
    if came_from == FROM_GGUF and not chosen.lower().endswith(".gguf"):
        raise LayerShapError(f"{chosen} does not end in .gguf; name a GGUF file.")
    return ModelChoice(chosen, (revision or "").strip() or None, device, dtype)


def _text_source(settings: AppSettings, came_from: str, file: str | None, data_set: str) -> str:
    if came_from == TEXT_BUNDLED:
        return BUNDLED_TEXT
    if came_from == TEXT_FILE:
        if not file:
            raise LayerShapError("Choose a text file to upload first.")
        return file
    name = (data_set or "").strip()
    settings.check_data_set(name)
    return name


def analyse_handler(
    settings: AppSettings,
    stops: StopSignals,
    session: gr.State,
    status: gr.HTML,
    model_line: gr.HTML,
    strip: gr.HTML,
    draw: Any,
) -> Any:
    """Handler that runs an analysis, streaming partial results; `draw` makes charts' updates."""

    @guarded(status)
    def analyse(
        current: Session,
        evaluations: float,
        strata: str,
        utility: str,
        surrogate: str,
        seed: float,
        average: str,
        order: str,
        request: gr.Request,
    ) -> Iterator[dict]:
        workspace = current.need_workspace()
        chosen = AnalysisSettings(
            evaluations=whole("Evaluations", evaluations),
            seed=whole("Seed", seed),
            strata=_parse_strata(strata),
            utility=utility,
            surrogate=surrogate,
        )
        settings.check_evaluations(chosen.evaluations)
        stop = stops.begin(request.session_hash)
        shown = 0.0
        for step in run(workspace.calibration, chosen, stop.is_set):
            if step.analysis is not None:
                current = current.analysed(step.analysis)
                yield {
                    session: current,
                    model_line: describe(current),
                    strip: gr.update(value=strip_value(current)),
                    **draw(current, average, order),
                }
            elif time.monotonic() - shown < REFRESH_SECONDS:
                continue
            shown = time.monotonic()
            yield {status: _progress(step)}
        notice = workspace.calibration.cache.notice
        if step.stage == "Done":
            try:
                current = replace(current, study_id=shelf.keep(current.study()))
            except LayerShapError as error:
                notice = notice or str(error)
            yield {session: current, strip: gr.update(value=strip_value(current))}
        yield {status: _news(_summary(step, current, notice), notice)}

    return analyse


def _progress(step: Any) -> str:
    left = f", about {duration(step.seconds_left)} left" if step.seconds_left else ""
    return progress_bar(
        step.stage, step.done / max(step.total, 1), f"{step.done} of {step.total} masks{left}"
    )


def _news(message: str, notice: str | None) -> str:
    """A message, and the cache's notice where there is one."""
    return news(message) if notice is None else alert(f"{message} {notice}")


def _summary(step: Any, current: Session, notice: str | None) -> str:
    if step.stage == "Done":
        return f"Done: {step.done} masks measured." + (
            "" if notice else " Every one is kept for next time."
        )
    used = len(current.analysis.masks) if current.analysis else 0
    return (
        f"Stopped: {step.done} of {step.total} masks measured{'' if notice else ' and kept'}; "
        f"the charts use the {used} "
        "of whole rounds. Analyse again to go on from here."
    )


def describe(session: Session, loading: bool = False) -> str:
    """The line that says which model and text are loaded, or just `loading`, as HTML."""
    model, text = session.model, session.text
    if model is None or text is None:
        return '<p class="ls-model">No model loaded yet.</p>'
    parts = (
        f"{model.n_layers} layers"
        + (", attention and MLP apart" if session.players.kind == "sub-blocks" else ""),
        f"{model.parameters / 1e6:,.1f} M parameters"
        + (
            f", {model.tower_parameters / 1e6:,.1f} M of them outside the language model"
            if model.tower_parameters
            else ""
        ),
        (f"{model.quantization}, " if model.quantization else "")
        + f"{model.dtype} on {model.device}",
        f"{text.source}: {text.blocks} calibration and {text.held_out_blocks} held-out blocks of "
        f"{text.block_length} tokens",
    )
    here = loading or session.workspace is not None
    where = "" if here else " (opened from a saved study; the model is not loaded)"
    return (
        f'<p class="ls-model"><b>{escape(model.name)}</b>{where} · '
        f"{' · '.join(map(escape, parts))}{_origin(session)}</p>"
    )


def _origin(session: Session) -> str:
    """How large the study on screen is and what measured it."""
    analysis, study = session.analysis, session.origin
    if analysis is None:
        return ""
    made = "here"
    if study is not None:
        made = f"in {study.model.dtype} on {study.model.device}, {study.created[:10]}"
    return (
        f" · study of {len(analysis.masks)} masks, seed {analysis.settings.seed}, measured "
        f"{escape(made)}"
    )


def whole(name: str, value: float | None) -> int:
    """A whole number from a number field.

    Raises:
        LayerShapError: the field is empty or holds a fraction.
    """
    if value is None or not math.isfinite(value) or value != int(value):
        raise LayerShapError(f"{name} must be a whole number.")
    return int(value)


def _parse_strata(text: str) -> tuple[int, ...] | None:
    if not text or not text.strip():
        return None
    try:
        return tuple(int(part) for part in text.replace(",", " ").split())
    except ValueError as error:
        raise LayerShapError(
            "Strata must be whole numbers separated by commas, such as 28, 26, 24."
        ) from error
