"""Choose the layers to drop: the best set of every size at once, within a budget of evaluations.

Bayesian optimisation over sets. A Gaussian process with a term for every layer and every pair
learns from all losses measured so far; sets one move away from the best ones known are scored by
the improvement expected of them; the most promising are measured on the model, and the process
learns from them. So evaluations go where good sets live, what is learnt at one size serves the
others, and a set that is chosen was measured.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve
from scipy.optimize import minimize
from scipy.stats import norm

from core.baselines import Frontier, finish, measured
from core.errors import LayerShapError
from core.game import Game
from core.masks import leave_out

Floats = NDArray[np.float64]
DropSet = frozenset[int]

METHOD = "LayerShap search"
# Sets that lose more than this many nats are all as bad as each other.
WORST_EXCESS = 3.0
# Measured sets of each size whose neighbours are looked at, and neighbours looked at closely.
BEAM, SHORTLIST = 3, 64
# Sets measured between two looks, at least, and as a share of the sizes searched.
BATCH, BATCH_SHARE = 5, 3
# By default, sets measured per size at least: models of few layers need more than a third of what
# greedy re-evaluation spends.
LOOKS = 4
# The kernel is fitted again when the measurements have grown by this factor.
REFIT_GROWTH, FIT_STEPS = 1.15, 80
JITTER = 1e-9


@dataclass(frozen=True)
class Kernel:
    """Prior of the excess loss of a set: a cost of each layer dropped and of each pair.

    Attributes:
        layer: standard deviation in nats of a layer's cost, and of the cost all layers share.
        near_pair: of the interaction of neighbours, fading with distance.
        any_pair: of the interaction of any two layers.
        reach: distance in layers at which `near_pair` has faded to 1/e in variance.
        noise: what single layers and pairs leave unexplained.
    """

    layer: float = 0.5
    near_pair: float = 0.2
    any_pair: float = 0.05
    reach: float = 3.0
    noise: float = 0.05

    def parameters(self) -> Floats:
        return np.array([self.layer, self.near_pair, self.any_pair, self.reach, self.noise])

    def pair_variances(self, n: int) -> Floats:
        """Prior variance of each pair's interaction, [n, n] with a zero diagonal."""
        distance = np.abs(np.arange(n)[:, None] - np.arange(n)[None, :])
        variances = self.near_pair**2 * np.exp(-distance / self.reach) + self.any_pair**2
        np.fill_diagonal(variances, 0.0)
        return variances

    def between(self, a: Floats, b: Floats) -> Floats:
        """Covariances of sets, indicators [p, n] and [q, n] of what is dropped → [p, q]."""
        total = self.layer**2 * (a @ b.T + a.sum(1)[:, None] * b.sum(1)[None, :])
        values, vectors = np.linalg.eigh(self.pair_variances(a.shape[1]))
        for value, vector in zip(values, vectors.T, strict=True):
            total += value / 2 * ((a * vector) @ b.T) ** 2
        return total

    def variances(self, a: Floats) -> Floats:
        """Variance of each set's excess loss, [p]."""
        size = a.sum(axis=1)
        pairs = np.einsum("pi,ij,pj->p", a, self.pair_variances(a.shape[1]), a)
        return self.layer**2 * (size + size**2) + pairs / 2


