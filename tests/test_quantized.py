"""Quantized models are measured, counted, cut and written as they are."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers

from conftest import TINY_LAYERS
from core.errors import LayerShapError
from core.evaluation import Evaluator
from core.footprint import footprint
from core.healing import heal
from core.loading import load_model
from core.masks import leave_out
from core.models import fingerprint
from core.pruning import prune
from core.quantization import keep_packing
from core.saving import save_pruned

PLACE = {"device": "cpu", "dtype": "float32"}
BITS = {
    4: {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    8: {"load_in_8bit": True},
}


def tokens():
    return torch.randint(1, 60, (2, 16), generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
def loss(module, text):
    logits = module(input_ids=text, use_cache=False).logits[:, :-1]
    return float(F.cross_entropy(logits.flatten(0, 1).double(), text[:, 1:].flatten()))


@pytest.fixture(autouse=True)
def _quiet(caplog):
    """It warns at every product that eight bits are computed in float16."""
    caplog.set_level("ERROR", logger="bitsandbytes")


@pytest.fixture(scope="module", params=BITS)
def packed(request, tiny_folder, tmp_path_factory):
    """(bits, folder of a quantized model, how many parameters it had)."""
    pytest.importorskip("bitsandbytes")
    plain = transformers.AutoModelForCausalLM.from_pretrained(tiny_folder)
    module = transformers.AutoModelForCausalLM.from_pretrained(
        tiny_folder,
        quantization_config=transformers.BitsAndBytesConfig(**BITS[request.param]),
        device_map="cpu",
        dtype=torch.float32,
    )
    folder = tmp_path_factory.mktemp("packed") / "model"
    module.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(folder)
    return request.param, folder, plain.num_parameters()


def test_it_is_loaded_as_it_is_and_counted_honestly(packed, tiny_folder):
    bits, folder, parameters = packed
    model, plain = load_model(str(folder), **PLACE), load_model(str(tiny_folder), **PLACE)
    assert model.info.quantization == f"bitsandbytes {bits}-bit"
    assert model.info.dtype == "float32"
    assert model.info.parameters == parameters
    assert model.info.block_parameters == plain.info.block_parameters
    if bits == 4:
        assert model.player_parameters("sub-blocks") == plain.player_parameters("sub-blocks")
    linear = sum(
        part.weight.numel()
        for part in plain.module.model.layers.modules()
        if isinstance(part, torch.nn.Linear)
    )
    # Packed weights and what scales them are less than the plain ones, but not less than the bits.
    packed_bytes = footprint(model).weight_bytes - 4 * (parameters - linear)
    assert linear * bits / 8 < packed_bytes < linear * 4


def test_skipping_layers_equals_leaving_them_out(packed):
    _, folder, _ = packed
    model = load_model(str(folder), **PLACE)
    keep = np.array([leave_out(TINY_LAYERS, cut) for cut in ((), (2,), (1, 5, 6))])
    losses = dict(Evaluator(model, tokens(), group=1).losses(keep))
    assert np.ptp(list(losses.values())) > 1e-3
    for row, mask in enumerate(keep):
        module = transformers.AutoModelForCausalLM.from_pretrained(
            folder, device_map="cpu", dtype=torch.float32
        )
        keep_packing(module)
        module.model.layers = torch.nn.ModuleList(
            layer for layer, kept in zip(module.model.layers, mask, strict=True) if kept
        )
        module.config.num_hidden_layers = int(mask.sum())
        assert losses[row] == pytest.approx(loss(module, tokens()), rel=1e-5)


def test_a_loss_does_not_depend_on_what_else_is_measured(packed):
    _, folder, _ = packed
    model = load_model(str(folder), **PLACE)
    masks = np.array([leave_out(TINY_LAYERS, cut) for cut in ((), (2,), (3,), (4, 5), (6,))])
    together = dict(Evaluator(model, tokens()).losses(masks))
    alone = [dict(Evaluator(model, tokens()).losses(mask[None]))[0] for mask in masks]
    assert [together[row] for row in range(len(masks))] == pytest.approx(alone, rel=1e-6)


def test_a_cut_is_written_in_the_same_bits(packed, tmp_path):
    bits, folder, parameters = packed
    model = load_model(str(folder), **PLACE)
    keep = leave_out(TINY_LAYERS, (1, 4))
    pruned = prune(model, keep)
    assert pruned.info.parameters == parameters - 2 * model.info.block_parameters[0]
    saved = save_pruned(model, keep, tmp_path / "cut")
    again = load_model(str(saved), **PLACE)
    assert again.info.quantization == f"bitsandbytes {bits}-bit"
    assert again.info.parameters == pruned.info.parameters
    assert loss(again.module, tokens()) == pytest.approx(loss(pruned.module, tokens()), rel=1e-6)


def test_what_cannot_be_done_with_packed_weights_is_one_sentence(packed, tmp_path):
    bits, folder, _ = packed
    model = load_model(str(folder), **PLACE)
    keep = np.ones(2 * TINY_LAYERS, dtype=bool)
    keep[5] = False
    # In eight bits an MLP rounds by the whole text, so it is no MLP branch to begin with.
    refusal = "cannot be made zero" if bits == 4 else "choose whole layers"
    with pytest.raises(LayerShapError, match=refusal):
        save_pruned(model, keep, tmp_path / "cut")
    pytest.importorskip("peft")
    with pytest.raises(LayerShapError, match="unquantized"):
        next(heal(model, tokens(), None, full=model))


def test_other_scales_are_another_fingerprint(packed):
    _, folder, _ = packed
    first, second = load_model(str(folder), **PLACE), load_model(str(folder), **PLACE)
    assert first.info.fingerprint == second.info.fingerprint
    scales = "SCB", "absmax"
    state = second.module.state_dict()
    next(t for name, t in state.items() if name.endswith(scales)).mul_(1.5)
    assert fingerprint(second.module) != first.info.fingerprint


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_a_missing_package_is_named(method, tiny_folder, tmp_path):
    folder = tmp_path / "model"
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_folder)
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "bits": 4, "group_size": 32}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(LayerShapError, match=rf"quantized with {method} 4-bit.*install"):
        load_model(str(folder), **PLACE)
