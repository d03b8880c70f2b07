"""Baselines and search, against brute force over every set of small games."""

import itertools

import numpy as np
import pytest
import torch

from core import baselines
from core.cache import EvaluationCache
from core.errors import LayerShapError
from core.game import LayerGame
from core.masks import leave_out
from core.methods import CONTRIBUTIONS, compare_methods, search_parts
from core.models import describe
from core.players import Players
from core.resources import RESOURCES, Resources
from core.selection import METHOD, Kernel, SetProcess, greedy_evaluations, search
from games import TableGame, rugged_game, with_pairs
from tiny_models import tiny

N, DEEPEST = 12, 6


def finish(method):
    """Run a method to its end: its result, and how often it yielded."""
    for count in itertools.count():
        try:
            next(method)
        except StopIteration as end:
            return end.value, count


def loss_of(game, dropped):
    return float(game.losses(leave_out(game.players.count, dropped)[None])[0])


def best_possible(game, k):
    sets = itertools.combinations(range(game.players.count), k)
    return min(loss_of(game, dropped) for dropped in sets)


def tiny_game(folder, seed):
    tokens = torch.randint(3, 90, (3, 24), generator=torch.Generator().manual_seed(seed))
    return LayerGame(describe(tiny("llama", 7)), tokens, EvaluationCache(folder))


@pytest.fixture
def layer_game(tmp_path):
    return tiny_game(tmp_path / "cache", seed=0)


@pytest.fixture
def other_game(tmp_path):
    return tiny_game(tmp_path / "cache", seed=1)


def total_gap(game, frontier):
    """Nats above the best possible sets, summed over sizes."""
    return sum(loss_of(game, s) - best_possible(game, k) for k, s in enumerate(frontier.sets, 1))


