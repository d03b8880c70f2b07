"""Perplexity of many masks: skip what is dropped, compute every shared prefix once.

Every player is one step of the model: a block, or one branch of a block. Two masks that agree on
their first l players have the same hidden state after step l. Masks are sorted so that common
prefixes are neighbours, and walked level by level as a prefix tree: one execution per distinct
(prefix, kept player), none for a dropped one. Work comes in *steps* of a
fixed shape (`group` states at once, the last step padded), so that a mask's value does not depend
on which other masks it was evaluated with.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import psutil
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from core.blocks import BlockCall, hidden_of
from core.errors import LayerShapError
from core.masks import Masks
from core.players import PlayerKind

if TYPE_CHECKING:
    from core.models import LayeredModel

# Tokens per step that keep the device's matrix units busy.
STEP_TOKENS = {"cpu": 1024, "mps": 4096, "cuda": 16384}
# Masks walked together, as a multiple of the group: enough that padding costs little.
CHUNK_GROUPS = 64
# Tokens whose logits are computed at once, and the share of the memory budget they may take.
HEAD_TOKENS = {"cpu": 256, "mps": 4096, "cuda": 16384}
HEAD_SHARE = 0.25
# Bytes of float32 logits at once: on a CPU few enough to stay in its cache.
SOFTMAX_BYTES = {"cpu": 4 << 20, "mps": 256 << 20, "cuda": 1 << 30}
# Share of the free memory left to everything else.
MEMORY_RESERVE = 0.4


@dataclass(frozen=True)
class Plan:
    """How an evaluation is cut up.

    Attributes:
        rows: blocks of text evaluated at once.
        group: masks' states in one step.
        chunk: masks walked together.
        head_rows: rows of final states, of one mask or of several, whose logits are computed at
            once.
        memory_budget: bytes that hidden states and logits may take.
    """

    rows: int
    group: int
    chunk: int
    head_rows: int
    memory_budget: int


class Evaluator:
    """Mean negative log-likelihood of masks on one set of token blocks.

    Args:
        model: the language model.
        tokens: LongTensor [blocks, length]; every block predicts its tokens 1 … length - 1.
        memory_budget: bytes that hidden states may take; by default what is free, less a reserve.
        group: masks' states per step execution; by default what the device needs to be busy.
        players: what a column of a mask stands for.
        memory_share: of the free memory, where several evaluators share one device.

    Safe to use from several threads at once.
    """

    def __init__(
        self,
        model: LayeredModel,
        tokens: Tensor,
        *,
        memory_budget: int | None = None,
        group: int | None = None,
        players: PlayerKind = "blocks",
        memory_share: float = 1.0,
    ) -> None:
        self.model = model
        self.tokens = tokens.to(model.device)
        self.players = model.players(players)
        self._parts = model.taken_apart
        self._steps = model.steps(players)
        # Of a model that is spread over several GPUs, where each step's weights are.
        self._homes = [next(step.parameters()).device for step in self._steps]
        budget = memory_budget or int(
            _free_memory(model.device) * (1 - MEMORY_RESERVE) * memory_share
        )
        self.plan = _plan(model, self.tokens, self.players.count, budget, group)
        self._recordings: dict[tuple[int, int], tuple[Tensor, list[BlockCall]]] = {}
        self._recording = threading.Lock()
        self.layer_executions = 0
        """Executions of blocks, or of branches, so far, in units of one mask's whole text."""

    @property
    def device(self) -> str:
        """The kind of device that evaluates, "cpu", "cuda" or "mps"."""
        return self.model.device.type

    def of_whole_layers(self) -> Evaluator:
        """The evaluator of the same model and text whose players are whole blocks."""
        return Evaluator(self.model, self.tokens)

    def losses(self, masks: Masks) -> Iterator[tuple[int, float]]:
        """Evaluate masks, bool [m, players]; yield (row of `masks`, mean NLL) as they finish.

        A non-finite loss is yielded as `inf`.

        Raises:
            LayerShapError: one mask does not fit in the device's memory.
        """
        pending = prefix_order(masks)
        while len(pending):
            done = 0
            try:
                for row, loss in self._walk(masks, pending):
                    done += 1
                    yield row, loss
            except torch.OutOfMemoryError as error:
                self._shrink(error)
            pending = pending[done:]

    def hidden_states(self) -> list[Tensor]:
        """The unpruned model's residual stream before each player and after the last.

        players + 1 tensors [blocks, length, hidden].
        """
        shards = []
        for start in range(0, len(self.tokens), self.plan.rows):
            states = [self.recording(start, 1)[0]]
            for player in range(self.players.count):
                states += self.run_step(player, states[-1:], start)
            shards.append(states)
        return [torch.cat(parts) for parts in zip(*shards, strict=True)]

    def _walk(self, masks: Masks, order: NDArray[np.intp]) -> Iterator[tuple[int, float]]:
        totals = np.zeros(len(order))
        for start in range(0, len(self.tokens), self.plan.rows):
            last_shard = start + self.plan.rows >= len(self.tokens)
            walk = _PrefixWalk(self, start)
            for first in range(0, len(order), self.plan.chunk):
                part = order[first : first + self.plan.chunk]
                losses = self._summed_losses(walk.advance(masks[part]), start)
                for offset, (row, loss) in enumerate(zip(part, losses, strict=True), first):
                    totals[offset] += loss
                    if last_shard:
                        yield int(row), self._mean(totals[offset])

    def _mean(self, total: float) -> float:
        loss = total / (self.tokens.shape[0] * (self.tokens.shape[1] - 1))
        return float(loss) if np.isfinite(loss) else float("inf")

    def _summed_losses(self, states: list[Tensor], start: int) -> Iterator[float]:
        """Summed NLL of final hidden states, each [rows, length, hidden], over their tokens.

        Steps have a fixed shape: several masks' rows at once, or a part of one mask's.
        """
        rows = len(states[0])
        text = self.tokens[start : start + rows]
        together = max(1, self.plan.head_rows // rows)
        for first in range(0, len(states), together):
            step = states[first : first + together]
            step = [state.to(self._homes[-1]) for state in step]
            padded = step + [step[-1]] * (together - len(step))
            batch = padded[0] if together == 1 else torch.cat(padded)
            losses = self._row_losses(batch, text.repeat(together, 1))
            yield from losses.view(together, rows).sum(dim=1)[: len(step)].tolist()

    @torch.inference_mode()
    def _row_losses(self, state: Tensor, text: Tensor) -> Tensor:
        """Summed NLL of each row of text, float64 [rows] on the CPU."""
        losses = []
        for first in range(0, len(state), self.plan.head_rows):
            part = slice(first, first + self.plan.head_rows)
            with self._parts.stand_ins.injecting(state[part]):
                logits = self._parts.shell(input_ids=text[part], use_cache=False).logits
            losses.append(_summed_cross_entropy(logits[:, :-1], text[part, 1:]))
        return torch.cat(losses)

    @torch.inference_mode()
    def recording(self, start: int, copies: int) -> tuple[Tensor, list[BlockCall]]:
        """The embedded text, rows from `start`, and each block's call, `copies` times over."""
        with self._recording:
            if (start, copies) not in self._recordings:
                text = self.tokens[start : start + self.plan.rows].repeat(copies, 1)
                self._recordings[start, copies] = self._parts.stand_ins.record(
                    lambda: self._parts.shell(
                        input_ids=text, use_cache=False, **_no_logits(self._parts.shell)
                    )
                )
            return self._recordings[start, copies]

    @torch.inference_mode()
    def run_step(self, player: int, states: list[Tensor], start: int) -> list[Tensor]:
        """Run one player on states [rows, length, hidden], `group` of them at a time."""
        results: list[Tensor] = []
        group = self.plan.group
        call = self.recording(start, group)[1][self.players.layers[player]]
        run = self._steps[player]
        for first in range(0, len(states), group):
            # States that skipped different steps may come from different GPUs.
            step = [state.to(self._homes[player]) for state in states[first : first + group]]
            padded = step + [step[-1]] * (group - len(step))
            batch = padded[0] if group == 1 else torch.cat(padded)
            output = hidden_of(run(batch, *call.args, **call.kwargs))
            results += [output] if group == 1 else output.chunk(group)[: len(step)]
        share = len(states[0]) / len(self.tokens) if states else 0.0
        self.layer_executions += len(states) * share
        return results

    def _shrink(self, error: Exception) -> None:
        plan = self.plan
        if plan.group == plan.chunk == plan.rows == plan.head_rows == 1:
            raise LayerShapError(
                "Even one block of text does not fit in the device's memory beside this model; "
                "use shorter blocks, a smaller dtype, or the CPU."
            ) from error
        self._recordings.clear()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.plan = Plan(
            rows=plan.rows if plan.chunk > 1 else max(1, plan.rows // 2),
            group=max(1, plan.group // 2),
            chunk=max(1, plan.chunk // 2),
            head_rows=max(1, plan.head_rows // 2),
            memory_budget=plan.memory_budget,
        )


def prefix_order(masks: Masks) -> NDArray[np.intp]:
    """The rows of masks, bool [m, n], sorted so that masks with common prefixes are neighbours."""
    return np.lexsort(masks.T[::-1])[::-1]


def _summed_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Each row's summed NLL, float64 [rows] on the CPU; logits [rows, tokens, vocabulary]."""
    flat = logits.flatten(0, 1)
    wanted = targets.flatten().to(flat.device)
    step = max(1, SOFTMAX_BYTES.get(flat.device.type, 256 << 20) // (4 * flat.shape[1]))
    per_token = torch.cat(
        [
            F.cross_entropy(part.float(), target, reduction="none")
            for part, target in zip(flat.split(step), wanted.split(step), strict=True)
        ]
    )
    # Not every device knows float64.
    return per_token.cpu().view(targets.shape).sum(dim=1, dtype=torch.float64)


class _PrefixWalk:
    """Walks sorted masks through the prefix tree, keeping the last mask's path of states."""

    def __init__(self, evaluator: Evaluator, start: int) -> None:
        self._evaluator = evaluator
        self._start = start
        self._last: NDArray[np.bool_] | None = None
        self._path: list[Tensor] = []

    def advance(self, masks: Masks) -> list[Tensor]:
        """The final hidden state of each mask, bool [c, n], which sort after all before them."""
        evaluator, start = self._evaluator, self._start
        n = masks.shape[1]
        shared = 0 if self._last is None else _common_prefix(self._last, masks[0])
        root = self._path[0] if self._path else evaluator.recording(start, 1)[0]
        states = [root]
        node = np.zeros(len(masks), dtype=np.intp)
        path = [root]
        for player in range(n):
            keys, first, child = np.unique(
                node * 2 + ~masks[:, player], return_index=True, return_inverse=True
            )
            parents = [states[key // 2] for key in keys]
            # Sorted masks: only the first mask's node can lie on the path walked before.
            known = child[0] if player < shared else -1
            to_run = [c for c in range(len(keys)) if masks[first[c], player] and c != known]
            outputs = evaluator.run_step(player, [parents[c] for c in to_run], start)
            states = parents
            for c, output in zip(to_run, outputs, strict=True):
                states[c] = output
            if known >= 0:
                states[known] = self._path[player + 1]
            node = child
            path.append(states[node[-1]])
        self._last, self._path = masks[-1], path
        return [states[c] for c in node]


def _common_prefix(a: NDArray[np.bool_], b: NDArray[np.bool_]) -> int:
    different = np.flatnonzero(a != b)
    return int(different[0]) if len(different) else len(a)


def _plan(model: LayeredModel, tokens: Tensor, depth: int, budget: int, group: int | None) -> Plan:
    blocks, length = tokens.shape
    kind = model.device.type
    weight = next(model.module.parameters())
    row_bytes = length * model.stack.state_bytes
    # Worst case for one mask alone: a distinct state after every player, and one step in flight.
    rows = max(1, min(blocks, budget // (row_bytes * (depth + 4))))
    if model.mixes_rows:
        group = 1
    group = group or max(1, STEP_TOKENS.get(kind, 4096) // (rows * length))
    capacity = int(budget * (1 - HEAD_SHARE)) // (row_bytes * rows) - depth - 4 * group
    chunk = 1 if group == 1 else max(1, min(CHUNK_GROUPS * group, capacity // 2))
    vocabulary = model.module.get_input_embeddings().weight.shape[0]
    logits_bytes = length * vocabulary * weight.element_size()
    head_tokens = HEAD_TOKENS.get(kind, 1024)
    head_rows = max(1, min(head_tokens // length, int(budget * HEAD_SHARE) // logits_bytes))
    return Plan(rows, min(group, chunk), chunk, head_rows, budget)


def _free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def _no_logits(shell: torch.nn.Module) -> dict[str, int]:
    """Ask for one position's logits where the model can: a recording needs none."""
    parameters = inspect.signature(shell.forward).parameters
    return {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}
