"""Accuracy: what dropping the chosen layers does to the answers on benchmark tasks."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from core.accuracy import (
    DEFAULT_QUESTIONS,
    INSTALL,
    OFFERED,
    AccuracyProgress,
    TaskAccuracy,
    compare_accuracy,
    installed,
    parse_tasks,
)
from core.errors import LayerShapError
from ui.chart import Chart
from ui.figures import accuracy_chart, empty_figure
from ui.figures.accuracy import HOW_TO_READ
from ui.parts import read_line
from ui.session import Session, StopSignals
from ui.settings import AppSettings
from ui.setup_view import REFRESH_SECONDS, whole
from ui.status import duration, guarded, news, progress_bar

NOTHING_YET = "Drop some layers, choose tasks and press Measure accuracy."
COLUMNS = ["task", "metric", "full %", "pruned %", "change, points", "questions"]
DEFAULT_TASKS = ("piqa", "arc_easy")
# On a dashboard open to all, one visitor must not hold the machine for hours.
MOST_QUESTIONS = 1000


@dataclass(frozen=True)
class AccuracyView:
    tasks: gr.CheckboxGroup
    questions: gr.Number
    others: gr.Textbox
    folder: gr.Textbox
    measure: gr.Button
    chart: Chart
    table: gr.Dataframe

    @property
    def inputs(self) -> list:
        return [self.tasks, self.questions, self.others, self.folder]

    def draw(self, results: tuple[TaskAccuracy, ...] = ()) -> dict[Any, Any]:
        """Updates that show the tasks measured so far, or what to do to see one."""
        if not results:
            return {
                self.chart: empty_figure(NOTHING_YET),
                self.table: gr.update(value=[], visible=False),
            }
        rows = [
            [
                result.label,
                result.metric,
                _share(result.full, result.full_error),
                _share(result.pruned, result.pruned_error),
                _share(result.change, result.change_error, "+"),
                f"{result.questions:,}",
            ]
            for result in results
        ]
        return {
            self.chart: accuracy_chart(results),
            self.table: gr.update(value=rows, visible=True),
        }


def accuracy_view(settings: AppSettings) -> AccuracyView:
    """Lay out the tab."""
    with gr.Row(equal_height=False):
        with gr.Column(scale=3, min_width=340):
            tasks = gr.CheckboxGroup(
                [(label, name) for name, label in OFFERED.items()],
                value=list(DEFAULT_TASKS),
                label="Tasks",
                elem_id="tasks",
            )
            with gr.Row(visible=settings.local_files):
                others = gr.Textbox(
                    label="Other lm-eval tasks",
                    placeholder="names, e.g. sciq, mmlu",
                    min_width=200,
                    elem_id="other-tasks",
                )
                folder = gr.Textbox(
                    label="Folder of your own task files (YAML; code they name is run)",
                    placeholder="none",
                    min_width=200,
                    elem_id="tasks-folder",
                )
        with gr.Column(scale=1, min_width=240):
            questions = gr.Number(
                DEFAULT_QUESTIONS, label="Questions per task", precision=0, elem_id="questions"
            )
            measure = gr.Button("Measure accuracy", variant="primary", elem_id="measure-accuracy")
            if not installed():
                read_line(INSTALL)
    gr.Markdown("### Zero-shot accuracy of the full and the pruned model")
    chart = Chart(
        empty_figure(NOTHING_YET),
        name="Accuracy of the full and the pruned model",
        how_to_read=HOW_TO_READ,
        elem_id="accuracy-chart",
    )
    table = gr.Dataframe(
        headers=COLUMNS,
        label="Accuracy ± standard error",
        interactive=False,
        visible=False,
        max_height=320,
        elem_id="accuracy-table",
    )
    return AccuracyView(tasks, questions, others, folder, measure, chart, table)


def accuracy_handler(
    settings: AppSettings, view: AccuracyView, stops: StopSignals, status: gr.HTML
) -> Any:
    """Handler that measures both models on the chosen tasks, showing each as it finishes."""

    @guarded(status)
    def measure(
        session: Session,
        selection: tuple[int, ...],
        tasks: list[str],
        questions: float | None,
        others: str,
        folder: str,
        request: gr.Request,
    ) -> Iterator[dict]:
        session = session.dropping(selection)
        workspace = session.need_workspace()
        names, own = chosen_tasks(settings, tasks or [], others or "", folder or "")
        limit = whole("Questions per task", questions)
        if not settings.local_files and limit > MOST_QUESTIONS:
            raise LayerShapError(
                f"Questions per task is {limit}; this dashboard allows at most {MOST_QUESTIONS}."
            )
        stop = stops.begin(request.session_hash)
        finished, shown = 0, 0.0
        yield {status: progress_bar("Preparing the tasks", None), **view.draw()}
        for step in compare_accuracy(
            workspace.model, session.keep, names, limit=limit, tasks_folder=own, stop=stop.is_set
        ):
            if len(step.results) > finished:
                finished = len(step.results)
                yield view.draw(step.results)
            elif time.monotonic() - shown < REFRESH_SECONDS:
                continue
            shown = time.monotonic()
            yield {status: _progress(step)}
        yield {status: news(_summary(step, session)), **view.draw(step.results)}

    return measure


def chosen_tasks(
    settings: AppSettings, tasks: list[str], others: str, folder: str
) -> tuple[tuple[str, ...], Path | None]:
    """The names of the tasks to measure and the folder of the user's own, if any.

    Raises:
        LayerShapError: a visitor of a public dashboard asks for more than it offers: task files
            can name Python code, which would run.
    """
    asked = tuple(dict.fromkeys((*tasks, *parse_tasks(others))))
    if not settings.local_files and (folder.strip() or not set(asked) <= set(OFFERED)):
        raise LayerShapError(
            f"This dashboard measures only these tasks: {', '.join(OFFERED.values())}."
        )
    return asked, Path(folder.strip()) if folder.strip() else None


def _progress(step: AccuracyProgress) -> str:
    if not step.total:
        return progress_bar(step.stage, None)
    left = f", about {duration(step.seconds_left)} left" if step.seconds_left else ""
    return progress_bar(
        step.stage, step.done / step.total, f"{step.done} of {step.total} answers scored{left}"
    )


def _summary(step: AccuracyProgress, session: Session) -> str:
    count = len(step.results)
    tasks = f"{count} task{'' if count == 1 else 's'}"
    if step.stage == "Done":
        dropped = session.players.labels(session.dropped) or "none"
        return f"Done: {tasks} measured; layers dropped: {dropped}."
    return f"Stopped: {tasks} measured; the others were left out."


def _share(value: float, error: float, sign: str = "") -> str:
    """A share in percent with its standard error."""
    return f"{100 * value:{sign}.1f} ± {100 * error:.1f}".replace("-", "−")
