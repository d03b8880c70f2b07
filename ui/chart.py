"""A chart on the page: drawn in the browser, linked to the layer strip, downloadable.

Gradio's own plot raises no click events and is built anew with every update. This one hands the
figure to the browser as it is; `assets/layershap.js` draws it in place, marks layers in it, and
tells the strip which was pressed.
"""

from __future__ import annotations

import json
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
import plotly
import plotly.graph_objects as go

PLOTLY = Path(plotly.__file__).parent / "package_data" / "plotly.min.js"
SCRIPT = Path(__file__).parents[1] / "assets" / "layershap.js"


class Chart(gr.HTML):
    """A Plotly figure with its name and the one line that says how to read it.

    What kind of things a figure shows, and so what a press on it means, is in its `layout.meta`;
    see `ui.figures.style.linked`.
    """

    def __init__(
        self,
        value: go.Figure | None = None,
        *,
        name: str,
        how_to_read: str,
        elem_id: str,
        **block: Any,
    ) -> None:
        super().__init__(
            value,
            html_template=_template(name, how_to_read),
            js_on_load="LayerShap.chart(element, props, watch);",
            apply_default_css=False,
            elem_id=elem_id,
            elem_classes="ls-chart",
            **block,
        )

    def get_block_name(self) -> str:
        return "html"

    def postprocess(self, value: go.Figure | None) -> str | None:
        """The figure as JSON, which the browser draws."""
        return None if value is None else value.to_json()

    def preprocess(self, payload: str | None) -> str | None:
        return payload

    def api_info(self) -> dict[str, Any]:
        return {"type": "string", "description": "a Plotly figure as JSON"}

    def example_payload(self) -> str:
        return "{}"

    def example_value(self) -> str:
        return "{}"


def page_head() -> str:
    """What the page's head needs for charts to be drawn: nothing is fetched from elsewhere."""
    gr.set_static_paths([PLOTLY])
    settings = {"plotly": str(PLOTLY), "version": plotly.__version__}
    return (
        f"<script>window.LAYERSHAP = {json.dumps(settings)};</script>"
        f"<script>{SCRIPT.read_text(encoding='utf-8')}</script>"
    )


def _template(name: str, how_to_read: str) -> str:
    # Constant, so that an update never touches what was drawn.
    buttons = "".join(
        f'<button type="button" class="ls-download" data-format="{kind}" '
        f'aria-label="Download {escape(name)} as {kind.upper()}">{kind.upper()}</button>'
        for kind in ("png", "svg")
    )
    return (
        f'<div class="ls-plot" role="img" aria-label="{escape(name)}. {escape(how_to_read)}"></div>'
        f'<p class="ls-empty"></p>'
        f'<div class="ls-caption"><p class="ls-read">{escape(how_to_read)}</p>'
        f'<div class="ls-downloads">{buttons}</div></div>'
    )
