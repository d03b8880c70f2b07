"""Small pieces that several views use."""

from __future__ import annotations

from html import escape

import gradio as gr


def read_line(text: str) -> gr.HTML:
    """The one line under a chart that says how to read it."""
    return gr.HTML(f'<p class="ls-read">{escape(text)}</p>')
