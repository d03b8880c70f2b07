"""Choose what to drop: the best set for every depth of cut at once, within a budget of evaluations.

Bayesian optimisation over sets. A Gaussian process with a term for every player and every pair
learns from all losses measured so far; sets one move away from the best ones known are scored by
the improvement expected of them; the most promising are measured on the model, and the process
learns from them. So evaluations go where good sets live, what is learnt at one depth serves the
others, and a set that is chosen was measured.

The depth of a cut is the number of layers dropped or, for players of different size, how much of a
resource they save, in whole layers' worth.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve
from scipy.optimize import minimize
from scipy.stats import norm

from core.baselines import Frontier, finish, measured
from core.errors import LayerShapError
from core.game import Game
from core.masks import leave_out
from core.players import Players

Floats = NDArray[np.float64]
DropSet = frozenset[int]

METHOD = "LayerShap search"
# Sets that lose more than this many nats are all as bad as each other.
WORST_EXCESS = 3.0
# Measured sets of each size whose neighbours are looked at, and neighbours looked at closely.
BEAM, SHORTLIST = 3, 64
# Sets measured between two looks, at least, and as a share of the depths searched.
BATCH, BATCH_SHARE = 5, 3
# Players that save fractions of a layer's worth are told apart to this part of it; a sum may fall
# short of a whole number by the tolerance, in the same unit, and still count.
FRACTIONS, TOLERANCE = 4, 0.05
# By default, sets measured per depth at least: models of few layers need more than a third of what
# greedy re-evaluation spends.
LOOKS = 4
# The kernel is fitted again when the measurements have grown by this factor.
# Of many measurements, a fit looks at so many, spread evenly over the course of the search.
REFIT_GROWTH, FIT_STEPS, FIT_SETS = 1.15, 80, 160
JITTER = 1e-9


@dataclass(frozen=True)
class Kernel:
    """Prior of the excess loss of a set: a cost of each player dropped and of each pair.

    Attributes:
        player: standard deviation in nats of a player's cost, and of the cost that all layers, or
            all attentions, or all MLPs, share.
        near_pair: of the interaction of neighbours, fading with distance.
        any_pair: of the interaction of any two players.
        reach: distance in layers at which `near_pair` has faded to 1/e in variance.
        noise: what single players and pairs leave unexplained.
    """

    player: float = 0.5
    near_pair: float = 0.2
    any_pair: float = 0.05
    reach: float = 3.0
    noise: float = 0.05

    def parameters(self) -> Floats:
        return np.array([self.player, self.near_pair, self.any_pair, self.reach, self.noise])

    def pair_variances(self, players: Players) -> Floats:
        """Prior variance of each pair's interaction, [n, n] with a zero diagonal."""
        distance = np.abs(players.depths[:, None] - players.depths[None, :])
        variances = self.near_pair**2 * np.exp(-distance / self.reach) + self.any_pair**2
        np.fill_diagonal(variances, 0.0)
        return variances

    def between(self, players: Players, a: Floats, b: Floats) -> Floats:
        """Covariances of sets, indicators [p, n] and [q, n] of what is dropped → [p, q]."""
        kinds = _kinds(players)
        total = self.player**2 * (a @ b.T + (a @ kinds) @ (b @ kinds).T)
        values, vectors = np.linalg.eigh(self.pair_variances(players))
        for value, vector in zip(values, vectors.T, strict=True):
            total += value / 2 * ((a * vector) @ b.T) ** 2
        return total

    def variances(self, players: Players, a: Floats) -> Floats:
        """Variance of each set's excess loss, [p]."""
        alike = ((a @ _kinds(players)) ** 2).sum(axis=1)
        pairs = np.einsum("pi,ij,pj->p", a, self.pair_variances(players), a)
        return self.player**2 * (a.sum(axis=1) + alike) + pairs / 2


def _kinds(players: Players) -> Floats:
    """Which players share a cost: those of the same branch, [n, branches] of 0 and 1."""
    return (players.branches[:, None] == np.unique(players.branches)).astype(float)


