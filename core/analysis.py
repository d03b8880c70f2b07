"""One run from settings to result: sample masks, measure them, estimate; with progress and stop.

Measuring goes in rounds that double in size. A round's masks are evaluated in the order that
shares most work, so only whole rounds are a fair sample: estimates are made between rounds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike, NDArray

from core.clock import Clock
from core.errors import LayerShapError
from core.estimates import Estimates, Utility, estimate
from core.game import Game, check_masks
from core.masks import (
    Masks,
    check_strata,
    default_strata,
    published_strata,
    sample_masks,
)
from core.players import Players
from core.strata import UTILITIES
from core.surrogate import KINDS, FittedSurrogate, SurrogateKind

FIRST_ROUND = 16
# Partial estimates take at most about a quarter of the time.
PARTIAL_REST = 3.0
PARTIAL_EVERY_SECONDS = 5.0
PUBLISHED_EVALUATIONS = 8000
MAX_SEED = 2**63 - 1


@dataclass(frozen=True)
class AnalysisSettings:
    """What an analysis measures and how it estimates.

    Attributes:
        evaluations: layer masks to measure, besides the full model.
        seed: of sampling and estimation; the same seed gives the same result.
        strata: numbers of kept layers to sample; None scales them to the model's depth.
        utility: "ratio" is PPL(full) / PPL(mask), "log" is its logarithm.
        surrogate: which model of the losses to train; "auto" picks by cross-validated score.
    """

    evaluations: int = 512
    seed: int = 0
    strata: tuple[int, ...] | None = None
    utility: Utility = "ratio"
    surrogate: SurrogateKind = "auto"

    @classmethod
    def published(cls, n: int) -> AnalysisSettings:
        """The paper's settings, strata scaled to n layers (arXiv 2602.07804, section 4)."""
        return cls(PUBLISHED_EVALUATIONS, strata=published_strata(n), surrogate="published")

    def resolved(self, n: int) -> AnalysisSettings:
        """These settings with the strata spelled out for n layers.

        Raises:
            LayerShapError: a setting is out of range.
        """
        if self.evaluations < 1:
            raise LayerShapError(f"evaluations is {self.evaluations}; it must be at least 1.")
        if not 0 <= self.seed <= MAX_SEED:
            raise LayerShapError(f"seed is {self.seed}; it must be 0 or more, below 2^63.")
        for name, value, allowed in (
            ("utility", self.utility, UTILITIES),
            ("surrogate", self.surrogate, KINDS),
        ):
            if value not in allowed:
                raise LayerShapError(f"{name} is {value!r}; choose one of {', '.join(allowed)}.")
        strata = default_strata(n) if self.strata is None else check_strata(n, self.strata)
        return replace(self, strata=strata)


@dataclass(frozen=True)
class Analysis:
    """Measured masks and what follows from them.

    Attributes:
        settings: as resolved for this game.
        players: what the columns of the masks stand for.
        masks: bool [m, n], distinct; the full mask is not among them unless it was sampled.
        losses: float64 [m], mean NLL in nats, `inf` where not finite.
        full_loss: mean NLL of the unpruned model, nats.
        estimates: surrogate, contributions and interactions.
        planned: masks that the settings ask for; more than m after a stop.
    """

    settings: AnalysisSettings
    players: Players
    masks: Masks
    losses: NDArray[np.float64]
    full_loss: float
    estimates: Estimates
    planned: int

    @property
    def n_players(self) -> int:
        return self.masks.shape[1]

    @property
    def complete(self) -> bool:
        return len(self.masks) >= self.planned

    @property
    def contributions(self) -> NDArray[np.float64]:
        """Operating-range contribution of each layer, [n], in units of utility."""
        return self.estimates.operating_range.values

    @property
    def intervals(self) -> NDArray[np.float64]:
        """95 % intervals of the contributions, [n, 2]."""
        return self.estimates.operating_range.intervals

    @property
    def interactions(self) -> NDArray[np.float64]:
        """Operating-range pairwise interactions, [n, n], symmetric with a zero diagonal."""
        return self.estimates.interactions.values

    @property
    def surrogate(self) -> FittedSurrogate:
        return self.estimates.surrogate

    @property
    def values(self) -> NDArray[np.float64]:
        """Measured utility PPL(full) / PPL(mask), [m]; 0 where the loss is not finite."""
        return np.exp(self.full_loss - self.losses)

    def predict_perplexity(
        self, masks: ArrayLike
    ) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """Predicted calibration perplexity of masks bool [m, n]: (estimate, low, high), each [m].

        About 90 % of unseen masks with a similar prediction fell between low and high. None is
        below 1, the perplexity of who knows every word.
        """
        excess = self.surrogate.predict(check_masks(masks, self.n_players))
        loss, half = self.full_loss + excess, self.surrogate.halfwidth(excess)
        predicted, low, high = np.exp(np.maximum((loss, loss - half, loss + half), 0.0))
        return predicted, low, high

    def separated_pairs(self) -> float:
        """Share of layer pairs whose 95 % intervals do not overlap."""
        low, high = self.intervals.T
        first, second = np.triu_indices(self.n_players, 1)
        if not len(first):
            return 1.0
        apart = (low[first] > high[second]) | (low[second] > high[first])
        return float(apart.mean())

    def verdict(self) -> str:
        """In plain words, whether the ranking can be trusted yet."""
        quality = self.surrogate.quality
        told_apart = (
            f"{self.separated_pairs():.0%} of {self.players.noun} pairs have intervals that do not "
            "touch"
        )
        seen = (
            f"On {quality.count} masks it never saw, the surrogate's order agrees with the "
            f"measured one at Spearman {quality.spearman:.2f} (R² {quality.r2:.2f}); {told_apart}."
        )
        if len(self.masks) >= 2**self.n_players - 1:
            return "Exact: every subset was measured, so nothing here is estimated."
        if not np.isfinite(quality.spearman):
            return "Too few evaluations to judge the surrogate yet: run more."
        if quality.spearman >= 0.9 and quality.r2 >= 0.7:
            return f"Trust the ranking, but not differences inside overlapping intervals. {seen}"
        if quality.spearman >= 0.7:
            return f"Take the ranking as a rough guide; more evaluations will sharpen it. {seen}"
        return f"Do not trust the ranking yet: run more evaluations. {seen}"


