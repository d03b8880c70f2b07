"""Find a causal LM's decoder blocks by what they do, not by what they are called.

The blocks are the one `ModuleList` whose members pass a residual stream along: each is called
once, in order, and is given exactly what the one before it returned. Everything around them
(embedding, masks, rotary tables, final norm, head) is left to the model's own code, run as a
*shell* in which stand-ins take the blocks' places.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from core.errors import LayerShapError

PROBE_ROWS, PROBE_TOKENS = 2, 8


@dataclass(frozen=True)
class BlockStack:
    """The decoder blocks of a model.

    Attributes:
        path: the name of the `ModuleList` that holds them.
        blocks: in order.
        returns: per block, what it returned on a probe with the hidden state taken out: `None` when
            a block returns the bare hidden state, else the tuple's remaining members.
        state_bytes: what passes from block to block per token.
    """

    path: str
    blocks: tuple[nn.Module, ...]
    returns: tuple[tuple[Any, ...] | None, ...]
    state_bytes: int


def hidden_of(output: Any) -> Tensor:
    """The hidden state in a block's output, which is a tensor or a tuple that starts with one."""
    return output if isinstance(output, Tensor) else output[0]


def find_blocks(module: nn.Module) -> BlockStack:
    """Locate the decoder blocks by running `module` once on a few tokens.

    Raises:
        LayerShapError: no `ModuleList` carries the residual stream from block to block.
    """
    lists = {
        path: tuple(child)
        for path, child in module.named_modules()
        if isinstance(child, nn.ModuleList) and len(child)
    }
    trace = _trace_calls(module, {block for blocks in lists.values() for block in blocks})
    stacks = [
        BlockStack(
            path,
            blocks,
            tuple(_template(trace[block][0][1]) for block in blocks),
            trace[blocks[0]][0][0].nbytes // (PROBE_ROWS * PROBE_TOKENS),
        )
        for path, blocks in lists.items()
        if _is_residual_chain(blocks, trace)
    ]
    if not stacks:
        raise LayerShapError(
            f"The decoder blocks of {type(module).__name__} could not be found: no list of modules "
            "passes one hidden state from block to block, so its layers cannot be skipped one by "
            "one. Choose a decoder-only language model."
        )
    return max(stacks, key=lambda stack: _count_parameters(stack.blocks))


@dataclass(frozen=True)
class TakenApart:
    """Copies of a model's parts, weights shared, that run one by one.

    The shell is everything around the blocks, with stand-ins in their places.
    """

    shell: nn.Module
    stand_ins: StandIns
    blocks: tuple[nn.Module, ...]


def take_apart(
    module: nn.Module, stack: BlockStack, prepare: Callable[[nn.Module], None]
) -> TakenApart:
    """Copy `module` but for its weights, `prepare` the copy, and part its blocks from the rest.

    The original is untouched, so it stays usable from other threads.
    """
    shell = copy_sharing_weights(module)
    prepare(shell)
    stand_ins = StandIns(stack)
    parent_path, _, name = stack.path.rpartition(".")
    parent = shell.get_submodule(parent_path)
    blocks = tuple(getattr(parent, name))
    setattr(parent, name, nn.ModuleList(stand_ins.modules))
    return TakenApart(shell, stand_ins, blocks)


def copy_sharing_weights(module: nn.Module) -> nn.Module:
    """Copy the module tree and every plain attribute; parameters and buffers stay the same."""
    shared = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    return copy.deepcopy(module, shared)


