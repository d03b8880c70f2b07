"""Surrogates, contributions and interactions against games with known answers."""

from itertools import combinations

import numpy as np
import pytest

from core.analysis import analyze
from core.errors import LayerShapError
from core.estimates import estimate
from core.masks import all_masks, default_strata, sample_masks
from core.strata import mean_and_variance, shrink
from core.surrogate import fit_surrogate
from games import (
    TableGame,
    additive_loss,
    restricted_contribution,
    restricted_interaction,
    with_pairs,
)

WEIGHTS = np.array([2.0, 0.9, 0.05, 0.1, 0.0, 0.3, 0.02, 0.6, 0.15, 0.15])
N = len(WEIGHTS)


def rough_game(seed):
    """Random main effects, pairs and triples: nothing a surrogate can learn exactly."""
    rng = np.random.default_rng(seed)
    n = 11
    weights = rng.exponential(0.25, n)
    pairs = rng.normal(0, 0.06, (n, n))
    triples = rng.normal(0, 0.03, (n, n, n))

    def utility(mask):
        gone = (~mask).astype(float)
        loss = gone @ weights + gone @ pairs @ gone
        return float(np.exp(-loss - np.einsum("ijk,i,j,k", triples, gone, gone, gone)))

    return TableGame(n, utility)


@pytest.mark.parametrize("utility", ["ratio", "log"])
def test_everything_measured_is_exact_in_every_average(utility):
    shapiq = pytest.importorskip("shapiq")
    game = with_pairs(WEIGHTS, {(1, 5): 0.8, (2, 3): -0.1})
    result = analyze(game, evaluations=2**N, strata=range(N + 1), utility=utility)
    masks = all_masks(N)
    losses = game.losses(masks)
    values = np.exp(-losses) if utility == "ratio" else -losses
    table = {mask.tobytes(): value for mask, value in zip(masks, values, strict=True)}
    oracle = shapiq.ExactComputer(
        lambda rows: np.array([table[row.astype(bool).tobytes()] for row in rows]), n_players=N
    )
    shapley, pairs = oracle("SV", order=1), oracle("SII", order=2)
    estimates = result.estimates
    for i in range(N):
        assert estimates.shapley.values[i] == pytest.approx(shapley[(i,)], abs=1e-9)
    for i, j in combinations(range(N), 2):
        found = estimates.shapley_interactions.values[i, j]
        assert found == pytest.approx(pairs[(i, j)], abs=1e-9)
    assert np.abs(estimates.shapley.errors).max() < 1e-9
    assert np.abs(estimates.shapley_interactions.errors).max() < 1e-9


def test_leave_one_out_is_measured_not_estimated():
    game = additive_loss(WEIGHTS)
    result = analyze(game, evaluations=100, strata=default_strata(N))
    contributions = result.estimates.operating_range
    assert contributions.sizes[-1] == N - 1
    np.testing.assert_allclose(contributions.by_size[:, -1], 1 - np.exp(-WEIGHTS), atol=1e-12)
    assert contributions.by_size_errors[:, -1].max() < 1e-9


def test_contributions_by_size_are_near_the_truth_from_few_masks():
    game = with_pairs(WEIGHTS, {(1, 5): 0.5})
    result = analyze(game, evaluations=160, strata=range(5, N))
    contributions = result.estimates.operating_range
    for layer in range(N):
        for column, size in enumerate(contributions.sizes):
            truth = restricted_contribution(game, layer, int(size))
            assert contributions.by_size[layer, column] == pytest.approx(truth, abs=0.03)


def test_the_value_is_the_mean_over_sizes():
    result = analyze(rough_game(0), evaluations=120)
    for contributions in (result.estimates.operating_range, result.estimates.shapley):
        np.testing.assert_allclose(contributions.values, contributions.by_size.mean(axis=1))


def test_shapley_values_sum_to_what_all_layers_are_worth():
    game = rough_game(1)
    result = analyze(game, evaluations=400, strata=range(12))
    worth = 1 - np.exp(-game.losses(np.zeros((1, 11), dtype=bool))[0])
    assert result.estimates.shapley.values.sum() == pytest.approx(worth, abs=1e-9)
    assert not result.estimates.shapley.extrapolated


def test_values_below_the_measured_strata_are_marked_extrapolated():
    result = analyze(rough_game(1), evaluations=100)
    assert result.estimates.shapley.extrapolated
    assert not result.estimates.operating_range.extrapolated


def test_a_layer_that_does_nothing_is_worth_nothing_and_twins_are_worth_the_same():
    result = analyze(additive_loss(WEIGHTS), evaluations=150)
    values, errors = result.contributions, result.estimates.operating_range.errors
    assert abs(values[4]) <= 3 * errors[4] + 1e-3
    assert abs(values[8] - values[9]) <= 3 * np.hypot(errors[8], errors[9]) + 1e-3
    assert np.argmax(values) == 0