@dataclass(frozen=True)
class AnalysisProgress:
    """Where a run is; `analysis` is set when there is a new result, partial or final."""

    stage: str
    done: int
    total: int
    seconds_left: float | None
    analysis: Analysis | None = None


def analyze(
    game: Game,
    evaluations: int = 512,
    seed: int = 0,
    *,
    strata: Sequence[int] | None = None,
    utility: Utility = "ratio",
    surrogate: SurrogateKind = "auto",
    on_progress: Callable[[AnalysisProgress], None] | None = None,
    stop: Callable[[], bool] | None = None,
) -> Analysis:
    """Measure masks of a game and estimate contributions and interactions.

    Args:
        game: a LayerGame, or anything with `players` and `measure`.
        evaluations, seed, strata, utility, surrogate: see `AnalysisSettings`.
        on_progress: told of every evaluation and of every partial result.
        stop: asked after every evaluation; True ends the run with what was measured.

    Raises:
        LayerShapError: a setting is out of range, or the run was stopped before its first round.
    """
    chosen = AnalysisSettings(
        evaluations, seed, None if strata is None else tuple(strata), utility, surrogate
    )
    analysis = None
    for progress in run(game, chosen, stop, partial=on_progress is not None):
        analysis = progress.analysis or analysis
        if on_progress:
            on_progress(progress)
    if analysis is None:
        raise LayerShapError(
            "The analysis was stopped before enough masks were measured; what was measured is "
            "kept, so running it again goes on from there."
        )
    return analysis


def run(
    game: Game,
    settings: AnalysisSettings,
    stop: Callable[[], bool] | None = None,
    *,
    partial: bool = True,
) -> Iterator[AnalysisProgress]:
    """The streaming form of `analyze`: yields after every evaluation and every estimate.

    After a stop the last yield holds the result of the rounds measured so far, if any.
    """
    n = game.players.count
    settings = settings.resolved(n)
    masks = sample_masks(n, settings.strata, settings.evaluations, settings.seed)
    total = len(masks)
    stopped = stop or (lambda: False)
    clock = Clock()
    yield AnalysisProgress("Measuring the full model", 0, total, None)
    [(_, full_loss)] = game.measure(np.ones((1, n), dtype=bool))
    if not np.isfinite(full_loss):
        raise LayerShapError(
            "The unpruned model's own loss on this text is not finite, so nothing can be compared "
            "with it; try float32, or other text."
        )
    losses = np.full(total, np.nan)
    last_estimate, estimate_seconds = time.monotonic(), 0.0
    for first, last in pairwise(_round_ends(total)):
        for row, loss in game.measure(masks[first:last]):
            losses[first + row] = loss
            done = int((~np.isnan(losses)).sum())
            yield AnalysisProgress("Measuring layer masks", done, total, clock.left(total - done))
            if stopped():
                break
        rest = time.monotonic() - last_estimate
        due = rest >= max(PARTIAL_EVERY_SECONDS, PARTIAL_REST * estimate_seconds)
        measured = ~np.isnan(losses)
        done = int(measured.sum())
        final = done == total or stopped()
        if done and (final or (partial and due)):
            # After a stop in mid-round, the whole rounds before it hold at least half of what was
            # measured and are a fair sample; the rest waits in the cache for the next run.
            used = measured if first == 0 or measured[first:last].all() else np.arange(first)
            yield AnalysisProgress("Estimating contributions", done, total, None)
            started = time.monotonic()
            result = _estimated(settings, game.players, masks[used], losses[used], full_loss, total)
            last_estimate = time.monotonic()
            estimate_seconds = last_estimate - started
            stage = "Partial result" if not final else "Done" if done == total else "Stopped"
            yield AnalysisProgress(stage, done, total, 0.0 if final else None, result)
            clock.restart()
        if final:
            return


def from_measurements(
    settings: AnalysisSettings,
    players: Players,
    masks: Masks,
    losses: NDArray[np.float64],
    full_loss: float,
    planned: int,
) -> Analysis:
    """Estimate from masks measured earlier, as a saved study holds them."""
    resolved = settings.resolved(players.count)
    return _estimated(resolved, players, masks, losses, full_loss, planned)


def _estimated(
    settings: AnalysisSettings,
    players: Players,
    masks: Masks,
    losses: NDArray[np.float64],
    full_loss: float,
    planned: int,
) -> Analysis:
    estimates = estimate(
        masks,
        losses,
        full_loss,
        strata=settings.strata,
        utility=settings.utility,
        surrogate=settings.surrogate,
        seed=settings.seed,
    )
    return Analysis(settings, players, masks, losses, full_loss, estimates, planned)


def _round_ends(total: int) -> list[int]:
    ends = [0]
    size = FIRST_ROUND
    while ends[-1] < total:
        ends.append(min(ends[-1] + size, total))
        size = max(size, ends[-1])
    return ends