@dataclass(frozen=True)
class BlockCall:
    """What the model passed to a block besides the hidden state."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class StandIns:
    """Modules in the blocks' places that record the calls made to them, or inject a state."""

    def __init__(self, stack: BlockStack) -> None:
        self.calls: list[BlockCall] = []
        self.entry: Tensor | None = None
        self._local = threading.local()
        self._recording = threading.Lock()
        self.modules = [
            _StandIn(block, returned, self)
            for block, returned in zip(stack.blocks, stack.returns, strict=True)
        ]

    @contextmanager
    def injecting(self, state: Tensor) -> Iterator[None]:
        """In this thread, let the blocks appear to return `state` [rows, tokens, ...]."""
        self._local.state = state
        try:
            yield
        finally:
            self._local.state = None

    def record(self, run: Callable[[], Any]) -> tuple[Tensor, list[BlockCall]]:
        """Run the shell; return what enters the first block, and every block's call."""
        with self._recording:
            self.calls, self.entry = [], None
            run()
            calls, entry = self.calls, self.entry
            self.calls, self.entry = [], None
        assert entry is not None
        return entry, calls

    def passed(self, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        injected = getattr(self._local, "state", None)
        if injected is not None:
            return injected
        if self.entry is None:
            self.entry = hidden
        self.calls.append(BlockCall(args, kwargs))
        return hidden


class _StandIn(nn.Module):
    def __init__(self, block: nn.Module, returned: tuple[Any, ...] | None, owner: StandIns) -> None:
        super().__init__()
        # Past nn.Module's registration: the block must not become a child of its stand-in.
        object.__setattr__(self, "_block", block)
        object.__setattr__(self, "_owner", owner)
        self._returned = returned

    def __getattr__(self, name: str) -> Any:
        # Models read attributes such as `attention_type` off their blocks.
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._block, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden, args, kwargs = split_hidden(args, kwargs)
        hidden = self._owner.passed(hidden, args, kwargs)
        return hidden if self._returned is None else (hidden, *self._returned)


def split_hidden(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    """Separate the hidden state from a block's other arguments."""
    if args:
        return args[0], args[1:], kwargs
    rest = dict(kwargs)
    return rest.pop("hidden_states"), args, rest


def _trace_calls(
    module: nn.Module, blocks: set[nn.Module]
) -> dict[nn.Module, list[tuple[Tensor | None, Any, int]]]:
    trace: dict[nn.Module, list[tuple[Tensor | None, Any, int]]] = {b: [] for b in blocks}
    clock = iter(range(1_000_000))

    def note(block: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        given = args[0] if args else kwargs.get("hidden_states")
        trace[block].append((given, output, next(clock)))

    hooks = [block.register_forward_hook(note, with_kwargs=True) for block in blocks]
    try:
        device = module.get_input_embeddings().weight.device
        tokens = torch.arange(PROBE_TOKENS, device=device).expand(PROBE_ROWS, -1)
        with torch.inference_mode():
            module(input_ids=tokens, use_cache=False)
    except Exception as error:
        raise LayerShapError(
            f"{type(module).__name__} could not be run on a few tokens of text "
            f"({type(error).__name__}: {error}); choose a decoder-only language model."
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    return trace


def _is_residual_chain(blocks: tuple[nn.Module, ...], trace: dict) -> bool:
    if any(len(trace[block]) != 1 for block in blocks):
        return False
    calls = [trace[block][0] for block in blocks]
    if any(not _is_hidden(given) for given, _, _ in calls):
        return False
    outputs = []
    for given, output, _ in calls:
        first = output[0] if isinstance(output, tuple | list) and output else output
        if not _is_hidden(first) or first.shape != given.shape:
            return False
        outputs.append(first)
    times = [time for _, _, time in calls]
    return times == sorted(times) and all(
        given is output or torch.equal(given.to(output.device), output)
        for output, (given, _, _) in zip(outputs, calls[1:], strict=False)
    )


def _is_hidden(value: Any) -> bool:
    """Whether this is a state of several rows of text, [rows, tokens, ...]."""
    return (
        isinstance(value, Tensor)
        and value.ndim >= 3
        and len(value) == PROBE_ROWS
        and value.is_floating_point()
    )


def _template(output: Any) -> tuple[Any, ...] | None:
    return None if isinstance(output, Tensor) else tuple(output[1:])


def _count_parameters(blocks: tuple[nn.Module, ...]) -> int:
    return sum(p.numel() for block in blocks for p in block.parameters())
