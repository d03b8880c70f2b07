import sqlite3
from pathlib import Path

import numpy as np
import pytest
import torch

from core.cache import EvaluationCache
from core.errors import LayerShapError
from core.game import LayerGame
from core.masks import all_masks
from core.models import describe


def tiny(seed=0, **changes):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    settings = {
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "max_position_embeddings": 32,
        **changes,
    }
    return describe(LlamaForCausalLM(LlamaConfig(**settings)), name="tiny")


TOKENS = torch.arange(24).reshape(2, 12)


def test_utility_is_the_ratio_of_perplexities(tmp_path):
    game = LayerGame(tiny(), TOKENS, EvaluationCache(tmp_path))
    masks = all_masks(4)
    perplexity = game.perplexity(masks)
    np.testing.assert_allclose(game.value(masks), perplexity[-1] / perplexity)
    assert game.value(np.ones(4, dtype=bool)).item() == 1.0


def test_perplexity_is_the_models_own(tmp_path):
    model = tiny()
    with torch.no_grad():
        loss = model.module(TOKENS, labels=TOKENS).loss
    game = LayerGame(model, TOKENS, EvaluationCache(tmp_path))
    np.testing.assert_allclose(game.full_loss, float(loss), rtol=1e-6)


def test_what_was_measured_is_never_measured_again(tmp_path, monkeypatch):
    cache = EvaluationCache(tmp_path)
    masks = all_masks(4)
    first = LayerGame(tiny(), TOKENS, cache).losses(masks)
    again = LayerGame(tiny(), TOKENS, EvaluationCache(tmp_path))
    monkeypatch.setattr(again.evaluator, "losses", lambda masks: pytest.fail("measured again"))
    assert (again.losses(masks) == first).all()


def test_ending_early_keeps_what_was_measured(tmp_path):
    cache = EvaluationCache(tmp_path)
    measuring = LayerGame(tiny(), TOKENS, cache).measure(all_masks(4))
    for _ in range(5):
        next(measuring)
    measuring.close()
    assert len(cache) == 5


def test_repeated_masks_are_measured_once_and_reported_each(tmp_path):
    cache = EvaluationCache(tmp_path)
    masks = np.array([[1, 1, 0, 1], [1, 0, 1, 1], [1, 1, 0, 1]], dtype=bool)
    losses = LayerGame(tiny(), TOKENS, cache).losses(masks)
    assert losses[0] == losses[2] != losses[1]
    assert len(cache) == 2


@pytest.mark.parametrize(
    "other",
    [
        lambda: (tiny(seed=1), TOKENS),
        lambda: (tiny(rms_norm_eps=1e-3), TOKENS),
        lambda: (tiny(), TOKENS + 1),
        lambda: (tiny(), TOKENS.reshape(3, 8)),
        lambda: (describe(tiny().module.double(), name="tiny"), TOKENS),
    ],
    ids=["weights", "configuration", "text", "shape", "dtype"],
)
def test_another_game_never_gets_these_numbers(tmp_path, other):
    cache = EvaluationCache(tmp_path)
    LayerGame(tiny(), TOKENS, cache).losses(all_masks(4))
    before = len(cache)
    LayerGame(*other(), cache).losses(all_masks(4))
    assert len(cache) == 2 * before


def test_nothing_in_the_cache_is_pickled_or_unpickled(tmp_path):
    cache = EvaluationCache(tmp_path)
    cache.put("key", 1.5)
    database = sqlite3.connect(Path(tmp_path) / "cache.db")
    assert database.execute("SELECT mode, value, filename FROM Cache").fetchall() == [
        (1, 1.5, None)
    ]
    evil = b'cbuiltins\neval\n(S\'open("/tmp/layershap-owned", "w")\'\ntR.'
    database.execute("UPDATE Cache SET mode = 4, value = ?", (evil,))
    database.commit()
    assert EvaluationCache(tmp_path).get(["key"]) == [None]
    assert not Path("/tmp/layershap-owned").exists()


def test_clearing_empties_the_cache_and_an_infinite_loss_survives_storage(tmp_path):
    cache = EvaluationCache(tmp_path)
    cache.put("a", float("inf"))
    assert EvaluationCache(tmp_path).get(["a", "b"]) == [float("inf"), None]
    assert cache.size_bytes > 0
    assert cache.clear() == 1
    assert cache.get(["a"]) == [None]


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.zeros(2, 40, dtype=torch.long), "longer than this model's context of 32"),
        (torch.full((1, 8), 64), "outside this model's vocabulary of 64"),
        (torch.zeros(0, 8, dtype=torch.long), "at least one block"),
        (torch.zeros(3, 1, dtype=torch.long), "at least one block of two tokens"),
    ],
)
def test_tokens_that_do_not_fit_are_refused(tmp_path, tokens, message):
    with pytest.raises(LayerShapError, match=message):
        LayerGame(tiny(), tokens, EvaluationCache(tmp_path))


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        (np.ones((2, 5), dtype=bool), "one column per layer"),
        (np.full((1, 4), 2), "True"),
        (np.ones((1, 1, 4), dtype=bool), "one column per layer"),
    ],
)
def test_masks_of_the_wrong_shape_are_refused(tmp_path, masks, message):
    with pytest.raises(LayerShapError, match=message):
        LayerGame(tiny(), TOKENS, EvaluationCache(tmp_path)).losses(masks)
