"""Several ways to choose what to drop, side by side: each measured on text that chose nothing.

Where the players are attention and MLP of each layer, methods that know whole layers only choose
among these, and the search chooses parts too: one row for every resource that a cut can save.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from core import baselines, selection
from core.baselines import Frontier, Method
from core.clock import Clock
from core.errors import LayerShapError
from core.game import LayerGame
from core.masks import leave_out
from core.players import Players
from core.resources import RESOURCES, Resource, Resources, measure_resources

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class MethodKind:
    """A method that can be run: its name, what it does and how many evaluations it takes.

    `cost` and `run` are given the number of layers, or the game of whole layers, and the depth.
    """

    name: str
    rule: str
    cost: Callable[[int, int], int]
    run: Callable[[LayerGame, int], Method]


def _searched(game: LayerGame, deepest: int) -> Method:
    frontiers = yield from selection.search(game, deepest)
    return frontiers[-1]


CONTRIBUTIONS = "Ascending contribution"
KINDS: dict[str, MethodKind] = {
    kind.name: kind
    for kind in (
        MethodKind(
            selection.METHOD,
            "search over sets with a model of layers and pairs; every chosen set was measured",
            selection.default_budget,
            _searched,
        ),
        MethodKind(
            "Greedy re-evaluation",
            "drop the layer that costs least, measure all others again, repeat (SLEB)",
            selection.greedy_evaluations,
            baselines.greedy,
        ),
        MethodKind(
            "Pairs (quadratic)",
            "greedy on the measured losses of all single and pair deletions",
            lambda n, deepest: n * (n + 1) // 2,
            baselines.quadratic,
        ),
        MethodKind(
            "Leave one out",
            "drop the layers whose removal alone costs least (Shortened LLaMA)",
            lambda n, deepest: n,
            baselines.leave_one_out,
        ),
        MethodKind(
            "Block Influence",
            "drop the layers that turn the hidden state least (ShortGPT)",
            lambda n, deepest: 1,
            baselines.block_influence,
        ),
        MethodKind(
            "Angular distance",
            "drop the run of layers that together turn it least (PruneMe)",
            lambda n, deepest: 1,
            baselines.angular_distance,
        ),
        MethodKind(
            "Weight magnitude",
            "drop the layers with the smallest weights",
            lambda n, deepest: 0,
            baselines.weight_magnitude,
        ),
        MethodKind("Last layers", "drop from the end", lambda n, d: 0, baselines.last_layers),
        MethodKind("Random", "drop in random order", lambda n, d: 0, baselines.random_order),
    )
}


# The search over parts, by the resource that is to be saved.
PARTS: dict[str, Resource] = {f"LayerShap parts, by {resource}": resource for resource in RESOURCES}


def available(players: Players) -> tuple[str, ...]:
    """The methods that can choose among these players."""
    parts = tuple(PARTS) if players.kind == "sub-blocks" else ()
    return (*parts, *KINDS, CONTRIBUTIONS)


def cost(name: str, players: Players, deepest: int) -> int:
    """The most model evaluations that a method takes to choose sets of depth 1 … deepest."""
    if name in KINDS:
        return KINDS[name].cost(players.n_layers, deepest)
    if name not in PARTS:
        return 0
    whole = selection.default_budget(players.n_layers, deepest)
    return whole if PARTS[name] == "cache" else whole + parts_budget(players, deepest)


def parts_budget(players: Players, deepest: int) -> int:
    """What the search over parts may spend: what greedy re-evaluation spends on whole layers."""
    whole = selection.greedy_evaluations(players.n_layers, deepest)
    return max(players.count + deepest, whole)


@dataclass(frozen=True)
class MethodResult:
    """A method's sets, and the losses of each in nats, [deepest].

    The set at depth d drops d layers or saves d layers' worth of some resource.
    """

    frontier: Frontier
    calibration: Floats
    held_out: Floats


@dataclass(frozen=True)
class MethodsComparison:
    """Methods side by side.

    Attributes:
        resources: what dropping each player saves.
        full_calibration, full_held_out: the unpruned model's losses in nats.
        results: one per method that finished, in the order asked for.
    """

    resources: Resources
    full_calibration: float
    full_held_out: float
    results: tuple[MethodResult, ...] = ()

    @property
    def deepest(self) -> int:
        return len(self.results[0].frontier.sets) if self.results else 0

    def result(self, method: str) -> MethodResult:
        """One method's result.

        Raises:
            LayerShapError: it is not among them.
        """
        for result in self.results:
            if result.frontier.method == method:
                return result
        raise LayerShapError(f"{method} has not been run; compare methods with it chosen first.")

    @property
    def players(self) -> Players:
        return self.resources.players

    def agreement(self, depth: int) -> Floats:
        """Share of players that two methods drop in common, [methods, methods], at one depth.

        Of two sets of different size, the share of the larger one.
        """
        sets = [set(result.frontier.sets[depth - 1]) for result in self.results]
        return np.array([[len(a & b) / max(len(a), len(b)) for b in sets] for a in sets])


@dataclass(frozen=True)
class MethodsProgress:
    """Where a comparison is; `comparison` holds the methods that are finished."""

    stage: str
    done: int
    total: int
    seconds_left: float | None
    comparison: MethodsComparison


def compare_methods(
    calibration: LayerGame,
    held_out: LayerGame,
    names: Sequence[str],
    deepest: int,
    *,
    contributions: tuple[ArrayLike, int] | None = None,
    resources: Resources | None = None,
    stop: Callable[[], bool] | None = None,
) -> Iterator[MethodsProgress]:
    """Run methods on the calibration game and measure what they choose on held-out text.

    Yields after every evaluation. After a stop the last yield holds the methods finished so far;
    every evaluation is in the cache, so that a next run goes on from there.

    Args:
        names: of `available(calibration.players)`.
        deepest: sets of 1 … deepest dropped layers, or layers' worth, are compared.
        contributions: of each player, and the evaluations behind them; needed for `CONTRIBUTIONS`.
        resources: what each player saves; measured where it is not given.

    Raises:
        LayerShapError: no method, an unknown one, or a depth out of range.
    """
    players = calibration.players
    _check(names, deepest, players, contributions)
    stopped = stop or (lambda: False)
    costs = {name: cost(name, players, deepest) for name in names}
    total = sum(costs.values()) + 2 * deepest * len(names)
    clock, before = Clock(), 0
    full = np.ones((1, players.count), dtype=bool)
    comparison = MethodsComparison(
        resources or measure_resources(calibration.model, players),
        float(calibration.losses(full)[0]),
        float(held_out.losses(full)[0]),
    )
    for name in names:
        clock.restart()
        method = _start(name, calibration, deepest, comparison.resources, contributions)
        running = _with_losses(method, calibration, held_out)
        done, planned = before, before + costs[name] + 2 * deepest
        while True:
            try:
                next(running)
            except StopIteration as end:
                comparison = replace(comparison, results=(*comparison.results, end.value))
                break
            # Some methods look at the full model too, which was measured before.
            done = min(done + 1, planned)
            yield MethodsProgress(name, done, total, clock.left(total - done), comparison)
            if stopped():
                yield MethodsProgress("Stopped", done, total, 0.0, comparison)
                return
        before = planned
        yield MethodsProgress(name, before, total, clock.left(total - before), comparison)
    yield MethodsProgress("Done", total, total, 0.0, comparison)


def search_parts(game: LayerGame, deepest: int, resources: Resources, resource: Resource) -> Method:
    """Sets of attentions and MLPs that save 1 … deepest layers' worth of a resource.

    What a search over whole layers finds is where this one starts, so it ends nowhere worse.
    """
    players, worth = game.players, resources.worth(resource)
    name = next(name for name, saved in PARTS.items() if saved == resource)
    if not worth.any():
        raise LayerShapError(f"Dropping parts of this model saves no {resource}.")
    if (worth > 0).sum() <= players.n_layers:
        # Only one kind of part saves any, so that no whole layer need be looked at.
        budget, spent, first = selection.default_budget(players.n_layers, deepest), 0, []
    else:
        budget = parts_budget(players, deepest)
        spent = selection.default_budget(players.n_layers, deepest)
        [*_, layers] = yield from selection.search(game.whole_layers, deepest, spent)
        first = [players.of_layers(chosen) for chosen in layers.sets]
    [*_, found] = yield from selection.search(game, deepest, budget, worth=worth, first=first)
    return Frontier(name, found.sets, tuple(n + spent for n in found.evaluations))


def _start(
    name: str,
    game: LayerGame,
    deepest: int,
    resources: Resources,
    contributions: tuple[ArrayLike, int] | None,
) -> Method:
    if name in PARTS:
        return search_parts(game, deepest, resources, PARTS[name])
    if name in KINDS:
        return _of_whole_layers(KINDS[name].run, game, deepest)
    assert contributions is not None
    return _by_contribution(*contributions, deepest, resources)


def _of_whole_layers(
    run: Callable[[LayerGame, int], Method], game: LayerGame, deepest: int
) -> Method:
    """A method that knows whole layers only, its sets in terms of the game's players."""
    if game.players.kind == "blocks":
        return (yield from run(game, deepest))
    found = yield from run(game.whole_layers, deepest)
    return replace(found, sets=tuple(game.players.of_layers(chosen) for chosen in found.sets))


