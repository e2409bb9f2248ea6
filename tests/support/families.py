"""Tiny random models of many families, to walk the paths that real checkpoints take: names, experts, other inputs."""

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel

from nspo.models.folders.classes import model_class
from nspo.models.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
DENSE = {
    "vocab_size": len(TOKENIZER),
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    **SPECIAL,
}
EXPERTS = {**DENSE, "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
VISION = {  # as deep as the decoder, so that depth cannot tell them apart
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "depth": 2,
    "num_attention_heads": 4,
    "num_heads": 4,
    "image_size": 16,
    "patch_size": 8,
    "out_hidden_size": 32,
}
DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}
ROTARY = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
GPT2 = {"vocab_size": len(TOKENIZER), "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512, **SPECIAL}
NEMOTRON = {
    **{key: value for key, value in DENSE.items() if key != "num_hidden_layers"},
    "layers_block_type": ["mamba", "attention"],
    "mamba_num_heads": 4,
    "mamba_head_dim": 8,
    "ssm_state_size": 8,
    "n_groups": 2,
}
DEEPSEEK = {
    **{key: value for key, value in EXPERTS.items() if key != "head_dim"},
    **LATENT,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}


def _multimodal(text: dict, vision: dict | None = None, **settings: object) -> dict:
    return {"text_config": text, "vision_config": {**VISION, **(vision or {})}, **settings}


CONFIGS = {  # family: configuration class of transformers, its values
    "llama": ("LlamaConfig", DENSE),
    "gpt2": ("GPT2Config", GPT2),
    "gpt_neox": ("GPTNeoXConfig", DENSE),
    "phi3": ("Phi3Config", DENSE),
    "gemma3_text": ("Gemma3TextConfig", DENSE),
    "qwen3_moe": ("Qwen3MoeConfig", EXPERTS),
    "mixtral": ("MixtralConfig", EXPERTS),
    "gpt_oss": ("GptOssConfig", EXPERTS),
    "granitemoe": ("GraniteMoeConfig", EXPERTS),
    "deepseek_v3": ("DeepseekV3Config", DEEPSEEK),
    "lfm2": ("Lfm2Config", {**DENSE, "layer_types": ["conv", "full_attention"]}),
    "nemotron_h": ("NemotronHConfig", NEMOTRON),
    "jamba": ("JambaConfig", {**EXPERTS, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 4}),
    "bamba": ("BambaConfig", {**DENSE, **MAMBA, "attn_layer_indices": [1]}),
    "falcon_h1": ("FalconH1Config", {**DENSE, **MAMBA, "mamba_n_heads": 4, "mamba_d_ssm": 32}),
    "mamba": ("MambaConfig", {**DENSE, "state_size": 4}),
    "qwen3_next": ("Qwen3NextConfig", {**EXPERTS, **DELTA, "shared_expert_intermediate_size": 16}),
    "gemma3": ("Gemma3Config", _multimodal(DENSE, mm_tokens_per_image=4, image_token_index=5)),
    "gemma4": ("Gemma4Config", _multimodal(DENSE)),
    "qwen3_5": ("Qwen3_5Config", _multimodal({**DENSE, **DELTA})),
    "qwen3_vl": ("Qwen3VLConfig", _multimodal(DENSE)),
    "qwen2_5_vl": ("Qwen2_5_VLConfig", _multimodal({**DENSE, "rope_parameters": ROTARY})),
    "llava": (
        "LlavaConfig",
        _multimodal(
            {**DENSE, "model_type": "llama"},
            {"model_type": "clip_vision_model", "projection_dim": 32},
            image_token_index=5,
        ),
    ),
    "mistral3": (
        "Mistral3Config",
        _multimodal({**DENSE, "model_type": "mistral"}, {"model_type": "pixtral", "head_dim": 8}, image_token_index=5),
    ),
}


def tiny_config(family: str) -> PreTrainedConfig:
    """The configuration of a tiny model of a family."""
    name, values = CONFIGS[family]
    return getattr(transformers, name)(**values)


def tiny_family(family: str, seed: int = 0) -> PreTrainedModel:
    """An untrained fp32 model of a family that goes with `TOKENIZER`, of the class that a folder of it is loaded as."""
    config = tiny_config(family)
    torch.manual_seed(seed)
    return model_class(config)(config).float().eval()
