"""`python -m core analyze`: measure a model's layers, save a study."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from core.allocator import keep_freed_memory
from core.analysis import Analysis, AnalysisProgress, AnalysisSettings, run
from core.commands.sources import add_model, add_text, the_model, the_text
from core.errors import LayerShapError
from core.game import LayerGame
from core.players import PLAYER_KINDS
from core.study import Study, TextInfo


def add(commands: Any) -> None:
    defaults = AnalysisSettings()
    command = commands.add_parser("analyze", help="measure a model's layers, save a study")
    command.set_defaults(command=analyze)
    add_model(command)
    add_text(command)
    command.add_argument(
        "--players",
        default="blocks",
        choices=PLAYER_KINDS,
        help="blocks: whole layers; sub-blocks: attention and MLP of each",
    )
    command.add_argument("--evaluations", type=int, default=defaults.evaluations)
    command.add_argument("--seed", type=int, default=defaults.seed)
    command.add_argument(
        "--strata",
        type=lambda text: tuple(int(part) for part in text.split(",")),
        help="numbers of kept layers, such as 28,26,24",
    )
    command.add_argument("--utility", default=defaults.utility, choices=("ratio", "log"))
    command.add_argument(
        "--surrogate",
        default=defaults.surrogate,
        choices=("auto", "ensemble", "ridge", "published"),
    )
    command.add_argument(
        "--published", action="store_true", help="the paper's strata, budget and surrogate"
    )
    command.add_argument("--out", type=Path, required=True, help="the study file to write")


def analyze(options: argparse.Namespace) -> None:
    keep_freed_memory()
    if not options.out.parent.is_dir():
        raise LayerShapError(f"There is no folder {options.out.parent} to write the study to.")
    model = the_model(options)
    text = the_text(options, model)
    game = LayerGame(model, text.calibration, players=options.players)
    settings = (
        AnalysisSettings.published(game.n_players)
        if options.published
        else AnalysisSettings(
            evaluations=options.evaluations,
            seed=options.seed,
            strata=options.strata,
            utility=options.utility,
            surrogate=options.surrogate,
        )
    )
    analysis = _measure(game, settings)
    parameters = model.player_parameters(options.players)
    study = Study(analysis, model.info, TextInfo.of(text), player_parameters=parameters)
    _write(options.out, study.to_json())
    print(analysis.verdict())
    print(f"Study of {len(analysis.masks)} masks written to {options.out}")


def _write(out: Path, content: str) -> None:
    try:
        out.write_text(content, encoding="utf-8")
    except OSError as error:
        raise LayerShapError(
            f"The study could not be written to {out} ({error.strerror or error}); free some disk "
            "space, or name another place with --out."
        ) from error


def _measure(game: LayerGame, settings: AnalysisSettings) -> Analysis:
    from tqdm import tqdm

    result = None
    progress: AnalysisProgress
    with tqdm(desc="Measuring layer masks", unit="mask", dynamic_ncols=True) as bar:
        for progress in run(game, settings, partial=False):
            bar.total = progress.total
            bar.update(progress.done - bar.n)
            result = progress.analysis or result
    assert result is not None
    return result
