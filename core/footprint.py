"""What a model costs: parameters, memory, and measured speed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from core.models import LayeredModel
from core.quantization import held_tensors


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
    held = held_tensors(model.module).values() if model.info.quantization else ()
    return Footprint(
        parameters=model.info.parameters,
        weight_bytes=sum(tensor.nbytes for tensor in held or model.module.parameters()),
        cache_bytes=sum(cache_bytes_by_layer(model)) or None,
    )


@torch.inference_mode()
def cache_bytes_by_layer(model: LayeredModel) -> tuple[int, ...]:
    """Bytes by which each layer's key/value cache grows with a token; empty without such a cache.

    Measured on the model's own cache, not looked up.
    """
    sizes = []
    for length in (2, 3):
        tokens = torch.arange(length, device=model.device).unsqueeze(0)
        cache = getattr(model.module(input_ids=tokens, use_cache=True), "past_key_values", None)
        sizes.append([_cached_bytes(layer) for layer in getattr(cache, "layers", ())])
    return tuple(after - before for before, after in zip(*sizes, strict=True))


def _cached_bytes(layer: Any) -> int:
    tensors = (getattr(layer, "keys", None), getattr(layer, "values", None))
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))


def measure_speeds(
    models: Sequence[LayeredModel],
    *,
    prompt_tokens: int = 128,
    new_tokens: int = 16,
    repeats: int = 4,
    stop: Callable[[], bool] | None = None,
) -> list[Speed]:
    """Time versions of one model in turn on the same work; the fastest of `repeats`, warmed up.

    They alternate, so that whatever else the machine does falls on all. A prompt that would not
    leave room for the new tokens in the context is shortened.
    """
    context = models[0].info.context_length
    if context is not None:
        prompt_tokens = max(1, min(prompt_tokens, context - new_tokens - 1))
    seconds: list[list[tuple[float, float]]] = [[] for _ in models]
    for repeat in range(repeats + 1):
        for times, model in zip(seconds, models, strict=True):
            measured = _time_generation(model, prompt_tokens, new_tokens)
            if repeat:
                times.append(measured)
        if repeat and stop and stop():
            break
    return [
        Speed(
            prefill=prompt_tokens / min(prefill for prefill, _ in times),
            decode=new_tokens / min(decode for _, decode in times),
        )
        for times in seconds
    ]


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