def test_search_is_nearer_the_best_sets_than_greedy_at_its_price_and_than_others_at_half_of_it():
    gaps = []
    for seed in range(12):
        game = rugged_game(seed, N)
        greedy, price = finish(baselines.greedy(game, DEEPEST))
        alone, _ = finish(baselines.leave_one_out(game, DEEPEST))
        [*_, half, whole], spent = finish(search(game, DEEPEST, price, snapshots=(price // 2,)))
        assert spent == price + 1
        gaps.append([total_gap(game, frontier) for frontier in (whole, half, greedy, alone)])
    whole, half, greedy, alone = np.mean(gaps, axis=0)
    assert whole < greedy / 2
    assert half < greedy
    assert half < alone / 2


def test_search_measures_no_set_twice_and_says_what_it_would_choose_earlier():
    game = rugged_game(0, N)
    seen = []
    measure = game.measure
    game.measure = lambda masks: (seen.extend(m.tobytes() for m in masks), measure(masks))[1]
    frontiers, _ = finish(search(game, DEEPEST, budget=45, snapshots=(20, 30)))
    assert len(seen) == len(set(seen))
    assert [f.evaluations[0] for f in frontiers] == [12, 20, 30, 45]
    calibration = [sum(loss_of(game, s) for s in f.sets) for f in frontiers]
    assert calibration[-1] <= calibration[0]


def test_search_ends_when_every_set_was_measured():
    game = rugged_game(1, 4)
    [*_, found], spent = finish(search(game, 2, budget=1000))
    assert spent == 1 + 4 + 6
    assert loss_of(game, found.sets[1]) == best_possible(game, 2)


def test_search_is_repeatable():
    once, again = (finish(search(rugged_game(3, N), DEEPEST))[0] for _ in range(2))
    assert once == again


@pytest.mark.parametrize(("deepest", "budget"), [(0, None), (12, None), (4, 11)])
def test_search_refuses_what_it_cannot_do(deepest, budget):
    with pytest.raises(LayerShapError, match=r"deepest is|budget is 11"):
        finish(search(rugged_game(0, N), deepest, budget))


def test_the_process_is_regression_on_layers_and_pairs():
    """Its covariance is that of independent costs of layers, of pairs, and one shared cost."""
    rng = np.random.default_rng(0)
    kernel = Kernel(player=0.7, near_pair=0.4, any_pair=0.1, reach=2.0, noise=0.1)
    sets = (rng.random((40, 6)) < 0.5).astype(float)
    players = Players("blocks", 6)
    first, second = np.triu_indices(6, 1)
    features = np.column_stack([sets, sets[:, first] * sets[:, second], sets.sum(axis=1)])
    pairs = kernel.pair_variances(players)[first, second]
    prior = np.concatenate([np.full(6, 0.49), pairs, [0.49]])
    excess = rng.normal(size=30)
    covariance = features @ np.diag(prior) @ features.T
    seen = covariance[:30, :30] + (0.1**2 + 1e-9) * np.eye(30)
    process = SetProcess(kernel, players, sets[:30], excess)
    mean = covariance[30:, :30] @ np.linalg.solve(seen, excess)
    left = covariance[30:, 30:] - covariance[30:, :30] @ np.linalg.solve(seen, covariance[:30, 30:])
    assert np.allclose(process.mean(sets[30:]), mean)
    assert np.allclose(process.spread(sets[30:]), np.sqrt(np.diag(left) + 0.1**2))


def test_greedy_is_what_it_says():
    game = rugged_game(2, N)
    found, spent = finish(baselines.greedy(game, 3))
    assert spent == found.evaluations[-1] == greedy_evaluations(N, 3) == 12 + 11 + 10
    dropped = []
    for chosen in found.sets:
        left = [i for i in range(N) if i not in dropped]
        dropped.append(min(left, key=lambda i: loss_of(game, [*dropped, i])))
        assert chosen == tuple(sorted(dropped))


def test_quadratic_is_exact_where_only_pairs_interact():
    weights = np.array([0.3, 0.31, 0.2, 0.5, 0.33])
    game = with_pairs(weights, {(0, 2): 0.4, (1, 2): -0.1})
    found, spent = finish(baselines.quadratic(game, 2))
    assert spent - 1 == found.evaluations[-1] == 5 + 10
    assert found.sets == ((2,), (1, 2))


def test_leave_one_out_ranks_by_single_losses():
    game = rugged_game(4, N)
    found, spent = finish(baselines.leave_one_out(game, 4))
    costs = [loss_of(game, [layer]) for layer in range(N)]
    assert spent == found.evaluations[0] == N
    assert found.sets[3] == tuple(sorted(np.argsort(costs)[:4].tolist()))


def test_an_infinite_loss_is_the_last_to_be_dropped():
    game = TableGame(4, lambda mask: 0.0 if not mask[1] else float(np.exp(-(~mask).sum())))
    for method in (baselines.leave_one_out, baselines.greedy, baselines.quadratic):
        found, _ = finish(method(game, 3))
        assert found.sets[-1] == (0, 2, 3)
    [*_, found], _ = finish(search(game, 3, budget=20))
    assert found.sets[-1] == (0, 2, 3)


def test_hidden_state_methods_agree_with_the_models_own_hidden_states(layer_game):
    module, tokens = layer_game.model.module, layer_game.tokens
    outputs = []
    hooks = [
        b.register_forward_hook(lambda m, a, out: outputs.append(out)) for b in module.model.layers
    ]
    with torch.no_grad():
        module(tokens)
        first = module.model.embed_tokens(tokens)
    for hook in hooks:
        hook.remove()
    states = [first, *(o if isinstance(o, torch.Tensor) else o[0] for o in outputs)]
    cosine = torch.nn.functional.cosine_similarity
    influence = [1 - float(cosine(a, b, dim=-1).mean()) for a, b in itertools.pairwise(states)]
    found, _ = finish(baselines.block_influence(layer_game, 3))
    assert found.sets[2] == tuple(sorted(np.argsort(influence)[:3].tolist()))
    alike = [float(cosine(states[i], states[i + 3], dim=-1).mean()) for i in range(5)]
    start = int(np.argmax(alike))
    found, _ = finish(baselines.angular_distance(layer_game, 3))
    assert found.sets[2] == (start, start + 1, start + 2)


def test_methods_that_look_at_no_text(layer_game):
    last, spent = finish(baselines.last_layers(layer_game, 3))
    assert (last.sets, spent) == (((6,), (5, 6), (4, 5, 6)), 0)
    with torch.no_grad():
        layer_game.model.blocks[4].mlp.up_proj.weight.mul_(0.01)
    small, _ = finish(baselines.weight_magnitude(layer_game, 1))
    assert small.sets == ((4,),)
    orders = [finish(baselines.random_order(layer_game, 3, seed))[0].sets for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]


def finished(*arguments, **settings):
    return list(compare_methods(*arguments, **settings))


def test_methods_are_judged_on_text_that_chose_nothing(layer_game, other_game):
    names = [METHOD, "Leave one out", "Block Influence", "Last layers", CONTRIBUTIONS]
    contributions = (np.arange(7)[::-1], 99)
    steps = finished(layer_game, other_game, names, 3, contributions=contributions)
    assert [step.done for step in steps] == sorted(step.done for step in steps)
    assert steps[-1].stage == "Done"
    comparison = steps[-1].comparison
    assert [result.frontier.method for result in comparison.results] == names
    for result in comparison.results:
        masks = np.array([leave_out(7, chosen) for chosen in result.frontier.sets])
        assert (result.calibration == layer_game.losses(masks)).all()
        assert (result.held_out == other_game.losses(masks)).all()
    last = comparison.result("Last layers").frontier
    ascending = comparison.result(CONTRIBUTIONS).frontier
    assert last.sets == ascending.sets
    assert ascending.evaluations == (99,) * 3
    agreement = comparison.agreement(3)
    assert (np.diag(agreement) == 1).all()
    assert agreement[3, 4] == 1
    shared = set(comparison.results[0].frontier.sets[2]) & set(last.sets[2])
    assert agreement[0, 3] == len(shared) / 3


def test_a_stopped_comparison_keeps_the_methods_that_finished(layer_game, other_game):
    asked = iter(range(1000))
    steps = finished(
        layer_game,
        other_game,
        ["Leave one out", "Greedy re-evaluation"],
        3,
        stop=lambda: next(asked) == 20,
    )
    assert steps[-1].stage == "Stopped"
    assert [r.frontier.method for r in steps[-1].comparison.results] == ["Leave one out"]


@pytest.mark.parametrize(
    ("names", "deepest", "words"),
    [
        ([], 3, "No method chosen"),
        (["Astrology"], 3, "no method 'Astrology'"),
        ([CONTRIBUTIONS], 3, "needs an analysis"),
        ([METHOD], 7, "choose 1 to 6"),
    ],
)
def test_comparisons_that_cannot_be_made_say_why(layer_game, names, deepest, words):
    with pytest.raises(LayerShapError, match=words):
        finished(layer_game, layer_game, names, deepest)


@pytest.fixture
def parts_game(layer_game):
    return LayerGame(layer_game.model, layer_game.tokens, layer_game.cache, players="sub-blocks")


@pytest.fixture
def savings(parts_game):
    players = parts_game.players
    parameters = np.array(parts_game.model.player_parameters("sub-blocks"), dtype=float)
    return Resources(
        players,
        parameters / parts_game.model.info.parameters,
        np.tile([1 / 7, 0.0], 7),
        np.tile([0.05, 0.06], 7),
    )


@pytest.mark.parametrize("resource", RESOURCES)
def test_parts_save_as_much_as_so_many_layers_and_cost_no_more(parts_game, savings, resource):
    found, _ = finish(search_parts(parts_game, 3, savings, resource))
    [*_, layers], _ = finish(search(parts_game.whole_layers, 3))
    worth = savings.worth(resource)
    for depth, (dropped, whole) in enumerate(zip(found.sets, layers.sets, strict=True), 1):
        assert worth[list(dropped)].sum() >= depth - 0.05
        if resource != "cache":
            assert loss_of(parts_game, dropped) <= loss_of(parts_game.whole_layers, whole)
    if resource == "cache":
        assert all(player % 2 == 0 for dropped in found.sets for player in dropped)


def test_methods_of_whole_layers_choose_among_parts_too(parts_game, other_game, savings):
    judge = LayerGame(other_game.model, other_game.tokens, other_game.cache, players="sub-blocks")
    names = ["Leave one out", CONTRIBUTIONS]
    contributions = (np.arange(14), 40)
    *_, last = finished(parts_game, judge, names, 2, contributions=contributions, resources=savings)
    alone, ascending = last.comparison.results
    [layer] = finish(baselines.leave_one_out(parts_game.whole_layers, 1))[0].sets[0]
    assert alone.frontier.sets[0] == (2 * layer, 2 * layer + 1)
    saved = savings.worth("parameters")
    for depth, dropped in enumerate(ascending.frontier.sets, 1):
        assert dropped == tuple(range(len(dropped)))
        assert saved[list(dropped)].sum() >= depth - 0.05
        assert saved[list(dropped[:-1])].sum() < depth
    assert last.comparison.agreement(2).shape == (2, 2)
    with pytest.raises(LayerShapError, match="choose them in Set-up"):
        finished(other_game, other_game, ["LayerShap parts, by cache"], 2)


def test_players_to_keep_are_kept_and_too_many_are_refused():
    game = rugged_game(5, N)
    [*_, free], _ = finish(search(game, 3))
    [*_, found], _ = finish(search(game, 3, keep=free.sets[2]))
    assert not set(free.sets[2]) & {p for dropped in found.sets for p in dropped}
    with pytest.raises(LayerShapError, match="must be from 1 to 2"):
        finish(search(game, 3, keep=range(N - 2)))
    with pytest.raises(LayerShapError, match="Too much is to be kept"):
        finish(search(game, 3, keep=range(N)))


def test_sets_measured_first_are_among_the_choices():
    game = rugged_game(6, N)
    best = min(itertools.combinations(range(N), 3), key=lambda s: loss_of(game, s))
    [*_, found], _ = finish(search(game, 3, budget=N + 1, first=[best]))
    assert found.sets[2] == best
