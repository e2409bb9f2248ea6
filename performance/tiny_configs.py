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
ROPE = {"rope_theta": 1e4, "rope_type": "default"}
IN_THREE = {**ROPE, "mrope_section": [2, 1, 1]}  # half of a head, turned by time, height and width
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
    "granitemoehybrid": {key: ["linear_attention", "full_attention"] for key in ("layer_types", "layers_block_type")},
    "minicpm3": {"qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "num_key_value_heads": 4, "head_dim": 4},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "bamba": {"attn_layer_indices": [1]},
    "gemma3n_text": {"intermediate_size": [48, 48]},
    "deepseek_v2": {"topk_method": "greedy"},
    "mamba2": {"head_dim": 16, "num_heads": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
    "recurrent_gemma": {"num_hidden_layers": 3},  # the third has attention
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "longcat_flash": {"head_dim": 4},
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE}},
}
TRIES = 4  # sets of sizes, see `config_of`


def config_of(kind: str, attempt: int = 0) -> PreTrainedConfig:
    """The configuration of a tiny model of a type: every size that the type knows, replaced by a small one.

    Args:
        attempt: from 1 on every head has keys of its own; at 1 the width of a head is left to the type, as latent
            attention wants it; at 2 sizes are also given where the default is none; at 3 positions have three axes.
    """
    cls = CONFIG_MAPPING[kind]
    default = cls()
    values = {**sizes(default, attempt), **SPECIALS.get(kind, {})}
    for name, part in ((n, getattr(default, n, None)) for n in ("text_config", "vision_config", "audio_config")):
        if isinstance(part, PreTrainedConfig):
            small = sizes(part, attempt) if name == "text_config" else known(part, VISION)
            values[name] = {**small, **SPECIALS.get(part.model_type, {}), "model_type": part.model_type}
    if any(name in values for name in ("vision_config", "audio_config")):
        values.update(known(default, dict.fromkeys(("image_token_index", "image_token_id"), 5)))
    return cls(**values)


def sizes(default: PreTrainedConfig, attempt: int) -> dict[str, Any]:
    """Small sizes of a decoder, and as many kinds of layers as it has layers."""
    if getattr(default, "num_hidden_layers", None) is None:
        return {}
    found = known(default, {**TEXT, "rope_parameters": ROPE} if attempt == 2 else TEXT, unset=attempt == 2)
    if attempt == 3:
        found |= known(default, {"rope_parameters": IN_THREE}, unset=True)
    if attempt == 1:
        found.pop("head_dim", None)
    if attempt:
        found |= known(default, {"num_key_value_heads": 4})
    count = found.get("num_hidden_layers", 2)
    for name in ("layer_types", "mlp_layer_types", "layers_block_type"):
        if settable(default, name) and isinstance(listed := getattr(default, name, None), list) and listed:
            found[name] = (list(dict.fromkeys(listed)) * count)[-count:]
    return found


def known(default: PreTrainedConfig, values: dict[str, Any], unset: bool = False) -> dict[str, Any]:
    """Those of `values` that the configuration has; with `unset` also those that are None by default."""
    found = {}
    for key, value in values.items():
        with contextlib.suppress(Exception):  # some refuse to be asked
            if settable(default, key) and (getattr(default, key) is not None or unset):
                found[key] = value
    return found


def settable(default: PreTrainedConfig, name: str) -> bool:
    """Whether a configuration takes a value for `name`, which it may keep under another name."""
    kept = getattr(type(default), default.attribute_map.get(name, name), None)
    return not isinstance(kept, property) or kept.fset is not None
