"""A cut as a mergekit recipe."""

from __future__ import annotations

from itertools import groupby

import yaml
from numpy.typing import ArrayLike

from core.cut import one_mask
from core.errors import LayerShapError
from core.masks import dropped_players, leave_out
from core.models import ModelInfo
from core.players import players_of_mask


def mergekit_yaml(info: ModelInfo, keep: ArrayLike, location: str | None = None) -> str:
    """A mergekit `passthrough` recipe of the same cut; layer ranges end before their last number.

    Args:
        location: the folder or Hub id to read the model from; by default where it came from.

    Raises:
        LayerShapError: no layer is kept, or only a part of one is dropped.
    """
    mask = one_mask(keep, info.n_layers)
    dropped = players_of_mask(len(mask), info.n_layers).whole_layers(dropped_players(mask))
    if dropped is None:
        raise LayerShapError("mergekit knows whole layers only; save the pruned model instead.")
    mask = leave_out(info.n_layers, dropped)
    runs = [
        [layer for layer, _ in run]
        for kept, run in groupby(enumerate(mask), key=lambda item: bool(item[1]))
        if kept
    ]
    model = location or info.source or info.name
    recipe = {
        "merge_method": "passthrough",
        "dtype": info.dtype,
        "slices": [
            {"sources": [{"model": model, "layer_range": [run[0], run[-1] + 1]}]} for run in runs
        ],
    }
    return yaml.safe_dump(recipe, sort_keys=False, default_flow_style=None, width=200)
