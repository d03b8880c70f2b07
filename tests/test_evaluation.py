"""Masked evaluation against models whose layers were really deleted."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import nn

from core.evaluation import Evaluator, _PrefixWalk, prefix_order
from core.game import LayerGame
from core.masks import all_masks, default_strata, sample_masks
from core.models import describe


@pytest.fixture(scope="module")
def model():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=6,
        num_attention_heads=4,
    )
    module = LlamaForCausalLM(config)
    for parameter in module.parameters():
        parameter.data.mul_(4)
    return describe(module)


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(0, 128, (3, 16), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def truth(model, tokens):
    """Mean NLL of every mask, by deleting layers and letting the model compute its own loss."""
    module, blocks = model.module, list(model.module.model.layers)
    losses = []
    for mask in all_masks(6):
        module.model.layers = nn.ModuleList(b for b, kept in zip(blocks, mask, strict=True) if kept)
        module.config.num_hidden_layers = int(mask.sum())
        with torch.no_grad():
            losses.append(float(module(tokens, labels=tokens, use_cache=False).loss))
    module.model.layers = nn.ModuleList(blocks)
    module.config.num_hidden_layers = len(blocks)
    return np.array(losses)


def evaluate(evaluator, masks):
    losses = np.full(len(masks), np.nan)
    for row, loss in evaluator.losses(masks):
        losses[row] = loss
    return losses


@pytest.mark.parametrize("group", [1, 2, 5, 64])
def test_skipping_equals_deleting_whatever_the_grouping(model, tokens, truth, group):
    losses = evaluate(Evaluator(model, tokens, group=group), all_masks(6))
    np.testing.assert_allclose(losses, truth, rtol=1e-5)


def test_a_small_memory_budget_splits_the_text_and_changes_nothing(model, tokens, truth):
    row_bytes = 16 * 32 * 4
    evaluator = Evaluator(model, tokens, memory_budget=row_bytes * 10)
    assert evaluator.plan.rows == 1
    np.testing.assert_allclose(evaluate(evaluator, all_masks(6)), truth, rtol=1e-5)


@pytest.mark.parametrize("group", [1, 4])
def test_every_shared_prefix_is_computed_once(model, tokens, group):
    masks = sample_masks(6, (5, 4, 3), 30, seed=0)
    distinct = {tuple(mask[: layer + 1]) for mask in masks for layer in range(6) if mask[layer]}
    evaluator = Evaluator(model, tokens, group=group)
    evaluate(evaluator, masks)
    assert evaluator.layer_executions == len(distinct)


def test_prefixes_are_shared_across_chunks(model, tokens, truth):
    evaluator = Evaluator(model, tokens, group=2)
    object.__setattr__(evaluator.plan, "chunk", 3)
    np.testing.assert_allclose(evaluate(evaluator, all_masks(6)), truth, rtol=1e-5)
    assert evaluator.layer_executions == 2**6 - 1


def test_a_mask_has_the_same_value_in_any_company(model, tokens):
    masks = sample_masks(6, (5, 4, 3), 30, seed=0)
    together = evaluate(Evaluator(model, tokens), masks)
    shuffled = np.random.default_rng(0).permutation(len(masks))
    apart = evaluate(Evaluator(model, tokens), masks[shuffled])
    alone = evaluate(Evaluator(model, tokens), masks[7:8])
    assert (together[shuffled] == apart).all()
    assert together[7] == alone[0]


def test_out_of_memory_halves_the_work_and_goes_on(model, tokens, truth, monkeypatch):
    evaluator = Evaluator(model, tokens, group=8)
    real, failures = evaluator.run_step, iter([True, True])

    def scarce(layer, states, start):
        if evaluator.plan.group > 2 and next(failures):
            raise torch.OutOfMemoryError("out of memory")
        return real(layer, states, start)

    monkeypatch.setattr(evaluator, "run_step", scarce)
    np.testing.assert_allclose(evaluate(evaluator, all_masks(6)), truth, rtol=1e-5)
    assert evaluator.plan.group == 2


def test_the_model_is_left_as_it_was(model, tokens):
    before = list(model.module.model.layers)
    evaluate(Evaluator(model, tokens), sample_masks(6, default_strata(6), 5, seed=0))
    assert list(model.module.model.layers) == before
    assert not model.module._forward_hooks


def test_a_loss_that_is_not_finite_is_infinite_and_worth_nothing(model, tokens, tmp_path):
    from copy import deepcopy

    from core.cache import EvaluationCache

    module = deepcopy(model.module)
    module.model.layers[2].mlp.down_proj.weight.data.fill_(float("nan"))
    broken = describe(module)
    masks = all_masks(6)[[0b111011, 0b000100]]
    losses = evaluate(Evaluator(broken, tokens), masks)
    assert np.isfinite(losses[0])
    assert losses[1] == np.inf
    game = LayerGame(broken, tokens, EvaluationCache(tmp_path))
    assert (game.losses(masks) == losses).all()
    assert (LayerGame(broken, tokens, EvaluationCache(tmp_path)).losses(masks) == losses).all()


def test_evaluators_of_one_model_in_several_threads_do_not_disturb_each_other(model):
    masks = all_masks(6)[1:20]
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(0, 128, (3, 16), generator=generator) for _ in range(4)]
    alone = [evaluate(Evaluator(describe(model.module), text), masks) for text in texts]
    shared = describe(model.module)
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda text: evaluate(Evaluator(shared, text), masks), texts))
    np.testing.assert_array_equal(together, alone)


def test_a_model_with_device_hooks_is_evaluated_the_same(model, tokens):
    """Accelerate gives a model that is spread over several GPUs such hooks on its modules."""
    from copy import deepcopy

    from accelerate import dispatch_model

    module = deepcopy(model.module)
    places = dict.fromkeys(
        ["model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head"], "cpu"
    )
    places |= {f"model.layers.{layer}": "cpu" for layer in range(6)}
    hooked = describe(dispatch_model(module, places, force_hooks=True))
    assert hooked.taken_apart.blocks[0]._hf_hook
    masks = all_masks(6)
    assert (
        evaluate(Evaluator(hooked, tokens), masks) == evaluate(Evaluator(model, tokens), masks)
    ).all()


def test_states_follow_the_blocks_from_one_device_to_the_next(model, tokens):
    """The last three layers on PyTorch's device without data, which refuses to be mixed as any."""
    from copy import deepcopy

    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    spread = describe(deepcopy(model.module))
    for block in spread.taken_apart.blocks[3:]:
        block.to("meta")
        add_hook_to_module(block, AlignDevicesHook(torch.device("meta"), place_submodules=False))
    masks = all_masks(6)
    masks = masks[prefix_order(masks)]
    states = _PrefixWalk(Evaluator(spread, tokens, group=4), 0).advance(masks)
    expected = ["meta" if mask[3:].any() else "cpu" for mask in masks]
    assert [state.device.type for state in states] == expected
