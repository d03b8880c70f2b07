"""Study: download everything, open a saved study, and look after the cache."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.processing_utils import save_bytes_to_cache

from core.cache import default_cache
from core.errors import LayerShapError
from core.methods import MethodsComparison
from core.study import Comparison, Study
from ui.parts import read_line
from ui.session import Session
from ui.settings import AppSettings
from ui.status import guarded, news, progress_bar

MAX_STUDY_BYTES = 64 << 20
FILES = (
    ("study.json", "Whole study (JSON)"),
    ("contributions.csv", "Contributions (CSV)"),
    ("interactions.csv", "Interactions (CSV)"),
    ("measurements.csv", "Measured masks (CSV)"),
    ("comparisons.csv", "Sets tried (CSV)"),
)


@dataclass(frozen=True)
class StudyView:
    tab: gr.Tab
    downloads: tuple[gr.DownloadButton, ...]
    about: gr.HTML
    upload: gr.File
    cache: gr.HTML
    clear: gr.Button

    def draw(
        self,
        session: Session,
        tried: tuple[Comparison, ...],
        compared: MethodsComparison | None,
    ) -> dict[Any, Any]:
        """Write the session's files for download, and say what made them."""
        updates: dict[Any, Any] = {self.cache: cache_line()}
        if session.analysis is None:
            return updates
        study = session.with_findings(tried, compared).study()
        frames = {
            "contributions.csv": study.contributions_frame(),
            "interactions.csv": study.interactions_frame(),
            "measurements.csv": study.measurements_frame(),
            "comparisons.csv": study.comparisons_frame(),
        }
        texts = {
            "study.json": study.to_json(),
            **{name: study.to_csv(frame) for name, frame in frames.items()},
        }
        for button, (name, _) in zip(self.downloads, FILES, strict=True):
            # The page's server hands out files of its own cache, and clears it.
            file = save_bytes_to_cache(texts[name].encode(), name, button.GRADIO_CACHE)
            button.temp_files.add(file)
            updates[button] = gr.update(value=file, interactive=True)
        updates[self.about] = _about(study)
        return updates


def study_view(tab: gr.Tab) -> StudyView:
    """Lay out the tab."""
    with gr.Row(equal_height=False):
        with gr.Column(scale=1, min_width=320):
            gr.Markdown("### Download")
            read_line(
                "Every file names the model, text, settings and versions that made it; "
                "a CSV does so in its first lines, after #."
            )
            downloads = tuple(
                gr.DownloadButton(
                    label, interactive=False, size="md", elem_id="get-" + name.replace(".", "-")
                )
                for name, label in FILES
            )
        with gr.Column(scale=1, min_width=320):
            gr.Markdown("### Open a saved study")
            read_line("Charts and predictions work without the model; measuring needs it loaded.")
            upload = gr.File(
                label="Study (.json)", file_types=[".json"], height=120, elem_id="open-study"
            )
            gr.Markdown("### Evaluation cache")
            cache = gr.HTML(cache_line(), elem_id="cache")
            clear = gr.Button("Clear the cache", variant="stop", elem_id="clear-cache")
        with gr.Column(scale=1, min_width=320):
            gr.Markdown("### What made these numbers")
            about = gr.HTML('<p class="ls-read">Nothing analysed yet.</p>', elem_id="about")
    return StudyView(tab, downloads, about, upload, cache, clear)


def open_handler(session: gr.State, status: gr.HTML, show: Any) -> Any:
    """Handler that opens a study file; `show` makes the whole page's updates for a session."""

    @guarded(status)
    def open_study(path: str | None) -> Iterator[dict]:
        if not path:
            return
        yield {status: progress_bar("Opening the study", None)}
        file = Path(path)
        if file.stat().st_size > MAX_STUDY_BYTES:
            raise LayerShapError(f"{file.name} is larger than {MAX_STUDY_BYTES >> 20} MB.")
        try:
            content = file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise LayerShapError(f"{file.name} is not a study: it is not UTF-8 text.") from error
        opened = Session.of_study(Study.from_json(content))
        yield {session: opened, status: news("Study opened."), **show(opened)}

    return open_study


def clear_handler(settings: AppSettings, view: StudyView, status: gr.HTML) -> Any:
    """Handler that forgets every cached evaluation."""

    @guarded(status)
    def clear() -> Iterator[dict]:
        settings.check_may_write()
        forgotten = default_cache().clear()
        yield {
            view.cache: cache_line(),
            status: news(f"The cache is empty; {forgotten} evaluations were forgotten."),
        }

    return clear


def cache_line() -> str:
    """Where the evaluation cache is and what it takes, as HTML."""
    cache = default_cache()
    text = f"{len(cache):,} evaluations, {cache.size_bytes / 1e3:,.0f} KB, in {cache.folder}"
    if cache.notice:
        text += f". {cache.notice}"
    return f'<p class="ls-read">{escape(text)}</p>'


def _about(study: Study) -> str:
    settings = study.analysis.settings
    rows = {
        "Model": study.model.name,
        "Fingerprint": study.model.fingerprint,
        "Number format": f"{study.model.dtype} on {study.model.device}",
        "Text": study.text.source,
        "Blocks": f"{study.text.blocks} calibration, {study.text.held_out_blocks} held-out, "
        f"{study.text.block_length} tokens each",
        "Masks measured": f"{len(study.analysis.masks)} of {study.analysis.planned}",
        "Strata": ", ".join(map(str, settings.strata or ())),
        "Utility": settings.utility,
        "Surrogate": study.analysis.surrogate.kind,
        "Seed": str(settings.seed),
        "Made": study.created,
        **dict(study.versions),
    }
    body = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(value)}</td></tr>'
        for name, value in rows.items()
    )
    return f'<table class="ls-figures"><tbody>{body}</tbody></table>'
