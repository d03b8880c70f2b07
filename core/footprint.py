"""What a model costs: parameters, memory, and measured speed."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from core.models import LayeredModel


@dataclass(frozen=True)
class Footprint:
    """A model's size; `cache_bytes` is per token of context, None where there is no such cache."""

    parameters: int
    weight_bytes: int
    cache_bytes: int | None


@dataclass(frozen=True)
class Speed:
    """Measured tokens per second: reading a prompt, and writing one token after another.

    Of the fastest of several runs: what else a machine does can only slow a run down.
    """

    prefill: float
    decode: float


def footprint(model: LayeredModel) -> Footprint:
    """A model's parameters and bytes; shared weights count once."""
    parameters = list(model.module.parameters())
    return Footprint(
        parameters=sum(p.numel() for p in parameters),
        weight_bytes=sum(p.numel() * p.element_size() for p in parameters),
        cache_bytes=_cache_bytes_per_token(model),
    )


@torch.inference_mode()
def _cache_bytes_per_token(model: LayeredModel) -> int | None:
    """Measured, not looked up: how much the model's own key/value cache grows with a token."""
    sizes = []
    for length in (2, 3):
        tokens = torch.arange(length, device=model.device).unsqueeze(0)
        cache = getattr(model.module(input_ids=tokens, use_cache=True), "past_key_values", None)
        if cache is None:
            return None
        sizes.append(
            sum(
                tensor.numel() * tensor.element_size()
                for layer in getattr(cache, "layers", ())
                for tensor in (getattr(layer, "keys", None), getattr(layer, "values", None))
                if isinstance(tensor, torch.Tensor)
            )
        )
    return (sizes[1] - sizes[0]) or None


def measure_speed(
    full: LayeredModel,
    pruned: LayeredModel,
    *,
    prompt_tokens: int = 128,
    new_tokens: int = 16,
    repeats: int = 4,
    stop: Callable[[], bool] | None = None,
) -> tuple[Speed, Speed]:
    """Time both models in turn on the same work; the fastest of `repeats`, after a warm-up.

    The two alternate, so that whatever else the machine does falls on both. A prompt that would
    not leave room for the new tokens in the context is shortened.
    """
    context = full.info.context_length
    if context is not None:
        prompt_tokens = max(1, min(prompt_tokens, context - new_tokens - 1))
    seconds: dict[int, list[tuple[float, float]]] = {0: [], 1: []}
    for repeat in range(repeats + 1):
        for which, model in enumerate((full, pruned)):
            measured = _time_generation(model, prompt_tokens, new_tokens)
            if repeat:
                seconds[which].append(measured)
        if repeat and stop and stop():
            break
    first, second = (
        Speed(
            prefill=prompt_tokens / min(prefill for prefill, _ in times),
            decode=new_tokens / min(decode for _, decode in times),
        )
        for times in seconds.values()
    )
    return first, second


@torch.inference_mode()
def _time_generation(
    model: LayeredModel, prompt_tokens: int, new_tokens: int
) -> tuple[float, float]:
    """Seconds until the first token of one generation, and from there until the last."""
    from transformers import StoppingCriteria, StoppingCriteriaList

    moments: list[float] = []

    class Clock(StoppingCriteria):
        def __call__(self, input_ids: Any, scores: Any, **_: Any) -> torch.Tensor:
            moments.append(_now(model))
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    vocabulary = model.module.get_input_embeddings().weight.shape[0]
    prompt = (torch.arange(prompt_tokens, device=model.device) % vocabulary).unsqueeze(0)
    start = _now(model)
    model.module.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        min_new_tokens=new_tokens + 1,
        max_new_tokens=new_tokens + 1,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
        stopping_criteria=StoppingCriteriaList([Clock()]),
    )
    return moments[0] - start, moments[-1] - moments[0]


def _now(model: LayeredModel) -> float:
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
