"""`python -m core analyze`: measure a model's layers, save a study."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from core.allocator import keep_freed_memory
from core.analysis import Analysis, AnalysisProgress, AnalysisSettings, run
from core.commands.sources import add_model, add_text, the_model, the_text
from core.errors import LayerShapError
from core.game import LayerGame
from core.models import LayeredModel
from core.players import PLAYER_KINDS
from core.study import Study, TextInfo
from core.workers import WorkerPool, start_workers, worker_device, worker_dtype


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
    command.add_argument(
        "--workers",
        help="spread evaluations: local (one per GPU), local:4, or Ray's ray, ray://host:10001",
    )
    command.add_argument("--out", type=Path, required=True, help="the study file to write")


def analyze(options: argparse.Namespace) -> None:
    keep_freed_memory()
    if not options.out.parent.is_dir():
        raise LayerShapError(f"There is no folder {options.out.parent} to write the study to.")
    with _workers(options) as (model, workers):
        _analyze(options, model, workers)


@contextmanager
def _workers(options: argparse.Namespace) -> Iterator[tuple[LayeredModel, WorkerPool | None]]:
    """The model, and the workers that the options ask for."""
    if options.workers is None:
        yield the_model(options), None
        return
    device = worker_device(options.workers, options.device)
    # The workers' devices are for their copies; this process only needs to know the model.
    model = the_model(options, device="cpu", dtype=worker_dtype(options.dtype, device))
    with start_workers(options.workers, model, device) as workers:
        described = replace(model.info, device=f"{workers.size} x {workers.device}")
        yield replace(model, info=described), workers


def _analyze(options: argparse.Namespace, model: LayeredModel, workers: WorkerPool | None) -> None:
    text = the_text(options, model)
    evaluator = workers.evaluator(model, text.calibration, options.players) if workers else None
    game = LayerGame(model, text.calibration, players=options.players, evaluator=evaluator)
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
