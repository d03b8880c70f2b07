"""Masks: strata by number of players kept, and stratified Monte Carlo sampling.

A mask is a bool row of length n, True where the player is kept: a layer, or a part of one. A
stratum is the set of masks that keep exactly k players (Hamming weight k).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from core.errors import LayerShapError

Masks = NDArray[np.bool_]

# The paper's strata for 32 layers (arXiv 2602.07804, section 4).
PUBLISHED_KEPT = (30, 27, 24, 21, 18)
PUBLISHED_LAYERS = 32
# By default, masks drop up to this share of the layers: past it the models we measured are noise.
OPERATING_DEPTH = 0.4
# A stratum of at most this many masks is enumerated and shuffled, not drawn from.
ENUMERATION_LIMIT = 4096


def default_strata(n: int) -> tuple[int, ...]:
    """Every number of kept layers from n - 1 down to about 60 % of the depth.

    Adjacent strata let the marginal contribution at each coalition size be measured, not
    interpolated; the first stratum, n - 1, is leave-one-out.
    """
    deepest = max(1, round(OPERATING_DEPTH * n))
    return tuple(n - dropped for dropped in range(1, deepest + 1))


def published_strata(n: int) -> tuple[int, ...]:
    """The paper's strata, scaled from 32 layers to n."""
    kept = (round(k * n / PUBLISHED_LAYERS) for k in PUBLISHED_KEPT)
    return tuple(sorted({min(max(k, 0), n - 1) for k in kept}, reverse=True))


def check_strata(n: int, strata: Sequence[int]) -> tuple[int, ...]:
    """Validate numbers of kept layers; return them distinct and descending.

    Raises:
        LayerShapError: none given, or one outside 0 … n.
    """
    if not strata:
        raise LayerShapError("No strata given; name at least one number of layers to keep.")
    for kept in strata:
        if not 0 <= kept <= n:
            raise LayerShapError(
                f"A stratum keeps {kept} layers, but this model has {n}; "
                f"choose numbers from 0 to {n}."
            )
    return tuple(sorted({int(kept) for kept in strata}, reverse=True))


def stratum_counts(n: int, strata: Sequence[int], count: int) -> dict[int, int]:
    """Masks per stratum: equal shares, except that a stratum never gives more than it holds.

    What small strata cannot use goes to the others; the sum is `count` where the strata hold
    that many masks.
    """
    room = {kept: math.comb(n, kept) for kept in strata}
    counts = dict.fromkeys(strata, 0)
    left = count
    while left:
        open_strata = [kept for kept in strata if counts[kept] < room[kept]]
        if not open_strata:
            break
        share, extra = divmod(left, len(open_strata))
        for position, kept in enumerate(open_strata):
            given = min(share + (position < extra), room[kept] - counts[kept])
            counts[kept] += given
            left -= given
    return counts


def sample_masks(n: int, strata: Sequence[int], count: int, seed: int) -> Masks:
    """Distinct masks, uniform over each stratum, the strata interleaved.

    Each stratum has its own random sequence, so the masks of a smaller `count` are a prefix, per
    stratum, of those of a larger one: asking for more costs only the new ones.

    Returns:
        bool [m, n]; m < count only where the strata hold fewer distinct masks.

    Raises:
        LayerShapError: strata out of range, or a count below 1.
    """
    if count < 1:
        raise LayerShapError(f"evaluations is {count}; it must be at least 1.")
    kept_counts = check_strata(n, strata)
    counts = stratum_counts(n, kept_counts, count)
    drawn = {kept: _draw(n, kept, counts[kept], seed) for kept in kept_counts}
    # Interleaving spreads every prefix of the result evenly over the strata.
    order = sorted(
        ((row + 0.5) / counts[kept], -kept, kept, row)
        for kept in kept_counts
        for row in range(counts[kept])
    )
    return np.array([drawn[kept][row] for *_, kept, row in order], dtype=bool).reshape(-1, n)


def leave_out(n: int, dropped: Iterable[int]) -> NDArray[np.bool_]:
    """The mask, bool [n], that drops the given layers.

    Raises:
        LayerShapError: a layer number outside 0 … n - 1.
    """
    mask = np.ones(n, dtype=bool)
    for layer in dropped:
        if not 0 <= layer < n:
            raise LayerShapError(
                f"There is no layer {layer}; this model's layers are 0 to {n - 1}."
            )
        mask[layer] = False
    return mask


def dropped_players(mask: NDArray[np.bool_]) -> tuple[int, ...]:
    """The players that a mask drops, ascending."""
    return tuple(int(player) for player in np.flatnonzero(~np.asarray(mask, dtype=bool)))


def all_masks(n: int) -> Masks:
    """Every mask of n layers, bool [2ⁿ, n]."""
    return (np.arange(2**n)[:, None] >> np.arange(n) & 1).astype(bool)


def mask_key(mask: NDArray[np.bool_]) -> str:
    """A mask as a string of 0 and 1, layer 0 first."""
    return "".join("1" if kept else "0" for kept in mask)


def _draw(n: int, kept: int, count: int, seed: int) -> Masks:
    rng = np.random.default_rng([seed, n, kept])
    total = math.comb(n, kept)
    if total <= ENUMERATION_LIMIT:
        return _enumerate(n, kept)[rng.permutation(total)[:count]]
    seen: dict[bytes, NDArray[np.bool_]] = {}
    while len(seen) < count:
        mask = np.zeros(n, dtype=bool)
        mask[rng.choice(n, size=kept, replace=False)] = True
        seen.setdefault(mask.tobytes(), mask)
    return np.array(list(seen.values()), dtype=bool).reshape(-1, n)


def _enumerate(n: int, kept: int) -> Masks:
    rows = list(itertools.combinations(range(n), kept))
    masks = np.zeros((len(rows), n), dtype=bool)
    for row, layers in enumerate(rows):
        masks[row, list(layers)] = True
    return masks
