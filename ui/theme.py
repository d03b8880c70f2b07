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
    ).set(
        # Every text at least 4.5 : 1 against what is behind it, light and dark (WCAG 2.2, 1.4.3).
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_400",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_400",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_hover_dark="*primary_800",
        button_cancel_background_fill="#b3261e",
        button_cancel_background_fill_dark="#b3261e",
        button_cancel_background_fill_hover="#8c1d18",
        button_cancel_background_fill_hover_dark="#8c1d18",
    )
