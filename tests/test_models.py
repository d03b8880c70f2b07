"""Loading: what is found, what is refused, and in which words."""

import json

import pytest
import torch
import transformers

from core.errors import LayerShapError
from core.loading import load_model, resolve_dtype
from core.models import describe, fingerprint


@pytest.fixture
def folder(tiny_llama, tmp_path):
    """A saved tiny model with a tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    path = tmp_path / "tiny"
    tiny_llama(3).save_pretrained(path)
    words = {word: number for number, word in enumerate(["<unk>", "a", "b", "c"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>"
    ).save_pretrained(path)
    return path


def test_a_local_folder_loads_and_is_described(folder):
    model = load_model(str(folder), device="cpu", dtype="float32")
    info = model.info
    assert (info.n_layers, info.hidden_size, info.name) == (3, 32, "tiny")
    assert (info.dtype, info.device, info.context_length) == ("float32", "cpu", 256)
    assert info.parameters == sum(p.numel() for p in model.module.parameters())
    assert len(info.block_parameters) == 3
    assert model.tokenizer("a b")["input_ids"] == [1, 2]
    assert model.location == str(folder)


def test_the_dtype_can_be_chosen(folder):
    assert load_model(str(folder), device="cpu", dtype="bfloat16").module.dtype == torch.bfloat16
    assert resolve_dtype("float16", torch.device("cpu")) == torch.float16


def test_auto_takes_bfloat16_only_where_it_is_native(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr("core.loading._cpu_has_bfloat16", lambda: True)
    assert resolve_dtype("auto", cpu) == torch.bfloat16
    monkeypatch.setattr("core.loading._cpu_has_bfloat16", lambda: False)
    assert resolve_dtype("auto", cpu) == torch.float32


def test_the_fingerprint_follows_weights_and_configuration_not_names(tiny_llama):
    model = tiny_llama(2)
    same = tiny_llama(2)
    same.config._name_or_path = "elsewhere"
    assert fingerprint(model) == fingerprint(same)
    same.model.layers[1].mlp.up_proj.weight.data[3, 3] += 1e-3
    assert fingerprint(model) != fingerprint(same)


def write_config(path, **config):
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    return path


def test_what_is_no_causal_model_is_refused_in_one_sentence(tmp_path):
    bert = transformers.BertForMaskedLM(
        transformers.BertConfig(
            vocab_size=32,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
        )
    )
    t5 = transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    )
    t5.save_pretrained(tmp_path / "t5")
    with pytest.raises(LayerShapError, match="t5 model, not a causal language model"):
        load_model(str(tmp_path / "t5"))
    bert.save_pretrained(tmp_path / "bert")
    with pytest.raises(LayerShapError, match="looks at the words to come"):
        load_model(str(tmp_path / "bert"), dtype="float32")


def test_pickled_weights_are_never_read(folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(LayerShapError, match=r"no .safetensors weights"):
        load_model(str(folder))


def test_code_in_a_models_folder_is_never_run(folder):
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "evil.Config"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text("open('/tmp/layershap-ran', 'w')")
    with pytest.raises(LayerShapError, match="never run"):
        load_model(str(folder))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("/no/such/folder", "no folder at '/no/such/folder'"),
        ("/no/such/model.gguf", "no GGUF file"),
        ("../../../etc", "no config.json|no folder"),
        ("a b c", "not a Hugging Face id"),
        ("owner/name/extra", "not a Hugging Face id"),
        ("", "not a Hugging Face id|no config.json"),
    ],
)
def test_places_without_a_model_are_one_sentence(source, message):
    with pytest.raises(LayerShapError, match=message):
        load_model(source)


def test_an_empty_folder_and_damaged_weights_are_one_sentence(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(LayerShapError, match=r"no config.json"):
        load_model(str(tmp_path / "empty"))
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(LayerShapError, match="cannot be loaded"):
        load_model(str(folder))


def test_a_hub_that_cannot_be_reached_is_one_sentence(monkeypatch, tmp_path):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(LayerShapError, match="cannot be reached"):
        load_model("owner/some-model-that-is-not-cached")


@pytest.mark.parametrize("option", [{"device": "tpu"}, {"dtype": "int4"}])
def test_unknown_options_are_refused_by_name(option):
    [name] = option
    with pytest.raises(LayerShapError, match=f"{name} is"):
        load_model("bundled", **option)


def test_describing_leaves_no_trace_on_the_model(tiny_llama):
    module = tiny_llama(3)
    describe(module)
    assert not any(part._forward_hooks for part in module.modules())
