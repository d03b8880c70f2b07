"""A full model and one cut of it, measured on both texts."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from core.analysis import Analysis
from core.footprint import Footprint, footprint
from core.game import LayerGame
from core.masks import dropped_players
from core.pruning import prune
from core.study import Comparison


def compare_cut(
    calibration: LayerGame,
    held_out: LayerGame,
    keep: NDArray[np.bool_],
    analysis: Analysis | None = None,
    sizes: tuple[Footprint, Footprint] | None = None,
) -> Comparison:
    """Measure one mask, bool [players], against the full model, through the cache.

    With an analysis the comparison also holds what its surrogate predicts for the calibration text.
    `sizes` are the full and the pruned model's, where they are known already.

    Raises:
        LayerShapError: no layers are kept, or the mask has another shape.
    """
    predicted = low = high = None
    if analysis is not None:
        predicted, low, high = (float(value[0]) for value in analysis.predict_perplexity(keep))
    full, pruned = full_and_pruned(calibration, keep)
    held_out_full, held_out_pruned = full_and_pruned(held_out, keep)
    if sizes is None:
        sizes = footprint(calibration.model), footprint(prune(calibration.model, keep))
    return Comparison(
        dropped=dropped_players(keep),
        predicted=predicted,
        predicted_low=low,
        predicted_high=high,
        calibration_full=full,
        calibration_pruned=pruned,
        held_out_full=held_out_full,
        held_out_pruned=held_out_pruned,
        parameters_full=sizes[0].parameters,
        parameters_pruned=sizes[1].parameters,
    )


def full_and_pruned(game: LayerGame, keep: NDArray[np.bool_]) -> tuple[float, float]:
    """Perplexity of the full model and of one mask, bool [players], on a game's text."""
    full, pruned = game.perplexity(np.array([np.ones_like(keep), keep]))
    return float(full), float(pruned)
