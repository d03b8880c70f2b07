"""Who plays the game: whole decoder blocks, or the attention and MLP branch of each."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from core.errors import LayerShapError

PlayerKind = Literal["blocks", "sub-blocks"]
PLAYER_KINDS: tuple[PlayerKind, ...] = ("blocks", "sub-blocks")
ATTENTION, MLP = 0, 1
SUFFIXES = ("a", "m")
BRANCH_NAMES = ("attention", "MLP")
_LABEL = re.compile(r"([0-9]{1,9})([am]?)", re.IGNORECASE)


@dataclass(frozen=True)
class Players:
    """The players of a model with `n_layers` blocks, in the order in which the text passes them.

    Of sub-blocks, player 2i is the attention of block i and player 2i + 1 its MLP.
    """

    kind: PlayerKind
    n_layers: int

    @property
    def per_layer(self) -> int:
        """Players of one block: 1, or 2 for sub-blocks."""
        return 2 if self.kind == "sub-blocks" else 1

    @property
    def count(self) -> int:
        return self.per_layer * self.n_layers

    @property
    def noun(self) -> str:
        """What one player is called: "layer", or "part" of a layer."""
        return "part" if self.kind == "sub-blocks" else "layer"

    @property
    def layers(self) -> NDArray[np.int_]:
        """The block of each player, [count]."""
        return np.arange(self.count) // self.per_layer

    @property
    def branches(self) -> NDArray[np.int_]:
        """`ATTENTION` or `MLP` for each sub-block, 0 for every whole block; [count]."""
        return np.arange(self.count) % self.per_layer

    @property
    def depths(self) -> NDArray[np.float64]:
        """Where each player stands, in blocks from the first, [count]."""
        return np.arange(self.count) / self.per_layer

    def label(self, player: int) -> str:
        """Short: "12", "12a" for its attention, "12m" for its MLP."""
        layer, branch = divmod(player, self.per_layer)
        return f"{layer}{SUFFIXES[branch]}" if self.per_layer == 2 else str(layer)

    def name(self, player: int) -> str:
        """In words: "layer 12", "layer 12 attention", "layer 12 MLP"."""
        layer, branch = divmod(player, self.per_layer)
        return f"layer {layer} {BRANCH_NAMES[branch]}" if self.per_layer == 2 else f"layer {layer}"

    def labels(self, players: Iterable[int]) -> str:
        """A set of players as text that `parse` reads; whole layers by their number alone."""
        chosen = sorted(set(players))
        if self.per_layer == 1:
            return ", ".join(map(str, chosen))
        texts = []
        for layer in sorted({player // 2 for player in chosen}):
            there = [player for player in chosen if player // 2 == layer]
            texts.append(str(layer) if len(there) == 2 else self.label(there[0]))
        return ", ".join(texts)

    def parse(self, name: str, text: str) -> tuple[int, ...]:
        """Players from numbers separated by commas or spaces; of sub-blocks, `12` is the whole
        layer, `12a` its attention and `12m` its MLP.

        Raises:
            LayerShapError: something else stands there, or a layer that the model does not have.
        """
        players: list[int] = []
        for part in text.replace(",", " ").split():
            found = _LABEL.fullmatch(part)
            if found is None or (found[2] and self.per_layer == 1):
                example = "3, 7a, 12m" if self.per_layer == 2 else "3, 7, 12"
                raise LayerShapError(
                    f"{name} must be whole numbers separated by commas, such as {example}."
                )
            layer, suffix = int(found[1]), found[2].lower()
            if layer >= self.n_layers:
                raise LayerShapError(
                    f"There is no layer {layer}; this model's layers are 0 to {self.n_layers - 1}."
                )
            if suffix:
                players.append(2 * layer + SUFFIXES.index(suffix))
            else:
                players += self.of_layers([layer])
        return tuple(sorted(set(players)))

    def of_layers(self, layers: Iterable[int]) -> tuple[int, ...]:
        """The players that whole layers consist of."""
        return tuple(
            self.per_layer * layer + part for layer in layers for part in range(self.per_layer)
        )

    def whole_layers(self, players: Collection[int]) -> tuple[int, ...] | None:
        """The layers that these players make up; None where only a part of one is among them."""
        layers = tuple(sorted({int(player) // self.per_layer for player in players}))
        return layers if len(layers) * self.per_layer == len(set(players)) else None


def players_of_mask(length: int, n_layers: int) -> Players:
    """The players that a mask of this length is about.

    Raises:
        LayerShapError: it fits neither whole blocks nor sub-blocks.
    """
    for kind in PLAYER_KINDS:
        players = Players(kind, n_layers)
        if players.count == length:
            return players
    raise LayerShapError(
        f"A mask of {length} players does not fit this model; it must have {n_layers}, one per "
        f"layer, or {2 * n_layers}, for attention and MLP of each."
    )


def parse_cut(name: str, text: str, n_layers: int) -> tuple[Players, tuple[int, ...]]:
    """What a text such as "13, 17" or "12a, 13" drops: the players it is about, and which of them.

    Raises:
        LayerShapError: it cannot be read, or names a layer that the model does not have.
    """
    apart = any(part[-1:].lower() in SUFFIXES for part in text.replace(",", " ").split())
    players = Players("sub-blocks" if apart else "blocks", n_layers)
    return players, players.parse(name, text)
