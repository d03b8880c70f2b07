"""Every architecture: skipping layers gives the loss of a model without them."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers

from core.cache import EvaluationCache
from core.errors import LayerShapError
from core.game import LayerGame
from core.masks import leave_out
from core.models import describe
from core.pruning import prune
from core.saving import save_pruned
from tiny_models import FAMILIES, VOCABULARY, really_deleted, tiny

LAYERS = 5
CUTS = [(), (0,), (4,), (2,), (1, 3), (0, 1, 2, 4), (0, 4)]
PATHS = {
    "gpt2": "transformer.h",
    "opt": "model.decoder.layers",
    "mamba": "backbone.layers",
    "rwkv": "rwkv.blocks",
}


def tokens():
    """Longer than the tiny models' sliding window."""
    return torch.randint(3, VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(1))


def mean_loss(module, text):
    with torch.no_grad():
        logits = module(input_ids=text, use_cache=False).logits
    return float(F.cross_entropy(logits[:, :-1].flatten(0, 1).double(), text[:, 1:].flatten()))


def deleted(family, path, kept):
    whole = tiny(family, LAYERS)
    if family != "rwkv" or 0 in kept:
        return really_deleted(whole, family, LAYERS, path, kept)
    # Its first block also normalises the embedding, so no configuration describes a model that
    # starts with another block: delete the modules themselves.
    whole.rwkv.blocks = torch.nn.ModuleList(whole.rwkv.blocks[layer] for layer in kept)
    return whole


@pytest.mark.parametrize("family", FAMILIES)
def test_skipping_equals_deleting(family, tmp_path):
    text = tokens()
    model = describe(tiny(family, LAYERS))
    game = LayerGame(model, text, EvaluationCache(tmp_path))
    masks = np.array([leave_out(LAYERS, cut) for cut in CUTS])
    losses = game.losses(masks)
    assert np.ptp(losses) > 1e-3
    for cut, loss in zip(CUTS, losses, strict=True):
        kept = [layer for layer in range(LAYERS) if layer not in cut]
        truth = deleted(family, model.blocks_path, kept)
        assert loss == pytest.approx(mean_loss(truth, text), rel=1e-5), (family, cut)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_cut_loads_plainly_and_generates(family, tmp_path):
    text = tokens()
    model = describe(tiny(family, LAYERS))
    keep = leave_out(LAYERS, (1, 3) if family == "rwkv" else (0, 3))
    loss = LayerGame(model, text, EvaluationCache(tmp_path / "cache")).losses(keep)[0]
    assert mean_loss(prune(model, keep).module, text) == pytest.approx(loss, rel=1e-5)
    folder = save_pruned(model, keep, tmp_path / "saved")
    again = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    assert again.config.num_hidden_layers == 3
    assert mean_loss(again, text) == pytest.approx(loss, rel=1e-5)
    written = again.generate(text[:, :6], max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert written.shape == (2, 11)


def test_a_cut_that_no_configuration_describes_is_refused_in_one_sentence(tmp_path):
    model = describe(tiny("rwkv", LAYERS))
    with pytest.raises(LayerShapError, match="measured perplexity still holds"):
        save_pruned(model, leave_out(LAYERS, (0,)), tmp_path / "saved")


def test_blocks_are_found_whatever_they_are_called():
    for family in PATHS:
        model = describe(tiny(family, LAYERS))
        assert model.n_layers == LAYERS
        assert model.blocks == tuple(model.module.get_submodule(PATHS[family]))


def test_a_model_without_a_residual_chain_is_refused_in_one_sentence():
    config = transformers.T5Config(
        vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2
    )
    with pytest.raises(LayerShapError, match="decoder-only"):
        describe(transformers.T5ForConditionalGeneration(config))
