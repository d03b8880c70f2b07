"""Heal a pruned model: a short LoRA fine-tune in which the layers left learn to do without others.

Low-rank adapters (Hu et al., LoRA, arXiv 2106.09685) on the blocks' linear layers are trained on
next tokens of calibration documents, and merged into a copy of the weights. Held-out documents
only judge.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from torch import Tensor, nn

from core.card import Measured, Perplexities, model_card
from core.clock import Clock
from core.errors import LayerShapError, first_line
from core.game import LayerGame
from core.models import LayeredModel, fingerprint
from core.saving import provenance, write_model
from core.text import TextBlocks
from core.text_info import TextInfo

MAX_STEPS, MAX_RANK = 10_000, 512
# More blocks of text than this are not held; they are gone through again instead.
MAX_TRAINING_BLOCKS = 20_000
# Blocks set apart from training, at most this share of them; the best of as many looks at them
# chooses which state is kept.
VALIDATION_BLOCKS, VALIDATION_SHARE, VALIDATIONS = 12, 0.2, 10
# Share of the steps over which the learning rate rises; after them it falls to zero.
WARM_UP = 0.1
CLIP_NORM = 1.0
# So many steps without a finite loss, one after another, end the training.
MAX_BAD_STEPS = 3
DONE, STOPPED, DIVERGED = "Done", "Stopped", "Diverged"


@dataclass(frozen=True)
class HealingSettings:
    """How to train the adapters.

    Attributes:
        steps: optimiser steps.
        rank: of each adapter; its scale is 2.
        learning_rate: of AdamW, at its height.
        batch_blocks: blocks of text in a step.
        seed: of the adapters' first values and of the order of the text.
    """

    steps: int = 100
    rank: int = 16
    learning_rate: float = 1e-3
    batch_blocks: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        for name, most in (
            ("steps", MAX_STEPS),
            ("rank", MAX_RANK),
            ("batch_blocks", 1024),
            ("seed", 2**63 - 1),
        ):
            value, least = getattr(self, name), 0 if name == "seed" else 1
            if not isinstance(value, Integral) or not least <= value <= most:
                raise LayerShapError(
                    f"{name} is {value!r}; it must be a whole number from {least} to {most}."
                )
        if not isinstance(self.learning_rate, int | float) or not 0 < self.learning_rate <= 1:
            raise LayerShapError(
                f"learning_rate is {self.learning_rate!r}; it must be above 0 and at most 1."
            )

    @property
    def blocks_wanted(self) -> int:
        """Blocks of text with which no block is trained on twice."""
        return min(self.steps * self.batch_blocks + VALIDATION_BLOCKS, MAX_TRAINING_BLOCKS)


@dataclass(frozen=True)
class HealingCurve:
    """What training saw.

    Attributes:
        losses: mean NLL of each step's batch before the step, nats; `inf` if not finite.
        validations: (steps made, mean NLL in nats of the blocks set apart), the first before any.
    """

    losses: tuple[float, ...] = ()
    validations: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Healing:
    """A healed model, and how it came about.

    Attributes:
        model: plain weights, adapters merged; it shares none with the model it was made from.
        kept_step: the step after which the blocks set apart did best; 0 if none helped.
        measured: perplexities of the full, the pruned and the healed model.
        ended: "Done", "Stopped", or "Diverged" where losses ceased to be finite.
        adapter_parameters: numbers that were trained.
        training_blocks: blocks of text trained on, of `block_length` tokens.
        seconds: what training took, measuring not included.
    """

    model: LayeredModel
    settings: HealingSettings
    curve: HealingCurve
    kept_step: int
    measured: Measured
    ended: str
    adapter_parameters: int
    training_blocks: int
    block_length: int
    seconds: float


@dataclass(frozen=True)
class HealingProgress:
    """A moment of healing; `measured` lacks the healed model, and `healing` is None, until the end.

    `seconds_left` covers the training steps; None while it is not known.
    """

    stage: str
    done: int
    total: int
    curve: HealingCurve = HealingCurve()
    measured: Measured | None = None
    seconds_left: float | None = None
    healing: Healing | None = None


def heal(
    pruned: LayeredModel,
    training: Tensor,
    text: TextBlocks,
    settings: HealingSettings | None = None,
    *,
    full: LayeredModel,
    stop: Callable[[], bool] | None = None,
) -> Iterator[HealingProgress]:
    """Train adapters on a copy of a pruned model, yielding progress; the last step has the result.

    The weights of `pruned` and of the model it shares them with are not touched. The same seed
    and inputs give the same weights on the same machine. Stopping keeps the best state so far.

    Args:
        pruned: a model made by `prune`.
        training: LongTensor [blocks, length] from `training_blocks`, of calibration documents.
        text: the blocks that perplexities are measured on, before and after.
        full: the model that `pruned` was made from, measured for comparison.
        stop: asked before each step.

    Raises:
        LayerShapError: peft is missing, its adapters do not fit this architecture, its weights are
            quantized, there is too little text or memory, or the pruned model's loss is not finite
            to begin with.
    """
    settings = settings or HealingSettings()
    total, curve = settings.steps, HealingCurve()
    _peft()
    if pruned.info.quantization:
        raise LayerShapError(
            f"Adapters cannot be merged into weights quantized with {pruned.info.quantization}; "
            "heal the same cut of the unquantized model."
        )
    if len(training) < 2:
        raise LayerShapError("Healing needs at least two blocks of text; give more text.")
    yield HealingProgress("Measuring the full and the pruned model", 0, total)
    held_out = Perplexities(_perplexity(full, text.held_out), _perplexity(pruned, text.held_out))
    calibration = Perplexities(
        _perplexity(full, text.calibration), _perplexity(pruned, text.calibration)
    )
    measured = Measured(TextInfo.of(text), held_out, calibration)
    yield HealingProgress("Putting adapters on the layers", 0, total, measured=measured)
    start = time.monotonic()
    trainer = _Trainer(pruned, training, settings)
    curve = _with_validation(curve, 0, trainer.validate())
    if not math.isfinite(curve.validations[0][1]):
        raise LayerShapError(
            "The pruned model's loss on this text is not finite, so it cannot learn from it; drop "
            "fewer or other layers."
        )
    every, bad, ended, clock = max(1, total // VALIDATIONS), 0, DONE, Clock()
    left = None
    for step in range(total):
        if stop and stop():
            ended = STOPPED
            break
        yield HealingProgress("Healing", step, total, curve, measured, left)
        loss = trainer.step(step)
        bad = 0 if math.isfinite(loss) else bad + 1
        curve = replace(curve, losses=(*curve.losses, loss))
        if bad == MAX_BAD_STEPS:
            ended = DIVERGED
            break
        if (step + 1) % every == 0:
            curve = _with_validation(curve, step + 1, trainer.validate())
        left = clock.left(total - step - 1)
    made = len(curve.losses)
    if ended != DIVERGED and curve.validations[-1][0] != made:
        curve = _with_validation(curve, made, trainer.validate())
    seconds = time.monotonic() - start
    yield HealingProgress("Merging the adapters and measuring", made, total, curve, measured)
    model = trainer.merged()
    # The parts laid out for measuring go with this record of the same model.
    judged = replace(model)
    measured = replace(
        measured,
        held_out=replace(held_out, healed=_perplexity(judged, text.held_out)),
        calibration=replace(calibration, healed=_perplexity(judged, text.calibration)),
    )
    healing = Healing(
        model=model,
        settings=settings,
        curve=curve,
        kept_step=trainer.kept_step,
        measured=measured,
        ended=ended,
        adapter_parameters=trainer.adapter_parameters,
        training_blocks=len(trainer.training),
        block_length=training.shape[1],
        seconds=seconds,
    )
    yield HealingProgress(ended, made, total, curve, measured, None, healing)


def save_healed(
    healing: Healing,
    full: LayeredModel,
    keep: ArrayLike,
    folder: str | Path,
    progress: Callable[[str, float | None], None] | None = None,
) -> Path:
    """Write a healed model, its tokenizer, provenance and card to a new folder.

    Args:
        full: the model that layers were dropped from.
        keep: the mask that `prune` was given.

    Raises:
        LayerShapError: the folder exists and is not empty, or cannot be written.
    """
    made_by = provenance(full, keep)
    made_by["healing"] = {
        **asdict(healing.settings),
        "steps_made": len(healing.curve.losses),
        "kept_step": healing.kept_step,
        "held_out_perplexity": asdict(healing.measured.held_out),
        "calibration_perplexity": asdict(healing.measured.calibration),
        "text": asdict(healing.measured.text),
    }
    card = model_card(
        full,
        healing.model,
        np.asarray(keep, dtype=bool),
        measured=healing.measured,
        healing=healing,
    )
    return write_model(healing.model, folder, made_by, card, progress)


@contextmanager
def _enough_memory() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise LayerShapError(
            "Healing this model does not fit in the device's memory: it needs a copy of the model "
            "and room to train; use shorter blocks, or load the model on the CPU."
        ) from error


class _Trainer:
    """Adapters on a copy of a model, the text they learn from, and their best state so far."""

    @_enough_memory()
    def __init__(self, model: LayeredModel, text: Tensor, settings: HealingSettings) -> None:
        self._model, self._settings = model, settings
        self._random = torch.Generator().manual_seed(settings.seed)
        order = torch.randperm(len(text), generator=self._random)
        apart = max(1, min(VALIDATION_BLOCKS, int(len(text) * VALIDATION_SHARE)))
        self._validation, self.training = text[order[:apart]], text[order[apart:]]
        self._queue: list[int] = []
        # Not `copy_sharing_weights`: merging writes into the weights.
        module = deepcopy(model.module).to(_training_dtype(model))
        self._adapted = _with_adapters(module, model.stack.path, settings.rank, self._random)
        self._weights = [p for p in self._adapted.parameters() if p.requires_grad]
        self._optimiser = torch.optim.AdamW(self._weights, weight_decay=0.0)
        self._best_loss, self._best = math.inf, self._state()
        self.kept_step = 0
        self._made = 0

    @property
    def adapter_parameters(self) -> int:
        return sum(weight.numel() for weight in self._weights)

    @_enough_memory()
    def step(self, number: int) -> float:
        """One optimiser step; a loss or a gradient that is not finite changes nothing.

        Returns:
            The batch's loss before the step, nats; `inf` where it or its gradient is not finite.
        """
        settings = self._settings
        for group in self._optimiser.param_groups:
            group["lr"] = settings.learning_rate * _schedule(number, settings.steps)
        self._made = number + 1
        with torch.enable_grad():
            loss = self._loss(self._batch())
            loss.backward()
        norm = nn.utils.clip_grad_norm_(self._weights, CLIP_NORM)
        finite = bool(torch.isfinite(loss.detach()) and torch.isfinite(norm))
        if finite:
            self._optimiser.step()
        self._optimiser.zero_grad(set_to_none=True)
        return float(loss.detach()) if finite else math.inf

    @_enough_memory()
    @torch.no_grad()
    def validate(self) -> float:
        """Mean NLL in nats of the blocks set apart; the state is kept if it is the best so far."""
        size = self._settings.batch_blocks
        parts = self._validation.split(size)
        total = sum(float(self._loss(part)) * len(part) for part in parts)
        loss = total / len(self._validation)
        if loss < self._best_loss:
            self._best_loss, self._best, self.kept_step = loss, self._state(), self._made
        return loss if math.isfinite(loss) else math.inf

    @_enough_memory()
    @torch.no_grad()
    def merged(self) -> LayeredModel:
        """The model in its own number format with the best adapters merged; training is over."""
        for weight, best in zip(self._weights, self._best, strict=True):
            weight.copy_(best)
        model = self._model
        module = self._adapted.merge_and_unload().to(model.module.dtype).eval()
        module.requires_grad_(True)
        blocks = tuple(module.get_submodule(model.stack.path))
        return LayeredModel(
            module,
            model.tokenizer,
            replace(model.stack, blocks=blocks),
            replace(model.info, fingerprint=fingerprint(module)),
        )

    def _loss(self, rows: Tensor) -> Tensor:
        """Mean NLL per predicted token of blocks, LongTensor [rows, length], in nats."""
        rows = rows.to(self._model.device)
        logits = self._adapted(input_ids=rows, use_cache=False).logits[:, :-1].float()
        return F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten().to(logits.device))

    def _batch(self) -> Tensor:
        """The next blocks in random order, all of them once before any comes again."""
        while len(self._queue) < self._settings.batch_blocks:
            self._queue += torch.randperm(len(self.training), generator=self._random).tolist()
        size = self._settings.batch_blocks
        chosen, self._queue = self._queue[:size], self._queue[size:]
        return self.training[chosen]

    def _state(self) -> list[Tensor]:
        return [weight.detach().clone() for weight in self._weights]


def _past_adapters(module: Any, name: str) -> bool:
    """Whether a layer's forward is passed over: Mamba's kernels take `out_proj`'s bare weight."""
    return "mamba" in module.config.model_type and name.endswith("out_proj")


