"""The methods people use today: each gives a set of layers to drop for every depth of cut.

All see the same calibration text through the same game, and so share its cache; each says how many
model evaluations it needed.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from core.game import Game, LayerGame
from core.masks import Masks, leave_out
from core.surrogate import finite_excess

Floats = NDArray[np.float64]
T = TypeVar("T")


@dataclass(frozen=True)
class Frontier:
    """What a method drops at every depth of cut.

    Attributes:
        method: its name.
        sets: `sets[k - 1]` holds the k layers it drops, ascending.
        evaluations: `evaluations[k - 1]` counts the model evaluations behind that set, without
            the unpruned model's own perplexity; looking at its hidden states counts as one.
    """

    method: str
    sets: tuple[tuple[int, ...], ...]
    evaluations: tuple[int, ...]

    @classmethod
    def of_ranking(cls, method: str, order: Iterator[int], deepest: int, cost: int) -> Frontier:
        """Nested sets: drop in `order`, everything known after `cost` evaluations."""
        layers = [int(layer) for layer in order][:deepest]
        sets = tuple(tuple(sorted(layers[: k + 1])) for k in range(deepest))
        return cls(method, sets, (cost,) * deepest)


# A method yields after each evaluation and returns its frontier.
Method = Generator[None, None, Frontier]


def finish(method: Generator[None, None, T]) -> T:
    """Run a method to its end without watching it."""
    while True:
        try:
            next(method)
        except StopIteration as end:
            return end.value


def measured(game: Game, masks: Masks) -> Generator[None, None, Floats]:
    """Losses of masks, float64 [m]; yields after each."""
    losses = np.empty(len(masks))
    for row, loss in game.measure(masks):
        losses[row] = loss
        yield
    return losses


def random_order(game: LayerGame, deepest: int, seed: int = 0) -> Method:
    """Layers in random order."""
    yield from ()
    order = np.random.default_rng(seed).permutation(game.n_players)
    return Frontier.of_ranking("Random", order, deepest, 0)


def last_layers(game: LayerGame, deepest: int) -> Method:
    """The last k layers."""
    yield from ()
    return Frontier.of_ranking("Last layers", reversed(range(game.n_players)), deepest, 0)


def weight_magnitude(game: LayerGame, deepest: int) -> Method:
    """Layers by ascending mean magnitude of their weight matrices."""
    yield from ()
    magnitudes = []
    for block in game.model.blocks:
        weights = [p.detach() for p in block.parameters() if p.ndim > 1]
        total = sum(float(w.abs().sum(dtype=torch.float32)) for w in weights)
        magnitudes.append(total / max(1, sum(w.numel() for w in weights)))
    return Frontier.of_ranking("Weight magnitude", np.argsort(magnitudes), deepest, 0)


def block_influence(game: LayerGame, deepest: int) -> Method:
    """Layers by ascending 1 − E cos(input, output) (ShortGPT, arXiv 2403.03853, equation 1)."""
    similarities = hidden_similarities(game)
    yield
    influence = 1 - np.array([similarities[i, i + 1] for i in range(game.n_players)])
    return Frontier.of_ranking("Block Influence", np.argsort(influence, kind="stable"), deepest, 1)


def angular_distance(game: LayerGame, deepest: int) -> Method:
    """The run of k layers whose input and output point most alike (arXiv 2403.17887, section 3).

    The angle is averaged over all tokens rather than read off the last one, which is less noisy.
    """
    angles = np.arccos(np.clip(hidden_similarities(game), -1, 1)) / np.pi
    yield
    sets = []
    for k in range(1, deepest + 1):
        distances = [angles[start, start + k] for start in range(game.n_players - k + 1)]
        start = int(np.argmin(distances))
        sets.append(tuple(range(start, start + k)))
    return Frontier("Angular distance", tuple(sets), (1,) * deepest)


def leave_one_out(game: LayerGame, deepest: int) -> Method:
    """Layers by ascending loss without each (Shortened LLaMA, arXiv 2402.02834)."""
    n = game.players.count
    losses = yield from measured(game, ~np.eye(n, dtype=bool))
    return Frontier.of_ranking("Leave one out", np.argsort(losses, kind="stable"), deepest, n)


def greedy(game: LayerGame, deepest: int) -> Method:
    """Drop the layer that costs least, measure all that remain, repeat (SLEB, arXiv 2402.09025)."""
    n = game.players.count
    dropped: list[int] = []
    sets, evaluations, spent = [], [], 0
    for _ in range(deepest):
        left = [layer for layer in range(n) if layer not in dropped]
        masks = np.array([leave_out(n, [*dropped, layer]) for layer in left])
        losses = yield from measured(game, masks)
        spent += len(left)
        dropped.append(left[int(np.argmin(losses))])
        sets.append(tuple(sorted(dropped)))
        evaluations.append(spent)
    return Frontier("Greedy re-evaluation", tuple(sets), tuple(evaluations))


def quadratic(game: LayerGame, deepest: int) -> Method:
    """Greedy on Σ δᵢ + Σ εᵢⱼ, from the losses of all single and pair deletions.

    δᵢ is what dropping i adds to the loss, εᵢⱼ what dropping both adds beyond δᵢ + δⱼ.
    """
    n = game.players.count
    first, second = np.triu_indices(n, 1)
    single = ~np.eye(n, dtype=bool)
    masks = np.concatenate([np.ones((1, n), dtype=bool), single, single[first] & single[second]])
    losses = yield from measured(game, masks)
    excess = finite_excess(losses - losses[0])
    alone = excess[1 : n + 1]
    pairs = np.zeros((n, n))
    pairs[first, second] = excess[n + 1 :] - alone[first] - alone[second]
    pairs += pairs.T
    order: list[int] = []
    for _ in range(deepest):
        cost = alone + pairs[:, order].sum(axis=1)
        cost[order] = np.inf
        order.append(int(np.argmin(cost)))
    return Frontier.of_ranking("Pairs (quadratic)", iter(order), deepest, n + len(first))


@torch.inference_mode()
def hidden_similarities(game: LayerGame) -> Floats:
    """Mean cosine of the residual stream before layers i and j, [n + 1, n + 1].

    Position n is the last layer's output. Costs one forward pass of the unpruned model.
    """
    states = [_unit(state) for state in game.evaluator.hidden_states()]
    size = len(states)
    similarities = np.eye(size)
    for i in range(size):
        for j in range(i + 1, size):
            cosine = float((states[i] * states[j]).sum(-1).mean())
            similarities[i, j] = similarities[j, i] = cosine
    return similarities


def _unit(state: Tensor) -> Tensor:
    return torch.nn.functional.normalize(state.float(), dim=-1)
