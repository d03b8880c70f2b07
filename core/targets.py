"""Find the set to drop for a target: how much may be lost, how much must be saved, what must stay.

The search chooses on calibration text; whether the choice keeps the limit is then measured on
held-out text, which had no part in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from core import selection
from core.baselines import Frontier, finish, measured
from core.clock import Clock
from core.errors import LayerShapError
from core.game import LayerGame
from core.masks import leave_out
from core.resources import Resource, Resources

# Without an amount to save, cuts of up to this share of the layers are looked at.
DEEPEST_SHARE = 0.5
# A share of a resource that falls short of what was asked by less than this is enough.
TOLERANCE = 1e-3


@dataclass(frozen=True)
class Target:
    """What a cut must achieve; at least one of the first two is set.

    Attributes:
        most_rise: share by which perplexity may rise, such as 0.1 for 10 %.
        least_saved: share of `resource` to save, such as 0.2 for 20 %.
        resource: what is to be saved.
        keep: players never to be dropped.
    """

    most_rise: float | None = None
    least_saved: float | None = None
    resource: Resource = "parameters"
    keep: tuple[int, ...] = ()


@dataclass(frozen=True)
class Found:
    """The set for a target, with perplexities of the full and the pruned model, measured.

    `saved` is the share of the target's resource; `evaluations` what the search took.
    """

    dropped: tuple[int, ...]
    saved: float
    calibration: tuple[float, float]
    held_out: tuple[float, float]
    evaluations: int

    @property
    def held_out_rise(self) -> float:
        """Share by which perplexity rises on text that had no part in the choice."""
        full, pruned = self.held_out
        return pruned / full - 1

    def keeps(self, target: Target) -> bool:
        """Whether the limit holds on held-out text too."""
        return target.most_rise is None or self.held_out_rise <= target.most_rise


@dataclass(frozen=True)
class TargetProgress:
    """Where a search is; `found` is set at its end, None too where it was stopped."""

    done: int
    total: int
    seconds_left: float | None
    found: Found | None = None
    stopped: bool = False


def find_set(
    calibration: LayerGame,
    held_out: LayerGame,
    target: Target,
    resources: Resources,
    stop: Callable[[], bool] | None = None,
) -> Iterator[TargetProgress]:
    """Search for the best set; yields after every evaluation, the result last.

    Without a limit on perplexity: of the sets that save enough, the one that costs least. Without
    an amount to save: of the sets within the limit, the one that saves most.

    Raises:
        LayerShapError: the target is empty, impossible, or not reached by any set that was found.
    """
    players = calibration.players
    depth = _deepest(target, resources)
    worth = resources.worth(target.resource)
    droppable = sum(bool(worth[p] > 0) and p not in target.keep for p in range(players.count))
    budget = selection.default_budget(max(1, droppable), depth)
    searching = selection.search(calibration, depth, budget, worth=worth, keep=target.keep)
    clock = Clock()
    total, done = budget + 1, 0
    while True:
        try:
            next(searching)
        except StopIteration as end:
            frontier: Frontier = end.value[-1]
            break
        done = min(done + 1, total)
        yield TargetProgress(done, total, clock.left(total - done))
        if stop and stop():
            yield TargetProgress(done, total, None, stopped=True)
            return
    masks = np.array([leave_out(players.count, ()), *_masks(players.count, frontier)])
    full, *losses = finish(measured(calibration, masks))
    rises = np.expm1(np.array(losses) - full)
    saved = np.array([resources.saved(target.resource, chosen) for chosen in frontier.sets])
    place = _choice(target, rises, saved)
    judged = held_out.perplexity(masks[[0, place + 1]])
    yield TargetProgress(
        total,
        total,
        0.0,
        Found(
            dropped=frontier.sets[place],
            saved=float(saved[place]),
            calibration=(math.exp(full), math.exp(losses[place])),
            held_out=(float(judged[0]), float(judged[1])),
            evaluations=frontier.evaluations[place],
        ),
    )


def _masks(n: int, frontier: Frontier) -> list[np.ndarray]:
    return [leave_out(n, chosen) for chosen in frontier.sets]


def _choice(target: Target, rises: np.ndarray, saved: np.ndarray) -> int:
    """The place of the chosen set among those found, by depth."""
    enough = saved >= (target.least_saved or 0.0) - TOLERANCE
    allowed = rises <= (math.inf if target.most_rise is None else target.most_rise)
    fitting = np.flatnonzero(enough & allowed)
    if len(fitting):
        if target.least_saved is None:
            return int(fitting[np.argmax(saved[fitting])])
        return int(fitting[np.argmin(rises[fitting])])
    if enough.any():
        cheapest = float(rises[enough].min())
        least = f"saves {target.least_saved:.0%}" if target.least_saved else "drops anything"
        raise LayerShapError(
            f"No set that {least} stays within +{target.most_rise:.0%}: the best one found raises "
            f"calibration perplexity by {cheapest:.0%}. Allow more, save less, or keep less."
        )
    raise LayerShapError(
        f"No set found saves {target.least_saved:.0%}; the most is {saved.max():.0%}. Ask for less "
        "or keep less."
    )


def _deepest(target: Target, resources: Resources) -> int:
    """How deep a cut may have to be, in layers' worth."""
    players = resources.players
    if target.most_rise is None and target.least_saved is None:
        raise LayerShapError(
            "Set a target: how much perplexity may rise, how much to save, or both."
        )
    if target.most_rise is not None and not target.most_rise >= 0:
        raise LayerShapError("Perplexity may rise by 0 % or more; a negative limit finds nothing.")
    worth = resources.worth(target.resource)
    if not worth.any():
        raise LayerShapError(f"Dropping anything from this model saves no {target.resource}.")
    if target.least_saved is None:
        free = players.count - len(target.keep)
        return max(1, math.floor(DEEPEST_SHARE * free / players.per_layer))
    free = [player for player in range(players.count) if player not in target.keep]
    reach = resources.saved(target.resource, free)
    if not 0 < target.least_saved < reach + TOLERANCE * bool(target.keep):
        raise LayerShapError(
            f"{target.least_saved:.0%} is to be saved, but choose more than 0 % and less than "
            f"{reach:.0%}, which is what all that may be dropped takes."
        )
    layer = resources.saved(target.resource, range(players.count)) / players.n_layers
    return max(1, min(players.n_layers - 1, math.ceil(target.least_saved / layer - TOLERANCE)))
