"""A prompt continued by a model, word by word."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from threading import Event, Thread
from typing import Any

import torch

from core.errors import LayerShapError
from core.models import LayeredModel

MAX_PROMPT_CHARACTERS = 50_000


def continue_prompt(
    model: LayeredModel,
    prompt: str,
    *,
    max_new_tokens: int = 40,
    stop: Callable[[], bool] | None = None,
) -> Iterator[str]:
    """Continue a prompt greedily; yield the continuation so far, again after every word.

    Generation ends early when `stop` says so or when the iterator is closed.

    Raises:
        LayerShapError: the prompt is empty, not text, or leaves no room in the model's context.
    """
    from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

    if model.tokenizer is None:
        raise LayerShapError("This model has no tokenizer, so it cannot continue text.")
    if len(prompt) > MAX_PROMPT_CHARACTERS or not _is_text(prompt):
        raise LayerShapError(
            f"The prompt must be text of at most {MAX_PROMPT_CHARACTERS:,} characters; shorten it."
        )
    encoded = model.tokenizer(prompt, return_tensors="pt").to(model.device)
    # Some tokenizers return more, such as segment ids, which causal models refuse.
    inputs = {name: encoded[name] for name in ("input_ids", "attention_mask") if name in encoded}
    length, context = inputs["input_ids"].shape[1], model.info.context_length
    if length == 0:
        raise LayerShapError("The prompt is empty; type the beginning of a text.")
    if context is not None and length + max_new_tokens > context:
        raise LayerShapError(
            f"The prompt has {length} tokens; with {max_new_tokens} new ones that is more than "
            f"this model's context of {context}; shorten it or ask for fewer."
        )

    abandoned = Event()

    class Stop(StoppingCriteria):
        def __call__(self, input_ids: Any, scores: Any, **_: Any) -> torch.Tensor:
            stopped = abandoned.is_set() or bool(stop and stop())
            return torch.full((len(input_ids),), stopped, device=input_ids.device)

    streamer = TextIteratorStreamer(model.tokenizer, skip_prompt=True, skip_special_tokens=True)
    failures: list[Exception] = []

    def generate() -> None:
        try:
            model.module.generate(
                **inputs,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                streamer=streamer,
                stopping_criteria=StoppingCriteriaList([Stop()]),
                pad_token_id=model.tokenizer.pad_token_id or model.tokenizer.eos_token_id,
            )
        except Exception as error:
            failures.append(error)
            streamer.end()

    thread = Thread(target=generate, daemon=True)
    thread.start()
    text = ""
    try:
        for piece in streamer:
            text += piece
            yield text
    finally:
        abandoned.set()
        thread.join()
    if failures:
        raise failures[0]


def _is_text(prompt: str) -> bool:
    """Whether there is no half of a surrogate pair in it, which no tokenizer takes."""
    try:
        prompt.encode()
    except UnicodeEncodeError:
        return False
    return True
