import json
import subprocess
import sys
from itertools import chain

import numpy as np
import pytest
import torch
import transformers
import yaml

from core.continuing import continue_prompt
from core.errors import LayerShapError
from core.footprint import footprint, measure_speeds
from core.game import LayerGame
from core.masks import leave_out
from core.models import describe
from core.pruning import prune
from core.recipe import mergekit_yaml
from core.saving import save_pruned


@pytest.fixture
def model(tiny_llama):
    return describe(tiny_llama(6), name="tiny", source="owner/tiny")


def test_depth_lists_and_positions_agree_after_a_cut(tiny_llama):
    config = transformers.Qwen2Config(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=6,
        num_attention_heads=2,
        num_key_value_heads=2,
        use_sliding_window=True,
        sliding_window=8,
        max_window_layers=3,
    )
    model = describe(transformers.Qwen2ForCausalLM(config))
    kinds = list(model.module.config.layer_types)
    pruned = prune(model, leave_out(6, (0, 4)))
    new = pruned.module.config
    assert new.num_hidden_layers == pruned.n_layers == 4
    assert new.layer_types == [kinds[layer] for layer in (1, 2, 3, 5)]
    assert [block.self_attn.layer_idx for block in pruned.blocks] == [0, 1, 2, 3]
    assert model.module.config.num_hidden_layers == 6
    assert [block.self_attn.layer_idx for block in model.blocks] == list(range(6))


def test_pruning_shares_the_weights(model):
    pruned = prune(model, leave_out(6, (1,)))
    theirs = {p.data_ptr() for p in model.module.parameters()}
    assert {p.data_ptr() for p in pruned.module.parameters()} < theirs


def test_nothing_kept_and_wrong_lengths_are_refused(model, tmp_path):
    with pytest.raises(LayerShapError, match="No layers are kept"):
        prune(model, np.zeros(6, dtype=bool))
    with pytest.raises(LayerShapError, match="one column per layer"):
        prune(model, np.ones(5, dtype=bool))
    with pytest.raises(LayerShapError, match="No layers are kept"):
        mergekit_yaml(model.info, np.zeros(6, dtype=bool))


def test_saving_refuses_to_overwrite_and_leaves_nothing_half_made(model, tmp_path, monkeypatch):
    keep = leave_out(6, (2,))
    folder = save_pruned(model, keep, tmp_path / "cut")
    made_by = json.loads((folder / "layershap.json").read_text())
    assert made_by["dropped_layers"] == [2]
    with pytest.raises(LayerShapError, match="exists already"):
        save_pruned(model, keep, folder)

    def full_disk(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(model.module), "save_pretrained", full_disk)
    with pytest.raises(LayerShapError, match="No space left"):
        save_pruned(model, keep, tmp_path / "second")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cut"]


def test_dtype_and_tied_weights_survive_saving(tiny_llama, tmp_path):
    model = describe(tiny_llama(4, tie_word_embeddings=True).to(torch.bfloat16))
    folder = save_pruned(model, leave_out(4, (1,)), tmp_path / "cut")
    again = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert again.dtype == torch.bfloat16
    assert again.lm_head.weight is again.model.embed_tokens.weight


@pytest.mark.parametrize("dropped", [(), (0,), (5,), (1, 2, 4)])
def test_the_recipe_names_exactly_the_kept_layers(model, dropped):
    recipe = yaml.safe_load(mergekit_yaml(model.info, leave_out(6, dropped)))
    assert recipe["merge_method"] == "passthrough"
    ranges = [source["layer_range"] for part in recipe["slices"] for source in part["sources"]]
    kept = list(chain.from_iterable(range(*each) for each in ranges))
    assert kept == [layer for layer in range(6) if layer not in dropped]
    assert recipe["slices"][0]["sources"][0]["model"] == "owner/tiny"


def test_footprint_counts_parameters_bytes_and_cache(model):
    whole, pruned = footprint(model), footprint(prune(model, leave_out(6, (0, 1))))
    layer = sum(p.numel() for p in model.blocks[0].parameters())
    assert whole.parameters - pruned.parameters == 2 * layer
    assert whole.weight_bytes == 4 * whole.parameters
    # Keys and values, 4 heads of 8 numbers of 4 bytes, in each of the layers.
    assert whole.cache_bytes == 2 * 32 * 4 * 6
    assert pruned.cache_bytes == 2 * 32 * 4 * 4


def test_a_model_without_such_a_cache_says_so():
    from tiny_models import tiny

    assert footprint(describe(tiny("mamba", 3))).cache_bytes is None


def test_speed_is_measured_on_both(model):
    speeds = measure_speeds(
        (model, prune(model, leave_out(6, (0,)))), prompt_tokens=8, new_tokens=2, repeats=1
    )
    assert len(speeds) == 2
    assert all(speed.prefill > 0 and speed.decode > 0 for speed in speeds)


def test_text_needs_a_tokenizer(model):
    with pytest.raises(LayerShapError, match="no tokenizer"):
        next(continue_prompt(model, "hello"))


RELOAD = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
inputs = tokenizer("The United States of America is", return_tensors="pt")
written = model.generate(**inputs, max_new_tokens=8, do_sample=False)
print(model.config.num_hidden_layers, repr(tokenizer.decode(written[0])))
"""


@pytest.mark.bundled
def test_the_real_model_is_cut_saved_and_reloaded_by_plain_transformers(
    bundled_model, tmp_path, isolated_cache
):
    keep = leave_out(30, (13, 14, 17))
    folder = save_pruned(bundled_model, keep, tmp_path / "cut")
    *_, here = continue_prompt(
        prune(bundled_model, keep), "The United States of America is", max_new_tokens=8
    )
    output = subprocess.run(
        [sys.executable, "-c", RELOAD, str(folder)], capture_output=True, text=True, check=True
    ).stdout
    depth, text = output.strip().splitlines()[-1].split(" ", 1)
    assert depth == "27"
    assert here in text.encode().decode("unicode_escape")
    tokens = bundled_model.tokenizer("We the people of the United States", return_tensors="pt")
    loss = LayerGame(bundled_model, tokens["input_ids"]).losses(keep)[0]
    again = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        reloaded = again(**tokens, labels=tokens["input_ids"]).loss
    assert float(reloaded) == pytest.approx(loss, rel=1e-2)