def test_signs_of_interactions_say_who_stands_in_for_whom():
    game = with_pairs(np.full(10, 0.1), {(2, 6): 1.5, (1, 8): -0.15})
    result = analyze(game, evaluations=300)
    interactions = result.estimates.interactions
    truth = np.mean([restricted_interaction(game, 2, 6, int(s)) for s in interactions.sizes])
    assert interactions.values[2, 6] == pytest.approx(truth, abs=0.1)
    assert interactions.values[2, 6] < -0.3
    assert np.unravel_index(np.argmin(interactions.values), (10, 10)) in ((2, 6), (6, 2))
    np.testing.assert_array_equal(interactions.values, interactions.values.T)
    assert not interactions.values.diagonal().any()


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    inside = total = 0
    for seed in range(6):
        game = rough_game(seed)
        result = analyze(game, evaluations=140, seed=seed)
        contributions = result.estimates.operating_range
        for layer in range(11):
            truth = np.mean(
                [restricted_contribution(game, layer, int(s)) for s in contributions.sizes]
            )
            low, high = contributions.intervals[layer]
            inside += low <= truth <= high
            total += 1
    assert inside / total >= 0.85


def test_more_evaluations_narrow_the_intervals():
    few, many = (analyze(rough_game(3), evaluations=count) for count in (60, 600))
    assert np.ptp(many.intervals, axis=1).mean() < np.ptp(few.intervals, axis=1).mean()


def test_a_surrogate_is_judged_on_masks_it_never_saw():
    rng = np.random.default_rng(0)
    masks = sample_masks(12, default_strata(12), 150, seed=0)
    noise = rng.exponential(1.0, 150)
    for kind in ("ridge", "ensemble"):
        assert fit_surrogate(masks, noise, kind=kind).quality.r2 < 0.15


@pytest.mark.parametrize("kind", ["ridge", "ensemble", "published"])
def test_every_kind_learns_an_easy_game_and_repeats_itself(kind):
    game = additive_loss(np.linspace(0.01, 0.2, 12))
    masks = sample_masks(12, range(4, 12), 1200 if kind == "published" else 200, seed=0)
    first, again = (fit_surrogate(masks, game.losses(masks), kind=kind, seed=5) for _ in range(2))
    assert first.quality.spearman > 0.9
    assert (first.out_of_fold == again.out_of_fold).all()
    assert first.kind == kind
    assert set(first.quality_by_stratum) == set(range(4, 12))


def test_auto_takes_the_better_kind_by_score_out_of_fold():
    game = with_pairs(np.full(12, 0.1), {(0, 1): 2.0, (2, 3): 2.0, (4, 5): 2.0})
    masks = sample_masks(12, range(6, 12), 500, seed=0)
    fitted = fit_surrogate(masks, game.losses(masks))
    assert set(fitted.candidates) == {"ridge", "ensemble"}
    assert fitted.kind == "ensemble"
    assert fitted.quality == fitted.candidates["ensemble"]


def test_a_loss_that_is_not_finite_is_kept_with_its_mask():
    game = additive_loss(WEIGHTS)
    masks = sample_masks(N, default_strata(N), 120, seed=0)
    losses = game.losses(masks)
    broken = ~masks[:, 3]
    losses[broken] = np.inf
    estimates = estimate(masks, losses, 0.0, strata=default_strata(N))
    assert len(estimates.surrogate.out_of_fold) == 120
    assert np.isfinite(estimates.operating_range.values).all()
    assert np.argmax(estimates.operating_range.values) == 3
    loo = estimates.operating_range.by_size[3, -1]
    assert loo == pytest.approx(1.0)


@pytest.mark.parametrize("count", [1, 2, 3, 7, 20])
def test_a_handful_of_masks_gives_finite_answers(count):
    result = analyze(additive_loss(WEIGHTS), evaluations=count)
    assert np.isfinite(result.contributions).all()
    assert np.isfinite(result.interactions).all()
    assert result.verdict()


@pytest.mark.parametrize("n", [1, 2, 3])
def test_very_shallow_models_are_exact(n):
    game = additive_loss(np.linspace(0.5, 1.0, n))
    result = analyze(game, evaluations=100, strata=range(n + 1))
    for layer in range(n):
        truth = np.mean([restricted_contribution(game, layer, s) for s in range(n)])
        assert result.estimates.shapley.values[layer] == pytest.approx(truth, abs=1e-12)


def test_an_unknown_surrogate_is_refused_by_name():
    with pytest.raises(LayerShapError, match="surrogate is 'oracle'"):
        fit_surrogate(np.ones((3, 4), dtype=bool), np.zeros(3), kind="oracle")


def test_predictions_come_with_a_range_that_holds_most_unseen_masks():
    game = rough_game(2)
    result = analyze(game, evaluations=200)
    masks = sample_masks(11, default_strata(11), 400, seed=99)
    _, low, high = result.predict_perplexity(masks)
    actual = np.exp(game.losses(masks))
    assert ((low <= actual) & (actual <= high)).mean() > 0.75
    assert low.min() >= 1


def test_corrections_are_believed_as_far_as_they_exceed_their_noise():
    exact, _ = shrink(np.array([0.3, -0.2]), np.zeros(2))
    noise, left = shrink(np.array([0.1, -0.1]), np.full(2, 0.5))
    assert exact.tolist() == [1.0, 1.0]
    assert noise.tolist() == left.tolist() == [0.0, 0.0]


def test_a_cell_measured_whole_has_no_sampling_error():
    means, variances = mean_and_variance(
        np.array([6.0, 2.0, 0.0]), np.array([3.0, 1.0, 0.0]), 4.0, 3
    )
    assert means.tolist() == [2.0, 2.0, 0.0]
    assert variances.tolist() == [0.0, 4.0, 4.0]
