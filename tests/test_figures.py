"""Figures: pure functions of results; what is drawn, not how it looks."""

import numpy as np
import pytest

from core.accuracy import TaskAccuracy
from core.analysis import analyze
from core.baselines import Frontier
from core.contributions import Contributions
from core.interactions import Interactions
from core.methods import MethodResult, MethodsComparison
from core.players import Players
from core.resources import Resources
from core.study import Comparison
from games import with_pairs
from ui.figures import (
    accuracy_chart,
    agreement_heatmap,
    comparison_chart,
    contribution_bars,
    contribution_heatmap,
    empty_figure,
    interaction_graph,
    interaction_heatmap,
    methods_chart,
    methods_cost,
    methods_map,
    pair_utilities,
    surrogate_scatter,
)
from ui.figures.interactions import strongest_pairs
from ui.figures.style import (
    layer_ticks,
    log_axis,
    log_ticks,
    number,
    player_ticks,
    root_scale,
    signed_root,
)

SIX_LAYERS = Resources(Players("blocks", 6), np.full(6, 0.15), np.full(6, 1 / 6), np.full(6, 0.1))


def contributions(n, sizes=5):
    rng = np.random.default_rng(n)
    by_size = rng.normal(0.05, 0.1, (n, sizes))
    return Contributions(
        values=by_size.mean(axis=1),
        errors=np.full(n, 0.02),
        sizes=np.arange(n - sizes, n),
        by_size=by_size,
        by_size_errors=np.full((n, sizes), 0.03),
        extrapolated=False,
    )


def interactions(n):
    values = np.random.default_rng(n).normal(0, 0.1, (n, n))
    values = np.triu(values, 1)
    return Interactions(values + values.T, np.full((n, n), 0.05), np.arange(n - 1))


@pytest.mark.parametrize("n", [6, 30, 80, 126])
def test_one_bar_per_layer_the_most_needed_on_top(n):
    shown = contributions(n)
    [bars] = contribution_bars(shown).data
    assert len(bars.x) == n
    assert list(bars.x) == sorted(bars.x)
    assert bars.y[-1] == f"layer {np.argmax(shown.values)}"
    np.testing.assert_allclose(bars.error_x.array, 1.96 * 0.02)


def test_bars_by_depth_start_with_the_first_layer():
    [bars] = contribution_bars(contributions(8), sort="depth").data
    assert list(bars.y) == [f"layer {layer}" for layer in range(7, -1, -1)]


@pytest.mark.parametrize("n", [6, 30, 126])
def test_the_heatmap_has_a_cell_per_layer_and_size_centred_on_zero(n):
    [heat] = contribution_heatmap(contributions(n)).data
    assert np.array(heat.z).shape == (5, n)
    assert heat.zmin == -heat.zmax
    assert heat.zmid == 0
    assert "standard error" in heat.customdata[0][0]


def test_colour_ticks_name_true_values():
    values = np.array([-0.09, 0.5, 0.01])
    scale = root_scale(values)
    ticks = dict(zip(scale["colorbar"]["ticktext"], scale["colorbar"]["tickvals"], strict=True))
    assert ticks["0.5"] == pytest.approx(np.sqrt(0.5)) == pytest.approx(scale["zmax"])
    assert signed_root(-0.25) == -0.5
    assert number(-0.12345) == "−0.123"


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (999.4, "999"),
        (1234.5, "1,230"),
        (26_102, "26,100"),
        (1e6, "10⁶"),
        (-2.5e7, "−2.5 × 10⁷"),
        (0.00002, "2 × 10⁻⁵"),
        (0.0, "0"),
    ],
)
def test_numbers_are_written_without_an_exponent_or_with_a_power_of_ten(value, shown):
    assert number(value) == shown


def test_a_logarithmic_axis_holds_its_values_with_few_labels():
    axis = log_axis([42.0, 26_000.0])
    assert axis["range"][0] < np.log10(42) < np.log10(26_000) < axis["range"][1]
    assert axis["ticktext"] == ["30", "100", "300", "1,000", "3,000", "10,000", "30,000"]
    assert len(log_ticks(1, 1e9)) <= 7


