"""Masked evaluation against the published procedure, on the same masks, in one process.

(a) published: clone and zero a dropped block's weights, run the whole model, one mask at a time;
(b) skipping: run only the kept blocks, one mask at a time;
(c) LayerShap: skip, and compute every shared prefix once.

(a) and (b) cost the same for every mask of a stratum, so they are timed on a sample of the masks
spread over all strata; (c) is timed on all of them.
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

from core.evaluation import Evaluator
from core.masks import sample_masks
from core.models import load_model
from core.text import load_text

STRATA_DROPPED = (2, 4, 6, 8, 10, 12)


def main() -> None:
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
    started = _now(model)
    ours = dict(evaluator.losses(masks))
    seconds_ours = (_now(model) - started) / len(masks)
    executions = evaluator.layer_executions / len(masks)

    zeroed, seconds_zeroing = _time(model, lambda m: _zeroed_loss(model, tokens, m), masks[sample])
    skipped, seconds_skipping = _time(
        model, lambda m: _skipped_loss(model, tokens, m), masks[sample]
    )
    floor = _floor_seconds(model, tokens, executions)

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
    print(f"floor: {1 / floor:.3f} masks/s; (c) takes {seconds_ours / floor:.2f} times the floor")
    print(f"memory: {_peak_bytes(model) / 2**30:.2f} GiB peak; plan {evaluator.plan}")
    ours_sample = np.array([ours[row] for row in sample])
    for name, losses in (("(a)", zeroed), ("(b)", skipped)):
        print(f"largest NLL difference to {name}: {np.nanmax(np.abs(ours_sample - losses)):.2e}")


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


def _floor_seconds(model, tokens, executions) -> float:
    """Matrix operations of the layers executed and the head, at the measured matrix rate."""
    rate = _matrix_rate(model)
    per_layer = 2 * np.mean(model.info.block_parameters) * tokens.numel()
    attention = 2 * 2 * tokens.numel() * tokens.shape[1] / 2 * model.info.hidden_size
    head = model.module.get_output_embeddings().weight
    return (executions * (per_layer + attention) + 2 * head.numel() * tokens.numel()) / rate


@torch.inference_mode()
def _matrix_rate(model) -> float:
    weight = next(p for p in model.blocks[0].parameters() if p.ndim == 2)
    rows = 4096 if model.device.type == "cpu" else 16384
    hidden, out = (1024, 4096) if model.device.type == "cpu" else (4096, 16384)
    a = torch.randn(rows, hidden, dtype=weight.dtype, device=model.device)
    b = torch.randn(out, hidden, dtype=weight.dtype, device=model.device)
    best = 0.0
    for _ in range(5):
        started = _now(model)
        F.linear(a, b)
        best = max(best, 2 * rows * hidden * out / (_now(model) - started))
    return best


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
