"""What a cut drops: the players, the layers of which something stays, and what these skip."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from core.errors import LayerShapError
from core.game import check_masks
from core.models import LayeredModel
from core.players import Players, players_of_mask


@dataclass(frozen=True)
class Cut:
    """What is dropped: `mask` over `players`; the `layers` of which something stays, and of each
    of these the branches that are skipped."""

    players: Players
    mask: NDArray[np.bool_]
    layers: list[int]
    silenced: list[tuple[int, ...]]

    @classmethod
    def of(cls, model: LayeredModel, keep: ArrayLike) -> Cut:
        """The cut that leaves `keep`, bool [n_layers] or [2 n_layers].

        Raises:
            LayerShapError: it is not one mask of the model's players, or keeps nothing.
        """
        mask = one_mask(keep, model.n_layers)
        players = players_of_mask(len(mask), model.n_layers)
        stays = mask.reshape(model.n_layers, players.per_layer)
        layers = [int(layer) for layer in np.flatnonzero(stays.any(axis=1))]
        silenced = [tuple(int(b) for b in np.flatnonzero(~stays[layer])) for layer in layers]
        return cls(players, mask, layers, silenced)

    @property
    def whole(self) -> bool:
        """Whether only whole layers are dropped."""
        return not any(self.silenced)

    def skipping(self, branch: int) -> list[int]:
        """The blocks of the pruned model that skip this branch."""
        return [number for number, skipped in enumerate(self.silenced) if branch in skipped]


def one_mask(keep: ArrayLike, n_layers: int) -> NDArray[np.bool_]:
    """A single mask, bool [n_layers] or [2 n_layers], that keeps something.

    Raises:
        LayerShapError: it is something else.
    """
    length = np.shape(keep)[-1] if np.ndim(keep) else 0
    masks = check_masks(keep, 2 * n_layers if length == 2 * n_layers else n_layers)
    if len(masks) != 1:
        raise LayerShapError(f"There are {len(masks)} masks; a model is pruned by one.")
    if not masks.any():
        raise LayerShapError("No layers are kept; keep at least one.")
    return masks[0]
