"""Masked evaluation against the published procedure, on the same masks, in one process.

(a) published: clone and zero a dropped block's weights, run the whole model, one mask at a time;
(b) skipping: run only the kept blocks, one mask at a time;
(c) LayerShap: skip, and compute every shared prefix once.

(a) and (b) cost the same for every mask of a stratum, so they are timed on a sample of the masks
spread over all strata; (c) is timed on all of them. Where (c) runs in a smaller dtype, (a) is
timed in float32 as well, and perplexities of the two dtypes are compared.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[2]))

from core.allocator import keep_freed_memory
from core.evaluation import Evaluator
from core.loading import load_model
from core.masks import sample_masks
from core.text import load_text

STRATA_DROPPED = (2, 4, 6, 8, 10, 12)
RATE_SECONDS = 4.0


def main() -> None:
    keep_freed_memory()
    options = _options()
    model = load_model(options.model, device=options.device, dtype=options.dtype)
    text = load_text("bundled", model.tokenizer, blocks=options.blocks, block_length=options.length)
    tokens = text.calibration.to(model.device)
    n = model.n_layers
    strata = [n - dropped for dropped in STRATA_DROPPED if dropped < n]
    masks = sample_masks(n, strata, options.masks, seed=0)
    sample = np.linspace(0, len(masks) - 1, min(options.sample, len(masks))).astype(int)

    evaluator = Evaluator(model, tokens)
    next(evaluator.losses(masks[:1]))
    evaluator.layer_executions = 0
    rates = [_matrix_rate(model)]
    started = _now(model)
    ours = dict(evaluator.losses(masks))
    seconds_ours = (_now(model) - started) / len(masks)
    executions = evaluator.layer_executions / len(masks)
    rates.append(_matrix_rate(model))

    zeroed, seconds_zeroing = _time(model, lambda m: _zeroed_loss(model, tokens, m), masks[sample])
    skipped, seconds_skipping = _time(
        model, lambda m: _skipped_loss(model, tokens, m), masks[sample]
    )
    rate = float(np.mean(rates))
    floor = _operations(model, tokens, executions) / rate
    peak = _peak_bytes(model)
    full_precision = None
    if model.info.dtype != "float32":
        wide = load_model(options.model, device=options.device, dtype="float32")
        full_precision = _time(wide, lambda m: _zeroed_loss(wide, tokens, m), masks[sample])

    print(f"{model.info.name}, {n} layers, {model.info.dtype} on {model.info.device}")
    print(f"{len(masks)} masks, {tokens.shape[0]} blocks of {tokens.shape[1]} tokens")
    print(f"{'':34}{'masks/s':>10}{'layers/mask':>13}")
    kept = masks.sum(axis=1).mean()
    for name, seconds, layers in (
        ("(a) zero weights, run everything", seconds_zeroing, float(n)),
        ("(b) skip, one mask at a time", seconds_skipping, kept),
        ("(c) LayerShap", seconds_ours, executions),
    ):
        print(f"{name:34}{1 / seconds:>10.3f}{layers:>13.2f}")
    print(f"(c) against (a): {seconds_zeroing / seconds_ours:.2f} times as fast")
    print(f"(c) against (b): {seconds_skipping / seconds_ours:.2f} times as fast")
    print(f"matrix rate: {rate / 1e9:.0f} GFLOP/s ({rates[0] / 1e9:.0f} before, ", end="")
    print(f"{rates[1] / 1e9:.0f} after)")
    print(f"floor: {1 / floor:.3f} masks/s; (c) takes {seconds_ours / floor:.2f} times the floor")
    budget = evaluator.plan.memory_budget
    print(f"memory: {peak / 2**30:.2f} GiB peak, model and program included;", end=" ")
    print(f"states and logits may take {budget / 2**30:.1f} GiB; {evaluator.plan}")
    ours_sample = np.array([ours[row] for row in sample])
    for name, losses in (("(a)", zeroed), ("(b)", skipped)):
        print(f"largest NLL difference to {name}: {np.nanmax(np.abs(ours_sample - losses)):.2e}")
    if full_precision is not None:
        losses, seconds = full_precision
        print(
            f"(a) in float32: {1 / seconds:.3f} masks/s; (c) is {seconds / seconds_ours:.2f} times"
        )
        worst = np.max(np.abs(np.expm1(ours_sample - losses)))
        mean = np.mean(np.abs(np.expm1(ours_sample - losses)))
        print(f"perplexity against float32: {mean:.2%} off on average, {worst:.2%} at most")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--masks", type=int, default=512)
    parser.add_argument("--blocks", type=int, default=10)
    parser.add_argument("--block-length", dest="length", type=int, default=128)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--sample", type=int, default=18, help="masks on which (a) and (b) are timed"
    )
    return parser.parse_args()


def _time(model, loss, masks):
    loss(masks[0])
    started = _now(model)
    losses = np.array([loss(mask) for mask in masks])
    return losses, (_now(model) - started) / len(masks)


@torch.inference_mode()
def _zeroed_loss(model, tokens, mask) -> float:
    saved = []
    for block, kept in zip(model.blocks, mask, strict=True):
        if not kept:
            for parameter in block.parameters():
                saved.append((parameter, parameter.data.clone()))
                parameter.data.zero_()
    logits = model.module(input_ids=tokens, use_cache=False).logits
    for parameter, values in saved:
        parameter.data.copy_(values)
    return _mean_loss(logits, tokens)


@torch.inference_mode()
def _skipped_loss(model, tokens, mask) -> float:
    """Dropped blocks return their input; the rest of the model is untouched."""
    originals = [block.forward for block in model.blocks]
    for block, kept in zip(model.blocks, mask, strict=True):
        if not kept:
            block.forward = lambda hidden_states, *args, **kwargs: hidden_states
    try:
        logits = model.module(input_ids=tokens, use_cache=False).logits
    finally:
        for block, original in zip(model.blocks, originals, strict=True):
            block.forward = original
    return _mean_loss(logits, tokens)


def _mean_loss(logits, tokens) -> float:
    return float(F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten()))


def _operations(model, tokens, executions) -> float:
    """Floating-point operations of the layers executed and the head, for one mask."""
    per_layer = 2 * np.mean(model.info.block_parameters) * tokens.numel()
    attention = 2 * 2 * tokens.numel() * tokens.shape[1] / 2 * model.info.hidden_size
    head = model.module.get_output_embeddings().weight
    return executions * (per_layer + attention) + 2 * head.numel() * tokens.numel()


@torch.inference_mode()
def _matrix_rate(model) -> float:
    """Operations a second of one large matrix product, sustained like the evaluation itself."""
    weight = next(p for p in model.blocks[0].parameters() if p.ndim == 2)
    rows = 4096 if model.device.type == "cpu" else 16384
    hidden, out = (1024, 4096) if model.device.type == "cpu" else (4096, 16384)
    a = torch.randn(rows, hidden, dtype=weight.dtype, device=model.device)
    b = torch.randn(out, hidden, dtype=weight.dtype, device=model.device)
    F.linear(a, b)
    started, products = _now(model), 0
    while (seconds := _now(model) - started) < RATE_SECONDS:
        F.linear(a, b)
        products += 1
    return products * 2 * rows * hidden * out / seconds


def _now(model) -> float:
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _peak_bytes(model) -> int:
    if model.device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