def test_of_parts_only_whole_layers_are_labelled():
    ticks = player_ticks(Players("sub-blocks", 30))
    assert all(label.endswith("a") for label in ticks["ticktext"])
    assert ticks["tickvals"][1] == 2 * int(ticks["ticktext"][1][:-1])


def test_arcs_that_could_be_chance_are_dotted():
    given = interactions(12)
    clear = np.abs(strongest_pairs(given, 12)["interaction"]) >= 2 * 0.05
    arcs = interaction_graph(given, strongest=12).data[:12]
    assert [arc.line.dash == "solid" for arc in arcs] == clear.tolist()
    assert clear.sum() > 0


def test_the_interaction_heatmap_is_symmetric_with_a_blank_diagonal():
    [heat] = interaction_heatmap(interactions(30)).data
    z = np.array(heat.z, dtype=float)
    assert np.isnan(z.diagonal()).all()
    np.testing.assert_array_equal(z, z.T)
    assert heat.zmid == 0


def test_the_strongest_pairs_are_listed_and_drawn_in_order():
    given = interactions(12)
    pairs = strongest_pairs(given, 7)
    strengths = pairs["interaction"].abs().tolist()
    assert strengths == sorted(strengths, reverse=True)
    assert strengths[0] == pytest.approx(np.abs(given.values).max(), abs=1e-5)
    figure = interaction_graph(given, strongest=7)
    assert len(figure.data) == 8
    arcs = figure.data[:7]
    for arc, value in zip(arcs, pairs["interaction"], strict=True):
        assert (max(arc.y) > 1e-6) == (value > 0)
    assert arcs[0].line.width > arcs[-1].line.width
    assert set(pairs["meaning"]) <= {
        "need each other",
        "stand in for each other",
        "no clear interaction",
    }


def test_four_utilities_and_the_sum_of_the_parts():
    figure = pair_utilities(3, 9, (1.0, 0.8, 0.7, 0.3))
    assert list(figure.data[0].y) == [1.0, 0.8, 0.7, 0.3]
    assert list(figure.data[0].x) == ["full model", "without 3", "without 9", "without both"]
    assert figure.layout.shapes[0].y0 == pytest.approx(0.5)
    assert "0.5" in figure.layout.annotations[0].text


def test_the_scatter_shows_every_unseen_mask_against_its_prediction():
    analysis = analyze(with_pairs(np.linspace(0.05, 0.6, 9), {(1, 2): 0.4}), evaluations=90)
    line, dots = surrogate_scatter(analysis).data
    assert len(dots.x) == 90
    np.testing.assert_allclose(dots.x, np.exp(analysis.losses))
    assert line.x == line.y


def test_measured_and_predicted_sets_are_told_apart():
    tried = [
        Comparison((1, 2), 30.0, 25.0, 36.0, 20.0, 31.0, 22.0, 33.0, 100, 80),
        Comparison((3,), None, None, None, 20.0, 21.0, 22.0, float("inf"), 100, 90),
    ]
    full, predicted, calibration, measured = comparison_chart(tried).data
    assert full.y[0] == 22.0
    assert list(predicted.x) == [2]
    assert predicted.marker.symbol == "circle-open"
    assert list(calibration.y) == [31.0, 21.0]
    assert list(measured.x) == [2, 1]
    assert "dropped 1, 2" in measured.text[0]


@pytest.mark.parametrize("n", [1, 2, 3])
def test_very_shallow_models_are_drawn(n):
    analysis = analyze(with_pairs(np.linspace(0.2, 0.6, n), {}), evaluations=20)
    for kind in (analysis.estimates.operating_range, analysis.estimates.shapley):
        contribution_bars(kind)
        contribution_heatmap(kind)
    surrogate_scatter(analysis)
    interaction_heatmap(analysis.estimates.interactions)
    interaction_graph(analysis.estimates.interactions)
    comparison_chart([])


@pytest.mark.parametrize(("n", "most"), [(1, 16), (30, 16), (80, 16), (126, 16), (1000, 16)])
def test_axis_labels_never_crowd(n, most):
    ticks = layer_ticks(n)
    assert ticks[0] == 0
    assert len(ticks) <= most
    assert max(ticks) < n