def _by_contribution(
    values: ArrayLike, evaluations: int, deepest: int, resources: Resources
) -> Method:
    """Ascending contribution, until as many parameters are saved as so many layers have."""
    yield from ()
    order = np.argsort(np.asarray(values), kind="stable")
    if resources.players.kind == "blocks":
        return Frontier.of_ranking(CONTRIBUTIONS, iter(order), deepest, evaluations)
    saved = np.cumsum(resources.worth("parameters")[order])
    ends = [int(np.argmax(saved >= depth - selection.TOLERANCE)) for depth in range(1, deepest + 1)]
    sets = tuple(tuple(sorted(int(p) for p in order[: end + 1])) for end in ends)
    return Frontier(CONTRIBUTIONS, sets, (evaluations,) * deepest)


def _with_losses(
    method: Method, calibration: LayerGame, held_out: LayerGame
) -> Generator[None, None, MethodResult]:
    frontier = yield from method
    masks = np.array([leave_out(calibration.players.count, chosen) for chosen in frontier.sets])
    chosen_by = yield from baselines.measured(calibration, masks)
    judged_by = yield from baselines.measured(held_out, masks)
    return MethodResult(frontier, chosen_by, judged_by)


def _check(names: Sequence[str], deepest: int, players: Players, contributions: object) -> None:
    if not names:
        raise LayerShapError("No method chosen; choose at least one to compare.")
    for name in names:
        if name in PARTS and players.kind == "blocks":
            raise LayerShapError(
                f"{name} needs attention and MLP as players; choose them in Set-up."
            )
        if name not in available(players):
            raise LayerShapError(
                f"There is no method {name!r}; choose from {', '.join(available(players))}."
            )
    if CONTRIBUTIONS in names and contributions is None:
        raise LayerShapError(
            f"{CONTRIBUTIONS} needs an analysis: press Analyse first, or leave that method out."
        )
    n = players.n_layers
    if not 1 <= deepest < n:
        raise LayerShapError(
            f"The deepest cut is {deepest} layers; this model has {n}, so choose 1 to {n - 1}."
        )