class SetProcess:
    """A Gaussian process conditioned on measured sets [m, n] and their excess losses [m]."""

    def __init__(self, kernel: Kernel, sets: Floats, excess: Floats) -> None:
        self.kernel = kernel
        self._sets = sets
        self._factor = cho_factor(_noisy(kernel, sets), lower=True)
        weights = cho_solve(self._factor, excess)
        self._shared = kernel.layer**2 * (weights @ sets.sum(axis=1))
        self._layers = kernel.layer**2 * (weights @ sets)
        self._pairs = kernel.pair_variances(sets.shape[1]) * ((sets.T * weights) @ sets)

    @classmethod
    def fit(cls, start: Kernel, sets: Floats, excess: Floats) -> SetProcess:
        """Choose the kernel by marginal likelihood, with a broad log-normal prior."""
        prior = np.log(Kernel().parameters())

        def loss(log_parameters: Floats) -> float:
            factor = np.linalg.cholesky(_noisy(Kernel(*np.exp(log_parameters)), sets))
            scaled = np.linalg.solve(factor, excess)
            misfit = 0.5 * scaled @ scaled + np.log(np.diag(factor)).sum()
            return float(misfit + 0.5 * ((log_parameters - prior) ** 2).sum())

        first = np.log(start.parameters())
        found = minimize(loss, first, method="Nelder-Mead", options={"maxfev": FIT_STEPS})
        return cls(Kernel(*np.exp(found.x)), sets, excess)

    def mean(self, sets: Floats) -> Floats:
        """Expected excess loss of sets [p, n], in nats, [p]."""
        pairs = ((sets @ self._pairs) * sets).sum(axis=1) / 2
        return self._shared * sets.sum(axis=1) + sets @ self._layers + pairs

    def spread(self, sets: Floats) -> Floats:
        """Standard deviation of what measuring each set would give, [p]."""
        cross = self.kernel.between(sets, self._sets)
        known = np.einsum("pm,mp->p", cross, cho_solve(self._factor, cross.T))
        return np.sqrt(np.maximum(self.kernel.variances(sets) - known, 0) + self.kernel.noise**2)


def greedy_evaluations(n: int, deepest: int) -> int:
    """What greedy re-evaluation spends on cuts of 1 … deepest of n layers."""
    return sum(n - dropped for dropped in range(deepest))


