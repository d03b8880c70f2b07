"""Attention and MLP as players of their own, against models whose branch weights are zero."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers

from conftest import WORDS
from core.__main__ import main
from core.cache import EvaluationCache
from core.continuing import continue_prompt
from core.errors import LayerShapError
from core.evaluation import Evaluator
from core.footprint import cache_bytes_by_layer, footprint
from core.game import LayerGame
from core.loading import load_model
from core.models import describe
from core.players import Players, players_of_mask
from core.pruning import prune
from core.recipe import mergekit_yaml
from core.resources import Resources, measure_resources
from core.saving import load_pruned, save_pruned
from core.study import Study
from tiny_models import FAMILIES, VOCABULARY, tiny

LAYERS = 4
# What is silent once all of its weights are zero, by family; written down, not found.
BRANCHES = {
    **dict.fromkeys(
        ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "mixtral"),
        (("self_attn",), ("mlp",)),
    ),
    **dict.fromkeys(("olmo2", "stablelm", "starcoder2"), (("self_attn",), ("mlp",))),
    "gpt2": (("attn",), ("mlp",)),
    "opt": (("self_attn",), ("fc1", "fc2")),
}
SIDE_BY_SIDE = sorted(set(FAMILIES) - set(BRANCHES))
CUTS = ["", "0a", "0m", "3a", "3m", "1a, 2m", "0, 2a", "1, 2, 3m", "0a, 1a, 2a", "0m, 1m, 2m, 3m"]


def tokens(rows=2, length=20):
    """Longer than the tiny models' sliding window."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, VOCABULARY, (rows, length), generator=generator)


def mean_loss(module, text):
    with torch.no_grad():
        logits = module(input_ids=text, use_cache=False).logits
    return float(F.cross_entropy(logits[:, :-1].flatten(0, 1).double(), text[:, 1:].flatten()))


def zeroed(family, path, dropped):
    """A model of its own in which every weight of the dropped branches is zero."""
    module = tiny(family, LAYERS)
    blocks = module.get_submodule(path)
    for player in dropped:
        for name in BRANCHES[family][player % 2]:
            for parameter in getattr(blocks[player // 2], name).parameters():
                parameter.data.zero_()
    return module


def keeping(players, dropped):
    mask = np.ones(players.count, dtype=bool)
    mask[list(dropped)] = False
    return mask


@pytest.mark.parametrize("family", BRANCHES)
def test_skipping_a_branch_equals_zeroing_its_weights(family, tmp_path):
    text = tokens()
    model = describe(tiny(family, LAYERS))
    game = LayerGame(model, text, EvaluationCache(tmp_path), players="sub-blocks")
    cuts = [game.players.parse("cut", cut) for cut in CUTS]
    losses = game.losses(np.array([keeping(game.players, cut) for cut in cuts]))
    assert len(set(losses.round(6))) == len(CUTS)
    for cut, loss in zip(cuts, losses, strict=True):
        truth = zeroed(family, model.blocks_path, cut)
        assert loss == pytest.approx(mean_loss(truth, text), rel=1e-5), (family, cut)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "gemma2"])
def test_whole_layers_are_the_same_to_the_bit_in_either_game(family, tmp_path):
    model = describe(tiny(family, LAYERS))
    masks = np.random.default_rng(0).random((12, LAYERS)) < 0.6
    by_layer = dict(Evaluator(model, tokens()).losses(masks))
    parts = np.repeat(masks, 2, axis=1)
    assert dict(Evaluator(model, tokens(), players="sub-blocks").losses(parts)) == by_layer
    cache = EvaluationCache(tmp_path)
    LayerGame(model, tokens(), cache).losses(masks)
    game = LayerGame(model, tokens(), cache, players="sub-blocks")
    before = len(cache)
    game.losses(parts)
    assert len(cache) == before
    assert game.evaluator.layer_executions == 0


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "opt", "mixtral"])
def test_a_saved_cut_is_neutral_in_plain_transformers_and_skips_in_the_library(family, tmp_path):
    text = tokens()
    model = describe(tiny(family, LAYERS))
    game = LayerGame(model, text, EvaluationCache(tmp_path / "c"), players="sub-blocks")
    keep = keeping(game.players, game.players.parse("cut", "0a, 1, 2m"))
    loss = game.losses(keep)[0]
    pruned = prune(model, keep)
    assert mean_loss(pruned.module, text) == pytest.approx(loss, rel=1e-5)
    folder = save_pruned(model, keep, tmp_path / "saved")
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    assert plain.config.num_hidden_layers == 3
    assert mean_loss(plain, text) == pytest.approx(loss, rel=1e-5)
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    prompt = text[:1, :9]
    written = plain.generate(prompt, **settings)
    assert torch.equal(pruned.module.generate(prompt, **settings), written)
    provenance = json.loads((folder / "layershap.json").read_text())
    assert provenance["dropped_layers"] == [1]
    assert provenance["dropped_attention"] == [0]
    assert provenance["dropped_mlp"] == [2]
    whole = sum(p.numel() for p in model.module.parameters())
    saved = np.array(model.player_parameters("sub-blocks"))[~keep].sum()
    assert pruned.info.parameters == whole - saved
    assert mean_loss(model.module, text) == pytest.approx(game.full_loss, rel=1e-6)


