"""How far from the best possible sets LayerShap's search ends.

Exhaustively: on a model of few layers (`small_model.py` trains one) every set of 1 … n/2 layers is
measured on several calibration texts, and what methods choose is held against the best there is.

By annealing: on a model of many layers simulated annealing looks for better sets of a few sizes,
from LayerShap's set, from greedy's and from a random one, `--anneal` new evaluations each. Its
moves are swaps that a Gaussian process of all losses known so far likes, so that a few evaluations
go far. The best set it finds need not be the best there is: the true gap may be larger.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parents[2]))

from core import baselines
from core.allocator import keep_freed_memory
from core.baselines import Frontier, finish
from core.cache import EvaluationCache
from core.game import LayerGame
from core.loading import load_model
from core.masks import Masks, all_masks, dropped_players, leave_out
from core.selection import METHOD, WORST_EXCESS, Kernel, SetProcess, best_sets, greedy_evaluations
from core.text import load_text

Floats = NDArray[np.float64]
DropSet = frozenset[int]

# More layers than this have too many sets to measure them all.
MOST_LAYERS = 16
BEST, OURS, GREEDY = "Best possible", METHOD, "Greedy re-evaluation"
# Temperatures in nats at an annealing run's start and end, swaps looked at per move, and moves per
# evaluation before a run that finds nothing new gives up.
HOT, COLD = 0.05, 0.005
PROPOSALS, MOVES = 64, 20


def main() -> None:
    keep_freed_memory()
    options = _options()
    if options.model:
        _exhaustive(options)
    if options.anneal:
        _annealed(options)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="measured exhaustively; by default that part is left out")
    parser.add_argument("--text", default="bundled", help="for that model")
    parser.add_argument("--texts", type=int, default=5, help="calibration texts for that model")
    parser.add_argument("--blocks", type=int, default=10)
    parser.add_argument("--block-length", dest="length", type=int, default=128)
    parser.add_argument("--anneal", type=int, default=20, help="0 leaves that part out")
    parser.add_argument("--annealed-model", default="bundled")
    parser.add_argument("--dropped", type=int, nargs="+", default=[3, 6, 9, 12], help="there")
    parser.add_argument("--cache", default=None, help="folder; by default the user's")
    return parser.parse_args()


def _games(
    name: str, source: str, count: int, options: argparse.Namespace
) -> Iterator[tuple[LayerGame, LayerGame]]:
    """Calibration and held-out games of the first `count` texts, those of `methods.py`."""
    model, blocks = load_model(name), options.blocks
    total = options.texts * blocks
    text = load_text(
        source,
        model.tokenizer,
        blocks=total,
        block_length=options.length,
        held_out_blocks=total,
    )
    cache = EvaluationCache(options.cache)
    for number in range(count):
        part = slice(number * blocks, (number + 1) * blocks)
        yield (
            LayerGame(model, text.calibration[part], cache),
            LayerGame(model, text.held_out[part], cache),
        )


def _losses(game: LayerGame, frontier: Frontier) -> Floats:
    return game.losses(np.array([leave_out(game.players.count, s) for s in frontier.sets]))


def _exhaustive(options: argparse.Namespace) -> None:
    rows = []
    full = []
    for number, (calibration, held_out) in enumerate(
        _games(options.model, options.text, options.texts, options)
    ):
        n = calibration.players.count
        if n > MOST_LAYERS:
            raise SystemExit(f"{options.model} has {n} layers; more than {MOST_LAYERS} is too many")
        deepest = n // 2
        masks = _by_size(n)[1 : deepest + 1]
        every = np.split(
            calibration.losses(np.concatenate(masks)), np.cumsum([len(m) for m in masks])[:-1]
        )
        best = Frontier(
            BEST,
            tuple(dropped_players(m[e.argmin()]) for m, e in zip(masks, every, strict=True)),
            tuple(np.cumsum([len(e) for e in every]).tolist()),
        )
        full.append((calibration.full_loss, held_out.full_loss))
        judged_best = _losses(held_out, best)
        for frontier in (best, *_frontiers(calibration, deepest)):
            name = f"{frontier.method} ({frontier.evaluations[-1]})"
            chosen, judged = _losses(calibration, frontier), _losses(held_out, frontier)
            for k in range(1, deepest + 1):
                loss, sets = chosen[k - 1], every[k - 1]
                rank = 1 + int((sets < loss).sum())
                extra = judged[k - 1] - judged_best[k - 1]
                rows.append((number, name, k, loss, loss - sets.min(), rank, extra, len(sets)))
        print(f"text {number}: {sum(map(len, every))} sets", file=sys.stderr, flush=True)
    columns = ["text", "method", "k", "loss", "excess", "rank", "held-out", "sets"]
    _report_exhaustive(pd.DataFrame(rows, columns=columns), np.mean(full, axis=0), options)


def _by_size(n: int) -> list[Masks]:
    """Every mask, by number of layers dropped."""
    masks = all_masks(n)
    dropped = (~masks).sum(axis=1)
    return [masks[dropped == k] for k in range(n + 1)]


def _frontiers(game: LayerGame, deepest: int) -> Iterator[Frontier]:
    yield best_sets(game, deepest)
    yield best_sets(game, deepest, greedy_evaluations(game.players.count, deepest))
    for method in (baselines.greedy, baselines.quadratic, baselines.leave_one_out):
        yield finish(method(game, deepest))


def _report_exhaustive(table: pd.DataFrame, full: Floats, options: argparse.Namespace) -> None:
    print(f"{options.model}: {options.texts} texts of {options.blocks} x {options.length} tokens")
    print("full model: calibration perplexity {:.2f}, held-out {:.2f}".format(*np.exp(full)))
    best = table[table.method.str.startswith(BEST)].groupby("k")
    print(
        "\nbest possible sets: calibration perplexity (geometric mean), and how many sets there are"
    )
    print(
        pd.DataFrame({"perplexity": np.exp(best.loss.mean()).round(2), "sets": best.sets.first()})
    )
    print("\nbelow, a method's evaluations are in brackets behind its name")
    print("\ncalibration perplexity above the best possible set's, %: mean (worst) over texts")
    table["%"] = 100 * np.expm1(table.excess)
    print(_pivot(table, "%", lambda x: f"{x.mean():.2f} ({x.max():.2f})"))
    print("\nrank among all sets of the size: mean (worst) over texts")
    print(_pivot(table, "rank", lambda x: f"{x.mean():.1f} ({x.max()})"))
    print("\nheld-out perplexity above that of the best calibration set, %: mean ± s.e. over texts")
    table["%"] = 100 * np.expm1(table["held-out"])
    print(_pivot(table, "%", lambda x: f"{x.mean():+.2f} ± {x.std() / np.sqrt(len(x)):.2f}"))
    print(
        "\nmean over texts and sizes: calibration excess %, held-out excess %, share best possible"
    )
    summary = {
        name: (
            100 * np.expm1(rows.excess).mean(),
            100 * np.expm1(rows["held-out"]).mean(),
            (rows["rank"] == 1).mean(),
        )
        for name, rows in table.groupby("method", sort=False)
    }
    columns = ["calibration", "held-out", "best"]
    print(pd.DataFrame(summary, index=columns).T.round(2).to_string())


def _pivot(table: pd.DataFrame, values: str, show) -> str:
    pivot = table.pivot_table(index="method", columns="k", values=values, sort=False, aggfunc=show)
    return pivot.to_string()


class _Recorded:
    """A game that remembers what was measured: layers dropped → loss in nats."""

    def __init__(self, game: LayerGame) -> None:
        self.players = game.players
        self.known: dict[DropSet, float] = {}
        self._game = game

    def measure(self, masks: Masks) -> Iterator[tuple[int, float]]:
        for row, loss in self._game.measure(masks):
            self.known[frozenset(dropped_players(masks[row]))] = loss
            yield row, loss

    def loss(self, dropped: DropSet) -> float:
        if dropped not in self.known:
            for _ in self.measure(leave_out(self.players.count, dropped)[None]):
                pass
        return self.known[dropped]

    def best(self, size: int) -> DropSet:
        return min((s for s in self.known if len(s) == size), key=self.known.__getitem__)

    def process(self, kernel: Kernel | None = None) -> SetProcess:
        """A Gaussian process of all that is known, its kernel fitted where none is given."""
        rows = _indicators(list(self.known), self.players.count)
        losses = np.array(list(self.known.values())) - self.known[frozenset()]
        losses = np.minimum(losses, WORST_EXCESS)
        dropping = rows.any(axis=1)
        if kernel is None:
            return SetProcess.fit(Kernel(), self.players, rows[dropping], losses[dropping])
        return SetProcess(kernel, self.players, rows[dropping], losses[dropping])


def _indicators(sets: list[DropSet], n: int) -> Floats:
    rows = np.zeros((len(sets), n))
    for row, dropped in enumerate(sets):
        rows[row, list(dropped)] = 1.0
    return rows


def _annealed(options: argparse.Namespace) -> None:
    [(calibration, held_out)] = _games(options.annealed_model, "bundled", 1, options)
    game, deepest = _Recorded(calibration), max(options.dropped)
    game.loss(frozenset())
    chosen = {OURS: best_sets(game, deepest), GREEDY: finish(baselines.greedy(game, deepest))}
    rng = np.random.default_rng(0)
    rows = []
    for k in options.dropped:
        starts = {name: frozenset(frontier.sets[k - 1]) for name, frontier in chosen.items()}
        starts["random"] = frozenset(rng.choice(game.players.count, k, replace=False).tolist())
        found = {}
        for name, start in starts.items():
            found[name], spent = _anneal(game, start, options.anneal, rng)
            print(f"{k} dropped, from {name}: {spent} evaluations", file=sys.stderr, flush=True)
        best = game.best(k)
        sets = {
            **{name: starts[name] for name in chosen},
            **{f"annealed from {name}": reached for name, reached in found.items()},
            "best found by anything": best,
        }
        for name, dropped in sets.items():
            above = 100 * np.expm1(game.loss(dropped) - game.loss(best))
            mask = leave_out(game.players.count, dropped)
            held = float(held_out.perplexity(mask)[0])
            rows.append((k, name, np.exp(game.loss(dropped)), above, held, sorted(dropped)))
    _report_annealed(rows, chosen, len(game.known), options)


def _anneal(
    game: _Recorded, start: DropSet, evaluations: int, rng: np.random.Generator
) -> tuple[DropSet, int]:
    """The best set on a run of annealing from `start`, and how many new sets it measured."""
    before = len(game.known)
    current = best = start
    loss = game.loss(start)
    process = game.process()
    for _ in range(MOVES * evaluations):
        spent = len(game.known) - before
        if spent >= evaluations:
            break
        temperature = HOT * (COLD / HOT) ** (spent / evaluations)
        proposed = _proposal(process, current, game.players.count, rng)
        new = proposed not in game.known
        proposed_loss = game.loss(proposed)
        if new:
            process = game.process(process.kernel)
        if rng.random() < np.exp(min(0.0, (loss - proposed_loss) / temperature)):
            current, loss = proposed, proposed_loss
        best = min(best, current, key=game.loss)
    return best, len(game.known) - before


def _proposal(process: SetProcess, current: DropSet, n: int, rng: np.random.Generator) -> DropSet:
    """Of several random swaps of one layer or two, the one that a draw from the process likes."""
    inside, outside = sorted(current), sorted(set(range(n)) - current)
    near = []
    for _ in range(PROPOSALS):
        count = min(int(rng.integers(1, 3)), len(inside), len(outside))
        leaving = rng.choice(inside, count, replace=False).tolist()
        coming = rng.choice(outside, count, replace=False).tolist()
        near.append((current - frozenset(leaving)) | frozenset(coming))
    rows = _indicators(near, n)
    drawn = process.mean(rows) + process.spread(rows) * rng.normal(size=len(near))
    return near[int(np.argmin(drawn))]


def _report_annealed(
    rows: list, chosen: dict[str, Frontier], known: int, options: argparse.Namespace
) -> None:
    print(f"\n{options.annealed_model}: a text of {options.blocks} x {options.length} tokens")
    spent = [f"{name} {frontier.evaluations[-1]}" for name, frontier in chosen.items()]
    print(f"evaluations: {', '.join(spent)}, together with annealing {known}")
    columns = ["k", "set", "calibration", "above best found, %", "held-out", "layers"]
    print(pd.DataFrame(rows, columns=columns).round(2).to_string(index=False))


if __name__ == "__main__":
    main()
