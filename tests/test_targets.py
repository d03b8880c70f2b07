"""Targets against brute force over every set of a small model."""

import itertools

import numpy as np
import pytest
import torch

from core.cache import EvaluationCache
from core.errors import LayerShapError
from core.game import LayerGame
from core.masks import leave_out
from core.models import describe
from core.players import Players
from core.resources import Resources
from core.targets import Target, find_set
from games import with_pairs

N = 7


SHARE = 0.12


@pytest.fixture
def games():
    """Every layer costs something, whatever else is gone."""

    def game(seed):
        rng = np.random.default_rng(seed)
        pairs = {pair: rng.uniform(-0.01, 0.1) for pair in itertools.combinations(range(N), 2)}
        return with_pairs(rng.uniform(0.1, 0.5, N), pairs)

    return [game(0), game(1)]


@pytest.fixture
def resources(games):
    return Resources(games[0].players, np.full(N, SHARE), np.full(N, 1 / N), np.full(N, 0.1))


def found(games, resources, target):
    *steps, last = find_set(*games, target, resources)
    assert [step.done for step in steps] == sorted(step.done for step in steps)
    return last.found


def rise(game, dropped):
    return float(np.expm1(game.losses(leave_out(N, dropped)[None])[0]))


def test_the_cheapest_set_that_saves_enough(games, resources):
    wanted = Target(least_saved=2.5 * SHARE)
    result = found(games, resources, wanted)
    best = min(rise(games[0], s) for k in (3,) for s in itertools.combinations(range(N), k))
    assert result.saved == pytest.approx(3 * SHARE)
    assert rise(games[0], result.dropped) <= best * 1.02 + 1e-9
    full, pruned = result.held_out
    assert full == pytest.approx(1.0)
    assert pruned / full - 1 == pytest.approx(rise(games[1], result.dropped))
    assert result.held_out_rise == pytest.approx(rise(games[1], result.dropped))


def test_the_most_that_can_be_saved_within_a_limit(games, resources):
    limit = sorted(rise(games[0], (layer,)) for layer in range(N))[2]
    result = found(games, resources, Target(most_rise=limit))
    assert rise(games[0], result.dropped) <= limit
    deeper = len(result.dropped) + 1
    if deeper <= N // 2:
        best = min(rise(games[0], s) for s in itertools.combinations(range(N), deeper))
        assert best > limit * 0.98
    assert result.keeps(Target(most_rise=result.held_out_rise + 1e-9))
    assert not result.keeps(Target(most_rise=result.held_out_rise - 0.01))


def test_what_must_stay_stays(games, resources):
    free = found(games, resources, Target(least_saved=2 * SHARE))
    keep = free.dropped
    result = found(games, resources, Target(least_saved=2 * SHARE, keep=keep))
    assert not set(result.dropped) & set(keep)
    assert rise(games[0], result.dropped) >= rise(games[0], free.dropped)


def test_parts_save_what_was_asked(tiny_llama, tmp_path):
    model, cache = describe(tiny_llama(N)), EvaluationCache(tmp_path)
    game, judge = (
        LayerGame(
            model,
            torch.randint(3, 120, (3, 24), generator=torch.Generator().manual_seed(seed)),
            cache,
            players="sub-blocks",
        )
        for seed in (0, 1)
    )
    parameters = np.array(game.model.player_parameters("sub-blocks"), dtype=float)
    resources = Resources(
        game.players,
        parameters / game.model.info.parameters,
        np.tile([1 / N, 0.0], N),
        np.tile([0.03, 0.07], N),
    )
    for resource in ("parameters", "cache", "time"):
        share = 2 * resources.saved(resource, (0, 1))
        result = found((game, judge), resources, Target(least_saved=share, resource=resource))
        assert result.saved >= share - 0.02
        if resource == "cache":
            assert all(player % 2 == 0 for player in result.dropped)


def test_whole_layers_are_kept_where_only_attention_is_searched():
    """Their MLPs save no cache, and so are not among what could be dropped anyway."""

    class Parts:
        """Every part costs the same, on any text."""

        players = Players("sub-blocks", N)

        def measure(self, masks):
            yield from ((row, 0.1 * float((~mask).sum())) for row, mask in enumerate(masks))

        def perplexity(self, masks):
            return np.exp(np.array([loss for _, loss in self.measure(masks)]))

    cache = np.tile([1 / N, 0.0], N)
    resources = Resources(Parts.players, np.full(2 * N, 0.05), cache, np.full(2 * N, 0.05))
    keep = Parts.players.of_layers((0, N - 1))
    target = Target(least_saved=1 / N, resource="cache", keep=keep)
    result = found((Parts(), Parts()), resources, target)
    assert len(result.dropped) == 1
    assert result.dropped[0] % 2 == 0
    assert result.dropped[0] not in keep


@pytest.mark.parametrize(
    ("target", "words"),
    [
        (Target(), "Set a target"),
        (Target(most_rise=-0.1), "0 % or more"),
        (Target(least_saved=1.5), "less than"),
        (Target(most_rise=1e-6), "No set that drops anything"),
        (Target(most_rise=1e-6, least_saved=0.2), "No set that saves 20%"),
        (Target(least_saved=0.5, keep=tuple(range(5))), "less than 24%"),
    ],
)
def test_targets_that_cannot_be_met_say_why(games, resources, target, words):
    with pytest.raises(LayerShapError, match=words):
        found(games, resources, target)


def test_a_stopped_search_ends_without_a_result(games, resources):
    *_, last = find_set(*games, Target(most_rise=0.5), resources, stop=lambda: True)
    assert last.stopped
    assert last.found is None