def test_the_library_loads_a_saved_cut_skipping(tiny_folder, tmp_path):
    model = load_pruned(str(tiny_folder), dtype="float32")
    keep = keeping(Players("sub-blocks", 8), (0, 3, 6, 7))
    folder = save_pruned(model, keep, tmp_path / "cut")
    again = load_pruned(str(folder), dtype="float32")
    pruned = prune(model, keep)
    assert again.info.parameters == pruned.info.parameters
    assert again.n_layers == 7
    text = tokens()
    assert mean_loss(again.module, text) == mean_loss(pruned.module, text)
    assert footprint(again).cache_bytes == footprint(model).cache_bytes * 6 / 8
    [*_, written] = continue_prompt(again, "w1 w2 w3", max_new_tokens=5)
    [*_, expected] = continue_prompt(pruned, "w1 w2 w3", max_new_tokens=5)
    assert written == expected
    for damage in ('{"skipped_branches": {"mlp": [99]}}', "[]", '{"skipped_branches": 3}', "{"):
        (folder / "layershap.json").write_text(damage)
        with pytest.raises(LayerShapError, match="damaged"):
            load_pruned(str(folder))


@pytest.mark.parametrize("family", SIDE_BY_SIDE)
def test_blocks_that_are_not_attention_then_mlp_say_so(family, tmp_path):
    model = describe(tiny(family, LAYERS))
    with pytest.raises(LayerShapError, match="choose whole layers as players"):
        LayerGame(model, tokens(), EvaluationCache(tmp_path), players="sub-blocks")


def test_attention_that_is_gone_leaves_the_cache_that_text_is_counted_by(tiny_llama):
    """Generation reads off the first cache how much text came before."""
    model = describe(tiny_llama(3))
    pruned = prune(model, keeping(Players("sub-blocks", 3), (0, 2)))
    assert [b.self_attn.layer_idx for b in pruned.blocks if hasattr(b.self_attn, "q_proj")] == [0]
    assert cache_bytes_by_layer(pruned)[1:] == (0, 0)
    # Learned positions need the count even where no attention is left.
    learned = describe(tiny("gpt2", 3))
    prune(learned, keeping(Players("sub-blocks", 3), (0, 2)))
    with pytest.raises(LayerShapError, match="measured perplexity still holds"):
        prune(learned, keeping(Players("sub-blocks", 3), (0, 2, 4)))


def test_recipes_know_whole_layers_only(tiny_llama):
    info = describe(tiny_llama(3), source="owner/tiny").info
    assert mergekit_yaml(info, [1, 1, 0, 0, 1, 1]) == mergekit_yaml(info, [1, 0, 1])
    with pytest.raises(LayerShapError, match="whole layers only"):
        mergekit_yaml(info, [1, 1, 0, 1, 1, 1])


def test_players_are_named_and_read_both_ways():
    parts = Players("sub-blocks", 20)
    assert parts.labels((25, 24, 26, 7)) == "3m, 12, 13a"
    assert parts.parse("cut", "3m, 12 13A") == (7, 24, 25, 26)
    assert parts.name(7) == "layer 3 MLP"
    assert parts.whole_layers((24, 25)) == (12,)
    assert parts.whole_layers((24,)) is None
    layers = Players("blocks", 20)
    assert layers.labels((12, 3)) == "3, 12"
    assert layers.parse("cut", "12 3") == (3, 12)
    assert layers.whole_layers((3, 12)) == (3, 12)
    assert players_of_mask(40, 20) == parts
    for players, text in ((layers, "3a"), (parts, "3b"), (parts, "-1"), (parts, "x")):
        with pytest.raises(LayerShapError, match="must be whole numbers"):
            players.parse("cut", text)
    with pytest.raises(LayerShapError, match="There is no layer 20"):
        parts.parse("cut", "20a")
    with pytest.raises(LayerShapError, match="does not fit"):
        players_of_mask(30, 20)


