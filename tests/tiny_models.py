"""Tiny random-weight causal LMs of many architectures."""

from __future__ import annotations

from typing import Any

import torch
import transformers

VOCABULARY = 96
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ALTERNATING = ["sliding_attention", "full_attention"]


def _without(*names: str, **changes: Any) -> dict[str, Any]:
    return {**{k: v for k, v in COMMON.items() if k not in names}, **changes}


# Family: (configuration class, its settings, whether layer kinds alternate).
FAMILIES: dict[str, tuple[str, dict[str, Any], bool]] = {
    "llama": ("LlamaConfig", COMMON, False),
    "mistral": ("MistralConfig", {**COMMON, "sliding_window": 8}, False),
    "qwen2": ("Qwen2Config", COMMON, False),
    "qwen3": ("Qwen3Config", {**COMMON, "head_dim": 8}, False),
    "gemma2": ("Gemma2Config", {**COMMON, "head_dim": 8, "sliding_window": 8}, True),
    "gemma3_text": ("Gemma3TextConfig", {**COMMON, "head_dim": 8, "sliding_window": 8}, True),
    "phi3": ("Phi3Config", COMMON, False),
    "gpt2": (
        "GPT2Config",
        {"vocab_size": VOCABULARY, "n_embd": 32, "n_head": 4, "n_positions": 128},
        False,
    ),
    "opt": (
        "OPTConfig",
        _without("intermediate_size", "num_key_value_heads", ffn_dim=48, word_embed_proj_dim=24),
        False,
    ),
    "gpt_neox": ("GPTNeoXConfig", _without("num_key_value_heads"), False),
    "bloom": ("BloomConfig", {"vocab_size": VOCABULARY, "hidden_size": 32, "n_head": 4}, False),
    "falcon": (
        "FalconConfig",
        _without("intermediate_size", "num_key_value_heads", "max_position_embeddings"),
        False,
    ),
    "mixtral": (
        "MixtralConfig",
        {**COMMON, "num_local_experts": 4, "num_experts_per_tok": 2},
        False,
    ),
    "mamba": (
        "MambaConfig",
        {"vocab_size": VOCABULARY, "hidden_size": 32, "state_size": 8, "time_step_rank": 4},
        False,
    ),
    "rwkv": (
        "RwkvConfig",
        {"vocab_size": VOCABULARY, "hidden_size": 32, "attention_hidden_size": 32},
        False,
    ),
    "olmo2": ("Olmo2Config", COMMON, False),
    "stablelm": ("StableLmConfig", COMMON, False),
    "cohere": ("CohereConfig", COMMON, False),
    "starcoder2": ("Starcoder2Config", COMMON, False),
    "gptj": (
        "GPTJConfig",
        {"vocab_size": VOCABULARY, "n_embd": 32, "n_head": 4, "n_positions": 128, "rotary_dim": 8},
        False,
    ),
}


def configuration(family: str, layers: int, kept: list[int] | None = None) -> Any:
    """A configuration with `layers` layers, or with those of them that are kept."""
    name, settings, alternating = FAMILIES[family]
    chosen = range(layers) if kept is None else kept
    changes: dict[str, Any] = {}
    if alternating:
        changes["layer_types"] = [ALTERNATING[layer % 2] for layer in chosen]
    if family == "rwkv":
        changes["rescale_every"] = 2
    return getattr(transformers, name)(**settings, **changes, num_hidden_layers=len(chosen))


def tiny(family: str, layers: int = 5, seed: int = 0) -> transformers.PreTrainedModel:
    """A model whose weights are large enough that every layer matters."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(
        configuration(family, layers), dtype=torch.float32
    ).eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data.add_(0.15 * noise)
    return model


def really_deleted(
    model: transformers.PreTrainedModel, family: str, layers: int, path: str, kept: list[int]
) -> transformers.PreTrainedModel:
    """A fresh model without the other layers, weights copied under renumbered names.

    Independent of the code under test: it goes through a configuration and a state dict.
    """
    fresh = transformers.AutoModelForCausalLM.from_config(
        configuration(family, layers, kept), dtype=torch.float32
    ).eval()
    new_number = {old: new for new, old in enumerate(kept)}
    state = {}
    for name, tensor in model.state_dict().items():
        if name.startswith(path + "."):
            number, _, rest = name.removeprefix(path + ".").partition(".")
            if int(number) not in new_number:
                continue
            name = f"{path}.{new_number[int(number)]}.{rest}"
        state[name] = tensor.clone()
    fresh.load_state_dict(state, strict=True)
    return fresh
