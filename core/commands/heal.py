"""`python -m core heal`: drop layers, heal what is left, save it as a model."""

from __future__ import annotations

import argparse
import signal
from pathlib import Path
from threading import Event
from typing import Any

from torch import Tensor

from core.allocator import keep_freed_memory
from core.commands.sources import DROP_HELP, add_model, add_text, the_model, the_text
from core.errors import LayerShapError
from core.healing import Healing, HealingSettings, heal, save_healed
from core.masks import leave_out
from core.models import LayeredModel
from core.players import parse_cut
from core.pruning import prune
from core.text import TextBlocks, training_blocks


def add(commands: Any) -> None:
    defaults = HealingSettings()
    command = commands.add_parser(
        "heal", help="drop layers, heal what is left, save it as a model (needs peft)"
    )
    command.set_defaults(command=heal_cut)
    add_model(command)
    add_text(command)
    command.add_argument("--drop", required=True, help=DROP_HELP)
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


def heal_cut(options: argparse.Namespace) -> None:
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
    model = the_model(options)
    text = the_text(options, model)
    players, dropped = parse_cut("--drop", options.drop, model.n_layers)
    keep = leave_out(players.count, dropped)
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
