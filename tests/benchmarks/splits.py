"""Splits of one text that share no block, each with calibration and held-out blocks of its own."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from core.cache import EvaluationCache
from core.game import LayerGame
from core.models import LayeredModel
from core.players import PlayerKind
from core.text import load_text


def add_options(parser: argparse.ArgumentParser) -> None:
    """Which model and text, how many splits of it, and what is dropped."""
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--text", default="bundled", help="as the dashboard takes it")
    parser.add_argument("--splits", type=int, default=5, help="how many of them to run")
    parser.add_argument("--of-splits", type=int, default=5, help="that the text is cut for")
    parser.add_argument("--blocks", type=int, default=10)
    parser.add_argument("--held-out-blocks", dest="held_out", type=int, help="as --blocks")
    parser.add_argument("--block-length", dest="length", type=int, default=128)
    parser.add_argument("--dropped", type=int, nargs="+", default=[3, 6, 9, 12])
    parser.add_argument("--cache", default=None, help="folder; by default the user's")


def games(
    options: argparse.Namespace, model: LayeredModel, players: PlayerKind = "blocks"
) -> Iterator[tuple[LayerGame, LayerGame]]:
    """The calibration and the held-out game of each split to run, through one cache."""
    held_out = options.held_out or options.blocks
    count = max(options.of_splits, options.splits)
    text = load_text(
        options.text,
        model.tokenizer,
        blocks=count * options.blocks,
        block_length=options.length,
        held_out_blocks=count * held_out,
    )
    cache = EvaluationCache(options.cache)
    for split in range(options.splits):
        choosing = text.calibration[split * options.blocks : (split + 1) * options.blocks]
        judging = text.held_out[split * held_out : (split + 1) * held_out]
        yield (
            LayerGame(model, choosing, cache, players=players),
            LayerGame(model, judging, cache, players=players),
        )
