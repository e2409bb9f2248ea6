"""Tiny random mixtures of experts of the families that people align."""

from typing import Any

import torch
import transformers as tf

from nspo import NullSpaceBases
from nspo.bases.stage import compute_basis
from nspo.models.structure.linears import layer_norms
from nspo.models.structure.sites import find_sites

HIDDEN, EXPERTS, ASKED = 16, 4, 2
COMMON: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": HIDDEN,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SOME = {"num_experts": EXPERTS, "num_experts_per_tok": ASKED, "moe_intermediate_size": 12}
LOCAL = {"num_local_experts": EXPERTS, "num_experts_per_tok": ASKED}
ROUTED = {
    "n_routed_experts": EXPERTS,
    "num_experts_per_tok": ASKED,
    "moe_intermediate_size": 12,
    "n_group": 1,
    "topk_group": 1,
}
LATENT = {
    "head_dim": None,
    "num_key_value_heads": 2,
    "q_lora_rank": 12,
    "kv_lora_rank": 10,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
}
DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
MAMBA = {"mamba_num_heads": 4, "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 1, "chunk_size": 8}

MIXTURES: dict[str, dict[str, Any]] = {
    "Qwen3Moe": SOME,
    "Qwen3_5MoeText": {**SOME, **DELTA, "shared_expert_intermediate_size": 20},
    "GptOss": {**LOCAL, "layer_types": ["sliding_attention", "full_attention"]},
    "Mixtral": LOCAL,
    "Olmoe": SOME,
    "Glm4Moe": {**ROUTED, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "DeepseekV3": {**ROUTED, **LATENT, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "MiniMax": {**LOCAL, "block_size": 4},
    "MiniMaxM2": LOCAL,
    "GraniteMoe": LOCAL,
    "Lfm2Moe": {**SOME, "num_dense_layers": 1, "layer_types": ["conv", "full_attention"]},
    "NemotronH": {
        **ROUTED,
        **MAMBA,
        "num_hidden_layers": 4,
        "layers_block_type": ["mamba", "moe", "attention", "moe"],
        "moe_shared_expert_intermediate_size": 20,
    },
}


def mixture(family: str, **changed: Any) -> tf.PreTrainedModel:
    """The family's causal language model, untrained, float32; equal arguments give equal weights."""
    settings = {**COMMON, **MIXTURES[family], **changed}
    config = getattr(tf, f"{family}Config")(**{k: v for k, v in settings.items() if v is not None})
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.02)  # made zero, they would hide a bias that is left out
    return model.eval()


def mixture_bases(model: tf.PreTrainedModel, frozen: str = "") -> NullSpaceBases:
    """Bases of random moments that leave half of every site free; nothing of a site whose name contains `frozen`."""
    made = []
    for seed, site in enumerate(find_sites(model)):
        vectors = torch.randn(site.width, site.width, generator=torch.Generator().manual_seed(seed)).double()
        rank = site.width if frozen and frozen in site.name else site.width // 2
        made.append(compute_basis(site.name, site.layers, vectors @ vectors.T, 10_000, "rank", rank))
    return NullSpaceBases(made, layer_norms(model, [layer for site in made for layer in site.layers]))
