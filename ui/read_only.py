"""Read-only dashboards: visitors may measure everything and keep nothing on the server."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any

import gradio as gr

from core.errors import LayerShapError
from ui.settings import AppSettings
from ui.status import guarded

REFUSED = (
    "This dashboard is read-only: nothing is saved, pushed or cleared here. Run LayerShap on your "
    "own machine to keep a model."
)


class Writing:
    """What may write on the server or to the Hub: refused as a whole where it is read-only."""

    def __init__(self, settings: AppSettings, status: gr.HTML) -> None:
        self._allowed = not settings.read_only
        self._status = status

    def on(self, button: gr.Button, handler: Callable[..., Iterator[dict]]) -> Callable:
        """The handler of a button that writes, or one that refuses; the button then is inert."""
        if self._allowed:
            return handler
        button.interactive = False

        @guarded(self._status)
        @wraps(handler)
        def refuse(*_: Any, **__: Any) -> Iterator[dict]:
            raise LayerShapError(REFUSED)
            yield

        return refuse
