"""Attention and MLP as players of their own, against whole layers, at equal resources saved.

The texts of `methods.py` with the same options, so what it measured is in the cache. For every
resource (parameters, key/value cache, time to write a token) and every depth, the table compares
sets that save as much as so many whole layers: the best row of whole layers on held-out text, and
what the search over parts chose for that resource. Speed-ups are measured on the pruned models.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).parents[2]))

from splits import add_options, games

from core.allocator import keep_freed_memory
from core.baselines import finish, greedy
from core.footprint import measure_speeds
from core.loading import load_model
from core.masks import leave_out
from core.methods import search_parts
from core.players import Players
from core.pruning import prune
from core.resources import RESOURCES, Resources, measure_resources
from core.selection import best_sets


def main() -> None:
    keep_freed_memory()
    options = _options()
    model = load_model(options.model)
    players = model.players("sub-blocks")
    resources = measure_resources(model, players)
    _describe(resources)
    rows = []
    chosen: dict[str, tuple[tuple[int, ...], ...]] = {}
    for split, (game, held_out) in enumerate(games(options, model, "sub-blocks")):
        started = time.monotonic()
        deepest = max(options.dropped)
        whole = {
            "whole layers, search": best_sets(game.whole_layers, deepest),
            "whole layers, greedy": finish(greedy(game.whole_layers, deepest)),
        }
        frontiers = {
            name: [players.of_layers(layers) for layers in frontier.sets]
            for name, frontier in whole.items()
        }
        evaluations = {name: frontier.evaluations[-1] for name, frontier in whole.items()}
        for resource in RESOURCES:
            found = finish(search_parts(game, deepest, resources, resource))
            frontiers[found.method] = list(found.sets)
            evaluations[found.method] = found.evaluations[-1]
        for name, sets in frontiers.items():
            chosen.setdefault(name, tuple(sets))
            for depth in options.dropped:
                dropped = sets[depth - 1]
                loss = held_out.losses(leave_out(players.count, dropped))[0]
                saved = {resource: resources.saved(resource, dropped) for resource in RESOURCES}
                rows.append({"split": split, "method": name, "depth": depth, "loss": loss, **saved})
            print(f"split {split}, {name} ({evaluations[name]} evaluations): ", end="")
            print(*(players.labels(sets[depth - 1]) for depth in options.dropped), sep=" | ")
        print(f"split {split}: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    _report(pd.DataFrame(rows))
    if options.timed:
        _report_speeds(model, players, chosen, options.dropped)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser)
    parser.add_argument("--timed", action=argparse.BooleanOptionalAction, default=True)
    return parser.parse_args()


def _describe(resources: Resources) -> None:
    for resource in RESOURCES:
        attention, mlp = (resources.worth(resource)[branch::2].mean() for branch in (0, 1))
        print(f"{resource}: an attention is worth {attention:.2f} of a layer, an MLP {mlp:.2f}")


def _report(table: pd.DataFrame) -> None:
    print("\nheld-out perplexity, geometric mean over splits")
    means = table.pivot_table(index="method", columns="depth", values="loss", sort=False)
    print(np.exp(means).round(2).to_string())
    for resource in RESOURCES:
        print(f"\n{resource} saved, mean share")
        shares = table.pivot_table(index="method", columns="depth", values=resource, sort=False)
        print((100 * shares).round(1).to_string())
    print("\nparts against the better row of whole layers at equal depth, paired: % ± s.e.")
    losses = table.pivot(index=["method", "split"], columns="depth", values="loss")
    whole = np.minimum(*(losses.loc[f"whole layers, {how}"] for how in ("search", "greedy")))
    paired = {}
    for name in losses.index.get_level_values("method").unique():
        difference = losses.loc[name] - whole
        error = difference.std(ddof=1) / np.sqrt(len(difference))
        paired[name] = [
            f"{100 * np.expm1(mean):+.1f} ± {100 * spread:.1f}"
            for mean, spread in zip(difference.mean(), error, strict=True)
        ]
    print(pd.DataFrame(paired, index=losses.columns).T.to_string())


def _report_speeds(model, players: Players, chosen, depths) -> None:
    print("\nmeasured speed-up of writing, sets of the first split")
    table = {}
    for depth in depths:
        cuts = [prune(model, leave_out(players.count, sets[depth - 1])) for sets in chosen.values()]
        full, *pruned = measure_speeds([model, *cuts], prompt_tokens=64, new_tokens=24, repeats=6)
        table[depth] = [f"{speed.decode / full.decode:.2f}" for speed in pruned]
    print(pd.DataFrame(table, index=list(chosen)).to_string())


if __name__ == "__main__":
    main()
