"""A saved study: what was measured, with the settings, model, text and versions that made it.

The file is JSON. It holds the measurements in full, so a study opens without the model and its
estimates are made again from them; the estimates are written too, for other readers.
"""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import pandas as pd

from core.analysis import Analysis, AnalysisSettings, from_measurements
from core.estimates import Contributions
from core.game import text_fingerprint
from core.masks import dropped_players, mask_key
from core.models import ModelInfo
from core.players import BRANCH_NAMES, Players
from core.study_file import (
    FORMAT,
    FORMAT_VERSION,
    ComparisonPart,
    StudyFile,
    read_study_file,
)
from core.text import TextBlocks

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
        return _study(read_study_file(text))

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


def _study(file: StudyFile) -> Study:
    measured = file.measurements
    masks = np.array([[digit == "1" for digit in mask] for mask in measured.masks], dtype=bool)
    analysis = from_measurements(
        AnalysisSettings(**dict(file.settings)),
        Players(file.players, file.model.n_layers),
        masks,
        np.array([_or_infinite(loss) for loss in measured.losses]),
        measured.full_loss,
        measured.planned,
    )
    return Study(
        analysis=analysis,
        model=ModelInfo(**dict(file.model)),
        text=TextInfo(**dict(file.text)),
        comparisons=tuple(_comparison(part) for part in file.comparisons),
        player_parameters=file.player_parameters,
        versions=file.versions,
        created=file.created,
    )


def _comparison(part: ComparisonPart) -> Comparison:
    values = dict(part)
    for name in values.keys() - {"predicted", "predicted_low", "predicted_high"}:
        values[name] = _or_infinite(values[name])
    return Comparison(**values)


def _or_infinite(value: Any) -> Any:
    return math.inf if value is None else value


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
