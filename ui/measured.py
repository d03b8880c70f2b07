"""The table of measured figures, full model against pruned model."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np

from core.footprint import Footprint, Speed


@dataclass(frozen=True)
class MeasuredFigures:
    """Pairs of figures, full and pruned; None where not measured yet.

    Attributes:
        without: labels of what the pruned model does without; "" for nothing.
    """

    without: str
    calibration: tuple[float, float] | None = None
    held_out: tuple[float, float] | None = None
    sizes: tuple[Footprint, Footprint] | None = None
    speeds: tuple[Speed, Speed] | None = None

    def table(self) -> str:
        """The figures as an HTML table; those to come show an ellipsis."""
        rows = [
            _row("Held-out perplexity", self.held_out, perplexity_text),
            _row("Calibration perplexity", self.calibration, perplexity_text),
            _row("Parameters", _of(self.sizes, "parameters"), lambda v: f"{v / 1e6:,.1f} M"),
            _row("Weights in memory", _of(self.sizes, "weight_bytes"), _bytes),
            _row("Key/value cache per token", _of(self.sizes, "cache_bytes"), _bytes),
            _row(
                "Reading a prompt, tokens/s (fastest run)",
                _of(self.speeds, "prefill"),
                "{:,.0f}".format,
            ),
            _row("Writing, tokens/s (fastest run)", _of(self.speeds, "decode"), "{:,.1f}".format),
        ]
        return (
            '<table class="ls-figures"><thead><tr><th scope="col">Measured</th>'
            f'<th scope="col">Full</th><th scope="col">{escape(cut_name(self.without))}</th>'
            '<th scope="col">Change</th></tr>'
            f"</thead><tbody>{''.join(rows)}</tbody></table>"
        )


def cut_name(without: str) -> str:
    """What a pruned model is called beside the full one, from the labels of what it lacks."""
    return f"Without {without}" if without else "Nothing dropped"


def _row(name: str, pair: tuple | None, show: Any) -> str:
    if pair is None:
        cells = ["…", "…", ""]
    elif None in pair:
        cells = ["none", "none", ""]
    else:
        full, pruned = pair
        change = f"{(pruned / full - 1) * 100:+.1f} %" if np.isfinite(pruned) else ""
        cells = [show(full), show(pruned), change.replace("-", "−")]
    return (
        f'<tr><th scope="row">{name}</th>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        + "</tr>"
    )


def _of(pair: tuple | None, field: str) -> tuple | None:
    return None if pair is None else tuple(getattr(each, field) for each in pair)


def perplexity_text(value: float) -> str:
    """A perplexity with as many digits as say something."""
    if not np.isfinite(value):
        return "not finite"
    return f"{value:,.2f}" if value < 1000 else f"{value:,.0f}" if value < 1e6 else f"{value:.2e}"


def _bytes(value: float) -> str:
    for unit in ("B", "KB", "MB"):
        if value < 1000:
            return f"{value:,.1f} {unit}"
        value /= 1000
    return f"{value:,.2f} GB"
