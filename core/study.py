"""A saved study: what was measured, with the settings, model, text and versions that made it.

The file is JSON. It holds the measurements in full, so a study opens without the model and its
estimates are made again from them; the estimates are written too, for other readers.
"""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import pandas as pd

from core.analysis import Analysis, AnalysisSettings, from_measurements
from core.errors import LayerShapError
from core.estimates import Contributions
from core.game import text_fingerprint
from core.masks import dropped_players, mask_key
from core.models import ModelInfo
from core.players import BRANCH_NAMES, PLAYER_KINDS, Players
from core.text import TextBlocks

FORMAT = "layershap-study"
FORMAT_VERSION = 2
# Version 1 knew whole layers only.
READABLE_VERSIONS = (1, 2)
MAX_LAYERS = 1024
MAX_MASKS = 200_000
PACKAGES = ("torch", "transformers", "gradio", "plotly", "numpy", "scikit-learn")


@dataclass(frozen=True)
class TextInfo:
    """Which text a study used; fingerprints identify the token blocks."""

    source: str
    blocks: int
    held_out_blocks: int
    block_length: int
    calibration_fingerprint: str
    held_out_fingerprint: str

    @classmethod
    def of(cls, text: TextBlocks) -> TextInfo:
        return cls(
            source=text.source,
            blocks=len(text.calibration),
            held_out_blocks=len(text.held_out),
            block_length=text.calibration.shape[1],
            calibration_fingerprint=text_fingerprint(text.calibration),
            held_out_fingerprint=text_fingerprint(text.held_out),
        )


@dataclass(frozen=True)
class Comparison:
    """One set of dropped layers that was tried: perplexities and parameters, full and pruned."""

    dropped: tuple[int, ...]
    predicted: float | None
    predicted_low: float | None
    predicted_high: float | None
    calibration_full: float
    calibration_pruned: float
    held_out_full: float
    held_out_pruned: float
    parameters_full: int
    parameters_pruned: int