class SetProcess:
    """A Gaussian process conditioned on measured sets [m, n] and their excess losses [m]."""

    def __init__(self, kernel: Kernel, players: Players, sets: Floats, excess: Floats) -> None:
        self.kernel, self._players = kernel, players
        self._sets = sets
        self._factor = cho_factor(_noisy(kernel, players, sets), lower=True)
        weights = cho_solve(self._factor, excess)
        kinds = _kinds(players)
        alone = weights @ sets + kinds @ (weights @ (sets @ kinds))
        self._alone = kernel.player**2 * alone
        self._pairs = kernel.pair_variances(players) * ((sets.T * weights) @ sets)

    @classmethod
    def fit(cls, start: Kernel, players: Players, sets: Floats, excess: Floats) -> SetProcess:
        """Choose the kernel by marginal likelihood, with a broad log-normal prior."""
        prior = np.log(Kernel().parameters())
        count = min(len(sets), FIT_SETS)
        seen = np.linspace(0, len(sets) - 1, count).astype(int)

        def loss(log_parameters: Floats) -> float:
            kernel = Kernel(*np.exp(log_parameters))
            factor = np.linalg.cholesky(_noisy(kernel, players, sets[seen]))
            scaled = np.linalg.solve(factor, excess[seen])
            misfit = 0.5 * scaled @ scaled + np.log(np.diag(factor)).sum()
            return float(misfit + 0.5 * ((log_parameters - prior) ** 2).sum())

        first = np.log(start.parameters())
        found = minimize(loss, first, method="Nelder-Mead", options={"maxfev": FIT_STEPS})
        return cls(Kernel(*np.exp(found.x)), players, sets, excess)

    def mean(self, sets: Floats) -> Floats:
        """Expected excess loss of sets [p, n], in nats, [p]."""
        return sets @ self._alone + ((sets @ self._pairs) * sets).sum(axis=1) / 2

    def spread(self, sets: Floats) -> Floats:
        """Standard deviation of what measuring each set would give, [p]."""
        cross = self.kernel.between(self._players, sets, self._sets)
        known = np.einsum("pm,mp->p", cross, cho_solve(self._factor, cross.T))
        prior = self.kernel.variances(self._players, sets)
        return np.sqrt(np.maximum(prior - known, 0) + self.kernel.noise**2)


def greedy_evaluations(n: int, deepest: int) -> int:
    """What greedy re-evaluation spends on cuts of 1 … deepest of n layers."""
    return sum(n - dropped for dropped in range(deepest))


