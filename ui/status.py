"""Progress, news and errors in the page's one status line."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Iterator
from functools import wraps
from html import escape
from typing import Any, TypeVar

import gradio as gr

from core.errors import LayerShapError, advice

logger = logging.getLogger("layershap")
T = TypeVar("T")
Report = Callable[[str, float | None], None]


def news(message: str) -> str:
    return f'<p class="ls-news">{escape(message)}</p>'


def alert(message: str) -> str:
    return f'<p class="ls-alert" role="alert">{escape(message)}</p>'


def progress_bar(stage: str, fraction: float | None, detail: str = "") -> str:
    """A labelled progress bar; without a fraction it only says that work goes on."""
    width = "" if fraction is None else f' style="--done:{min(max(fraction, 0), 1):.4f}"'
    value = "" if fraction is None else f' aria-valuenow="{fraction * 100:.0f}"'
    kind = "ls-bar ls-bar-unknown" if fraction is None else "ls-bar"
    return (
        f'<div class="ls-progress"><span>{escape(stage)}</span><span>{escape(detail)}</span>'
        f'<div class="{kind}" role="progressbar" aria-label="{escape(stage)}" aria-valuemin="0" '
        f'aria-valuemax="100"{value}{width}></div></div>'
    )


def duration(seconds: float) -> str:
    """Time left in words: "40 s", "3 min", "1 h 20 min"."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def streamed(work: Callable[[Report], T]) -> Iterator[tuple[str, float | None] | T]:
    """Run `work` in a thread: yield its (stage, fraction) reports, then its result.

    What `work` raises is raised here.
    """
    reports: queue.Queue = queue.Queue()
    done = object()
    outcome: dict[str, Any] = {}

    def target() -> None:
        try:
            outcome["result"] = work(lambda stage, fraction: reports.put((stage, fraction)))
        except BaseException as error:
            outcome["error"] = error
        finally:
            reports.put(done)

    threading.Thread(target=target, daemon=True).start()
    while (item := reports.get()) is not done:
        yield item
    if "error" in outcome:
        raise outcome["error"]
    yield outcome["result"]


def guarded(status: gr.HTML) -> Callable:
    """Wrap a handler that yields {component: value}: what goes wrong becomes one sentence in the
    status line, and the app goes on."""

    def decorate(handler: Callable[..., Iterator[dict]]) -> Callable[..., Iterator[dict]]:
        @wraps(handler)
        def safe(*args: Any, **kwargs: Any) -> Iterator[dict]:
            try:
                yield from handler(*args, **kwargs)
            except LayerShapError as error:
                yield {status: alert(str(error))}
            except Exception as error:
                logger.exception("a handler failed")
                yield {
                    status: alert(
                        advice(error)
                        or "Something went wrong that was not foreseen; the details are in the "
                        "server's log. You can go on."
                    )
                }

        return safe

    return decorate
