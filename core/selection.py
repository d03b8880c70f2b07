"""Choose the layers to drop: search for the best set of every size at once, within a budget.

Bayesian optimisation over sets. A Gaussian process with terms for single layers and for pairs
(stronger between near neighbours) is fitted to every loss measured so far; sets one move away from
the best ones known are scored by the improvement expected of them; the most promising are measured
on the model, and the process learns from them. Measurements so go where good sets live, and what is
learnt at one size serves the others.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve
from scipy.optimize import minimize
from scipy.stats import norm

from core.baselines import Frontier, measured
from core.game import Game
from core.masks import leave_out

Floats = NDArray[np.float64]
Sets = NDArray[np.bool_]
"""Sets of dropped layers, bool [m, n]; the complement of masks."""

METHOD = "LayerShap search"
# Sets that lose more than this many nats are all as bad as each other.
WORST_EXCESS = 3.0
# Sets measured between two fits.
BATCH = 5
# Sets of each size whose neighbours are looked at.
BEAM = 3
FIT_STEPS = 80


@dataclass(frozen=True)
class Kernel:
    """Covariance of the excess losses of two sets, in terms of what both drop.

    `layer`, `pair` and `any_pair` are standard deviations in nats of the cost of one layer, of the
    interaction of neighbours, and of any two layers; `reach` is the distance in layers over which
    interactions of neighbours fade; `noise` is what the rest leaves unexplained.
    """

    layer: float = 0.5
    pair: float = 0.2
    any_pair: float = 0.05
    reach: float = 3.0
    noise: float = 0.05

    def between(self, a: Sets, b: Sets) -> Floats:
        """Covariances [a, b]."""
        a, b = a.astype(float), b.astype(float)
        common = a @ b.T
        values, vectors = np.linalg.eigh(self._nearness(a.shape[1]))
        total = self.layer**2 * common + self.any_pair**2 * common * (common - 1) / 2
        total += self.slope(a)[:, None] * self.slope(b)[None, :]
        for value, vector in zip(values, vectors.T, strict=True):
            total += self.pair**2 * value / 2 * ((a * vector) @ b.T) ** 2
        return total

    def variances(self, a: Sets) -> Floats:
        a = a.astype(float)
        size = a.sum(axis=1)
        near = np.einsum("mi,ij,mj->m", a, self._nearness(a.shape[1]), a)
        return (
            self.layer**2 * size
            + self.any_pair**2 * size * (size - 1) / 2
            + self.slope(a) ** 2
            + self.pair**2 * near / 2
        )

    def slope(self, a: Floats) -> Floats:
        """A cost that all layers share."""
        return self.layer * a.sum(axis=1)

    def _nearness(self, n: int) -> Floats:
        place = np.arange(n)
        return np.exp(-np.abs(place[:, None] - place[None, :]) / self.reach)


class SetProcess:
    """A Gaussian process over sets, fitted by maximum marginal likelihood."""

    def __init__(self, kernel: Kernel, sets: Sets, excess: Floats) -> None:
        self._kernel, self._sets = kernel, sets
        self._factor = cho_factor(_noisy(kernel, sets), lower=True)
        self._weights = cho_solve(self._factor, excess)

    @classmethod
    def fit(cls, sets: Sets, excess: Floats, start: Kernel) -> SetProcess:
        first = np.log(_parameters(start))
        prior = np.log(_parameters(Kernel()))

        def loss(log_parameters: Floats) -> float:
            factor = np.linalg.cholesky(_noisy(Kernel(*np.exp(log_parameters)), sets))
            scaled = np.linalg.solve(factor, excess)
            fit = 0.5 * scaled @ scaled + np.log(np.diag(factor)).sum()
            return float(fit + 0.5 * ((log_parameters - prior) ** 2).sum())

        found = minimize(loss, first, method="Nelder-Mead", options={"maxfev": FIT_STEPS})
        return cls(Kernel(*np.exp(found.x)), sets, excess)

    @property
    def kernel(self) -> Kernel:
        return self._kernel

    def predict(self, sets: Sets) -> tuple[Floats, Floats]:
        """Mean and standard deviation of the excess losses of sets, [m] each."""
        cross = self._kernel.between(sets, self._sets)
        explained = np.einsum("ma,am->m", cross, cho_solve(self._factor, cross.T))
        variances = np.maximum(self._kernel.variances(sets) - explained, 0.0)
        return cross @ self._weights, np.sqrt(variances + self._kernel.noise**2)


def _parameters(kernel: Kernel) -> Floats:
    return np.array([kernel.layer, kernel.pair, kernel.any_pair, kernel.reach, kernel.noise])


def _noisy(kernel: Kernel, sets: Sets) -> Floats:
    return kernel.between(sets, sets) + (kernel.noise**2 + 1e-9) * np.eye(len(sets))


def search(
    game: Game, deepest: int, budget: int, snapshots: tuple[int, ...] = ()
) -> Generator[None, None, list[Frontier]]:
    n = game.n_layers
    [full] = yield from measured(game, np.ones((1, n), dtype=bool))
    known: dict[frozenset[int], float] = {}

    def measure(sets):
        masks = np.array([leave_out(n, s) for s in sets])
        losses = yield from measured(game, masks)
        for s, loss in zip(sets, losses, strict=True):
            known[s] = min(float(loss - full), WORST_EXCESS)

    yield from measure([frozenset((layer,)) for layer in range(n)])
    kernel = Kernel()
    frontiers = []
    waiting = sorted(snapshots) + [budget]
    while True:
        sets = _indicator(list(known), n)
        excess = np.array(list(known.values()))
        process = SetProcess.fit(sets, excess, kernel)
        kernel = process.kernel
        while waiting and len(known) >= waiting[0]:
            waiting.pop(0)
            frontiers.append(_frontier(process, known, deepest, n))
        if not waiting:
            return frontiers
        chosen = _promising(process, known, deepest, n, min(BATCH, waiting[0] - len(known)))
        if not chosen:
            return frontiers
        yield from measure(chosen)


def _indicator(sets, n: int) -> Sets:
    rows = np.zeros((len(sets), n), dtype=bool)
    for row, s in enumerate(sets):
        rows[row, list(s)] = True
    return rows


def _beams(process, known, deepest, n):
    """Per size, the best sets known: measured ones, and the process's own greedy choice."""
    beams = {0: [frozenset()]}
    for k in range(1, deepest + 2):
        made = [s for s in known if len(s) == k]
        made = sorted(made, key=known.get)[:BEAM]
        grown = [s | {i} for s in beams[k - 1] for i in range(n) if i not in s]
        grown = list(dict.fromkeys(grown))
        if grown:
            mean, _ = process.predict(_indicator(grown, n))
            made += [grown[int(np.argmin(mean))]]
        beams[k] = list(dict.fromkeys(made))
    return beams


