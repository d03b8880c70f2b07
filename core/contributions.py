"""What each layer is worth: marginal contributions by coalition size, and their averages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from core.marginals import SizeAverages
from core.strata import MeasuredStrata, cell_sums, jackknife_variance, mean_and_variance, shrink
from core.surrogate import FOLDS

Floats = NDArray[np.float64]
Z_95 = 1.96


@dataclass(frozen=True)
class Contributions:
    """Contributions of n layers, averaged over coalition sizes.

    Attributes:
        values: [n], the plain mean over `sizes` of the contributions by size, in units of utility.
        errors: [n], standard errors.
        sizes: [S], coalition sizes |S|, counted without the layer itself.
        by_size: [n, S], φᵢ(s) = E over |S| = s, i ∉ S, of v(S ∪ {i}) − v(S).
        by_size_errors: [n, S].
        extrapolated: whether some sizes lie below every measured stratum.
    """

    values: Floats
    errors: Floats
    sizes: NDArray[np.int_]
    by_size: Floats
    by_size_errors: Floats
    extrapolated: bool

    @property
    def intervals(self) -> Floats:
        """95 % intervals of the values, [n, 2]."""
        return self.values[:, None] + Z_95 * np.array([-1.0, 1.0]) * self.errors[:, None]


def estimate_contributions(
    averages: SizeAverages, measured: MeasuredStrata, sizes: Sequence[int]
) -> Contributions:
    """Average marginal contributions over coalition sizes.

    Over all sizes 0 … n − 1 the values are Shapley values (Shapley 1953); over fewer they are a
    semivalue restricted to those sizes.

    Args:
        averages: the surrogate's marginal contributions at sizes 0 … n − 1.
        measured: what was measured, to correct the surrogate and to replace it where complete.
    """
    chosen = np.array(sizes)
    members = averages.means[:, :, chosen].copy()
    sampling = averages.variances[:, chosen].copy()
    corrections, noise = np.zeros(sampling.shape), np.zeros(sampling.shape)
    for column, size in enumerate(sizes):
        if measured.complete(size, size + 1):
            members[:, :, column] = _direct(measured, size)
            sampling[:, column] = 0
        else:
            corrections[:, column], noise[:, column] = _correction(measured, size)
    count = len(chosen)
    weights, remaining = shrink(corrections.mean(axis=1), noise.sum(axis=1) / count**2)
    by_size = members.mean(axis=0) + weights[:, None] * corrections
    by_size_variance = jackknife_variance(members, FOLDS) + sampling + weights[:, None] ** 2 * noise
    variance = (
        jackknife_variance(members.mean(axis=2), FOLDS)
        + sampling.sum(axis=1) / count**2
        + remaining
    )
    by_size += _efficiency_share(measured, sizes, by_size, variance)[:, None]
    return Contributions(
        values=by_size.mean(axis=1),
        errors=np.sqrt(variance),
        sizes=chosen,
        by_size=by_size,
        by_size_errors=np.sqrt(by_size_variance),
        extrapolated=bool(chosen.min() < measured.lowest),
    )


def _efficiency_share(
    measured: MeasuredStrata, sizes: Sequence[int], by_size: Floats, variance: Floats
) -> Floats:
    """What to add to each layer so that the values sum to v(N) − v(∅), [n].

    The Shapley value is efficient; where the empty coalition was measured, the sum is known, and
    the least-squares correction gives each layer of the gap as much as it has of the variance.
    """
    total = variance.sum()
    if len(sizes) < measured.n or not measured.complete(0) or total == 0:
        return np.zeros(measured.n)
    worth = measured.strata[measured.n].utilities[0] - measured.strata[0].utilities[0]
    return (worth - by_size.mean(axis=1).sum()) * variance / total


def _direct(measured: MeasuredStrata, size: int) -> Floats:
    """φᵢ(size) from two strata measured whole, [n]."""
    upper, lower = measured.strata[size + 1], measured.strata[size]
    everywhere = np.ones((len(upper.masks), 1), dtype=bool)
    with_i, with_count = cell_sums(upper.utilities, upper.masks, everywhere)
    everywhere = np.ones((len(lower.masks), 1), dtype=bool)
    without_i, without_count = cell_sums(lower.utilities, ~lower.masks, everywhere)
    return (with_i / with_count - without_i / without_count)[:, 0]


def _correction(measured: MeasuredStrata, size: int) -> tuple[Floats, Floats]:
    """Mean residuals' difference at a size, and its variance, [n] each."""
    n = measured.n
    total, variance = np.zeros(n), np.zeros(n)
    for kept, with_layer in ((size + 1, True), (size, False)):
        stratum = measured.nearest(kept)
        if stratum is None:
            continue
        member = stratum.masks if with_layer else ~stratum.masks
        everywhere = np.ones((len(member), 1), dtype=bool)
        sums, counts = cell_sums(stratum.residuals, member, everywhere)
        population = math.comb(n - 1, stratum.kept - with_layer)
        means, variances = mean_and_variance(sums, counts, stratum.noise, population)
        total += means[:, 0] if with_layer else -means[:, 0]
        variance += variances[:, 0]
    return total, variance
