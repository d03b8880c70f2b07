"""What a study file may hold: names, types, ranges and sizes.

A file may come from anyone, so nothing in it is taken over that is not named here, and nothing is
larger than a study that the dashboard could have made.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    model_validator,
)

from core.analysis import MAX_SEED
from core.errors import LayerShapError
from core.players import PlayerKind, Players
from core.surrogate import SurrogateKind

FORMAT = "layershap-study"
FORMAT_VERSION = 3
# Version 1 knew whole layers only, version 2 no methods.
READABLE_VERSIONS = (1, 2, 3)
MAX_PLAYERS = 512
MAX_MASKS = 200_000
# Masks times the square of the players, which is what making the estimates again takes.
MAX_WORK = 5 * 10**8
MAX_COMPARISONS, MAX_METHODS = 10_000, 100


def _visible(text: str) -> str:
    """One line of text that every program can show and store."""
    if not all(letter.isprintable() for letter in text):
        raise ValueError("it holds characters that cannot be shown")
    return text


Name = Annotated[str, StringConstraints(max_length=1000), AfterValidator(_visible)]
Short = Annotated[str, StringConstraints(max_length=100), AfterValidator(_visible)]
Count = Annotated[int, Field(ge=0, lt=2**53)]
Player = Annotated[int, Field(ge=0, lt=MAX_PLAYERS)]
# Nats per token.
Loss = Annotated[float, Field(ge=0, le=1e6)]
# null stands for infinity, which JSON does not have.
Perplexity = Annotated[float, Field(ge=1)] | None
Strata = Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(strict=False, max_length=1024)]
Dropped = Annotated[tuple[Player, ...], Field(strict=False, max_length=MAX_PLAYERS)]
Losses = Annotated[tuple[Loss | None, ...], Field(strict=False, max_length=MAX_PLAYERS)]
Share = Annotated[float, Field(ge=0, le=1)]
Shares = Annotated[tuple[Share, ...], Field(strict=False, max_length=MAX_PLAYERS)]
Counts = Annotated[tuple[Count, ...], Field(strict=False, max_length=MAX_PLAYERS)]


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True)


class ModelPart(_Part):
    name: Name
    source: Name
    revision: Name | None
    architecture: Name
    n_layers: Annotated[int, Field(ge=1, le=MAX_PLAYERS)]
    hidden_size: Count
    parameters: Count
    block_parameters: Counts
    dtype: Short
    device: Short
    fingerprint: Short
    context_length: Count | None
    quantization: Short | None = None
    tower_parameters: Count = 0


class TextPart(_Part):
    source: Name
    blocks: Count
    held_out_blocks: Count
    block_length: Count
    calibration_fingerprint: Short
    held_out_fingerprint: Short


class SettingsPart(_Part):
    evaluations: Annotated[int, Field(ge=1, lt=2**53)]
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)]
    strata: Strata | None
    utility: Literal["ratio", "log"]
    surrogate: SurrogateKind


class MeasurementsPart(_Part):
    full_loss: Loss
    planned: Annotated[int, Field(ge=1, lt=2**53)]
    masks: list[Annotated[str, StringConstraints(max_length=MAX_PLAYERS)]]
    losses: list[Loss | None]


class ComparisonPart(_Part):
    dropped: Dropped
    predicted: Perplexity
    predicted_low: Perplexity
    predicted_high: Perplexity
    calibration_full: Perplexity
    calibration_pruned: Perplexity
    held_out_full: Perplexity
    held_out_pruned: Perplexity
    parameters_full: Count
    parameters_pruned: Count


class SavedPart(_Part):
    parameters: Shares
    cache: Shares
    time: Shares


class MethodPart(_Part):
    method: Short
    sets: Annotated[tuple[Dropped, ...], Field(strict=False, min_length=1, max_length=MAX_PLAYERS)]
    evaluations: Counts
    calibration: Losses
    held_out: Losses


class MethodsPart(_Part):
    saved: SavedPart
    full_calibration: Loss
    full_held_out: Loss
    results: Annotated[list[MethodPart], Field(min_length=1, max_length=MAX_METHODS)]

    def check(self, n: int) -> None:
        """Raises ValueError where the parts do not fit each other, or n players."""
        deepest = len(self.results[0].sets)
        if len({result.method for result in self.results}) != len(self.results):
            raise ValueError("a method occurs twice")
        if any(len(s) != n for s in (self.saved.parameters, self.saved.cache, self.saved.time)):
            raise ValueError("what the players save is not one number each")
        for result in self.results:
            parts = (result.sets, result.evaluations, result.calibration, result.held_out)
            if any(len(part) != deepest for part in parts):
                raise ValueError("methods were not compared to the same depth")
            for chosen in result.sets:
                check_dropped(chosen, n)


class StudyFile(_Part):
    """A whole file; the estimates in it are for other readers and are made again here."""

    format: Literal["layershap-study"]
    format_version: Literal[1, 2, 3]
    created: Short
    versions: Annotated[dict[Short, Short], Field(max_length=100)]
    model: ModelPart
    text: TextPart
    settings: SettingsPart
    players: PlayerKind = "blocks"
    player_parameters: Counts = ()
    measurements: MeasurementsPart
    estimates: Any = None
    comparisons: Annotated[list[ComparisonPart], Field(max_length=MAX_COMPARISONS)]
    methods: MethodsPart | None = None

    @model_validator(mode="after")
    def _parts_go_together(self) -> StudyFile:
        n = Players(self.players, self.model.n_layers).count
        masks, losses = self.measurements.masks, self.measurements.losses
        if n > MAX_PLAYERS or not 1 <= len(masks) <= MAX_MASKS or len(masks) != len(losses):
            raise ValueError("the numbers of layers, masks and losses do not go together")
        if len(masks) * n * n > MAX_WORK:
            raise ValueError("so many masks of so many layers cannot be opened")
        if any(len(mask) != n or mask.strip("01") for mask in masks):
            raise ValueError(f"a mask is not {n} digits of 0 and 1")
        if len(set(masks)) != len(masks):
            raise ValueError("a mask occurs twice")
        if len(self.model.block_parameters) != self.model.n_layers:
            raise ValueError("the parameters of the blocks are not one number each")
        if len(self.player_parameters) not in (0, n):
            raise ValueError("the parameters of the players are not one number each")
        for comparison in self.comparisons:
            check_dropped(comparison.dropped, n)
        if self.methods is not None:
            self.methods.check(n)
        return self


def check_dropped(dropped: tuple[int, ...], n: int) -> None:
    """Raises ValueError where a set is not of n players, in order, with one left."""
    if sorted(set(dropped)) != list(dropped) or len(dropped) >= n or dropped[-1:] >= (n,):
        raise ValueError("a set is not one of this model's players, in order")


def read_study_file(text: str) -> StudyFile:
    """A study file that holds what it should.

    Raises:
        LayerShapError: it is not JSON, not a study, of another version, or damaged.
    """
    try:
        document = json.loads(text, object_pairs_hook=_distinct, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise LayerShapError(
            "This file is not the JSON of a study; choose a study saved by LayerShap."
        ) from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise LayerShapError("This JSON file is not a study saved by LayerShap.")
    if document.get("format_version") not in READABLE_VERSIONS:
        raise LayerShapError(
            "This study has another format version; this version of LayerShap reads versions "
            f"{READABLE_VERSIONS[0]} to {READABLE_VERSIONS[-1]}."
        )
    try:
        return StudyFile.model_validate(document)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        place = ".".join(map(str, first["loc"]))[:100] or "the whole"
        raise LayerShapError(
            f"The study file is damaged ({place}: {first['msg'][:200]}); save it again."
        ) from error


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose names are all different: which of two values counts is anyone's guess."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice")
    return found


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")
