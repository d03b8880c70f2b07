"""How many evaluations a trustworthy ranking takes: ours, the published surrogate, and shapiq's.

Every method plays the same game, layers of a real model, and pays for every coalition it asks for.
Each is compared with a reference of its own target, estimated from a large budget of masks that no
method saw: ours with the operating-range contribution, the published surrogate with the same
contribution over the published strata, shapiq's approximators with the Shapley value. The
reference's own reliability is the agreement of two estimates from half of its masks each.

All evaluations are cached, so a run that was stopped goes on from there.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import shapiq
from scipy.stats import spearmanr

sys.path.insert(0, str(Path(__file__).parents[2]))

from core.allocator import keep_freed_memory
from core.cache import EvaluationCache
from core.estimates import estimate
from core.game import LayerGame
from core.loading import load_model
from core.masks import default_strata, published_strata, sample_masks
from core.surrogate import fit_surrogate
from core.text import load_text

REFERENCE_SEED, PUBLISHED_SEED = 1000, 2000
# Layers below the operating range hold little utility: fewer masks are enough there.
REFERENCE_BELOW = 0.125
PUBLISHED_BASES = 4000
TOP = 6

APPROXIMATORS: dict[str, Callable] = {
    "shapiq permutation": lambda n, seed: shapiq.PermutationSamplingSV(n, random_state=seed),
    "shapiq SVARM": lambda n, seed: shapiq.SVARM(n, random_state=seed),
    "shapiq KernelSHAP": lambda n, seed: shapiq.KernelSHAP(n, random_state=seed),
    "shapiq ProxySPEX": lambda n, seed: shapiq.ProxySPEX(
        n=n, index="SV", max_order=1, random_state=seed
    ),
}


def main() -> None:
    keep_freed_memory()
    options = _options()
    model = load_model(options.model)
    text = load_text("bundled", model.tokenizer, blocks=options.blocks, block_length=options.length)
    game = LayerGame(model, text.calibration, EvaluationCache(options.cache))
    n = game.players.count
    unseen, reference = _reference(game, options.reference)
    rows = []
    for seed in range(options.seeds):
        for budget in options.budgets:
            rows.append(_ours(game, budget, seed, unseen, reference["operating range"]))
            print(rows[-1], flush=True)
    target = reference["published strata"]
    for budget in (*options.budgets, options.published):
        for seed in range(options.seeds if budget < options.published else 1):
            rows.append(_published(game, budget, seed, options, unseen, target))
            print(rows[-1], flush=True)
    for name, build in APPROXIMATORS.items():
        for seed in range(options.seeds):
            for budget in options.budgets:
                values, used = _approximated(game, build(n, seed), budget)
                scores = _scores(values, reference["Shapley"])
                rows.append({"method": name, "budget": budget, "used": used, **scores})
                print(rows[-1], flush=True)
    table = pd.DataFrame(rows).groupby(["method", "budget"], sort=False).mean(numeric_only=True)
    print(f"\n{model.info.name}, {options.blocks} blocks of {options.length} tokens")
    print(f"means over {options.seeds} seeds")
    print(table.round(3).to_string())


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--block-length", dest="length", type=int, default=128)
    parser.add_argument("--reference", type=int, default=4000, help="masks behind the reference")
    parser.add_argument("--budgets", type=int, nargs="+", default=[64, 128, 256, 512, 1024])
    parser.add_argument("--published", type=int, default=8000, help="the paper's own budget")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--cache", default=None, help="folder; by default the user's")
    return parser.parse_args()


def _reference(game, count):
    """Unseen masks with their utilities, and the reference values of each target."""
    n = game.players.count
    operating = default_strata(n)
    below = tuple(range(operating[-1]))
    masks = np.concatenate(
        [
            sample_masks(n, operating, count, REFERENCE_SEED),
            sample_masks(n, below, round(count * REFERENCE_BELOW), REFERENCE_SEED),
        ]
    )
    losses = _measured(game, masks, "reference")
    values = np.exp(game.full_loss - losses)
    whole = _reference_values(game, masks, losses)
    rng = np.random.default_rng(REFERENCE_SEED)
    half = rng.permutation(len(masks)) < len(masks) // 2
    halves = [_reference_values(game, masks[part], losses[part]) for part in (half, ~half)]
    for name in whole:
        scores = _scores(halves[0][name], halves[1][name])
        print(f"reference {name}: its halves agree at {scores}", flush=True)
    kept = masks.sum(axis=1)
    inside = (kept >= operating[-1]) & (kept < n - 1)
    return (masks[inside], values[inside]), whole


def _reference_values(game, masks, losses):
    n = game.players.count
    estimates = estimate(masks, losses, game.full_loss, strata=range(n), surrogate="ensemble")
    by_size = estimates.shapley.by_size
    strata = published_strata(n)
    # A base mask of k layers has s = k − 1 others where the layer is kept and k where it is not.
    published = sum(
        kept / n * by_size[:, kept - 1] + (n - kept) / n * by_size[:, kept] for kept in strata
    )
    return {
        "operating range": by_size[:, default_strata(n)[-1] :].mean(axis=1),
        "published strata": published / len(strata),
        "Shapley": by_size.mean(axis=1),
    }


def _measured(game, masks, name):
    losses = np.empty(len(masks))
    started = time.monotonic()
    for done, (row, loss) in enumerate(game.measure(masks), 1):
        losses[row] = loss
        if done % 500 == 0:
            print(f"{name}: {done} of {len(masks)}, {time.monotonic() - started:.0f} s", flush=True)
    return losses


def _ours(game, budget, seed, unseen, reference):
    n = game.players.count
    strata = default_strata(n)
    masks = sample_masks(n, strata, budget, seed)
    losses = _measured(game, masks, "ours")
    started = time.monotonic()
    estimates = estimate(masks, losses, game.full_loss, strata=strata, seed=seed)
    seconds = time.monotonic() - started
    scores = _scores(estimates.operating_range.values, reference)
    r2 = _r2(estimates.surrogate, unseen)
    row = {"method": "ours", "budget": budget, "used": len(masks), **scores, "r2": r2}
    return row | {"estimation seconds": seconds}


def _published(game, budget, seed, options, unseen, reference):
    """The paper's surrogate and its estimator: no correction by what was measured."""
    n = game.players.count
    strata = published_strata(n)
    everything = sample_masks(n, strata, options.published, PUBLISHED_SEED)
    masks = everything[seed * budget : (seed + 1) * budget]
    losses = _measured(game, masks, "published")
    surrogate = fit_surrogate(masks, losses - game.full_loss, kind="published", seed=seed)
    bases = sample_masks(n, strata, PUBLISHED_BASES, seed)
    values = np.zeros(n)
    for layer in range(n):
        with_layer, without = bases.copy(), bases.copy()
        with_layer[:, layer], without[:, layer] = True, False
        gains = np.exp(-surrogate.predict(with_layer)) - np.exp(-surrogate.predict(without))
        values[layer] = gains.mean()
    scores = _scores(values, reference)
    r2 = _r2(surrogate, unseen)
    return {"method": "published", "budget": budget, "used": len(masks), **scores, "r2": r2}


def _approximated(game, approximator, budget):
    asked: set[bytes] = set()

    def play(coalitions):
        coalitions = np.asarray(coalitions, dtype=bool)
        asked.update(mask.tobytes() for mask in coalitions)
        return game.value(coalitions)

    result = approximator.approximate(budget, play)
    return result.get_n_order_values(1), len(asked)


def _r2(surrogate, unseen):
    masks, values = unseen
    predicted = np.exp(-surrogate.predict(masks))
    return 1 - ((values - predicted) ** 2).sum() / ((values - values.mean()) ** 2).sum()


def _scores(values, reference):
    lowest, truth = np.argsort(values)[:TOP], np.argsort(reference)[:TOP]
    return {
        "spearman": float(spearmanr(values, reference).statistic),
        f"lowest {TOP} shared": len(np.intersect1d(lowest, truth)) / TOP,
    }


if __name__ == "__main__":
    main()
