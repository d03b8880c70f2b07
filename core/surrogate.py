"""Learn the loss of any layer mask from the measured ones.

A surrogate predicts the excess loss y(m) = loss(m) − loss(full), in nats, so that the utility
PPL(full) / PPL(m) is exp(−y). Members are trained on cross-validation folds: every measured mask
has a prediction by members that never saw it, which gives the surrogate's honest quality and the
residuals that correct its bias; the spread of the members gives its uncertainty.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import spearmanr
from torch import Tensor
from torch.nn.functional import celu

from core.errors import check_one_of
from core.masks import Masks

Floats = NDArray[np.float64]
SurrogateKind = Literal["auto", "ensemble", "ridge", "published"]
KINDS = ("auto", "ensemble", "ridge", "published")

FOLDS = 5
REPEATS = 2
# A mask whose loss is not finite counts as this many nats worse than the worst finite one.
CEILING_MARGIN = math.log(10)
# Masks are weighted by v^0.5 + 0.02: the good ones matter for the choice, the bad ones still count.
WEIGHT_POWER, WEIGHT_FLOOR = 0.5, 0.02
# Chosen by out-of-fold score on measured masks of a 30-layer model, 64 to 640 of them.
RIDGE_PENALTY = 1.0
STEPS, LEARNING_RATE, WEIGHT_DECAY = 300, 0.02, 1.0
INITIAL_OUTPUT_SCALE = 0.1
# The paper's training schedule (arXiv 2602.07804, section 4).
PUBLISHED_EPOCHS, PUBLISHED_RATE, PUBLISHED_BATCH = 300, 0.008, 300
PUBLISHED_DECAY_EPOCHS, PUBLISHED_MOMENTUM = 100, 0.9
# Predictions are made this many masks at a time, to bound memory.
CHUNK = 16_384
INTERVAL_COVERAGE = 0.9
INTERVAL_NEIGHBOURS = 40
MIN_MASKS_TO_SCORE = 3


@dataclass(frozen=True)
class SurrogateQuality:
    """Agreement of predicted and measured utility on `count` masks never seen in training.

    NaN where there are too few masks, or none that differ.
    """

    r2: float
    spearman: float
    mean_absolute_error: float
    count: int


class _Predictor(Protocol):
    def excess(self, masks: Tensor) -> Tensor:
        """bool [m, n] as float64 0/1 → excess loss [members, m]."""
        ...


@dataclass(frozen=True)
class FittedSurrogate:
    """A trained surrogate.

    Attributes:
        kind: what it is ("ensemble", "ridge" or "published"), also where "auto" was asked for.
        out_of_fold: float64 [m], predicted excess loss of each training mask by members that never
            saw it.
        measured: float64 [m], the excess losses learnt, with a finite ceiling.
        quality: on all training masks, out of fold.
        quality_by_stratum: the same per number of kept layers.
        candidates: quality of every kind that was compared.
    """

    kind: str
    out_of_fold: Floats
    measured: Floats
    quality: SurrogateQuality
    quality_by_stratum: Mapping[int, SurrogateQuality]
    candidates: Mapping[str, SurrogateQuality]
    _predictor: _Predictor
    _floor: float

    def predict_members(self, masks: Masks) -> Floats:
        """Excess loss in nats by each member, bool [m, n] → float64 [members, m]."""
        parts = [
            self._predictor.excess(torch.from_numpy(masks[first : first + CHUNK].astype(float)))
            for first in range(0, max(len(masks), 1), CHUNK)
        ]
        return torch.cat(parts, dim=1).clamp(min=self._floor).numpy()

    def predict(self, masks: Masks) -> Floats:
        """Excess loss in nats, bool [m, n] → float64 [m]."""
        return self.predict_members(masks).mean(axis=0)

    def halfwidth(self, predicted: Floats) -> Floats:
        """Nats within which 90 % of unseen masks with a similar prediction fell, [m] → [m]."""
        order = np.argsort(self.out_of_fold)
        errors = np.abs(self.measured - self.out_of_fold)[order]
        near = min(INTERVAL_NEIGHBOURS, len(order))
        windows = np.lib.stride_tricks.sliding_window_view(errors, near)
        widths = np.quantile(windows, INTERVAL_COVERAGE, axis=1)
        centres = np.lib.stride_tricks.sliding_window_view(self.out_of_fold[order], near)
        return np.interp(predicted, centres.mean(axis=1), widths)


def fit_surrogate(
    masks: Masks, excess_losses: Floats, *, kind: SurrogateKind = "auto", seed: int = 0
) -> FittedSurrogate:
    """Train a surrogate on measured masks.

    Args:
        masks: bool [m, n], distinct.
        excess_losses: float64 [m] in nats above the full model's loss; `inf` where not finite.
        kind: "ridge" is linear in the dropped layers; "ensemble" adds a small network that learns
            what the ridge leaves; "published" is the paper's network and schedule; "auto" takes
            ridge or ensemble by out-of-fold score, Spearman correlation plus R² of the utility,
            because both the ranking and the values matter.
        seed: of folds and initial weights.

    Raises:
        LayerShapError: an unknown kind.
    """
    check_one_of("surrogate", kind, KINDS)
    measured = finite_excess(excess_losses)
    held = _held_out(len(masks), seed)
    wanted = ("ridge", "ensemble") if kind == "auto" else (kind,)
    fitted = [_fit_kind(name, masks, measured, held, seed) for name in wanted]
    best = max(fitted, key=lambda f: _score(f.quality))
    candidates = {f.kind: f.quality for f in fitted}
    strata = {
        int(kept): _quality(
            measured[masks.sum(axis=1) == kept], best.out_of_fold[masks.sum(axis=1) == kept]
        )
        for kept in np.unique(masks.sum(axis=1))
    }
    return FittedSurrogate(
        best.kind,
        best.out_of_fold,
        measured,
        best.quality,
        strata,
        candidates,
        best.predictor,
        best.floor,
    )


def finite_excess(excess_losses: Floats) -> Floats:
    """Excess losses with a ceiling in place of what is not finite, so no mask is dropped."""
    finite = np.isfinite(excess_losses)
    worst = max(float(excess_losses[finite].max(initial=0.0)), 0.0)
    return np.where(finite, excess_losses, worst + CEILING_MARGIN)


@dataclass(frozen=True)
class _Fit:
    kind: str
    predictor: _Predictor
    out_of_fold: Floats
    quality: SurrogateQuality
    floor: float


def _fit_kind(kind: str, masks: Masks, measured: Floats, held: Tensor, seed: int) -> _Fit:
    inputs = torch.from_numpy(masks.astype(float))
    targets = torch.from_numpy(measured)
    predictor = _TRAINERS[kind](inputs, targets, held, torch.Generator().manual_seed(seed))
    # No cut seen was better than this; extrapolating below it would promise improvements.
    floor = min(0.0, float(measured.min()))
    with torch.no_grad():
        predictions = predictor.excess(inputs).clamp(min=floor)
    unseen = held if len(held) > 1 else torch.ones_like(held)
    out_of_fold = ((predictions * unseen).sum(0) / unseen.sum(0)).numpy()
    quality = _quality(measured, out_of_fold)
    if len(held) == 1:
        quality = SurrogateQuality(math.nan, math.nan, math.nan, 0)
    return _Fit(kind, predictor, out_of_fold, quality, floor)


def _held_out(count: int, seed: int) -> Tensor:
    """Which masks each member does not see, 0/1 [members, m].

    Every mask is held out by one member per repeat. With a single mask nothing can be.
    """
    if count < 2:
        return torch.zeros(1, count, dtype=torch.float64)
    folds = min(FOLDS, count)
    rng = np.random.default_rng([seed, count])
    rows = []
    for _ in range(REPEATS):
        fold = rng.permutation(count) % folds
        rows += [fold == f for f in range(folds)]
    return torch.from_numpy(np.array(rows, dtype=float))


def _score(quality: SurrogateQuality) -> float:
    return float(np.nan_to_num(quality.spearman) + np.nan_to_num(quality.r2))


def _quality(measured: Floats, predicted: Floats) -> SurrogateQuality:
    truth, guess = np.exp(-measured), np.exp(-predicted)
    count = len(truth)
    error = float(np.abs(truth - guess).mean()) if count else math.nan
    if count < MIN_MASKS_TO_SCORE or np.ptp(truth) == 0:
        return SurrogateQuality(math.nan, math.nan, error, count)
    r2 = 1 - float(((truth - guess) ** 2).sum() / ((truth - truth.mean()) ** 2).sum())
    rank = float(spearmanr(truth, guess).statistic) if np.ptp(guess) else math.nan
    return SurrogateQuality(r2, rank, error, count)


@dataclass(frozen=True)
class _Ridge:
    """y = w · (1 − m): no intercept, because the full mask has no excess loss."""

    weights: Tensor  # [members, n]

    def excess(self, masks: Tensor) -> Tensor:
        return self.weights @ (1 - masks).T


@dataclass(frozen=True)
class _Boosted:
    """A ridge plus g(1 − m) − g(0), g a two-layer network: zero at the full mask."""

    ridge: _Ridge
    hidden: Tensor  # [members, n, width]
    bias: Tensor  # [members, 1, width]
    output: Tensor  # [members, width, 1]

    def excess(self, masks: Tensor) -> Tensor:
        return self.ridge.excess(masks) + self.network((1 - masks).float()).double()

    def network(self, dropped: Tensor) -> Tensor:
        rows = dropped.expand(len(self.hidden), -1, -1)
        active = celu(torch.baddbmm(self.bias, rows, self.hidden))
        return (torch.bmm(active, self.output) - torch.bmm(celu(self.bias), self.output))[..., 0]


@dataclass(frozen=True)
class _Published:
    """n → 2n (CELU) → 1 (sigmoid), predicting the utility itself."""

    hidden: Tensor
    bias: Tensor
    output: Tensor
    offset: Tensor

    def excess(self, masks: Tensor) -> Tensor:
        rows = masks.float().expand(len(self.hidden), -1, -1)
        return -torch.nn.functional.logsigmoid(self.logits(rows)).double()

    def logits(self, rows: Tensor) -> Tensor:
        active = celu(torch.baddbmm(self.bias, rows, self.hidden))
        return torch.baddbmm(self.offset, active, self.output)[..., 0]


def _train_ridge(
    inputs: Tensor, targets: Tensor, held: Tensor, generator: torch.Generator
) -> _Ridge:
    weights = _sample_weights(targets, held)
    dropped = 1 - inputs
    count, n = dropped.shape
    gram = torch.einsum("em,mi,mj->eij", weights, dropped, dropped)
    gram += RIDGE_PENALTY / count * torch.eye(n, dtype=gram.dtype)
    moment = torch.einsum("em,mi,m->ei", weights, dropped, targets)
    return _Ridge(torch.linalg.solve(gram, moment))


def _train_boosted(
    inputs: Tensor, targets: Tensor, held: Tensor, generator: torch.Generator
) -> _Boosted:
    ridge = _train_ridge(inputs, targets, held, generator)
    residuals = targets - ridge.excess(inputs)
    scale = float(residuals.std(correction=0)) or 1.0
    wanted = (residuals / scale).float()
    weights = _sample_weights(targets, held).float()
    dropped = (1 - inputs).float()
    members, n = len(held), inputs.shape[1]
    width = 2 * n

    def draw(*shape: int, spread: float) -> Tensor:
        return (torch.randn(shape, generator=generator) * spread).requires_grad_()

    model = _Boosted(
        ridge,
        draw(members, n, width, spread=n**-0.5),
        draw(members, 1, width, spread=0.1),
        draw(members, width, 1, spread=INITIAL_OUTPUT_SCALE * width**-0.5),
    )
    optimizer = torch.optim.AdamW(
        [model.hidden, model.bias, model.output], lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=STEPS)
    for _ in range(STEPS):
        optimizer.zero_grad()
        (weights * (model.network(dropped) - wanted) ** 2).sum().backward()
        optimizer.step()
        schedule.step()
    return _Boosted(
        ridge, model.hidden.detach(), model.bias.detach(), model.output.detach() * scale
    )


def _train_published(
    inputs: Tensor, targets: Tensor, held: Tensor, generator: torch.Generator
) -> _Published:
    members, n = len(held), inputs.shape[1]
    utilities = torch.exp(-targets).float()
    seen = (1 - held).float()
    rows = inputs.float()

    def draw(*shape: int, fan_in: int) -> Tensor:
        """PyTorch's own initial law for a linear layer."""
        uniform = torch.rand(shape, generator=generator) * 2 - 1
        return (uniform * fan_in**-0.5).requires_grad_()

    model = _Published(
        draw(members, n, 2 * n, fan_in=n),
        draw(members, 1, 2 * n, fan_in=n),
        draw(members, 2 * n, 1, fan_in=2 * n),
        draw(members, 1, 1, fan_in=2 * n),
    )
    optimizer = torch.optim.SGD(
        [model.hidden, model.bias, model.output, model.offset],
        lr=PUBLISHED_RATE,
        momentum=PUBLISHED_MOMENTUM,
    )
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, PUBLISHED_DECAY_EPOCHS, 0.1)
    for _ in range(PUBLISHED_EPOCHS):
        for batch in torch.randperm(len(rows), generator=generator).split(PUBLISHED_BATCH):
            optimizer.zero_grad()
            batch_seen = seen[:, batch]
            guess = torch.sigmoid(model.logits(rows[batch].expand(members, -1, -1)))
            errors = batch_seen * (guess - utilities[batch]) ** 2
            # Summed over members, meaned over each member's own masks: independent trainings.
            (errors.sum(1) / batch_seen.sum(1).clamp(min=1)).sum().backward()
            optimizer.step()
        schedule.step()
    return _Published(*(t.detach() for t in (model.hidden, model.bias, model.output, model.offset)))


def _sample_weights(targets: Tensor, held: Tensor) -> Tensor:
    """Each member's weights of the masks, [members, m], summing to 1."""
    weights = (torch.exp(-WEIGHT_POWER * targets) + WEIGHT_FLOOR) * (1 - held)
    return weights / weights.sum(dim=1, keepdim=True)


_TRAINERS: Mapping[str, Callable[[Tensor, Tensor, Tensor, torch.Generator], _Predictor]] = {
    "ridge": _train_ridge,
    "ensemble": _train_boosted,
    "published": _train_published,
}
