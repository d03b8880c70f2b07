"""The command line: `python -m core analyze …` measures layers, `heal …` drops some and heals."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path
from threading import Event
from typing import Any

from torch import Tensor

from core.allocator import keep_freed_memory
from core.analysis import AnalysisProgress, AnalysisSettings, run
from core.errors import LayerShapError
from core.game import LayerGame
from core.healing import Healing, HealingSettings, heal, save_healed
from core.masks import leave_out
from core.models import DEVICES, DTYPES, LayeredModel, load_model
from core.pruning import prune
from core.study import Study, TextInfo
from core.text import TextBlocks, load_text, training_blocks


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
    sources = _source_options()
    analyze = commands.add_parser(
        "analyze", parents=[sources], help="measure a model's layers, save a study"
    )
    analyze.set_defaults(command=_analyze)
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
    _add_heal(commands, sources)
    return parser


def _source_options() -> argparse.ArgumentParser:
    """Which model and text, for every command that needs them."""
    sources = argparse.ArgumentParser(add_help=False)
    sources.add_argument("--model", default="bundled", help="bundled, Hub id, folder or .gguf")
    sources.add_argument("--revision", help="branch, tag or commit of a Hub id")
    sources.add_argument("--device", default="auto", choices=DEVICES)
    sources.add_argument("--dtype", default="auto", choices=DTYPES)
    sources.add_argument("--text", default="bundled", help="bundled, a file, or a Hub data set")
    sources.add_argument("--blocks", type=int, default=10, help="calibration blocks")
    sources.add_argument("--block-length", type=int, default=128, help="tokens per block")
    sources.add_argument("--held-out-blocks", type=int)
    return sources


def _add_heal(commands: Any, sources: argparse.ArgumentParser) -> None:
    defaults = HealingSettings()
    command = commands.add_parser(
        "heal", parents=[sources], help="drop layers, heal what is left, save it as a model"
    )
    command.set_defaults(command=_heal)
    command.add_argument(
        "--drop",
        type=lambda text: tuple(int(part) for part in text.split(",")),
        required=True,
        help="layers to drop, such as 13,17,4",
    )
    command.add_argument("--steps", type=int, default=defaults.steps)
    command.add_argument("--rank", type=int, default=defaults.rank, help="of the LoRA adapters")
    command.add_argument("--learning-rate", type=float, default=defaults.learning_rate)
    command.add_argument("--batch-blocks", type=int, default=defaults.batch_blocks)
    command.add_argument(
        "--seed",
        type=int,
        default=defaults.seed,
        help="of training and of the text's two sides: take that of the analysis",
    )
    command.add_argument("--out", type=Path, required=True, help="the folder to write")


def _analyze(options: argparse.Namespace) -> None:
    keep_freed_memory()
    if not options.out.parent.is_dir():
        raise LayerShapError(f"There is no folder {options.out.parent} to write the study to.")
    model, text = _load(options)
    settings = (
        AnalysisSettings.published(model.n_layers)
        if options.published
        else AnalysisSettings(
            evaluations=options.evaluations,
            seed=options.seed,
            strata=options.strata,
            utility=options.utility,
            surrogate=options.surrogate,
        )
    )
    analysis = _measure(LayerGame(model, text.calibration), settings)
    study = Study(analysis, model.info, TextInfo.of(text))
    options.out.write_text(study.to_json(), encoding="utf-8")
    print(analysis.verdict())
    print(f"Study of {len(analysis.masks)} masks written to {options.out}")


def _heal(options: argparse.Namespace) -> None:
    keep_freed_memory()
    settings = HealingSettings(
        steps=options.steps,
        rank=options.rank,
        learning_rate=options.learning_rate,
        batch_blocks=options.batch_blocks,
        seed=options.seed,
    )
    if options.out.exists():
        raise LayerShapError(f"{options.out} exists already; choose another name.")
    model, text = _load(options)
    keep = leave_out(model.n_layers, options.drop)
    training = training_blocks(
        options.text,
        model.tokenizer,
        settings.blocks_wanted,
        block_length=options.block_length,
        seed=options.seed,
    )
    healing = _train(prune(model, keep), training, text, settings, model)
    folder = save_healed(healing, model, keep, options.out)
    held_out = healing.measured.held_out
    print(
        f"Held-out perplexity: full model {held_out.full:,.2f}, pruned {held_out.pruned:,.2f}, "
        f"healed {held_out.healed:,.2f} (step {healing.kept_step} of {settings.steps}, "
        f"{healing.seconds / 60:.1f} minutes)"
    )
    print(f"Healed model written to {folder}")


def _train(
    pruned: LayeredModel,
    training: Tensor,
    text: TextBlocks,
    settings: HealingSettings,
    full: LayeredModel,
) -> Healing:
    """Heal with a progress bar; the first Ctrl-C keeps what was learnt so far."""
    from tqdm import tqdm

    interrupted = Event()

    def interrupt(*_: object) -> None:
        interrupted.set()
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        with tqdm(desc="Healing", unit="step", total=settings.steps, dynamic_ncols=True) as bar:
            for step in heal(pruned, training, text, settings, full=full, stop=interrupted.is_set):
                bar.update(step.done - bar.n)
                if step.curve.validations:
                    bar.set_postfix(loss=f"{step.curve.validations[-1][1]:.3f}")
    finally:
        signal.signal(signal.SIGINT, before)
    assert step.healing is not None
    return step.healing


def _load(options: argparse.Namespace) -> tuple[LayeredModel, TextBlocks]:
    """The model and text that the options name."""
    model = load_model(
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
    return model, text


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
