"""Models and texts in use, shared by everyone who asked for the same ones."""

from __future__ import annotations

import math
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from torch import LongTensor

from core.card import origin
from core.errors import LayerShapError
from core.evaluation import Evaluator
from core.footprint import Footprint, Speed
from core.game import LayerGame
from core.loading import Progress
from core.models import LayeredModel
from core.players import PlayerKind
from core.resources import Resources, measure_resources
from core.saving import load_pruned
from core.study import TextInfo
from core.text import BUNDLED, TextBlocks, load_text, training_blocks
from ui.zero_gpu import ZeroGpuEvaluator, announce

# Loaded models, and the games of each on bundled text, kept in memory; the least recently used go
# first.
MAX_MODELS = 2
MAX_WORKSPACES = 8
RECENT_SECONDS, MAX_RECENT = 600.0, 64


@dataclass(frozen=True)
class ModelChoice:
    """Which model to load, and how."""

    source: str = "bundled"
    revision: str | None = None
    device: str = "auto"
    dtype: str = "auto"


@dataclass(frozen=True)
class TextChoice:
    """Which text to cut into blocks, and how."""

    source: str = "bundled"
    blocks: int = 10
    block_length: int = 128
    held_out_blocks: int = 10
    seed: int = 0

    def read(self, model: LayeredModel) -> TextBlocks:
        """The blocks, in a model's tokens.

        Raises:
            LayerShapError: the text cannot be used.
        """
        return load_text(
            self.source,
            model.tokenizer,
            blocks=self.blocks,
            block_length=self.block_length,
            held_out_blocks=self.held_out_blocks,
            seed=self.seed,
        )


@dataclass(frozen=True)
class CutCosts:
    """What a cut takes, full and pruned: sizes and measured speeds."""

    sizes: tuple[Footprint, Footprint]
    speeds: tuple[Speed, Speed]


class RecentCosts:
    """What cuts took that were measured in the last minutes: visitors who ask for the same one need
    not wait for it to be built and timed again."""

    def __init__(self) -> None:
        self._costs: OrderedDict[bytes, tuple[float, CutCosts]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, keep: NDArray[np.bool_]) -> CutCosts | None:
        with self._lock:
            measured, costs = self._costs.get(keep.tobytes(), (-math.inf, None))
        return costs if time.monotonic() - measured < RECENT_SECONDS else None

    def put(self, keep: NDArray[np.bool_], costs: CutCosts) -> None:
        with self._lock:
            self._costs[keep.tobytes()] = (time.monotonic(), costs)
            self._costs.move_to_end(keep.tobytes())
            while len(self._costs) > MAX_RECENT:
                self._costs.popitem(last=False)


@dataclass(frozen=True)
class Workspace:
    """A loaded model with its calibration and held-out games.

    `public_location` is what another machine would load the model by, never a path of this one.
    """

    model: LayeredModel
    text: TextBlocks
    calibration: LayerGame
    held_out: LayerGame
    text_choice: TextChoice
    public_location: str = ""
    recent: RecentCosts = field(default_factory=RecentCosts, compare=False)

    @cached_property
    def resources(self) -> Resources:
        """What dropping each player saves; measured when it is first asked for."""
        return measure_resources(self.model, self.calibration.players)

    @property
    def text_info(self) -> TextInfo:
        return TextInfo.of(self.text)

    def training_blocks(self, count: int) -> LongTensor:
        """Up to `count` more blocks of calibration documents, LongTensor [blocks, length].

        Raises:
            LayerShapError: the text cannot be read again, or is no longer what it was.
        """
        if TextInfo.of(self.text_choice.read(self.model)) != self.text_info:
            raise LayerShapError(
                "The text has changed since it was loaded, so what is held out is no longer "
                "certain; load it again in Set-up."
            )
        return training_blocks(
            self.text_choice.source,
            self.model.tokenizer,
            count,
            block_length=self.text_choice.block_length,
            seed=self.text_choice.seed,
        )


class Workspaces:
    """Opens workspaces; models are loaded once and shared between visitors, and so is the whole
    workspace where the text cannot change.

    With `zero_gpu` models stay on the CPU, and masks are evaluated on a GPU that ZeroGPU lends.
    """

    def __init__(self, zero_gpu: bool = False) -> None:
        self._zero_gpu = zero_gpu
        if zero_gpu:
            announce()
        self._models: OrderedDict[ModelChoice, LayeredModel] = OrderedDict()
        self._opened: OrderedDict[tuple, Workspace] = OrderedDict()
        self._lock = threading.Lock()

    def open(
        self,
        model: ModelChoice,
        text: TextChoice,
        progress: Progress,
        players: PlayerKind = "blocks",
    ) -> Workspace:
        """Load what is not loaded yet.

        Raises:
            LayerShapError: the model or the text cannot be used.
        """
        lent = self._zero_gpu and model.device == "auto"
        loaded = self.model(model, progress)
        key = (loaded.info, text, players, lent)
        with self._lock:
            if key in self._opened:
                self._opened.move_to_end(key)
                return self._opened[key]
        progress("Reading the text", None)
        blocks = text.read(loaded)
        evaluator = ZeroGpuEvaluator if lent else Evaluator
        calibration, held_out = (
            LayerGame(
                loaded,
                tokens,
                players=players,
                evaluator=evaluator(loaded, tokens, players=players),
            )
            for tokens in (blocks.calibration, blocks.held_out)
        )
        workspace = Workspace(loaded, blocks, calibration, held_out, text, origin(loaded).location)
        if text.source == BUNDLED:
            with self._lock:
                self._opened[key] = workspace
                while len(self._opened) > MAX_WORKSPACES:
                    self._opened.popitem(last=False)
        return workspace

    def model(self, choice: ModelChoice, progress: Progress) -> LayeredModel:
        """A model alone; loaded if it is not yet.

        Raises:
            LayerShapError: it cannot be used.
        """
        if self._zero_gpu:
            choice = _on_cpu(choice)
        with self._lock:
            if choice not in self._models:
                while len(self._models) >= MAX_MODELS:
                    _, gone = self._models.popitem(last=False)
                    for key in [k for k, w in self._opened.items() if w.model is gone]:
                        del self._opened[key]
                self._models[choice] = load_pruned(
                    choice.source,
                    revision=choice.revision,
                    device=choice.device,
                    dtype=choice.dtype,
                    progress=progress,
                )
            self._models.move_to_end(choice)
            return self._models[choice]


def _on_cpu(choice: ModelChoice) -> ModelChoice:
    """The choice where ZeroGPU lends the GPU: this process must not touch it."""
    if choice.device not in ("auto", "cpu"):
        raise LayerShapError(
            "This Space borrows its GPU while it measures: leave the device at auto, or choose cpu."
        )
    return replace(choice, device="cpu")
