"""The command line: `python -m core analyze …` and `python -m core accuracy …`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from core.accuracy import (
    DEFAULT_QUESTIONS,
    OFFERED,
    AccuracyProgress,
    TaskAccuracy,
    compare_accuracy,
    parse_tasks,
)
from core.allocator import keep_freed_memory
from core.analysis import AnalysisProgress, AnalysisSettings, run
from core.errors import LayerShapError
from core.game import LayerGame
from core.masks import leave_out
from core.models import DEVICES, DTYPES, LayeredModel
from core.players import PLAYER_KINDS, parse_cut
from core.pruning import load_pruned
from core.study import Study, TextInfo, installed_versions
from core.text import load_text

DROP_HELP = "layers, such as 13,17; 12a is the attention of layer 12 alone, 12m its MLP"


def main(arguments: list[str] | None = None) -> int:
    """Run a command; return the exit status, 2 after an error that the user can put right."""
    options = _parser().parse_args(arguments)
    try:
        options.command(options)
    except LayerShapError as error:
        print(f"layershap: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("layershap: stopped; what was measured is kept", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    defaults = AnalysisSettings()
    parser = argparse.ArgumentParser(prog="python -m core", description="LayerShap, no screen")
    commands = parser.add_subparsers(required=True)
    analyze = commands.add_parser("analyze", help="measure a model's layers, save a study")
    analyze.set_defaults(command=_analyze)
    _add_model(analyze)
    analyze.add_argument(
        "--players",
        default="blocks",
        choices=PLAYER_KINDS,
        help="blocks: whole layers; sub-blocks: attention and MLP of each",
    )
    analyze.add_argument("--text", default="bundled", help="bundled, a file, or a Hub data set")
    analyze.add_argument("--blocks", type=int, default=10, help="calibration blocks")
    analyze.add_argument("--block-length", type=int, default=128, help="tokens per block")
    analyze.add_argument("--held-out-blocks", type=int)
    analyze.add_argument("--evaluations", type=int, default=defaults.evaluations)
    analyze.add_argument("--seed", type=int, default=defaults.seed)
    analyze.add_argument(
        "--strata",
        type=lambda text: tuple(int(part) for part in text.split(",")),
        help="numbers of kept layers, such as 28,26,24",
    )
    analyze.add_argument("--utility", default=defaults.utility, choices=("ratio", "log"))
    analyze.add_argument(
        "--surrogate",
        default=defaults.surrogate,
        choices=("auto", "ensemble", "ridge", "published"),
    )
    analyze.add_argument(
        "--published", action="store_true", help="the paper's strata, budget and surrogate"
    )
    analyze.add_argument("--out", type=Path, required=True, help="the study file to write")
    accuracy = commands.add_parser(
        "accuracy", help="zero-shot accuracy of the full and the pruned model (needs lm-eval)"
    )
    accuracy.set_defaults(command=_accuracy)
    _add_model(accuracy)
    accuracy.add_argument("--drop", default="", help=DROP_HELP)
    accuracy.add_argument(
        "--tasks",
        type=parse_tasks,
        required=True,
        help=f"lm-eval names, such as {','.join(OFFERED)}",
    )
    accuracy.add_argument(
        "--limit",
        type=int,
        default=DEFAULT_QUESTIONS,
        help="ask the first so many questions of each task; 0 asks all",
    )
    accuracy.add_argument(
        "--tasks-folder",
        type=Path,
        help="a folder with task files of your own (YAML); Python code they name is run",
    )
    accuracy.add_argument("--seed", type=int, default=0)
    accuracy.add_argument("--out", type=Path, help="a JSON file to write the results to")
    return parser


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="bundled", help="bundled, Hub id, folder or .gguf")
    parser.add_argument("--revision", help="branch, tag or commit of a Hub id")
    parser.add_argument("--device", default="auto", choices=DEVICES)
    parser.add_argument("--dtype", default="auto", choices=DTYPES)


def _model(options: argparse.Namespace) -> LayeredModel:
    return load_pruned(
        options.model,
        revision=options.revision,
        device=options.device,
        dtype=options.dtype,
        progress=_print_stage,
    )


def _analyze(options: argparse.Namespace) -> None:
    keep_freed_memory()
    if not options.out.parent.is_dir():
        raise LayerShapError(f"There is no folder {options.out.parent} to write the study to.")
    model = _model(options)
    text = load_text(
        options.text,
        model.tokenizer,
        blocks=options.blocks,
        block_length=options.block_length,
        held_out_blocks=options.held_out_blocks,
        seed=options.seed,
    )
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
    options.out.write_text(study.to_json(), encoding="utf-8")
    print(analysis.verdict())
    print(f"Study of {len(analysis.masks)} masks written to {options.out}")


def _measure(game: LayerGame, settings: AnalysisSettings):
    from tqdm import tqdm

    result = None
    progress: AnalysisProgress
    with tqdm(desc="Measuring layer masks", unit="mask", dynamic_ncols=True) as bar:
        for progress in run(game, settings, partial=False):
            bar.total = progress.total
            bar.update(progress.done - bar.n)
            result = progress.analysis or result
    return result


def _accuracy(options: argparse.Namespace) -> None:
    if options.out and not options.out.parent.is_dir():
        raise LayerShapError(f"There is no folder {options.out.parent} to write the results to.")
    model = _model(options)
    players, dropped = parse_cut("--drop", options.drop, model.n_layers)
    limit = options.limit or None
    results = _answer(
        compare_accuracy(
            model,
            leave_out(players.count, dropped),
            options.tasks,
            limit=limit,
            tasks_folder=options.tasks_folder,
            seed=options.seed,
        )
    )
    print(_table(results))
    if options.out:
        document = {
            "model": asdict(model.info),
            "dropped": players.labels(dropped),
            "limit": limit,
            "seed": options.seed,
            "versions": {**installed_versions(), "lm_eval": version("lm_eval")},
            "results": [{**asdict(result), "change": result.change} for result in results],
        }
        options.out.write_text(json.dumps(document, indent=1), encoding="utf-8")
        print(f"Accuracy written to {options.out}")


def _answer(steps: Iterator[AccuracyProgress]) -> tuple[TaskAccuracy, ...]:
    from tqdm import tqdm

    step = AccuracyProgress("")
    with tqdm(unit="question", dynamic_ncols=True) as bar:
        for step in steps:
            bar.set_description(step.stage, refresh=False)
            bar.total = step.total or None
            bar.update(step.done - bar.n)
    return step.results


def _table(results: Sequence[TaskAccuracy]) -> str:
    """Shares in percent, each with its standard error."""
    rows = [("task", "metric", "full", "pruned", "change", "questions")]
    for r in results:
        rows.append(
            (
                r.label,
                r.metric,
                f"{100 * r.full:.1f} ± {100 * r.full_error:.1f}",
                f"{100 * r.pruned:.1f} ± {100 * r.pruned_error:.1f}",
                f"{100 * r.change:+.1f} ± {100 * r.change_error:.1f}",
                f"{r.questions:,}",
            )
        )
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if place < 2 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join([*lines, "Percent of the questions, ± standard error."])


def _print_stage(stage: str, fraction: float | None) -> None:
    print(stage if fraction is None else f"{stage} {fraction:.0%}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
