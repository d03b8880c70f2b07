"""Which model, text and cut a command is about."""

from __future__ import annotations

import argparse
import sys

from core.loading import DEVICES, DTYPES
from core.models import LayeredModel
from core.saving import load_pruned
from core.text import TextBlocks, load_text

DROP_HELP = "layers, such as 13,17; 12a is the attention of layer 12 alone, 12m its MLP"


def add_model(parser: argparse.ArgumentParser) -> None:
    """Options that name a model."""
    parser.add_argument("--model", default="bundled", help="bundled, Hub id, folder or .gguf")
    parser.add_argument("--revision", help="branch, tag or commit of a Hub id")
    parser.add_argument("--device", default="auto", choices=DEVICES)
    parser.add_argument("--dtype", default="auto", choices=DTYPES)


def add_text(parser: argparse.ArgumentParser) -> None:
    """Options that name a text and say how it is cut."""
    parser.add_argument("--text", default="bundled", help="bundled, a file, or a Hub data set")
    parser.add_argument("--blocks", type=int, default=10, help="calibration blocks")
    parser.add_argument("--block-length", type=int, default=128, help="tokens per block")
    parser.add_argument("--held-out-blocks", type=int)


def the_model(
    options: argparse.Namespace, device: str | None = None, dtype: str | None = None
) -> LayeredModel:
    """The model that the options name, on another device or in another dtype if one is given."""
    return load_pruned(
        options.model,
        revision=options.revision,
        device=device or options.device,
        dtype=dtype or options.dtype,
        progress=_print_stage,
    )


def the_text(options: argparse.Namespace, model: LayeredModel) -> TextBlocks:
    """The text that the options name, tokenised for the model."""
    return load_text(
        options.text,
        model.tokenizer,
        blocks=options.blocks,
        block_length=options.block_length,
        held_out_blocks=options.held_out_blocks,
        seed=options.seed,
    )


def _print_stage(stage: str, fraction: float | None) -> None:
    print(stage if fraction is None else f"{stage} {fraction:.0%}", file=sys.stderr)
