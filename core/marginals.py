"""First and second differences of a surrogate, averaged by coalition size.

A base mask with k layers kept serves every layer and every pair at once: flipping layer i gives its
marginal contribution at size k or k − 1, flipping i and j their interaction at size k, k − 1 or
k − 2. All terms of a difference share one base, so most sampling noise cancels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from core.masks import Masks, sample_masks
from core.strata import Utility, to_utility
from core.surrogate import FittedSurrogate

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class SizeAverages:
    """Averages by coalition size of differences predicted by each member.

    `means` is [members, …, sizes]; `variances` […, sizes] is the sampling variance of the
    members' mean; the middle axes are a layer, or two layers.
    """

    means: Floats
    variances: Floats


def marginal_averages(
    surrogate: FittedSurrogate, n: int, utility: Utility, bases: dict[int, int], seed: int
) -> SizeAverages:
    """Marginal contribution of each layer at sizes 0 … n − 1, [members, n, n].

    `bases` says how many base masks to draw per number of kept layers; a stratum with no more masks
    than that is enumerated.
    """
    totals = _Totals(n, (n,), n)
    flips = np.eye(n, dtype=bool)
    for kept, masks in _bases(n, bases, seed):
        value = _values(surrogate, masks, utility)
        flipped = _values(surrogate, _flipped(masks, flips), utility)
        sign = 1 - 2 * masks.astype(float)
        differences = sign * (flipped.reshape(len(value), len(masks), n) - value[:, :, None])
        totals.add(differences, kept - masks.astype(int))
    return totals.averages()


def interaction_averages(
    surrogate: FittedSurrogate, n: int, utility: Utility, bases: dict[int, int], seed: int
) -> SizeAverages:
    """Interaction of each pair i < j at sizes 0 … n − 2, [members, pairs, n − 1].

    Pairs are in the order of `numpy.triu_indices(n, 1)`.
    """
    first, second = np.triu_indices(n, 1)
    totals = _Totals(n, (len(first),), n - 1)
    single = np.eye(n, dtype=bool)
    double = single[first] | single[second]
    for kept, masks in _bases(n, bases, seed):
        value = _values(surrogate, masks, utility)[:, :, None]
        shape = value.shape[:2]
        one = _values(surrogate, _flipped(masks, single), utility).reshape(*shape, n)
        both = _values(surrogate, _flipped(masks, double), utility).reshape(*shape, len(first))
        sign = 1 - 2 * masks.astype(float)
        differences = (
            sign[:, first] * sign[:, second] * (both - one[:, :, first] - one[:, :, second] + value)
        )
        totals.add(differences, kept - masks[:, first].astype(int) - masks[:, second])
    return totals.averages()


class _Totals:
    """Running sums of differences, by layer (or pair) and coalition size."""

    def __init__(self, n: int, cells: tuple[int, ...], sizes: int) -> None:
        self._cells = cells[0]
        self._sizes = sizes
        self._sums: Floats | None = None
        self._squares = np.zeros(cells[0] * sizes)
        self._counts = np.zeros(cells[0] * sizes)

    def add(self, differences: Floats, sizes: NDArray[np.int_]) -> None:
        """Add differences [members, bases, cells] at coalition sizes [bases, cells]."""
        valid = (sizes >= 0) & (sizes < self._sizes)
        slots = (np.arange(self._cells) * self._sizes + sizes)[valid]
        length = self._cells * self._sizes
        if self._sums is None:
            self._sums = np.zeros((len(differences), length))
        for member, row in enumerate(differences):
            self._sums[member] += np.bincount(slots, row[valid], length)
        self._squares += np.bincount(slots, differences.mean(axis=0)[valid] ** 2, length)
        self._counts += np.bincount(slots, minlength=length)

    def averages(self) -> SizeAverages:
        counts = np.maximum(self._counts, 1)
        assert self._sums is not None
        means = self._sums / counts
        spread = np.maximum(self._squares / counts - means.mean(axis=0) ** 2, 0)
        shape = (self._cells, self._sizes)
        return SizeAverages(means.reshape(len(means), *shape), (spread / counts).reshape(shape))


def _bases(n: int, bases: dict[int, int], seed: int) -> list[tuple[int, Masks]]:
    return [
        (kept, sample_masks(n, (kept,), min(count, math.comb(n, kept)), seed))
        for kept, count in bases.items()
    ]


def _flipped(masks: Masks, flips: Masks) -> Masks:
    """Every mask under every flip: [bases, n] and [flips, n] → [bases · flips, n]."""
    return (masks[:, None, :] ^ flips[None, :, :]).reshape(-1, masks.shape[1])


def _values(surrogate: FittedSurrogate, masks: Masks, utility: Utility) -> Floats:
    return to_utility(surrogate.predict_members(masks), utility)
