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
from core.baselines import Frontier
from core.estimates import Contributions
from core.masks import dropped_players, mask_key
from core.methods import MethodResult, MethodsComparison
from core.models import ModelInfo
from core.players import BRANCH_NAMES, Players
from core.resources import RESOURCES, Resources
from core.study_file import (
    FORMAT,
    FORMAT_VERSION,
    ComparisonPart,
    MethodsPart,
    StudyFile,
    read_study_file,
)
from core.text_info import TextInfo

PACKAGES = ("torch", "transformers", "gradio", "plotly", "numpy", "scikit-learn")


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
    """An analysis with its provenance, every set tried on the way, and methods compared, if any.

    `player_parameters` says how many parameters dropping each player saves; empty, where players
    are whole layers, it is what the model says of its blocks.
    """

    analysis: Analysis
    model: ModelInfo
    text: TextInfo
    comparisons: tuple[Comparison, ...] = ()
    player_parameters: tuple[int, ...] = ()
    methods: MethodsComparison | None = None
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
            "methods": None if self.methods is None else _methods(self.methods),
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
        methods=None if file.methods is None else _compared(file.methods, analysis.players),
        versions=file.versions,
        created=file.created,
    )


def _comparison(part: ComparisonPart) -> Comparison:
    values = dict(part)
    for name in values.keys() - {"predicted", "predicted_low", "predicted_high"}:
        values[name] = _or_infinite(values[name])
    return Comparison(**values)


def _methods(comparison: MethodsComparison) -> dict[str, Any]:
    resources = comparison.resources
    return {
        "saved": {name: _floats(getattr(resources, name)) for name in RESOURCES},
        "full_calibration": comparison.full_calibration,
        "full_held_out": comparison.full_held_out,
        "results": [
            {
                "method": result.frontier.method,
                "sets": [list(chosen) for chosen in result.frontier.sets],
                "evaluations": list(result.frontier.evaluations),
                "calibration": _floats(result.calibration),
                "held_out": _floats(result.held_out),
            }
            for result in comparison.results
        ],
    }


def _compared(part: MethodsPart, players: Players) -> MethodsComparison:
    saved = {name: np.array(getattr(part.saved, name)) for name in RESOURCES}
    return MethodsComparison(
        Resources(players, **saved),
        part.full_calibration,
        part.full_held_out,
        tuple(
            MethodResult(
                Frontier(result.method, result.sets, result.evaluations),
                np.array([_or_infinite(loss) for loss in result.calibration]),
                np.array([_or_infinite(loss) for loss in result.held_out]),
            )
            for result in part.results
        ),
    )


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


def _floats(values: np.ndarray) -> list[float | None]:
    return [_number(v) for v in values]


def _matrix(values: Sequence[Sequence[float]] | np.ndarray) -> list[list[float | None]]:
    return [_floats(row) for row in np.asarray(values)]


def _contributions(contributions: Contributions) -> dict[str, Any]:
    return {
        "values": _floats(contributions.values),
        "errors": _floats(contributions.errors),
        "sizes": [int(s) for s in contributions.sizes],
        "by_size": _matrix(contributions.by_size),
        "by_size_errors": _matrix(contributions.by_size_errors),
        "extrapolated": bool(contributions.extrapolated),
    }