def _promising(process, known, deepest, n, count):
    beams = _beams(process, known, deepest, n)
    picks = []
    for k in range(2, deepest + 1):
        near = set()
        for s in beams[k - 1]:
            near.update(s | {i} for i in range(n) if i not in s)
        for s in beams.get(k + 1, []):
            near.update(s - {i} for i in s)
        for s in beams[k]:
            near.update((s - {i}) | {j} for i in s for j in range(n) if j not in s)
            near.add(s)
        near = sorted((s for s in near if s not in known), key=sorted)
        if not near:
            continue
        mean, spread = process.predict(_indicator(near, n))
        made = [known[s] for s in known if len(s) == k]
        best = min(made) if made else float((mean + spread).min())
        z = (best - mean) / spread
        gain = spread * (z * norm.cdf(z) + norm.pdf(z))
        at = int(np.argmax(gain))
        picks.append((float(gain[at]), k, near[at]))
    picks.sort(key=lambda p: -p[0])
    return [s for _, _, s in picks[:count]]


def _frontier(process, known, deepest, n):
    beams = _beams(process, known, deepest, n)
    sets = []
    for k in range(1, deepest + 1):
        made = [s for s in known if len(s) == k]
        best = min(made, key=known.get) if made else beams[k][0]
        sets.append(tuple(sorted(best)))
    return Frontier(METHOD, tuple(sets), (len(known),) * deepest)