def default_budget(n: int, deepest: int) -> int:
    """A third of what greedy re-evaluation would need, or `LOOKS` per size where that is more.

    Never more than greedy re-evaluation itself.
    """
    greedy = greedy_evaluations(n, deepest)
    return max(greedy // 3, min(greedy, n + LOOKS * deepest))


def search(
    game: Game, deepest: int, budget: int | None = None, snapshots: Iterable[int] = ()
) -> Generator[None, None, list[Frontier]]:
    """Search sets of 1 … deepest layers; yields after each evaluation.

    Args:
        game: measured for every set that is looked at; equal sets are measured once.
        deepest: the most layers to drop.
        budget: evaluations to spend, at least one per layer; by default `default_budget`.
        snapshots: smaller budgets at which to say what would have been chosen.

    Returns:
        Frontiers at every snapshot and, last, at the whole budget.

    Raises:
        LayerShapError: `deepest` or `budget` is out of range.
    """
    n = game.n_layers
    if not 1 <= deepest < n:
        raise LayerShapError(f"deepest is {deepest}; it must be from 1 to {n - 1}.")
    budget = default_budget(n, deepest) if budget is None else budget
    if budget < n:
        raise LayerShapError(f"budget is {budget}; it must be at least {n}, one per layer.")
    [full_loss] = yield from measured(game, np.ones((1, n), dtype=bool))
    known = _Known(n)
    wanted = [frozenset((layer,)) for layer in range(n)]
    kernel, fitted_at = Kernel(), 0
    frontiers = []
    stations = sorted({n, *(s for s in snapshots if n < s < budget), budget})
    while wanted:
        losses = yield from measured(game, np.array([leave_out(n, s) for s in wanted]))
        known.add(wanted, losses - full_loss)
        if len(known) >= REFIT_GROWTH * fitted_at:
            process = SetProcess.fit(kernel, *known.arrays())
            kernel, fitted_at = process.kernel, len(known)
        else:
            process = SetProcess(kernel, *known.arrays())
        room = stations[0] - len(known)
        if room <= 0:
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


class _Known:
    """Sets measured so far, and the choices that follow from them."""

    def __init__(self, n: int) -> None:
        self.n = n
        self._excess: dict[DropSet, float] = {}
        self._by_size: dict[int, list[DropSet]] = {0: [frozenset()]}

    def __len__(self) -> int:
        return len(self._excess)

    def add(self, sets: list[DropSet], excess: Floats) -> None:
        for chosen, loss in zip(sets, excess, strict=True):
            self._excess[chosen] = min(float(loss), WORST_EXCESS)
            self._by_size.setdefault(len(chosen), []).append(chosen)
        for same_size in self._by_size.values():
            same_size.sort(key=lambda s: self._excess.get(s, 0.0))

    def arrays(self) -> tuple[Floats, Floats]:
        return self._indicators(list(self._excess)), np.array(list(self._excess.values()))

    def frontier(self, process: SetProcess, deepest: int) -> Frontier:
        """The best measured set of each size; where none was, the one expected to be best."""
        beams = self._beams(process, deepest)
        sets = tuple(tuple(sorted(beams[k][0])) for k in range(1, deepest + 1))
        return Frontier(METHOD, sets, (len(self),) * deepest)

    def promising(self, process: SetProcess, deepest: int, count: int) -> list[DropSet]:
        """Up to `count` sets of different sizes from which most improvement is expected.

        Where no set of a size was measured, the one expected to be best comes first: a search that
        ends early must have looked at that before it looked at what is merely uncertain.
        """
        beams = self._beams(process, deepest + 1)
        found = []
        for k in range(2, deepest + 1):
            near = self._neighbours(beams, k)
            if not near:
                continue
            means = process.mean(self._indicators(near))
            short = np.argsort(means, kind="stable")[:SHORTLIST]
            made = self._by_size.get(k)
            if not made:
                found.append((np.inf, near[short[0]]))
                continue
            mean = means[short]
            spread = process.spread(self._indicators([near[i] for i in short]))
            score = (self._excess[made[0]] - mean) / spread
            # Expected improvement (Jones, Schonlau and Welch 1998).
            gain = spread * (score * norm.cdf(score) + norm.pdf(score))
            top = int(np.argmax(gain))
            found.append((float(gain[top]), near[short[top]]))
        found.sort(key=lambda pick: -pick[0])
        return [chosen for _, chosen in found[:count]]

    def _beams(self, process: SetProcess, deepest: int) -> dict[int, list[DropSet]]:
        """Per size, the best measured sets, then the best that grows from the size before."""
        beams = {0: self._by_size[0]}
        for k in range(1, min(deepest, self.n - 1) + 1):
            beam = self._by_size.get(k, [])[:BEAM]
            grown = _distinct(s | {i} for s in beams[k - 1] for i in range(self.n) if i not in s)
            expected = grown[int(np.argmin(process.mean(self._indicators(grown))))]
            beams[k] = _distinct([*beam, expected])
        return beams

    def _neighbours(self, beams: dict[int, list[DropSet]], k: int) -> list[DropSet]:
        """Unmeasured sets of size k one addition, removal or swap away from the beams."""
        layers = range(self.n)
        near = [*beams[k]]
        near += [s | {i} for s in beams[k - 1] for i in layers if i not in s]
        near += [s - {i} for s in beams.get(k + 1, []) for i in sorted(s)]
        near += [s - {i} | {j} for s in beams[k] for i in sorted(s) for j in layers if j not in s]
        return [s for s in _distinct(near) if s not in self._excess]

    def _indicators(self, sets: list[DropSet]) -> Floats:
        rows = np.zeros((len(sets), self.n))
        for row, chosen in enumerate(sets):
            rows[row, list(chosen)] = 1.0
        return rows


def _noisy(kernel: Kernel, sets: Floats) -> Floats:
    return kernel.between(sets, sets) + (kernel.noise**2 + JITTER) * np.eye(len(sets))


def _distinct(sets: Iterable[DropSet]) -> list[DropSet]:
    return list(dict.fromkeys(sets))
