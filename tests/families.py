"""Every causal LM family that transformers knows, each as a tiny model with random weights."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

LAYERS = 4
VOCABULARY = 96

# Settings that mean the same in every family, given to each configuration that has them.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "unpadded_vocab_size"), VOCABULARY),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "emb_dim", "embedding_size"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), LAYERS),
    **dict.fromkeys(("decoder_layers", "num_decoder_layers"), LAYERS),
    **dict.fromkeys(("encoder_layers", "num_encoder_layers"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "num_decoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "num_encoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "swa_num_key_value_heads"), 2),
    **dict.fromkeys(("attention_heads", "swa_num_attention_heads"), 4),
    **dict.fromkeys(("head_dim", "swa_head_dim", "v_head_dim", "kv_channels", "dim_head"), 8),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "attention_head_size"), 8),
    **dict.fromkeys(("intermediate_size", "decoder_ffn_dim", "encoder_ffn_dim", "ffn_dim"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 24),
    **dict.fromkeys(("feed_forward_size", "d_inner", "dff", "dim_ff", "ffn_hidden_size"), 48),
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "num_shared_experts"), 1),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "o_lora_rank"), 16),
    **dict.fromkeys(("index_head_dim", "indexer_head_dim"), 16),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 64),
    **dict.fromkeys(("sliding_window", "window_size", "local_attention"), 8),
    **dict.fromkeys(("sliding_window_size", "attention_window_size"), 8),
    **dict.fromkeys(("pad_token_id", "decoder_start_token_id"), 0),
    "bos_token_id": 1,
    "eos_token_id": 2,
    # Encoders' families have causal language models too, which say so.
    "is_decoder": True,
}


# Composite configurations name their vision towers' sizes otherwise.
TOWER_SIZES: dict[str, Any] = {
    **SIZES,
    **dict.fromkeys(("depth", "num_global_layers", "num_blocks"), 2),
    **dict.fromkeys(("image_size", "crop_size"), 16),
    **dict.fromkeys(("patch_size", "spatial_patch_size"), 8),
    **dict.fromkeys(("out_hidden_size", "vision_output_dim", "projection_dim"), 32),
    **dict.fromkeys(("num_key_value_heads",), 4),
    **dict.fromkeys(("max_source_positions",), 64),
    **dict.fromkeys(("hidden_size_global",), 32),
}
HYBRID = ["linear_attention", "full_attention"] * 2
MAMBA2 = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 16}
DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
UNSHARED = {"num_kv_shared_layers": 0}
GEMMA_INPUTS = {"vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8}
DRAFTS = {
    "backbone_hidden_size": 32,
    "text_config": {"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0},
}
# What a family needs besides, by the type that its configuration states.
QUIRKS: dict[str, dict[str, Any]] = {
    "axk1": {"first_k_dense_replace": 1},
    "bailing_hybrid": {"layer_group_size": 2},
    "bamba": {**MAMBA2, "attn_layer_indices": [1, 3]},
    "blt": {"encoder_hash_byte_group_vocab": 64, "encoder_hash_byte_group_size": [3]},
    "codegen": {"rotary_dim": 8},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}
    },
    "cpmant": {"prompt_length": 4},
    "dbrx": {
        "attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0},
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "deepseek_v3": {"first_k_dense_replace": 1},
    "dots3_note_text": {
        "num_key_value_heads": 4,
        "shared_experts_intermediate_size": 24,
        "index_n_heads": 2,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 16,
        "swa_kv_lora_rank": 16,
        "swa_qk_nope_head_dim": 8,
        "swa_qk_rope_head_dim": 8,
        "swa_head_dim": 16,
        "swa_v_head_dim": 8,
    },
    "dots3_note": {"vision_config": {"pyramid_num_routed": [0, 0, 2, 2]}},
    "falcon_h1": {**MAMBA2, "mamba_d_ssm": 64},
    "gemma3n_text": {**GEMMA_INPUTS, **UNSHARED, "laurel_rank": 8},
    "gemma4_assistant": DRAFTS,
    "gemma4_text": GEMMA_INPUTS,
    "gemma4_unified_assistant": DRAFTS,
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "gptj": {"rotary_dim": 8},
    "granitemoehybrid": {**MAMBA2, "layer_types": ["mamba", "attention"] * 2},
    "hrm_text": {"H_cycles": 1, "L_cycles": 1},
    "inkling2_text": {"n_layers_per_attn_res_block": 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8},
    "kimi_linear": {
        "layer_types": HYBRID,
        "linear_head_dim": 8,
        "linear_num_heads": 4,
        "num_local_experts": 4,
        "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
    },
    "lfm2": {"block_multiple_of": 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "longcat_flash": {"expert_ffn_hidden_size": 24, "zero_expert_num": 2},
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 2, "state_size": 8, "chunk_size": 16},
    "mpt": {"attn_config": {"attn_impl": "eager"}},
    "nemotron_h": {
        "mamba_num_heads": 4,
        "mamba_head_dim": 8,
        "n_groups": 2,
        "ssm_state_size": 8,
        "moe_shared_expert_intermediate_size": 24,
    },
    "qwen2_5_vl_text": {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [2, 1, 1],
        }
    },
    "qwen4_exp_text": {
        **DELTA,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
        "split_ngram_parts": 1,
        "hc_lowrank": 8,
    },
    "reformer": {
        "attn_layers": ["local"] * LAYERS,
        "axial_pos_shape": [8, 8],
        "axial_pos_embds_dim": [16, 16],
        "local_attn_chunk_length": 4,
    },
    "roc_bert": {
        "pronunciation_vocab_size": 16,
        "shape_vocab_size": 16,
        "pronunciation_embed_dim": 8,
        "shape_embed_dim": 8,
    },
    "xlstm": {"num_heads": 2, "num_blocks": 4},
    "xmod": {"default_language": "en_XX", "languages": ["en_XX"]},
    # Every load gives the padding token zeros.
    "youtu": {"pad_token_id": None},
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "attention_head_dim": 16,
        "num_key_value_heads": 4,
        "mamba_d_state": 8,
    },
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "n_mamba_heads": 4,
        "mamba_d_state": 8,
        "chunk_size": 16,
        "num_key_value_heads": 4,
    },
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
    **dict.fromkeys(
        (
            "olmo_hybrid",
            "qwen3_5_moe_text",
            "qwen3_5_text",
            "qwen3_next",
        ),
        DELTA,
    ),
}


def small(kind: type[PreTrainedConfig], sizes: dict[str, Any], **changes: Any) -> PreTrainedConfig:
    """A configuration of this class with small sizes, its parts' configurations included."""
    names = {field.name for field in dataclasses.fields(kind)}
    changes = {**QUIRKS.get(kind.model_type, {}), **changes}
    settings = {name: value for name, value in sizes.items() if name in names}
    # Families that compress keys and values have as many of them as queries.
    if "kv_lora_rank" in names:
        settings["num_key_value_heads"] = 4
    for name, spec in kind.sub_configs_defaults.items():
        if spec.optional:
            continue
        part = spec.config_class if spec.model_type is None else CONFIG_MAPPING[spec.model_type]
        part_sizes = SIZES if name in ("text_config", "decoder") else TOWER_SIZES
        settings[name] = small(part, part_sizes, **changes.pop(name, {}))
    return kind(**{**settings, **changes})


def tiny(family: str, loader: Any = AutoModelForCausalLM, **changes: Any) -> PreTrainedModel:
    """A model whose weights are large enough that every layer matters."""
    torch.manual_seed(0)
    config = small(CONFIG_MAPPING[family], SIZES, **changes)
    model = loader.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.add_(0.15 * torch.randn(parameter.shape, generator=generator))
    return model.eval()
