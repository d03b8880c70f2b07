"""Which layers to drop: LayerShap's search against the methods people use, over disjoint splits.

Every split has calibration and held-out blocks of its own. All methods choose on the calibration
text, through one cache; what they choose is judged on the held-out text. "Shapley contribution" is
the paper's rule on contributions from `--shapley` evaluations.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parents[2]))

from splits import add_options, games

from core.allocator import keep_freed_memory
from core.analysis import analyze
from core.baselines import Frontier, finish
from core.game import LayerGame
from core.loading import load_model
from core.masks import leave_out
from core.methods import KINDS
from core.selection import METHOD, default_budget, search

# The paper's rule on the same masks, with our surrogate and with the paper's.
SHAPLEY = {"Shapley contribution": "auto", "Shapley, published surrogate": "published"}
# Smaller budgets, as shares of the search's own, at which it says what it would choose.
SNAPSHOTS = (0.5, 0.7)


def main() -> None:
    keep_freed_memory()
    options = _options()
    model = load_model(options.model)
    rows = []
    for split, (calibration, held_out) in enumerate(games(options, model)):
        started = time.monotonic()
        for frontier in _frontiers(calibration, options):
            name = f"{frontier.method} ({frontier.evaluations[-1]} evaluations)"
            losses = _losses(held_out, frontier, options.dropped)
            fitted = _losses(calibration, frontier, options.dropped)
            rows += [
                (split, name, *row) for row in zip(options.dropped, losses, fitted, strict=True)
            ]
            seconds = time.monotonic() - started
            print(f"split {split}, {name}: {seconds:.0f} s", file=sys.stderr, flush=True)
        rows.append((split, "Full model", 0, held_out.full_loss, calibration.full_loss))
    table = pd.DataFrame(rows, columns=["split", "method", "k", "held-out", "calibration"])
    _report(table, options)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser)
    parser.add_argument("--shapley", type=int, default=512, help="0 leaves the paper's rule out")
    parser.add_argument("--methods", nargs="+", default=list(KINDS), choices=list(KINDS))
    return parser.parse_args()


def _frontiers(game: LayerGame, options: argparse.Namespace) -> Iterator[Frontier]:
    deepest = max(options.dropped)
    for name in options.methods:
        if name == METHOD:
            budget = default_budget(game.players.count, deepest)
            yield from finish(
                search(game, deepest, budget, [round(share * budget) for share in SNAPSHOTS])
            )
        else:
            yield finish(KINDS[name].run(game, deepest))
    for name, surrogate in SHAPLEY.items() if options.shapley else ():
        contributions = analyze(game, options.shapley, surrogate=surrogate).contributions
        order = np.argsort(contributions, kind="stable")
        yield Frontier.of_ranking(name, iter(order), deepest, options.shapley)


def _losses(game: LayerGame, frontier: Frontier, depths: Sequence[int]) -> NDArray[np.float64]:
    sets = [frontier.sets[depth - 1] for depth in depths]
    return game.losses(np.array([leave_out(game.players.count, s) for s in sets]))


def _report(table: pd.DataFrame, options: argparse.Namespace) -> None:
    full = table[table.k == 0]
    print(
        f"{options.splits} splits of {options.blocks} x {options.length} calibration and "
        f"{options.held_out or options.blocks} x {options.length} held-out tokens"
    )
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
