"""How pairs of layers depend on one another."""

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


@dataclass(frozen=True)
class Interactions:
    """Pairwise interactions, [n, n], symmetric with a zero diagonal, in units of utility.

    Positive: the two layers need each other. Negative: they stand in for each other, so dropping
    both costs more than the sum of the parts.
    """

    values: Floats
    errors: Floats
    sizes: NDArray[np.int_]


def estimate_interactions(
    averages: SizeAverages, measured: MeasuredStrata, sizes: Sequence[int]
) -> Interactions:
    """Average I(i, j) = E[v(S∪{i,j}) − v(S∪{i}) − v(S∪{j}) + v(S)] over coalition sizes.

    Over all sizes 0 … n − 2 this is the Shapley interaction index (Grabisch and Roubens 1999),
    whose weights are uniform over sizes and, inside a size, over coalitions.

    Args:
        averages: the surrogate's interactions of pairs i < j at sizes 0 … n − 2.
        measured: what was measured, to correct the surrogate and to replace it where complete.
    """
    n = measured.n
    chosen = np.array(sizes, dtype=int)
    first, second = np.triu_indices(n, 1)
    if not len(first):
        return Interactions(np.zeros((n, n)), np.zeros((n, n)), chosen)
    members = averages.means[:, :, chosen].copy()
    sampling = averages.variances[:, chosen].copy()
    corrections, noise = np.zeros(sampling.shape), np.zeros(sampling.shape)
    for column, size in enumerate(sizes):
        exact = measured.complete(size, size + 1, size + 2)
        total, variance = _pattern_difference(measured, size, exact=exact)
        if exact:
            members[:, :, column] = total[first, second]
            sampling[:, column] = 0
        else:
            corrections[:, column] = total[first, second]
            noise[:, column] = variance[first, second]
    count = len(chosen)
    correction, correction_noise = corrections.mean(axis=1), noise.sum(axis=1) / count**2
    weights, remaining = shrink(correction, correction_noise)
    over_sizes = members.mean(axis=2)
    values = over_sizes.mean(axis=0) + weights * correction
    variance = jackknife_variance(over_sizes, FOLDS) + sampling.sum(axis=1) / count**2 + remaining
    return Interactions(
        _symmetric(n, values, first, second),
        _symmetric(n, np.sqrt(variance), first, second),
        chosen,
    )


def _pattern_difference(
    measured: MeasuredStrata, size: int, *, exact: bool
) -> tuple[Floats, Floats]:
    """E[both in] − E[i only] − E[j only] + E[neither] over the three strata, [n, n] each.

    Of the utilities where all three were measured whole (`exact`), else of the residuals.
    """
    n = measured.n
    total, variance = np.zeros((n, n)), np.zeros((n, n))
    for layers_in, sign in ((2, 1.0), (1, -1.0), (0, 1.0)):
        stratum = measured.nearest(size + layers_in)
        if stratum is None:
            continue
        rows = stratum.masks
        values = stratum.utilities if exact else stratum.residuals
        sums, counts = cell_sums(
            values, rows if layers_in else ~rows, rows if layers_in == 2 else ~rows
        )
        population = math.comb(n - 2, stratum.kept - layers_in) if stratum.kept >= layers_in else 0
        means, variances = mean_and_variance(sums, counts, stratum.noise, population)
        if layers_in == 1:
            means, variances = means + means.T, variances + variances.T
        total += sign * means
        variance += variances
    return total, variance


def _symmetric(n: int, values: Floats, first: NDArray[np.int_], second: NDArray[np.int_]) -> Floats:
    matrix = np.zeros((n, n))
    matrix[first, second] = matrix[second, first] = values
    return matrix
