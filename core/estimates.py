"""Everything that follows from measured masks: surrogate, contributions, interactions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from core.contributions import Contributions, estimate_contributions
from core.interactions import Interactions, estimate_interactions
from core.marginals import interaction_averages, marginal_averages
from core.masks import Masks
from core.strata import MeasuredStrata, Utility
from core.surrogate import FittedSurrogate, SurrogateKind, finite_excess, fit_surrogate

# Base masks per number of kept layers, inside the operating range and below it.
MARGINAL_BASES, MARGINAL_BASES_BELOW = 256, 64
PAIR_BASES, PAIR_BASES_BELOW = 32, 8


@dataclass(frozen=True)
class Estimates:
    """Contributions and interactions, over the operating range and over all coalition sizes.

    The operating range is the coalition sizes that the sampled strata cover: what layers are worth
    in models as small as a user may prune to (a semivalue). Over all sizes, contributions are
    Shapley values and interactions the Shapley interaction index.
    """

    utility: Utility
    surrogate: FittedSurrogate
    operating_range: Contributions
    shapley: Contributions
    interactions: Interactions
    shapley_interactions: Interactions


def estimate(
    masks: Masks,
    losses: NDArray[np.float64],
    full_loss: float,
    *,
    strata: Sequence[int],
    utility: Utility = "ratio",
    surrogate: SurrogateKind = "auto",
    seed: int = 0,
) -> Estimates:
    """Estimate contributions and interactions from measured masks.

    Args:
        masks: bool [m, n], distinct, uniform inside each stratum.
        losses: float64 [m], mean NLL in nats, `inf` where not finite.
        full_loss: the full model's.
        strata: numbers of kept layers that the masks were sampled from.
        utility: "ratio" is PPL(full) / PPL(mask), "log" its logarithm.
        surrogate, seed: see `fit_surrogate`.
    """
    n = masks.shape[1]
    excess = losses - full_loss
    partial = ~masks.all(axis=1)
    fitted = fit_surrogate(masks, excess, kind=surrogate, seed=seed)
    measured = MeasuredStrata.of(
        masks[partial],
        finite_excess(excess)[partial],
        fitted.out_of_fold[partial],
        infinite=np.isinf(excess[partial]),
        utility=utility,
    )
    lowest = min((kept for kept in strata if kept < n), default=n - 1)
    lowest_pair = min(lowest, max(n - 2, 0))
    marginals = marginal_averages(
        fitted, n, utility, _bases(n, lowest, MARGINAL_BASES, MARGINAL_BASES_BELOW), seed
    )
    pairs = interaction_averages(
        fitted, n, utility, _bases(n, lowest, PAIR_BASES, PAIR_BASES_BELOW), seed
    )
    return Estimates(
        utility=utility,
        surrogate=fitted,
        operating_range=estimate_contributions(marginals, measured, range(lowest, n)),
        shapley=estimate_contributions(marginals, measured, range(n)),
        interactions=estimate_interactions(pairs, measured, range(lowest_pair, n - 1)),
        shapley_interactions=estimate_interactions(pairs, measured, range(n - 1)),
    )


def _bases(n: int, lowest: int, inside: int, below: int) -> dict[int, int]:
    return {kept: inside if kept >= lowest else below for kept in range(n + 1)}
