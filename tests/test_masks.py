import math

import numpy as np
import pytest

from core.errors import LayerShapError
from core.masks import (
    all_masks,
    check_strata,
    default_strata,
    dropped_players,
    leave_out,
    mask_key,
    published_strata,
    sample_masks,
    stratum_counts,
)


def test_published_strata_are_the_papers_at_its_own_depth():
    assert published_strata(32) == (30, 27, 24, 21, 18)


@pytest.mark.parametrize("n", [1, 2, 3, 8, 30, 32, 80, 126])
def test_strata_are_valid_at_any_depth(n):
    for strata in (default_strata(n), published_strata(n)):
        assert check_strata(n, strata) == strata
        assert max(strata) < n


def test_default_strata_start_at_leave_one_out_and_leave_no_gap():
    assert default_strata(30) == tuple(range(29, 17, -1))


def test_masks_are_distinct_and_share_the_budget_equally():
    masks = sample_masks(30, (26, 24, 20), 300, seed=1)
    assert len(np.unique(masks, axis=0)) == 300
    kept, counts = np.unique(masks.sum(axis=1), return_counts=True)
    assert dict(zip(kept.tolist(), counts.tolist(), strict=True)) == {20: 100, 24: 100, 26: 100}


def test_small_strata_are_exhausted_and_give_their_rest_away():
    masks = sample_masks(10, (9, 8, 5), 150, seed=0)
    kept = masks.sum(axis=1)
    assert (kept == 9).sum() == 10
    assert (kept == 8).sum() == 45
    assert len(masks) == 150


def test_asking_for_more_than_there_are_gives_all_there_are():
    masks = sample_masks(4, (0, 1, 2, 3, 4), 1000, seed=0)
    assert len(masks) == 16
    assert stratum_counts(4, (3, 2), 1000) == {3: 4, 2: 6}


def test_a_smaller_budget_is_contained_in_a_larger_one():
    small = {mask_key(m) for m in sample_masks(30, default_strata(30), 100, seed=3)}
    large = {mask_key(m) for m in sample_masks(30, default_strata(30), 400, seed=3)}
    assert small <= large


def test_every_prefix_spreads_over_the_strata():
    first = sample_masks(30, (28, 26, 24, 22), 400, seed=0)[:40]
    assert np.unique(first.sum(axis=1), return_counts=True)[1].tolist() == [10, 10, 10, 10]


def test_masks_are_uniform_inside_a_stratum():
    pooled = np.concatenate([sample_masks(40, (30,), 200, seed=s) for s in range(40)])
    share = pooled.mean(axis=0)
    error = math.sqrt(0.75 * 0.25 / len(pooled))
    assert np.abs(share - 0.75).max() < 4.5 * error


def test_the_seed_decides():
    again = [sample_masks(30, (20,), 50, seed=s) for s in (5, 5, 6)]
    assert (again[0] == again[1]).all()
    assert not (again[0] == again[2]).all()


def test_wrong_strata_and_budgets_are_refused_by_name():
    with pytest.raises(LayerShapError, match="keeps 31 layers, but this model has 30"):
        sample_masks(30, (31,), 10, seed=0)
    with pytest.raises(LayerShapError, match="evaluations is -3"):
        sample_masks(30, (20,), -3, seed=0)
    with pytest.raises(LayerShapError, match="No strata"):
        sample_masks(30, (), 10, seed=0)


def test_masks_and_dropped_layers_translate_both_ways():
    mask = leave_out(6, (4, 1))
    assert mask_key(mask) == "101101"
    assert dropped_players(mask) == (1, 4)
    with pytest.raises(LayerShapError, match="no layer 6"):
        leave_out(6, (6,))
    assert len(all_masks(5)) == 32
