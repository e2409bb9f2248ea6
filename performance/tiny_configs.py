"""A tiny configuration of every architecture that transformers knows: its own default with small sizes."""

import contextlib
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

from nspo.models.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
TEXT: dict[str, Any] = {
    "vocab_size": len(TOKENIZER),
    "hidden_size": 32,
    "intermediate_size": 48,
    "ffn_dim": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "global_head_dim": 8,
    "max_position_embeddings": 512,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "top_k_experts": 2,
    "moe_top_k": 2,
    "moe_k": 2,
    "moe_topk": 2,
    "moe_intermediate_size": 16,
    "expert_ffn_hidden_size": 16,
    "ffn_hidden_size": 48,
    "shared_expert_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 16,
    "shared_intermediate_size": 16,
    "moe_ffn_hidden_size": 16,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "zero_expert_num": 0,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "index_n_heads": 2,
    "index_head_dim": 8,
    "index_topk": 4,
    "sliding_window": 8,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": len(TOKENIZER),
    "num_kv_shared_layers": 0,
    "laurel_rank": 4,
    "altup_num_inputs": 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "state_size": 8,
    "ssm_state_size": 8,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_ssm": 64,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_num_heads": 4,
    "n_mamba_heads": 2,
    "mamba_head_dim": 16,
    "mamba_dt_rank": 4,
    "n_groups": 1,
    "num_heads": 4,
    "chunk_size": 8,
    "block_size": 8,
    "lru_width": 32,
    "attention_window_size": 8,
    "rotary_dim": 4,
    "word_embed_proj_dim": 32,
    **SPECIAL,
}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "embed_dim": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "depth": 2,
    "num_attention_heads": 4,
    "num_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "image_size": 16,
    "patch_size": 8,
    "out_hidden_size": 32,
    "projection_dim": 32,
}
HEADS_ALIKE = {"num_key_value_heads": 4}
NO_HEAD_DIM = ("deepseek_v2", "deepseek_v3", "longcat_flash", "glm_moe_dsa", "deepseek_v32", "youtu", "kimi_k25")
SPECIALS: dict[str, dict[str, Any]] = {
    "nemotron_h": {"layers_block_type": ["mamba", "moe", "attention", "moe"], "num_hidden_layers": 4},
    "dbrx": {
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 2,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2, "ffn_act_fn": {"name": "silu"}},
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "full_attn_idxs": None},
    "lfm2": {"layer_types": ["conv", "full_attention"], "full_attn_idxs": None},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "minicpm3": {"qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "num_key_value_heads": 4, "head_dim": 4},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "bamba": {"attn_layer_indices": [1]},
    "gemma3n_text": {"intermediate_size": [48, 48]},
    **dict.fromkeys(NO_HEAD_DIM, HEADS_ALIKE),
}


def config_of(kind: str) -> PreTrainedConfig:
    """The configuration of a tiny model of a type: every size that the type knows, replaced by a small one."""
    cls = CONFIG_MAPPING[kind]
    default = cls()
    values = {**sizes(default, kind), **SPECIALS.get(kind, {})}
    for name, part in ((n, getattr(default, n, None)) for n in ("text_config", "vision_config", "audio_config")):
        if isinstance(part, PreTrainedConfig):
            small = sizes(part, part.model_type) if name == "text_config" else known(part, VISION)
            values[name] = {**small, **SPECIALS.get(part.model_type, {}), "model_type": part.model_type}
    if any(name in values for name in ("vision_config", "audio_config")):
        values.update(known(default, dict.fromkeys(("image_token_index", "image_token_id"), 5)))
    return cls(**values)


def sizes(default: PreTrainedConfig, kind: str) -> dict[str, Any]:
    """Small sizes of a decoder, and as many kinds of layers as it has layers."""
    if getattr(default, "num_hidden_layers", None) is None:
        return {}
    found = known(default, TEXT)
    if kind in NO_HEAD_DIM:
        found.pop("head_dim", None)
    count = found.get("num_hidden_layers", 2)
    for name in ("layer_types", "mlp_layer_types", "layers_block_type"):
        settable = not isinstance(getattr(type(default), name, None), property)
        if settable and isinstance(listed := getattr(default, name, None), list) and listed:
            found[name] = (list(dict.fromkeys(listed)) * count)[-count:]
    return found


def known(default: PreTrainedConfig, values: dict[str, Any]) -> dict[str, Any]:
    """Those of `values` that the configuration has."""
    found = {}
    for key, value in values.items():
        with contextlib.suppress(Exception):  # some refuse to be asked
            if getattr(default, key, None) is not None:
                found[key] = value
    return found
