"""Measured masks grouped by stratum, and what they say about averages over coalitions.

A marginal contribution at coalition size s is a difference of conditional means over strata,
φᵢ(s) = E[v | |M| = s+1, i ∈ M] − E[v | |M| = s, i ∉ M], and masks are uniform inside a stratum: so
measured masks estimate it without bias. Alone they are noisy; applied to the surrogate's
out-of-fold residuals they correct the surrogate's bias, and their sampling error is the estimate's
(cross-fitting). The conditional means are those of SVARM (arXiv 2302.00736).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from core.masks import Masks

Floats = NDArray[np.float64]
Utility = Literal["ratio", "log"]
UTILITIES: tuple[Utility, ...] = ("ratio", "log")


def to_utility(excess: Floats, utility: Utility) -> Floats:
    """Utility of excess losses in nats: exp(−y), that is PPL(full) / PPL(mask), or −y."""
    return np.exp(-excess) if utility == "ratio" else -excess


@dataclass(frozen=True)
class Stratum:
    """Measured masks that keep `kept` layers.

    `utilities` and `residuals` (measured minus surrogate's out-of-fold prediction) are [c];
    `noise` is the variance of one residual.
    """

    kept: int
    masks: Masks
    utilities: Floats
    residuals: Floats
    noise: float

    @property
    def complete(self) -> bool:
        """Whether every mask of the stratum was measured."""
        return len(self.masks) == math.comb(self.masks.shape[1], self.kept)


@dataclass(frozen=True)
class MeasuredStrata:
    """All measured strata, the full mask among them, of a game of `n` layers."""

    n: int
    utility: Utility
    strata: Mapping[int, Stratum]

    @classmethod
    def of(
        cls,
        masks: Masks,
        excess: Floats,
        out_of_fold: Floats,
        *,
        infinite: NDArray[np.bool_],
        utility: Utility,
    ) -> MeasuredStrata:
        """Group measured masks, bool [m, n], the full mask not among them.

        Args:
            excess: float64 [m] excess losses, finite; `infinite` says where a ceiling stands in.
            out_of_fold: float64 [m], predicted by members that never saw the mask.
        """
        n = masks.shape[1]
        utilities = to_utility(excess, utility)
        if utility == "ratio":
            utilities = np.where(infinite, 0.0, utilities)
        residuals = utilities - to_utility(out_of_fold, utility)
        pooled = float(residuals.var()) if len(residuals) else 0.0
        kept = masks.sum(axis=1)
        full = np.ones((1, n), dtype=bool)
        best = to_utility(np.zeros(1), utility)
        strata = {n: Stratum(n, full, best, np.zeros(1), 0.0)}
        for size in np.unique(kept):
            rows = kept == size
            noise = float(residuals[rows].var(ddof=1)) if rows.sum() > 2 else pooled
            strata[int(size)] = Stratum(
                int(size), masks[rows], utilities[rows], residuals[rows], noise
            )
        return cls(n, utility, strata)

    @property
    def lowest(self) -> int:
        return min(self.strata)

    def complete(self, *sizes: int) -> bool:
        """Whether every mask of all these sizes was measured."""
        return all(size in self.strata and self.strata[size].complete for size in sizes)

    def nearest(self, size: int) -> Stratum | None:
        """The measured stratum that speaks for `size`; None below all measured ones."""
        if size < self.lowest:
            return None
        return self.strata[min(self.strata, key=lambda kept: (abs(kept - size), kept))]


def cell_sums(values: Floats, first: Masks, second: Masks) -> tuple[Floats, Floats]:
    """Sums of `values` [c] and counts over masks where both memberships hold.

    `first` [c, a] and `second` [c, b] → [a, b] each.
    """
    weighted = first.T.astype(float) @ (values[:, None] * second)
    return weighted, first.T.astype(float) @ second.astype(float)


def mean_and_variance(
    sums: Floats, counts: Floats, noise: float, population: int
) -> tuple[Floats, Floats]:
    """Means of residuals and the variances of those means, for cells of one stratum.

    Sampling is without replacement, so a cell measured whole has no variance; an empty cell has no
    mean to offer, and one residual's variance.
    """
    means = np.divide(sums, counts, out=np.zeros_like(sums), where=counts > 0)
    left = np.clip((population - counts) / max(population - 1, 1), 0.0, 1.0)
    variances = np.where(counts > 0, noise / np.maximum(counts, 1) * left, noise)
    return means, variances


def shrink(corrections: Floats, variances: Floats) -> tuple[Floats, Floats]:
    """How much of each correction to believe, and the variance that remains.

    Empirical Bayes: corrections of all layers (or pairs) share a true spread τ², estimated by what
    their spread exceeds their noise. Exact corrections are believed whole, pure noise not at all.
    """
    spread = max(0.0, float(np.mean(corrections**2) - np.mean(variances)))
    total = spread + variances
    weights = np.divide(spread, total, out=np.ones_like(total), where=total > 0)
    return weights, weights * variances


def jackknife_variance(members: Sequence[Floats] | Floats, folds: int) -> Floats:
    """Variance of the mean over members trained with one of `folds` folds left out each.

    The delete-a-group jackknife: (folds − 1) times the members' spread.
    """
    return (folds - 1) * np.var(np.asarray(members), axis=0)
