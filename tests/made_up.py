"""Made-up but realistic results of models of any depth, for figures to draw."""

from types import SimpleNamespace

import numpy as np

from core.accuracy import TaskAccuracy
from core.baselines import Frontier
from core.contributions import Contributions
from core.healing import HealingCurve
from core.interactions import Interactions
from core.methods import MethodResult, MethodsComparison, available
from core.players import Players
from core.resources import Resources
from core.study import Comparison


def contributions(players: Players, sizes: int = 12) -> Contributions:
    """First and last players worth most, some in the middle less than nothing."""
    n = players.count
    sizes = min(sizes, n)
    rng = np.random.default_rng(n)
    depth = np.linspace(-1, 1, n)
    worth = 0.35 * depth**6 + 0.05 * rng.exponential(1, n) - 0.015
    growth = np.linspace(0.2, 1.8, sizes)
    return Contributions(
        values=worth,
        errors=0.1 * np.abs(worth) + 0.004,
        sizes=np.arange(n - sizes, n),
        by_size=worth[:, None] * growth + rng.normal(0, 0.003, (n, sizes)),
        by_size_errors=np.full((n, sizes), 0.004),
        extrapolated=False,
    )


def interactions(players: Players) -> Interactions:
    """Neighbours stand in for each other; a few distant pairs need each other."""
    n = players.count
    rng = np.random.default_rng(n)
    distance = np.abs(np.arange(n)[:, None] - np.arange(n))
    values = rng.normal(0, 0.004, (n, n)) - 0.06 * np.exp(-distance / 2) * rng.random((n, n))
    values[:3] += 0.06 * rng.random((3, n))
    values = np.triu(values, 1)
    return Interactions(values + values.T, np.full((n, n), 0.02), np.arange(n - 1))


def analysis(players: Players, decades: float = 6, count: int = 300) -> SimpleNamespace:
    """As much of an analysis as the scatter shows: masks over so many decades of perplexity."""
    n = players.count
    rng = np.random.default_rng(n)
    kept = rng.integers(max(1, n // 2), n, count)
    masks = np.array([rng.permutation(n) < k for k in kept])
    measured = np.sort(rng.random(count)) * decades * np.log(10)
    predicted = measured + rng.normal(0, 0.05 * decades, count)
    return SimpleNamespace(
        players=players,
        masks=masks,
        full_loss=3.6,
        losses=3.6 + measured,
        surrogate=SimpleNamespace(measured=measured, out_of_fold=predicted),
    )


def methods(players: Players, deepest: int) -> MethodsComparison:
    """Every method there is, the worst thousands of times worse than the best."""
    n = players.count
    rng = np.random.default_rng(n)
    results = []
    spent = (n * deepest, 4 * n, n * deepest, n * (n + 1) // 2, n, 1, 1, 0, 0, 0, 256)
    for place, method in enumerate(available(players)):
        order = rng.permutation(n)
        depths = range(1, deepest + 1)
        sets = tuple(tuple(sorted(int(p) for p in order[:depth])) for depth in depths)
        slope = 4.0 if method in ("Random", "Last layers", "Weight magnitude") else 0.6
        slope *= 1 + 0.05 * place
        losses = 3.7 + slope * np.linspace(0, 1.5, deepest + 1)[1:]
        evaluations = (spent[place % len(spent)],) * deepest
        results.append(MethodResult(Frontier(method, sets, evaluations), losses, losses + 0.05))
    share = np.full(n, 1 / n)
    return MethodsComparison(
        Resources(players, 0.8 * share, share, 0.9 * share), 3.6, 3.7, tuple(results)
    )


def comparisons(players: Players, count: int = 8) -> list[Comparison]:
    """Sets tried by hand: as many layers as one third of the model."""
    rng = np.random.default_rng(players.count)
    tried = []
    for size in np.unique(np.linspace(1, players.count // 3, count).astype(int)):
        dropped = tuple(sorted(int(p) for p in rng.choice(players.count, size, replace=False)))
        held_out = 45.0 * 1.16 ** (size * 30 / players.count)
        calibration = held_out * 0.9
        tried.append(
            Comparison(
                dropped,
                calibration * 1.05,
                calibration * 0.9,
                calibration * 1.3,
                38.0,
                calibration,
                45.0,
                held_out,
                134_515_008,
                134_515_008 - 3_540_096 * int(size),
            )
        )
    return tried


def accuracies(tasks: int = 8) -> list[TaskAccuracy]:
    names = ("piqa", "arc_easy", "arc_challenge", "hellaswag", "winogrande", "openbookqa")
    names += ("boolq", "lambada_openai")
    return [
        TaskAccuracy(
            name,
            "acc_norm",
            0.4 + 0.08 * k,
            0.04,
            0.35 + 0.06 * k,
            0.04,
            0.03,
            200,
            0.5 / (1 + k % 2),
        )
        for k, name in enumerate(names[:tasks])
    ]


def healing(steps: int = 200) -> HealingCurve:
    rng = np.random.default_rng(0)
    falling = 4.2 + 1.5 * np.exp(-np.arange(steps) / 40)
    looks = range(0, steps + 1, max(1, steps // 10))
    return HealingCurve(
        tuple((falling + rng.normal(0, 0.15, steps)).tolist()),
        tuple((step, float(4.3 + 1.4 * np.exp(-step / 50) + 1e-5 * step**1.6)) for step in looks),
    )