def _with_adapters(module: Any, path: str, rank: int, random: torch.Generator) -> Any:
    """The module with LoRA adapters on every linear layer of its blocks, all else frozen.

    Raises:
        LayerShapError: no such layers, or peft refuses this architecture.
    """
    from transformers.pytorch_utils import Conv1D

    peft = _peft()
    names = {
        f"{path}.{name}": part
        for name, part in module.get_submodule(path).named_modules()
        if isinstance(part, nn.Linear | Conv1D) and not _past_adapters(module, name)
    }
    try:
        config = peft.LoraConfig(
            r=rank,
            lora_alpha=2 * rank,
            target_modules=list(names),
            fan_in_fan_out=any(isinstance(part, Conv1D) for part in names.values()),
        )
        adapted = peft.get_peft_model(module, config)
    except (ValueError, TypeError) as error:
        raise LayerShapError(
            f"LoRA adapters cannot be put on {type(module).__name__} "
            f"({first_line(error)}), so it cannot be healed here; the cut "
            "itself can be saved."
        ) from error
    # peft draws them from PyTorch's global generator, which other threads use too.
    for name, weight in adapted.named_parameters():
        if "lora_A" in name:
            values = torch.empty(weight.shape)
            nn.init.kaiming_uniform_(values, a=math.sqrt(5), generator=random)
            weight.data.copy_(values)
    return adapted


def _training_dtype(model: LayeredModel) -> torch.dtype:
    """bfloat16 stays only on a GPU: on CPUs without it, its backward pass took fifty times as long
    as that of float32. Gradients in float16 would vanish."""
    kept = model.module.dtype == torch.bfloat16 and model.device.type == "cuda"
    return torch.bfloat16 if kept else torch.float32


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise LayerShapError(
            "Healing needs the package peft; run `pip install peft` and start LayerShap again."
        ) from error
    return peft


def _schedule(step: int, steps: int) -> float:
    """Share of the learning rate at a step: a linear rise, then half a cosine down."""
    rise = max(1, round(WARM_UP * steps))
    if step < rise:
        return (step + 1) / rise
    return (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise))) / 2


def _with_validation(curve: HealingCurve, step: int, loss: float) -> HealingCurve:
    return replace(curve, validations=(*curve.validations, (step, loss)))


def _perplexity(model: LayeredModel, blocks: Tensor) -> float:
    """Perplexity of a whole model, measured as a mask that keeps everything."""
    return float(np.exp(LayerGame(model, blocks).full_loss))
