"""What dropping each player saves: parameters, key/value cache, and time to write a token."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from core.footprint import cache_bytes_by_layer, footprint, measure_speeds
from core.models import LayeredModel
from core.players import ATTENTION, MLP, Players
from core.pruning import prune

Floats = NDArray[np.float64]
Resource = Literal["parameters", "cache", "time"]
RESOURCES: tuple[Resource, ...] = ("parameters", "cache", "time")
# Runs of which the fastest counts, and tokens written in each: what else a machine does can only
# slow a run down.
REPEATS, WRITTEN_TOKENS = 6, 24


@dataclass(frozen=True)
class Resources:
    """Savings by player, as shares of what the whole model takes.

    Attributes:
        players: whose savings these are.
        parameters: share of all the model's parameters, [players].
        cache: share of the key/value cache per token, [players]; zeros where a model has none.
        time: share of the time to write one token, [players]; measured on models that skip half of
            the attentions, or half of the MLPs, and spread evenly over the layers.
    """

    players: Players
    parameters: Floats
    cache: Floats
    time: Floats

    def saved(self, resource: Resource, dropped: Iterable[int]) -> float:
        """The share of a resource that a set of dropped players saves, 0 to 1."""
        return float(self._of(resource)[list(dropped)].sum())

    def worth(self, resource: Resource) -> Floats:
        """What dropping each player saves, in whole layers' worth, [players]."""
        savings = self._of(resource)
        layer = savings.sum() / self.players.n_layers
        return savings / layer if layer else savings

    def _of(self, resource: Resource) -> Floats:
        return getattr(self, resource)


def measure_resources(model: LayeredModel, players: Players) -> Resources:
    """Count a model's parameters and cache by player, and time its parts on this machine.

    Raises:
        LayerShapError: its blocks have no such players.
    """
    parameters = np.array(model.player_parameters(players.kind), dtype=float)
    by_layer = np.array(cache_bytes_by_layer(model), dtype=float)
    if len(by_layer) != model.n_layers:
        by_layer = np.zeros(model.n_layers)
    cache = np.where(players.branches == ATTENTION, by_layer[players.layers], 0.0)
    return Resources(
        players=players,
        parameters=parameters / footprint(model).parameters,
        cache=cache / (by_layer.sum() or 1.0),
        time=_times(model, players),
    )


def _times(model: LayeredModel, players: Players) -> Floats:
    """Share of the time to write a token that each player takes, [players]."""
    cuts = [np.ones(players.count, dtype=bool)]
    for branch in np.unique(players.branches):
        keep = cuts[0].copy()
        # Every second layer, so that what differs with depth falls on both halves.
        keep[(players.branches == branch) & (players.layers % 2 == 1)] = False
        cuts.append(keep)
    speeds = measure_speeds(
        [model if cut.all() else prune(model, cut) for cut in cuts],
        prompt_tokens=64,
        new_tokens=WRITTEN_TOKENS,
        repeats=REPEATS,
    )
    full, *reduced = (1 / speed.decode for speed in speeds)
    dropped = max(1, model.n_layers // 2)
    shares = {
        branch: max(0.0, (full - seconds) / full / dropped)
        for branch, seconds in zip((ATTENTION, MLP), reduced, strict=False)
    }
    return np.array([shares[branch] for branch in players.branches])
