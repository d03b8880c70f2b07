"""Several ways to choose layers, side by side: each measured on text that chose none of them."""

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

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class MethodKind:
    """A method that can be run: its name, what it does and how many evaluations it takes."""

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


@dataclass(frozen=True)
class MethodResult:
    """A method's sets, and the losses of each in nats, [deepest]."""

    frontier: Frontier
    calibration: Floats
    held_out: Floats


@dataclass(frozen=True)
class MethodsComparison:
    """Methods side by side.

    Attributes:
        n_layers: of the unpruned model.
        full_calibration, full_held_out: its losses in nats.
        results: one per method that finished, in the order asked for.
    """

    n_layers: int
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

    def agreement(self, dropped: int) -> Floats:
        """Share of layers that two methods drop in common, [methods, methods], at one depth."""
        sets = [set(result.frontier.sets[dropped - 1]) for result in self.results]
        return np.array([[len(a & b) / dropped for b in sets] for a in sets])


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
    stop: Callable[[], bool] | None = None,
) -> Iterator[MethodsProgress]:
    """Run methods on the calibration game and measure what they choose on held-out text.

    Yields after every evaluation. After a stop the last yield holds the methods finished so far;
    every evaluation is in the cache, so that a next run goes on from there.

    Args:
        names: of `KINDS`, or `CONTRIBUTIONS`, which drops layers by ascending contribution.
        deepest: sets of 1 … deepest dropped layers are compared.
        contributions: of each layer, and the evaluations behind them; needed for `CONTRIBUTIONS`.

    Raises:
        LayerShapError: no method, an unknown one, or a depth out of range.
    """
    n = calibration.n_layers
    _check(names, deepest, n, contributions)
    stopped = stop or (lambda: False)
    costs = {name: KINDS[name].cost(n, deepest) if name in KINDS else 0 for name in names}
    total = sum(costs.values()) + 2 * deepest * len(names)
    clock, before = Clock(), 0
    full = np.ones((1, n), dtype=bool)
    comparison = MethodsComparison(
        n, float(calibration.losses(full)[0]), float(held_out.losses(full)[0])
    )
    for name in names:
        clock.restart()
        method = _start(name, calibration, deepest, contributions)
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


def _start(
    name: str,
    game: LayerGame,
    deepest: int,
    contributions: tuple[ArrayLike, int] | None,
) -> Method:
    if name in KINDS:
        return KINDS[name].run(game, deepest)
    assert contributions is not None
    return _by_contribution(*contributions, deepest)


def _by_contribution(values: ArrayLike, evaluations: int, deepest: int) -> Method:
    yield from ()
    order = np.argsort(np.asarray(values), kind="stable")
    return Frontier.of_ranking(CONTRIBUTIONS, iter(order), deepest, evaluations)


def _with_losses(
    method: Method, calibration: LayerGame, held_out: LayerGame
) -> Generator[None, None, MethodResult]:
    frontier = yield from method
    masks = np.array([leave_out(calibration.n_layers, chosen) for chosen in frontier.sets])
    chosen_by = yield from baselines.measured(calibration, masks)
    judged_by = yield from baselines.measured(held_out, masks)
    return MethodResult(frontier, chosen_by, judged_by)


def _check(names: Sequence[str], deepest: int, n: int, contributions: object) -> None:
    if not names:
        raise LayerShapError("No method chosen; choose at least one to compare.")
    for name in names:
        if name not in KINDS and name != CONTRIBUTIONS:
            raise LayerShapError(
                f"There is no method {name!r}; choose from {', '.join([*KINDS, CONTRIBUTIONS])}."
            )
    if CONTRIBUTIONS in names and contributions is None:
        raise LayerShapError(
            f"{CONTRIBUTIONS} needs an analysis: press Analyse first, or leave that method out."
        )
    if not 1 <= deepest < n:
        raise LayerShapError(
            f"The deepest cut is {deepest} layers; this model has {n}, so choose 1 to {n - 1}."
        )
