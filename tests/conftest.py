"""Shared fixtures: the bundled model, tiny random-weight models, and caches of their own."""

import numpy as np
import pytest
import torch

TINY_LAYERS = 8
WORDS = [f"w{number}" for number in range(60)]


@pytest.fixture(scope="session")
def bundled_model():
    """The real 30-layer model, fetched on first use into the user's cache."""
    from core.loading import load_model

    return load_model("bundled")


@pytest.fixture(scope="module")
def real_cache(bundled_model, tmp_path_factory):
    """A cache folder with the bundled model in it and no evaluations yet."""
    from core.bundled import cache_root

    folder = tmp_path_factory.mktemp("cache")
    (folder / "models").symlink_to(cache_root() / "models")
    return folder


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium."""
    from playwright.sync_api import sync_playwright

    from browsing import CHROMIUM, FLAGS

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture
def isolated_cache(tmp_path, monkeypatch):
    """An empty cache folder of the test's own."""
    monkeypatch.setenv("LAYERSHAP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A cache folder that the tests of one module share."""
    patch = pytest.MonkeyPatch()
    folder = tmp_path_factory.mktemp("cache")
    patch.setenv("LAYERSHAP_CACHE", str(folder))
    yield folder
    patch.undo()


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    """A text of `WORDS`, as somebody might upload it."""
    rng = np.random.default_rng(0)
    file = tmp_path_factory.mktemp("text") / "book.txt"
    file.write_text(" ".join(rng.choice(WORDS, 4000)))
    return file


@pytest.fixture(scope="session")
def tiny_llama():
    """A factory of small random-weight Llama models: `tiny_llama(layers=4, seed=0, **config)`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    def make(layers=4, seed=0, **changes):
        torch.manual_seed(seed)
        settings = {
            "vocab_size": 128,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "max_position_embeddings": 256,
            **changes,
        }
        module = LlamaForCausalLM(LlamaConfig(**settings)).eval()
        for parameter in module.parameters():
            parameter.data.mul_(4)
        return module

    return make


@pytest.fixture(scope="session")
def tiny_folder(tiny_llama, tmp_path_factory):
    """A saved tiny model with a tokenizer that knows only `WORDS`."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_llama(TINY_LAYERS).save_pretrained(folder)
    vocabulary = {word: number for number, word in enumerate(["<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<unk>"
    ).save_pretrained(folder)
    return folder
