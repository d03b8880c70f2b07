"""Colours of figures, by numbers: even, symmetric, seen on both pages and by the colour-blind."""

import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from colours import DARK, LIGHT, VISION, contrast, lab, on_scale, over, rgba
from core.methods import PARTS, available
from core.players import Players
from ui.figures.methods import AGREEMENT_SCALE, COLOURS, _style
from ui.figures.style import ACCENT, CONTRAST, DIVERGING, HOVER_BACK, QUIET, SEQUENTIAL, TEXT

PAGES = pytest.mark.parametrize("page", [LIGHT, DARK])
STYLESHEET = (Path(__file__).parents[1] / "assets" / "layershap.css").read_text()
TEXT_ON = dict(zip((LIGHT, DARK), re.findall(r"--ls-quiet: (#\w+)", STYLESHEET), strict=True))
# From zero to either end.
BLUE_ARM, ORANGE_ARM = np.linspace(0.5, 1, 11), np.linspace(0.5, 0, 11)


def seen(stops, places, page=LIGHT, vision="full"):
    """CIELAB of places on a scale, [places, 3]."""
    return lab(over(np.array([on_scale(stops, place) for place in places]), page), vision)


def steps(colours):
    """Differences of neighbours (CIE 1976), [places - 1]."""
    return np.linalg.norm(np.diff(colours, axis=0), axis=1)


@PAGES
def test_the_diverging_scale_is_as_light_on_either_side_of_zero_and_even(page):
    blue, orange = seen(DIVERGING, BLUE_ARM, page), seen(DIVERGING, ORANGE_ARM, page)
    np.testing.assert_allclose(blue[:, 0], orange[:, 0], atol=2)
    np.testing.assert_allclose(blue[0], lab(rgba(page)[:3]), atol=1e-9)
    for arm in (blue, orange):
        lightness = np.abs(np.diff(arm[:, 0]))
        assert abs(arm[-1, 0] - arm[0, 0]) > 30
        assert lightness.max() < 1.4 * lightness.min()
        assert steps(arm).max() < 1.4 * steps(arm).min()


@PAGES
@pytest.mark.parametrize("vision", VISION)
def test_both_sides_of_zero_are_told_apart_by_everyone(page, vision):
    blue, orange = (seen(DIVERGING, arm, page, vision) for arm in (BLUE_ARM, ORANGE_ARM))
    apart = np.linalg.norm(blue - orange, axis=1)
    # A tenth of the way out; a difference of 2.3 is just noticeable.
    assert apart[1] > 7
    assert apart[-1] > 60
    assert (np.diff(apart) > 0).all()


def test_the_sequential_scale_is_even():
    sizes = steps(seen(SEQUENTIAL, np.linspace(0, 1, 17)))
    assert sizes.max() < 1.15 * sizes.min()


@pytest.mark.parametrize("vision", VISION)
def test_the_order_of_the_sequential_scale_is_seen_by_everyone(vision):
    colours = seen(SEQUENTIAL, np.linspace(0, 1, 9), vision=vision)
    assert (np.diff(colours[:, 0]) < 0).all()
    assert steps(colours).min() > 4.6


@PAGES
def test_marks_stand_out_from_the_page(page):
    for colour in (ACCENT, CONTRAST, QUIET, *COLOURS):
        assert contrast(colour, page) >= 3
    for place in np.linspace(0, 1, 9):
        assert contrast(on_scale(SEQUENTIAL, place)[:3], page) > 2.4


def test_no_two_methods_look_the_same():
    methods = available(Players("sub-blocks", 30))
    styles = [_style(method) for method in methods]
    assert len({symbol for _, symbol in styles}) == len(methods)
    assert {colour for (colour, _), m in zip(styles, methods, strict=True) if m in PARTS} == {
        ACCENT
    }


@PAGES
def test_numbers_are_readable_on_the_strongest_cell(page):
    cell = over(on_scale(AGREEMENT_SCALE, 1.0), page)
    assert contrast(rgba(TEXT_ON[page])[:3], cell) >= 4.5


def test_text_of_hover_boxes_and_of_downloaded_images_is_readable():
    assert contrast("#ffffff", HOVER_BACK) >= 7
    assert contrast(TEXT, "#ffffff") >= 4.5


def test_a_scale_is_read_as_plotly_reads_it():
    scale = [[0.0, "#000000"], [0.5, "rgba(255, 0, 0, 0.5)"], [1.0, "#ffffff"]]
    np.testing.assert_allclose(on_scale(scale, 0.25), [0.5, 0, 0, 0.75])
    assert all(a <= b for (a, _), (b, _) in pairwise(DIVERGING))
    assert contrast("#000000", "#ffffff") == pytest.approx(21, abs=1e-3)
    np.testing.assert_allclose(lab(rgba("#ff0000")[:3]), [53.24, 80.09, 67.20], atol=0.02)
