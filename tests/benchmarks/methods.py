"""Which layers to drop: LayerShap's search against the methods people use, over disjoint splits.

Every split has calibration and held-out blocks of its own. All methods choose on the calibration
text, through one cache; what they choose is judged on the held-out text. "Shapley contribution" is
the paper's rule on contributions from `--shapley` evaluations.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parents[2]))

from core.allocator import keep_freed_memory
from core.analysis import analyze
from core.baselines import Frontier, finish
from core.cache import EvaluationCache
from core.game import LayerGame
from core.masks import leave_out
from core.methods import KINDS
from core.models import load_model
from core.selection import METHOD, default_budget, search
from core.text import load_text

SHAPLEY = "Shapley contribution"
# Smaller budgets, as shares of the search's own, at which it says what it would choose.
SNAPSHOTS = (0.5, 0.7)


def main() -> None:
    keep_freed_memory()
    options = _options()
    model = load_model(options.model)
    blocks = options.blocks
    text = load_text(
        options.text,
        model.tokenizer,
        blocks=options.splits * blocks,
        block_length=options.length,
        held_out_blocks=options.splits * blocks,
    )
    cache = EvaluationCache(options.cache)
    rows = []
    for split in range(options.splits):
        part = slice(split * blocks, (split + 1) * blocks)
        calibration = LayerGame(model, text.calibration[part], cache)
        held_out = LayerGame(model, text.held_out[part], cache)
        started = time.monotonic()
        for frontier in _frontiers(calibration, options):
            name = f"{frontier.method} ({frontier.evaluations[-1]} evaluations)"
            losses = _losses(held_out, frontier)
            fitted = _losses(calibration, frontier)
            for k in options.dropped:
                rows.append((split, name, k, losses[k - 1], fitted[k - 1]))
            seconds = time.monotonic() - started
            print(f"split {split}, {name}: {seconds:.0f} s", file=sys.stderr, flush=True)
        rows.append((split, "Full model", 0, held_out.full_loss, calibration.full_loss))
    table = pd.DataFrame(rows, columns=["split", "method", "k", "held-out", "calibration"])
    _report(table, options)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--text", default="bundled", help="as the dashboard takes it")
    parser.add_argument("--splits", type=int, default=5)
    parser.add_argument("--blocks", type=int, default=10)
    parser.add_argument("--block-length", dest="length", type=int, default=128)
    parser.add_argument("--dropped", type=int, nargs="+", default=[3, 6, 9, 12])
    parser.add_argument("--shapley", type=int, default=512, help="0 leaves the paper's rule out")
    parser.add_argument("--methods", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--cache", default=None, help="folder; by default the user's")
    return parser.parse_args()


def _frontiers(game: LayerGame, options: argparse.Namespace) -> Iterator[Frontier]:
    deepest = max(options.dropped)
    for name in options.methods:
        if name == METHOD:
            budget = default_budget(game.n_layers, deepest)
            yield from finish(
                search(game, deepest, budget, [round(share * budget) for share in SNAPSHOTS])
            )
        else:
            yield finish(KINDS[name].run(game, deepest))
    if options.shapley:
        order = np.argsort(analyze(game, options.shapley).contributions, kind="stable")
        yield Frontier.of_ranking(SHAPLEY, iter(order), deepest, options.shapley)


def _losses(game: LayerGame, frontier: Frontier) -> NDArray[np.float64]:
    return game.losses(np.array([leave_out(game.n_layers, s) for s in frontier.sets]))


def _report(table: pd.DataFrame, options: argparse.Namespace) -> None:
    full = table[table.k == 0]
    print(f"{options.splits} splits of {options.blocks} x {options.length} tokens")
    print(f"full model: held-out perplexity {np.exp(full['held-out'].mean()):.2f}")
    cuts = table[table.k > 0]
    for text in ("held-out", "calibration"):
        print(f"\n{text} perplexity, geometric mean over splits")
        means = np.exp(cuts.pivot_table(index="method", columns="k", values=text, sort=False))
        print(means.round(2).to_string())
    print("\nheld-out perplexity against the search's whole budget, paired over splits: % ± s.e.")
    losses = cuts.pivot(index=["method", "split"], columns="k", values="held-out")
    names = list(dict.fromkeys(cuts.method))
    ours = [name for name in names if name.startswith(METHOD)][-1]
    paired = {}
    for name in names:
        difference = losses.loc[name] - losses.loc[ours]
        error = difference.std(ddof=1) / np.sqrt(len(difference))
        paired[name] = [
            f"{100 * np.expm1(mean):+.1f} ± {100 * spread:.1f}"
            for mean, spread in zip(difference.mean(), error, strict=True)
        ]
    print(pd.DataFrame(paired, index=losses.columns).T.to_string())


if __name__ == "__main__":
    main()