@pytest.fixture
def compared():
    rng = np.random.default_rng(0)

    def result(method, sets, evaluations):
        losses = rng.uniform(3.7, 6.0, len(sets))
        return MethodResult(
            Frontier(method, sets, (evaluations,) * len(sets)), losses, losses + 0.1
        )

    first = result("Leave one out", ((4,), (2, 4), (2, 3, 4)), 6)
    second = result("LayerShap search", ((4,), (1, 4), (1, 3, 4)), 30)
    second.held_out[1:] = first.held_out[1:] - 0.5
    second.held_out[2] = np.inf
    return MethodsComparison(SIX_LAYERS, 3.6, 3.7, (first, second))


def test_a_line_per_method_ours_on_top_and_a_gap_where_a_loss_is_not_finite(compared):
    full, other, ours = methods_chart(compared).data
    assert (other.name, ours.name) == ("Leave one out", "LayerShap search")
    np.testing.assert_allclose(full.y, np.exp(3.7))
    np.testing.assert_allclose(other.y, np.exp(compared.results[0].held_out))
    assert ours.y[2] is None
    assert "1, 4" in ours.text[1]
    assert "30 model evaluations" in ours.text[1]


def test_the_map_fills_what_each_method_drops_best_first(compared):
    [cells] = methods_map(compared, 2).data
    assert [name.split(" (")[0] for name in cells.y] == ["LayerShap search", "Leave one out"]
    assert cells.z.tolist() == [[0, 1, 0, 0, 1, 0], [0, 0, 1, 0, 1, 0]]


def test_each_method_stands_where_its_cost_and_its_choice_put_it(compared):
    ours, other = sorted(methods_cost(compared, 2).data, key=lambda trace: trace.y[0])
    assert ours.name == "LayerShap search"
    assert (other.x[0], ours.x[0]) == (6, 30)
    np.testing.assert_allclose(ours.y[0], np.exp(compared.results[1].held_out[1]))
    # A set whose loss is not finite has no place.
    assert [trace.name for trace in methods_cost(compared, 3).data] == ["Leave one out"]


def test_agreement_is_the_share_in_common(compared):
    [cells] = agreement_heatmap(compared, 3).data
    np.testing.assert_allclose(cells.z, [[1, 2 / 3], [2 / 3, 1]])


def test_a_row_per_task_with_both_models_their_intervals_and_chance():
    results = [
        TaskAccuracy("piqa", "acc_norm", 0.7, 0.05, 0.6, 0.06, 0.04, 100, 0.5),
        TaskAccuracy("mine", "acc", 0.98, 0.02, 0.9, 0.03, 0.03, 50),
    ]
    figure = accuracy_chart(results)
    chance, full, pruned = figure.data
    assert list(figure.layout.yaxis.ticktext) == ["PIQA", "mine"]
    assert figure.layout.yaxis.range[0] > figure.layout.yaxis.range[1]
    assert (list(chance.x), list(chance.y)) == ([0.5], [0])
    assert (list(full.x), list(pruned.x)) == ([0.7, 0.98], [0.6, 0.9])
    assert all(above < below for above, below in zip(full.y, pruned.y, strict=True))
    np.testing.assert_allclose(pruned.error_x.array, [1.96 * 0.06, 1.96 * 0.03])
    np.testing.assert_allclose(full.error_x.array[1], 0.02)
    np.testing.assert_allclose(full.error_x.arrayminus[1], 1.96 * 0.02)
    assert "change −10 ± 7.8 points" in pruned.text[0]
    assert accuracy_chart([]).data[1].x == ()


def test_an_empty_figure_says_what_to_do():
    assert empty_figure("Press Analyse").layout.annotations[0].text == "Press Analyse"


@pytest.mark.parametrize(("low", "high"), [(26.9, 33.1), (40, 600), (12, 2e6), (10, 10.4), (5, 5)])
def test_a_logarithmic_axis_has_round_labels_wherever_it_lies(low, high):
    ticks = log_ticks(low, high)
    assert sum(low <= tick <= high for tick in ticks) >= (1 if low == high else 2)
    assert len(ticks) <= 24
    assert ticks == sorted(ticks)
