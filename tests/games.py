"""Games with known answers; players stand for layers, losses are −log of a positive utility."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import combinations

import numpy as np

from core.players import Players


class TableGame:
    """A game given by a utility function of a bool mask; v(full) should be 1."""

    def __init__(self, n: int, utility: Callable[[np.ndarray], float]) -> None:
        self.players = Players("blocks", n)
        self._utility = utility

    def measure(self, masks: np.ndarray) -> Iterator[tuple[int, float]]:
        for row, mask in enumerate(masks):
            value = self._utility(mask)
            yield row, float(-np.log(value)) if value > 0 else float("inf")

    def losses(self, masks: np.ndarray) -> np.ndarray:
        return np.array([loss for _, loss in self.measure(masks)])

    def perplexity(self, masks: np.ndarray) -> np.ndarray:
        return np.exp(self.losses(masks))


def additive_loss(weights: np.ndarray) -> TableGame:
    """−log v = sum of the dropped layers' weights."""
    return TableGame(len(weights), lambda mask: float(np.exp(-weights[~mask].sum())))


def rugged_game(seed: int, n: int) -> TableGame:
    """Layers with costs, neighbours that stand in for each other, and a rest no model explains."""
    rng = np.random.default_rng(seed)
    weights = rng.exponential(0.2, n)
    pairs = {(i, j): rng.normal(0.0, 0.15) for i in range(n) for j in range(i + 1, min(n, i + 4))}
    noise = rng.normal(0.0, 0.02, 2**n)
    smooth = with_pairs(weights, pairs)
    places = 2 ** np.arange(n)

    def utility(mask: np.ndarray) -> float:
        return smooth._utility(mask) * np.exp(noise[int(places[~mask].sum())] * (not mask.all()))

    return TableGame(n, utility)


def with_pairs(weights: np.ndarray, pairs: dict[tuple[int, int], float]) -> TableGame:
    """As `additive_loss`, and dropping both layers of a pair costs so much more (or less)."""

    def utility(mask: np.ndarray) -> float:
        loss = weights[~mask].sum()
        loss += sum(extra for (i, j), extra in pairs.items() if not mask[i] and not mask[j])
        return float(np.exp(-loss))

    return TableGame(len(weights), utility)


def restricted_contribution(game: TableGame, layer: int, size: int) -> float:
    """φ of one layer at one coalition size, by enumeration."""
    n = game.players.count
    others = [player for player in range(n) if player != layer]
    total = []
    for chosen in combinations(others, size):
        without = np.zeros(n, dtype=bool)
        without[list(chosen)] = True
        with_layer = without.copy()
        with_layer[layer] = True
        total.append(game._utility(with_layer) - game._utility(without))
    return float(np.mean(total))


def restricted_interaction(game: TableGame, i: int, j: int, size: int) -> float:
    """The interaction of two layers at one coalition size, by enumeration."""
    n = game.players.count
    rest = [player for player in range(n) if player not in (i, j)]
    total = []
    for chosen in combinations(rest, size):
        base = np.zeros(n, dtype=bool)
        base[list(chosen)] = True
        values = []
        for added in ((), (i,), (j,), (i, j)):
            mask = base.copy()
            mask[list(added)] = True
            values.append(game._utility(mask))
        total.append(values[3] - values[1] - values[2] + values[0])
    return float(np.mean(total))