def default_budget(n: int, deepest: int) -> int:
    """A third of what greedy re-evaluation would need, or `LOOKS` per depth where that is more.

    Never more than greedy re-evaluation itself.
    """
    greedy = greedy_evaluations(n, deepest)
    return max(greedy // 3, min(greedy, n + LOOKS * deepest))


def search(
    game: Game,
    deepest: int,
    budget: int | None = None,
    snapshots: Iterable[int] = (),
    *,
    worth: Floats | None = None,
    keep: Collection[int] = (),
    first: Iterable[Iterable[int]] = (),
) -> Generator[None, None, list[Frontier]]:
    """Search sets of depth 1 … deepest; yields after each evaluation.

    Args:
        game: measured for every set that is looked at; equal sets are measured once.
        deepest: the deepest cut, in layers dropped or in layers' worth.
        budget: evaluations to spend, at least one per player; by default `default_budget`.
        snapshots: smaller budgets at which to say what would have been chosen.
        worth: what dropping each player saves, in whole layers' worth, [players]; by default 1.
            Players that save nothing are kept.
        keep: players never to be dropped.
        first: sets to measure before the search begins.

    Returns:
        Frontiers at every snapshot and, last, at the whole budget; `sets[d - 1]` is the best set
        of depth d.

    Raises:
        LayerShapError: `deepest` or `budget` is out of range.
    """
    players = game.players
    scale = _Scale.of(np.ones(players.count) if worth is None else worth, keep)
    _check(scale, deepest, players.count)
    single = [frozenset((player,)) for player in scale.droppable]
    budget = default_budget(len(single), deepest) if budget is None else budget
    wanted = _distinct([*single, *(s for s in map(frozenset, first) if s <= scale.allowed)])
    if budget < len(single):
        raise LayerShapError(
            f"budget is {budget}; it must be at least {len(single)}, one per {players.noun}."
        )
    [full_loss] = yield from measured(game, np.ones((1, players.count), dtype=bool))
    known = _Known(players, scale)
    kernel, fitted_at = Kernel(), 0
    frontiers = []
    stations = sorted({len(single), *(s for s in snapshots if len(single) < s < budget), budget})
    while wanted:
        losses = yield from measured(game, np.array([leave_out(players.count, s) for s in wanted]))
        known.add(wanted, losses - full_loss)
        if len(known) >= REFIT_GROWTH * fitted_at:
            process = SetProcess.fit(kernel, players, *known.arrays())
            kernel, fitted_at = process.kernel, len(known)
        else:
            process = SetProcess(kernel, players, *known.arrays())
        while stations and len(known) >= stations[0]:
            stations.pop(0)
            frontiers.append(known.frontier(process, deepest))
        room = stations[0] - len(known) if stations else 0
        batch = min(room, max(BATCH, deepest // BATCH_SHARE))
        wanted = known.promising(process, deepest, batch)
    if stations:
        # Every set within reach was measured before the budget was spent.
        frontiers.append(known.frontier(process, deepest))
    return frontiers


def best_sets(game: Game, deepest: int, budget: int | None = None) -> Frontier:
    """The sets of 1 … deepest layers that `search` chooses in the end."""
    return finish(search(game, deepest, budget))[-1]


@dataclass(frozen=True)
class _Scale:
    """How deep a cut is, in levels of `1 / per_depth` of a layer's worth each.

    Attributes:
        worth: levels that dropping each player gains, [players].
        droppable: the players that may be dropped.
        per_depth: levels in one layer's worth.
    """

    worth: tuple[float, ...]
    droppable: tuple[int, ...]
    per_depth: int

    @classmethod
    def of(cls, worth: Floats, keep: Collection[int]) -> _Scale:
        levels = 1 if np.allclose(worth, np.round(worth)) else FRACTIONS
        droppable = [p for p in range(len(worth)) if worth[p] > 0 and p not in keep]
        return cls(tuple(levels * float(w) for w in worth), tuple(droppable), levels)

    @cached_property
    def allowed(self) -> DropSet:
        return frozenset(self.droppable)

    @cached_property
    def step(self) -> int:
        """The most levels that one more player can gain."""
        return max(1, int(np.ceil(max(self.worth[p] for p in self.droppable))))

    @cached_property
    def spread(self) -> int:
        """The most levels between two players."""
        gains = [self.worth[p] for p in self.droppable]
        return int(np.ceil(max(gains) - min(gains)))

    def level(self, players: Iterable[int], gained: float = 0.0) -> int:
        return int(sum(self.worth[p] for p in players) + gained + TOLERANCE)

    def wanted(self, depth: int) -> range:
        """The levels that a cut of this depth aims at: as little more than asked as can be."""
        start = depth * self.per_depth
        return range(start, start + max(1, self.per_depth // 2))


def _check(scale: _Scale, deepest: int, n: int) -> None:
    reach = scale.level(scale.droppable) // scale.per_depth
    if len(scale.droppable) == n:
        # Something has to stay.
        reach -= 1
    if not 1 <= deepest <= reach:
        raise LayerShapError(
            f"deepest is {deepest}; it must be from 1 to {reach}."
            if reach
            else "Too much is to be kept: nothing is left that could be dropped."
        )


class _Known:
    """Sets measured so far, and the choices that follow from them."""

    def __init__(self, players: Players, scale: _Scale) -> None:
        self._players, self._scale = players, scale
        self._excess: dict[DropSet, float] = {}
        self._by_level: dict[int, list[DropSet]] = {0: [frozenset()]}

    def __len__(self) -> int:
        return len(self._excess)

    def add(self, sets: list[DropSet], excess: Floats) -> None:
        for chosen, loss in zip(sets, excess, strict=True):
            self._excess[chosen] = min(float(loss), WORST_EXCESS)
            self._by_level.setdefault(self._scale.level(chosen), []).append(chosen)
        for alike in self._by_level.values():
            alike.sort(key=lambda s: self._excess.get(s, 0.0))

    def arrays(self) -> tuple[Floats, Floats]:
        return self._indicators(list(self._excess)), np.array(list(self._excess.values()))

    def frontier(self, process: SetProcess, deepest: int) -> Frontier:
        """The best measured set of each depth; where none was, the one expected to be best."""
        beams = self._beams(process, deepest)
        sets = []
        for depth in range(1, deepest + 1):
            best = self._best(depth) or self._expected(process, beams, depth)
            sets.append(tuple(sorted(best)))
        return Frontier(METHOD, tuple(sets), (len(self),) * deepest)

    def promising(self, process: SetProcess, deepest: int, count: int) -> list[DropSet]:
        """Up to `count` sets of different depths from which most improvement is expected."""
        if count < 1:
            return []
        beams = self._beams(process, deepest)
        found = []
        for depth in range(1, deepest + 1):
            near = self._neighbours(beams, depth)
            if not near:
                continue
            means = process.mean(self._indicators(near))
            short = np.argsort(means, kind="stable")[:SHORTLIST]
            mean = means[short]
            spread = process.spread(self._indicators([near[i] for i in short]))
            made = self._best(depth)
            best = self._excess[made] if made else float((mean + spread).min())
            score = (best - mean) / spread
            # Expected improvement (Jones, Schonlau and Welch 1998).
            gain = spread * (score * norm.cdf(score) + norm.pdf(score))
            top = int(np.argmax(gain))
            found.append((float(gain[top]), near[short[top]]))
        found.sort(key=lambda pick: -pick[0])
        return [chosen for _, chosen in found[:count]]

    def _best(self, depth: int) -> DropSet | None:
        """The best measured set of a depth."""
        start = depth * self._scale.per_depth
        levels = range(start, start + self._scale.per_depth)
        leaders = [made[0] for level in levels if (made := self._by_level.get(level))]
        return min(leaders, key=self._excess.__getitem__, default=None)

    def _expected(
        self, process: SetProcess, beams: dict[int, list[DropSet]], depth: int
    ) -> DropSet:
        start = depth * self._scale.per_depth
        near = [s for level in range(start, max(beams) + 1) for s in beams[level]]
        return near[int(np.argmin(process.mean(self._indicators(near))))]

    def _beams(self, process: SetProcess, deepest: int) -> dict[int, list[DropSet]]:
        """Per level, the best measured sets, then the best that grows from the levels before."""
        scale = self._scale
        beams = {0: self._by_level[0]}
        top = min(deepest * scale.per_depth + scale.step, scale.level(scale.droppable))
        if len(scale.droppable) == self._players.count:
            top = min(top, scale.level(scale.droppable) - scale.step)
        for level in range(1, top + 1):
            beam = self._by_level.get(level, [])[:BEAM]
            grown = _distinct(
                s | {p}
                for lower in range(max(0, level - scale.step), level)
                for s in beams[lower]
                for p in scale.droppable
                if p not in s and scale.level(s, scale.worth[p]) == level
            )
            if grown:
                expected = grown[int(np.argmin(process.mean(self._indicators(grown))))]
                beam = _distinct([*beam, expected])
            beams[level] = beam
        return beams

    def _neighbours(self, beams: dict[int, list[DropSet]], depth: int) -> list[DropSet]:
        """Unmeasured sets of a depth one addition, removal or swap away from the beams."""
        worth, level_of = self._scale.worth, self._scale.level
        wanted = self._scale.wanted(depth)
        step, spread = self._scale.step, self._scale.spread
        near: list[DropSet] = []
        for level in wanted:
            near += beams.get(level, [])
        for level in range(wanted.start - step, wanted.stop + step):
            for s in beams.get(level, []):
                out = [p for p in self._scale.droppable if p not in s]
                inside = sorted(s)
                near += [s | {p} for p in out if level_of(s, worth[p]) in wanted]
                near += [s - {p} for p in inside if level_of(s, -worth[p]) in wanted]
                if wanted.start - spread <= level < wanted.stop + spread:
                    near += [
                        s - {i} | {j}
                        for i in inside
                        for j in out
                        if level_of(s, worth[j] - worth[i]) in wanted
                    ]
        return [s for s in _distinct(near) if s and s not in self._excess]

    def _indicators(self, sets: list[DropSet]) -> Floats:
        rows = np.zeros((len(sets), self._players.count))
        for row, chosen in enumerate(sets):
            rows[row, list(chosen)] = 1.0
        return rows


def _noisy(kernel: Kernel, players: Players, sets: Floats) -> Floats:
    noise = (kernel.noise**2 + JITTER) * np.eye(len(sets))
    return kernel.between(players, sets, sets) + noise


def _distinct(sets: Iterable[DropSet]) -> list[DropSet]:
    return list(dict.fromkeys(sets))
