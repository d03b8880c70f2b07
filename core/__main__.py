"""The command line: `python -m core analyze --model … --evaluations … --out study.json`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from core.allocator import keep_freed_memory
from core.analysis import AnalysisProgress, AnalysisSettings, run
from core.errors import LayerShapError
from core.game import LayerGame
from core.models import DEVICES, DTYPES
from core.players import PLAYER_KINDS
from core.pruning import load_pruned
from core.study import Study, TextInfo
from core.text import load_text


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
    analyze.add_argument("--model", default="bundled", help="bundled, Hub id, folder or .gguf")
    analyze.add_argument("--revision", help="branch, tag or commit of a Hub id")
    analyze.add_argument("--device", default="auto", choices=DEVICES)
    analyze.add_argument("--dtype", default="auto", choices=DTYPES)
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
    return parser


def _analyze(options: argparse.Namespace) -> None:
    keep_freed_memory()
    if not options.out.parent.is_dir():
        raise LayerShapError(f"There is no folder {options.out.parent} to write the study to.")
    model = load_pruned(
        options.model,
        revision=options.revision,
        device=options.device,
        dtype=options.dtype,
        progress=_print_stage,
    )
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


def _print_stage(stage: str, fraction: float | None) -> None:
    print(stage if fraction is None else f"{stage} {fraction:.0%}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
