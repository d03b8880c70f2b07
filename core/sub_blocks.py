"""Find the attention and the MLP branch of decoder blocks by what they do, and silence either.

A block adds two branches to the residual stream, one after the other. Attention is the part without
which no token sees another; the MLP is the part without which, attention silenced too, the block
hands its input on unchanged. A silenced part answers zeros, which add nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from core.blocks import BlockCall, hidden_of
from core.errors import LayerShapError

# By so many roundings of the usual value a token may move that does not see what changed.
ROUNDINGS = 2


@dataclass(frozen=True)
class Part:
    """What a child of a block returned on a probe: `width` of its last axis, and whatever follows
    the tensor in a tuple, None where it is a bare tensor."""

    width: int
    returned: tuple[Any, ...] | None


@dataclass(frozen=True)
class Branches:
    """The branches of one block.

    `attention` and `mlp` name the children that serve that branch only, each with what it returns;
    silencing them all is silencing the branch.
    """

    attention: Mapping[str, Part]
    mlp: Mapping[str, Part]

    @property
    def both(self) -> tuple[Mapping[str, Part], Mapping[str, Part]]:
        return self.attention, self.mlp


class Silenced(nn.Module):
    """In the place of a part that was dropped: zeros of its output's shape, at no cost.

    The part itself is remembered, but is no child: its weights are not among the model's.
    """

    def __init__(self, part: nn.Module, described: Part) -> None:
        super().__init__()
        object.__setattr__(self, "part", part)
        self.described = described

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor))
        shape = (*given.shape[:-1], self.described.width)
        zeros = given.new_zeros(1).expand(shape)
        returned = self.described.returned
        return zeros if returned is None else (zeros, *returned)


def silence(block: nn.Module, parts: Mapping[str, Part]) -> nn.Module:
    """The block with these children silenced, weights shared; the original is untouched."""
    changed = copy.copy(block)
    changed._modules = dict(block._modules)
    for name, described in parts.items():
        changed._modules[name] = Silenced(block._modules[name], described)
    return changed


@torch.inference_mode()
def find_branches(
    blocks: Sequence[nn.Module], state: Tensor, calls: Sequence[BlockCall]
) -> tuple[Branches, ...]:
    """Each block's branches, found by running it on a probe.

    Args:
        blocks: in order.
        state: what enters the first one, [1, tokens, hidden]. All are run on it: states deep in a
            model are larger, and what an attention adds to them is nearer to their rounding.
        calls: what else the model passes to each.

    Raises:
        LayerShapError: some block does not consist of two branches, one after the other.
    """
    found = []
    for number, (block, call) in enumerate(zip(blocks, calls, strict=True)):
        branches = _Probe(block, state, call).branches()
        if branches is None:
            raise LayerShapError(
                f"Block {number} ({type(block).__name__}) does not consist of an attention and an "
                "MLP branch, one after the other, so its parts cannot be dropped separately; "
                "choose whole layers as players."
            )
        found.append(branches)
    return tuple(found)


def halves(block: nn.Module, branches: Branches) -> tuple[nn.Module, nn.Module]:
    """A block as two steps, first its attention alone and then its MLP alone; weights shared."""
    return silence(block, branches.mlp), silence(block, branches.attention)


class _Probe:
    """One block on one hidden state."""

    def __init__(self, block: nn.Module, state: Tensor, call: BlockCall) -> None:
        self._block, self._state, self._call = block, state, call
        self._parts: dict[str, Part] = {}
        hooks = [
            child.register_forward_hook(self._note(name)) for name, child in block.named_children()
        ]
        try:
            self._output = self._run(block)
        finally:
            for hook in hooks:
                hook.remove()

    def branches(self) -> Branches | None:
        """What the block consists of; None where it is not attention, then MLP."""
        attention = self._largest(
            name for name in self._parts if self._is_pointwise(self._without(name))
        )
        if attention is None or self._is_pointwise(self._block):
            return None
        mlp = self._largest(
            name for name in self._parts if self._is_identity(self._without(attention, name))
        )
        if mlp is None or mlp == attention:
            return None
        found = Branches(self._serving(attention), self._serving(mlp))
        if set(found.attention) & set(found.mlp):
            return None
        first, second = halves(self._block, found)
        after_attention = self._run(first)
        same = torch.equal(self._run(second, after_attention), self._output)
        return found if same else None

    def _note(self, name: str) -> Any:
        def note(module: nn.Module, args: tuple, output: Any) -> None:
            tensor = output[0] if isinstance(output, tuple) and output else output
            if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
                return
            rest = None if isinstance(output, Tensor) else (None,) * (len(output) - 1)
            self._parts[name] = Part(tensor.shape[-1], rest)

        return note

    def _run(self, block: nn.Module, state: Tensor | None = None) -> Tensor:
        given = self._state if state is None else state
        return hidden_of(block(given, *self._call.args, **self._call.kwargs))

    def _without(self, *names: str) -> nn.Module:
        return silence(self._block, {name: self._parts[name] for name in names})

    def _is_pointwise(self, block: nn.Module) -> bool:
        """Whether later tokens do not see that the first one is another."""
        if not self._works(block):
            return False
        changed = self._state.clone()
        changed[:, 0] = self._state[:, 1]
        before, after = self._run(block)[:, 1:].float(), self._run(block, changed)[:, 1:].float()
        # Experts are given tokens in batches, whose sizes move the last digits. Means, because in
        # some models a few numbers are so large that what an attention adds is less than they are
        # rounded by.
        rounding = ROUNDINGS * torch.finfo(self._state.dtype).eps
        return bool((before - after).abs().mean() <= rounding * before.abs().mean())

    def _is_identity(self, block: nn.Module) -> bool:
        return self._works(block) and torch.equal(self._run(block), self._state)

    def _works(self, block: nn.Module) -> bool:
        try:
            return self._run(block).shape == self._state.shape
        except Exception:
            return False

    def _largest(self, names: Iterable[str]) -> str | None:
        """Of several that qualify, such as a norm before the part it feeds, the heaviest."""
        weights = {
            name: sum(p.numel() for p in self._block._modules[name].parameters()) for name in names
        }
        # Of equals the later one: what it answers is what is added to the stream.
        return max(reversed(weights), key=weights.__getitem__, default=None)

    def _serving(self, branch: str) -> dict[str, Part]:
        """The children that no longer matter once `branch` is silenced, itself among them."""
        silenced = self._run(self._without(branch))
        serving = {branch: self._parts[branch]}
        for name, part in self._parts.items():
            if name == branch:
                continue
            block = self._without(branch, name)
            if self._works(block) and torch.equal(self._run(block), silenced):
                serving[name] = part
        return serving
