"""Colours as eyes see them: contrast, CIELAB, and simulated colour blindness."""

import re

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
# The page's own backgrounds behind a chart: Gradio's block on a light and on a dark page.
LIGHT, DARK = "#ffffff", "#1e293b"
# sRGB to CIE XYZ (IEC 61966-2-1).
XYZ = np.array(
    [
        [0.4124564, 0.3575761, 0.1804375],
        [0.2126729, 0.7151522, 0.0721750],
        [0.0193339, 0.1191920, 0.9503041],
    ]
)
# Complete dichromacy (Machado, Oliveira and Fernandes 2009), on linear RGB.
VISION = {
    "full": np.eye(3),
    "protanopia": np.array(
        [
            [0.152286, 1.052583, -0.204868],
            [0.114503, 0.786281, 0.099216],
            [-0.003882, -0.048116, 1.051998],
        ]
    ),
    "deuteranopia": np.array(
        [
            [0.367322, 0.860646, -0.227968],
            [0.280085, 0.672501, 0.047413],
            [-0.011820, 0.042940, 0.968881],
        ]
    ),
    "tritanopia": np.array(
        [
            [1.255528, -0.076749, -0.178779],
            [-0.078411, 0.930809, 0.147602],
            [0.004733, 0.691367, 0.303900],
        ]
    ),
}


def rgba(colour: str) -> Floats:
    """Red, green, blue and opacity, 0 to 1, of "#rrggbb", "rgb(…)" or "rgba(…)"."""
    if colour.startswith("#"):
        return np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)] + [1.0])
    parts = [float(part) for part in re.findall(r"[\d.]+", colour)]
    return np.array([*(part / 255 for part in parts[:3]), *(parts[3:] or [1.0])])


def over(colour: Floats, background: str) -> Floats:
    """What [..., 4] looks like on a page, [..., 3]."""
    opacity = colour[..., 3:]
    return opacity * colour[..., :3] + (1 - opacity) * rgba(background)[:3]


def on_scale(stops: list, place: float) -> Floats:
    """The colour of a Plotly scale at a place from 0 to 1, [4]."""
    places = [stop for stop, _ in stops]
    # Of two stops at one place, the scale ends with the first and goes on with the second.
    after = min(int(np.searchsorted(places, place, side="left")), len(stops) - 1)
    before = max(after - 1, 0)
    span = places[after] - places[before]
    share = (place - places[before]) / span if span else 0.0
    return (1 - share) * rgba(stops[before][1]) + share * rgba(stops[after][1])


def linear(colour: Floats) -> Floats:
    return np.where(colour <= 0.04045, colour / 12.92, ((colour + 0.055) / 1.055) ** 2.4)


def lab(colour: Floats, vision: str = "full") -> Floats:
    """CIELAB, D65, of [..., 3] in sRGB as someone with this vision sees it."""
    seen = np.clip(linear(colour) @ VISION[vision].T, 0, 1)
    share = seen @ XYZ.T / XYZ.sum(axis=1)
    root = np.where(share > (6 / 29) ** 3, np.cbrt(share), share / (3 * (6 / 29) ** 2) + 4 / 29)
    x, y, z = np.moveaxis(root, -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


def contrast(first: Floats | str, second: Floats | str) -> float:
    """Contrast ratio of two opaque colours (WCAG 2.2)."""
    colours = [rgba(c)[:3] if isinstance(c, str) else c for c in (first, second)]
    darker, lighter = sorted(linear(colour) @ XYZ[1] + 0.05 for colour in colours)
    return float(lighter / darker)
