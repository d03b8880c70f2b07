"""The cooperative game: decoder blocks, or their branches, are the players; model quality is the
utility.

v(m) = PPL(full) / PPL(m) on one set of token blocks, with
PPL = exp(mean negative log-likelihood per predicted token) (arXiv 2602.07804, section 3).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from core.cache import EvaluationCache, default_cache
from core.errors import LayerShapError
from core.evaluation import Evaluator
from core.masks import Masks, mask_key
from core.models import LayeredModel
from core.players import PlayerKind, Players

if TYPE_CHECKING:
    pass

# Part of every cache key: raise it when the same mask would come out differently.
EVALUATION_VERSION = 1
# Requests for so few masks are quick: another that asks for the same waits for them, at most so
# long. Nobody waits for a long one, whose masks come in an order of its own.
FEW_MASKS = 8
PATIENCE_SECONDS = 60

Losses = NDArray[np.float64]


class Game(Protocol):
    """What estimation needs of a game: players and, per coalition, a loss in nats."""

    players: Players

    def measure(self, masks: Masks) -> Iterator[tuple[int, float]]:
        """Yield (row of `masks`, loss in nats) in whatever order they come; `inf` if not finite."""
        ...


class MaskEvaluator(Protocol):
    """What a game needs of whatever evaluates its masks; see `core.evaluation.Evaluator`."""

    @property
    def device(self) -> str:
        """The kind of device that evaluates, "cpu", "cuda" or "mps"."""
        ...

    def losses(self, masks: Masks) -> Iterator[tuple[int, float]]: ...

    def hidden_states(self) -> list[Tensor]: ...

    def of_whole_layers(self) -> MaskEvaluator: ...


class LayerGame:
    """The layer game of a model on token blocks, every evaluation cached on disk.

    Args:
        model: the language model.
        tokens: LongTensor [blocks, length] of token ids.
        cache: where evaluations are kept; by default the user's cache folder.
        players: "blocks", or "sub-blocks" for attention and MLP of each separately.
        evaluator: what evaluates masks of these players on these tokens; by default an `Evaluator`
            in this process.

    Raises:
        LayerShapError: the tokens do not fit the model, or it has no such players.
    """

    def __init__(
        self,
        model: LayeredModel,
        tokens: Tensor,
        cache: EvaluationCache | None = None,
        *,
        players: PlayerKind = "blocks",
        evaluator: MaskEvaluator | None = None,
    ) -> None:
        _check_tokens(model, tokens)
        self.model = model
        self.tokens = tokens
        self.players = model.players(players)
        self.cache = cache if cache is not None else default_cache()
        self.evaluator = evaluator or Evaluator(model, tokens, players=players)
        self._prefix = "/".join(
            (
                f"v{EVALUATION_VERSION}",
                model.info.fingerprint,
                text_fingerprint(tokens),
                model.info.dtype,
                self.evaluator.device,
                "",
            )
        )

    @property
    def n_players(self) -> int:
        return self.players.count

    @property
    def full_loss(self) -> float:
        """Mean NLL of the unpruned model, nats per predicted token."""
        return float(self.losses(np.ones((1, self.n_players), dtype=bool))[0])

    @cached_property
    def whole_layers(self) -> LayerGame:
        """The game of the same model, text and cache whose players are whole blocks."""
        evaluator = self.evaluator.of_whole_layers()
        return LayerGame(self.model, self.tokens, self.cache, evaluator=evaluator)

    def measure(self, masks: ArrayLike) -> Iterator[tuple[int, float]]:
        """Yield (row of `masks`, mean NLL in nats) as they become known, cached ones first.

        Each loss is on disk before it is yielded, so ending the iteration early loses nothing.

        Raises:
            LayerShapError: masks of the wrong shape.
        """
        rows = check_masks(masks, self.n_players)
        distinct, inverse = np.unique(rows, axis=0, return_inverse=True)
        keys = [self._prefix + self._key(mask) for mask in distinct]
        copies = [np.flatnonzero(inverse == row) for row in range(len(distinct))]
        missing = []
        for row, loss in enumerate(self.cache.get(keys)):
            if loss is None:
                missing.append(row)
            else:
                yield from ((int(copy), loss) for copy in copies[row])
        for offset, loss in self._shared([keys[row] for row in missing], distinct[missing]):
            yield from ((int(copy), loss) for copy in copies[missing[offset]])

    def _shared(self, keys: list[str], masks: Masks) -> Iterator[tuple[int, float]]:
        """Evaluate what is not cached, or let whoever is at it already; yield (row, loss)."""
        if len(keys) > FEW_MASKS:
            yield from self._evaluated(keys, masks)
            return
        with self.cache.claims.hold(keys) as theirs:
            # Others may have finished since the cache was asked.
            found = dict(zip(keys, self.cache.get(keys), strict=True))
            mine = [r for r, key in enumerate(keys) if key not in theirs and found[key] is None]
            yield from ((row, found[key]) for row, key in enumerate(keys) if found[key] is not None)
            yield from _renumbered(mine, self._evaluated([keys[r] for r in mine], masks[mine]))
        waited = [r for r, key in enumerate(keys) if key in theirs and found[key] is None]
        for row in waited:
            theirs[keys[row]].wait(PATIENCE_SECONDS)
        left = []
        for row, loss in zip(waited, self.cache.get(keys[r] for r in waited), strict=True):
            if loss is None:
                left.append(row)
            else:
                yield row, loss
        # Whoever held them was stopped, or is slow.
        yield from _renumbered(left, self._evaluated([keys[r] for r in left], masks[left]))

    def _evaluated(self, keys: list[str], masks: Masks) -> Iterator[tuple[int, float]]:
        if not keys:
            return
        for row, loss in self.evaluator.losses(masks):
            self.cache.put(keys[row], loss)
            yield row, loss

    def losses(self, masks: ArrayLike) -> Losses:
        """Mean NLL per predicted token, bool [m, n_players] -> float64 [m] nats; `inf` if not
        finite.

        Raises:
            LayerShapError: masks of the wrong shape.
        """
        rows = check_masks(masks, self.n_players)
        losses = np.empty(len(rows))
        for row, loss in self.measure(rows):
            losses[row] = loss
        return losses

    def perplexity(self, masks: ArrayLike) -> Losses:
        """Perplexity of each mask, bool [m, n_players] -> float64 [m]; `inf` if not finite."""
        return np.exp(self.losses(masks))

    def value(self, masks: ArrayLike) -> Losses:
        """Utility PPL(full) / PPL(mask) of each mask, bool [m, n_players] -> float64 [m].

        A mask whose loss is not finite has utility 0.
        """
        return np.exp(self.full_loss - self.losses(masks))

    def _key(self, mask: NDArray[np.bool_]) -> str:
        """A mask's part of its cache key; the same in both games where only whole blocks drop,
        because running a block's branches one by one is the same to the bit."""
        pairs = mask.reshape(-1, self.players.per_layer)
        whole = (pairs == pairs[:, :1]).all()
        return mask_key(pairs[:, 0] if whole else mask)


