"""Fonts and colours of the page; only fonts that the visitor's machine has."""

from __future__ import annotations

from pathlib import Path

import gradio as gr

ASSETS = Path(__file__).parents[1] / "assets"
STYLESHEET = ASSETS / "layershap.css"


def theme() -> gr.themes.Base:
    return gr.themes.Default(
        primary_hue="blue",
        neutral_hue="slate",
        radius_size="sm",
        font=("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"),
        font_mono=("ui-monospace", "SFMono-Regular", "Menlo", "monospace"),
    )