def test_what_players_save_is_counted_and_timed(tiny_llama):
    model = describe(tiny_llama(4))
    parts = measure_resources(model, model.players("sub-blocks"))
    layers = measure_resources(model, model.players("blocks"))
    block = model.info.block_parameters[0] / model.info.parameters
    assert parts.saved("parameters", (2, 3)) == pytest.approx(block)
    assert layers.saved("parameters", (1,)) == pytest.approx(block)
    assert parts.saved("cache", range(0, 8, 2)) == pytest.approx(1.0)
    assert parts.saved("cache", range(1, 8, 2)) == 0
    assert layers.worth("cache").tolist() == [1.0] * 4
    assert parts.worth("cache").tolist() == [1.0, 0.0] * 4
    assert (parts.time >= 0).all()
    assert 0 < parts.time.sum() < 1.5


def test_a_model_without_a_cache_saves_none_of_it(tiny_llama):
    players = Players("sub-blocks", 3)
    none = Resources(players, np.ones(6) / 6, np.zeros(6), np.ones(6) / 6)
    assert none.saved("cache", (0, 1)) == 0
    assert not none.worth("cache").any()


def test_the_command_line_analyses_parts(tiny_folder, isolated_cache, tmp_path):
    text, out = tmp_path / "words.txt", tmp_path / "study.json"
    text.write_text(" ".join(np.random.default_rng(0).choice(WORDS, 800)))
    arguments = ["--model", str(tiny_folder), "--players", "sub-blocks", "--text", str(text)]
    arguments += ["--blocks", "2", "--block-length", "16", "--evaluations", "24"]
    assert main(["analyze", *arguments, "--out", str(out)]) == 0
    study = Study.from_json(out.read_text())
    assert study.analysis.n_players == 16
    frame = study.contributions_frame()
    assert frame["part"].tolist()[:2] == ["attention", "MLP"]
    model = load_pruned(str(tiny_folder))
    assert tuple(frame["parameters"]) == model.player_parameters("sub-blocks")
    assert study.interactions_frame()["part_j"].iloc[0] == "0m"
    assert Study.from_json(study.to_json()).to_json() == study.to_json()


@pytest.mark.bundled
def test_branches_are_found_in_few_bits(bundled_model):
    """Its blocks add a little to large numbers, which bfloat16 rounds by more than some add."""
    model = load_model("bundled", dtype="bfloat16")
    assert {(*sorted(found.attention), *sorted(found.mlp)) for found in model.branches} == {
        ("input_layernorm", "self_attn", "mlp", "post_attention_layernorm")
    }


@pytest.mark.bundled
def test_parts_of_the_real_model(bundled_model, tmp_path):
    """The game of the bundled model's 60 parts, in the number format that is the default here."""
    from core.text import load_text

    text = load_text("bundled", bundled_model.tokenizer, blocks=2, block_length=64)
    game = LayerGame(
        bundled_model, text.calibration, EvaluationCache(tmp_path / "c"), players="sub-blocks"
    )
    players = game.players
    keep = keeping(players, players.parse("cut", "12a, 14a, 17m, 20"))
    by_layer = np.repeat(np.arange(30) != 20, 2)
    full, cut, layer = game.perplexity(np.array([np.ones(60, dtype=bool), keep, by_layer]))
    assert full < layer < cut < 10 * full
    assert game.whole_layers.perplexity(np.arange(30) != 20)[0] == layer
    folder = save_pruned(bundled_model, keep, tmp_path / "cut")
    script = (
        "import sys; from core.saving import load_pruned; "
        "m = load_pruned(sys.argv[1]); print(m.n_layers, m.info.parameters)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(folder)], capture_output=True, text=True, check=True
    )
    layers, parameters = map(int, done.stdout.split()[-2:])
    saved = np.array(bundled_model.player_parameters("sub-blocks"))[~keep].sum()
    assert (layers, parameters) == (29, bundled_model.info.parameters - saved)