def _renumbered(
    rows: list[int], evaluated: Iterator[tuple[int, float]]
) -> Iterator[tuple[int, float]]:
    return ((rows[place], loss) for place, loss in evaluated)


def check_masks(masks: ArrayLike, n: int) -> Masks:
    """Masks as bool [m, n]; a single mask [n] becomes one row.

    Raises:
        LayerShapError: another shape or values other than 0 and 1.
    """
    rows = np.atleast_2d(np.asarray(masks))
    if rows.dtype != bool and not np.isin(rows, (0, 1)).all():
        raise LayerShapError("A mask holds True (kept) or False (dropped) for each player.")
    if rows.ndim != 2 or rows.shape[1] != n:
        raise LayerShapError(
            f"Masks have shape {rows.shape}; they must be [m, {n}], one column per layer or per "
            "part of one."
        )
    return rows.astype(bool)


def text_fingerprint(tokens: Tensor) -> str:
    """A hash of the token ids and their shape, 32 hex digits."""
    shape = str(tuple(tokens.shape)).encode()
    content = tokens.cpu().long().contiguous().numpy().tobytes()
    return hashlib.blake2b(shape + content, digest_size=16).hexdigest()


def _check_tokens(model: LayeredModel, tokens: Tensor) -> None:
    if tokens.ndim != 2 or tokens.shape[0] < 1 or tokens.shape[1] < 2:
        raise LayerShapError(
            f"The token blocks have shape {tuple(tokens.shape)}; they must be [blocks, length] "
            "with at least one block of two tokens."
        )
    length, context = tokens.shape[1], model.info.context_length
    if context is not None and length > context:
        raise LayerShapError(
            f"Blocks of {length} tokens are longer than this model's context of {context} tokens; "
            "choose a smaller block length."
        )
    vocabulary = model.module.get_input_embeddings().weight.shape[0]
    if int(tokens.max()) >= vocabulary or int(tokens.min()) < 0:
        raise LayerShapError(
            f"The text holds token ids outside this model's vocabulary of {vocabulary}; "
            "tokenise it with the model's own tokenizer."
        )