@dataclass(frozen=True)
class Study:
    """An analysis with its provenance, and every set compared on the way.

    `player_parameters` says how many parameters dropping each player saves; empty, where players
    are whole layers, it is what the model says of its blocks.
    """

    analysis: Analysis
    model: ModelInfo
    text: TextInfo
    comparisons: tuple[Comparison, ...] = ()
    player_parameters: tuple[int, ...] = ()
    versions: Mapping[str, str] = field(default_factory=lambda: installed_versions())
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    @property
    def parameters(self) -> tuple[int, ...]:
        """What dropping each player saves, in parameters, [players]."""
        return self.player_parameters or self.model.block_parameters

    def to_json(self) -> str:
        """The study as a JSON document; `from_json` reads it back."""
        analysis = self.analysis
        estimates = analysis.estimates
        quality = analysis.surrogate.quality
        document = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "created": self.created,
            "versions": dict(self.versions),
            "model": asdict(self.model),
            "text": asdict(self.text),
            "settings": asdict(analysis.settings),
            "players": analysis.players.kind,
            "player_parameters": list(self.parameters),
            "measurements": {
                "full_loss": analysis.full_loss,
                "planned": analysis.planned,
                "masks": [mask_key(mask) for mask in analysis.masks],
                "losses": [_number(loss) for loss in analysis.losses],
            },
            "estimates": {
                "surrogate": {"kind": analysis.surrogate.kind, **_numbers(asdict(quality))},
                "operating_range": _contributions(estimates.operating_range),
                "shapley": _contributions(estimates.shapley),
                "interactions": _matrix(estimates.interactions.values),
                "interaction_errors": _matrix(estimates.interactions.errors),
            },
            "comparisons": [_numbers(asdict(c)) for c in self.comparisons],
        }
        return json.dumps(document, indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Study:
        """Open a saved study.

        Raises:
            LayerShapError: not a study, or one that is damaged.
        """
        try:
            document = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise LayerShapError(
                "This file is not JSON; choose a study saved by LayerShap."
            ) from error
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            raise LayerShapError("This JSON file is not a study saved by LayerShap.")
        if document.get("format_version") not in READABLE_VERSIONS:
            raise LayerShapError(
                f"This study has format version {document.get('format_version')!r}; this version "
                f"of LayerShap reads versions {READABLE_VERSIONS[0]} to {READABLE_VERSIONS[-1]}."
            )
        try:
            return _from_document(document)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise LayerShapError(
                f"The study file is damaged ({type(error).__name__}: {error}); save it again."
            ) from error

    def to_csv(self, frame: pd.DataFrame) -> str:
        """A table as CSV, with what made it in leading comment lines.

        `pandas.read_csv(file, comment="#")` skips them.
        """
        made_by = {
            "created": self.created,
            "model": asdict(self.model),
            "text": asdict(self.text),
            "settings": asdict(self.analysis.settings),
            "versions": dict(self.versions),
        }
        lines = [f"# {name}: {json.dumps(value)}" for name, value in made_by.items()]
        return "\n".join(lines) + "\n" + frame.to_csv(index=False)

    def contributions_frame(self) -> pd.DataFrame:
        """One row per player: contributions with errors and intervals, both kinds of value."""
        players = self.analysis.players
        columns: dict[str, Any] = {"layer": players.layers}
        if players.kind == "sub-blocks":
            columns["part"] = [BRANCH_NAMES[branch] for branch in players.branches]
        estimates = self.analysis.estimates
        for name, value in (
            ("contribution", estimates.operating_range),
            ("shapley_value", estimates.shapley),
        ):
            columns[name] = value.values
            columns[f"{name}_error"] = value.errors
            columns[f"{name}_low"], columns[f"{name}_high"] = value.intervals.T
        columns["parameters"] = self.parameters
        return pd.DataFrame(columns)

    def interactions_frame(self) -> pd.DataFrame:
        """One row per pair of players: interaction and its standard error."""
        players = self.analysis.players
        first, second = np.triu_indices(players.count, 1)
        interactions = self.analysis.estimates.interactions
        labels = np.array([players.label(player) for player in range(players.count)])
        return pd.DataFrame(
            {
                f"{players.noun}_i": labels[first],
                f"{players.noun}_j": labels[second],
                "interaction": interactions.values[first, second],
                "interaction_error": interactions.errors[first, second],
            }
        )

    def measurements_frame(self) -> pd.DataFrame:
        """One row per measured mask."""
        analysis = self.analysis
        return pd.DataFrame(
            {
                "mask": [mask_key(mask) for mask in analysis.masks],
                "kept": analysis.masks.sum(axis=1),
                "dropped": [_spaced(analysis.players, dropped_players(m)) for m in analysis.masks],
                "loss": analysis.losses,
                "perplexity": np.exp(analysis.losses),
                "utility": analysis.values,
                "predicted_unseen_loss": analysis.full_loss + analysis.surrogate.out_of_fold,
            }
        )

    def comparisons_frame(self) -> pd.DataFrame:
        """One row per set tried."""
        players = self.analysis.players
        rows = [
            {**asdict(c), "dropped": _spaced(players, c.dropped), "count": len(c.dropped)}
            for c in self.comparisons
        ]
        names = [f.name for f in fields(Comparison)] + ["count"]
        return pd.DataFrame(rows, columns=names)


def with_comparison(
    tried: tuple[Comparison, ...], comparison: Comparison
) -> tuple[Comparison, ...]:
    """The sets tried and one more; a set tried again replaces its earlier figures."""
    return (*(c for c in tried if c.dropped != comparison.dropped), comparison)


def installed_versions() -> dict[str, str]:
    """Versions of Python and of the packages that numbers depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _from_document(document: dict[str, Any]) -> Study:
    measured = document["measurements"]
    keys, losses = measured["masks"], measured["losses"]
    model = _record(ModelInfo, document["model"])
    kind = document.get("players", "blocks")
    if kind not in PLAYER_KINDS:
        raise ValueError("the kind of players is not known")
    players = Players(kind, model.n_layers)
    n = players.count
    sizes_fit = 1 <= model.n_layers <= MAX_LAYERS and 1 <= len(keys) <= MAX_MASKS
    if not sizes_fit or len(keys) != len(losses):
        raise ValueError("the numbers of layers, masks and losses do not go together")
    if any(not isinstance(key, str) or len(key) != n or set(key) - {"0", "1"} for key in keys):
        raise ValueError(f"a mask is not {n} digits of 0 and 1")
    masks = np.array([[digit == "1" for digit in key] for key in keys], dtype=bool)
    if len(np.unique(masks, axis=0)) != len(masks):
        raise ValueError("a mask occurs twice")
    analysis = from_measurements(
        _record(AnalysisSettings, document["settings"]),
        players,
        masks,
        np.array([math.inf if loss is None else float(loss) for loss in losses]),
        float(measured["full_loss"]),
        int(measured["planned"]),
    )
    return Study(
        analysis=analysis,
        model=model,
        text=_record(TextInfo, document["text"]),
        comparisons=tuple(_record(Comparison, c) for c in document["comparisons"]),
        player_parameters=_saved_parameters(document, players),
        versions={str(k): str(v) for k, v in document["versions"].items()},
        created=str(document["created"]),
    )


def _saved_parameters(document: dict[str, Any], players: Players) -> tuple[int, ...]:
    saved = document.get("player_parameters", [])
    if saved and (len(saved) != players.count or any(type(v) is not int or v < 0 for v in saved)):
        raise ValueError("the parameters of the players are not one whole number each")
    return tuple(saved)


def _record(kind: type, values: Mapping[str, Any]) -> Any:
    """A dataclass of scalars and tuples from JSON, types checked against the field types' names."""
    allowed = {f.name: str(f.type) for f in fields(kind)}
    required = {f.name for f in fields(kind) if f.default is MISSING}
    if not required <= set(values) <= set(allowed):
        raise ValueError(f"{kind.__name__} holds other fields than expected")
    return kind(**{name: _scalar(name, allowed[name], value) for name, value in values.items()})


def _scalar(name: str, kind: str, value: Any) -> Any:
    if value is None and ("None" in kind or kind == "float"):
        return math.inf if kind == "float" else None
    if kind.startswith("tuple"):
        if not isinstance(value, list) or any(type(v) is not int for v in value):
            raise ValueError(f"{name} is not a list of whole numbers")
        return tuple(value)
    if kind.startswith("float") and type(value) in (int, float):
        return float(value)
    expected = int if kind.startswith("int") else str
    if type(value) is not expected:
        raise ValueError(f"{name} is not {'a whole number' if expected is int else 'text'}")
    return value


def _spaced(players: Players, dropped: Sequence[int]) -> str:
    """A set without commas, which separate a CSV's columns."""
    return players.labels(dropped).replace(",", "")


def _number(value: float) -> float | None:
    """JSON has no infinity: a non-finite number is written as null."""
    return float(value) if math.isfinite(value) else None


def _numbers(values: Mapping[str, Any]) -> dict[str, Any]:
    return {k: _number(v) if isinstance(v, float) else v for k, v in values.items()}


def _matrix(values: Sequence[Sequence[float]] | np.ndarray) -> list[list[float | None]]:
    return [[_number(v) for v in row] for row in np.asarray(values)]


def _contributions(contributions: Contributions) -> dict[str, Any]:
    return {
        "values": [_number(v) for v in contributions.values],
        "errors": [_number(v) for v in contributions.errors],
        "sizes": [int(s) for s in contributions.sizes],
        "by_size": _matrix(contributions.by_size),
        "by_size_errors": _matrix(contributions.by_size_errors),
        "extrapolated": bool(contributions.extrapolated),
    }
