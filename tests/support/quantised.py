"""Checkpoints as they are published in few bits: FP8 with a scale per block, MXFP4, and GGUF."""

import json
from pathlib import Path

import torch
from gguf import MODEL_ARCH, GGMLQuantizationType, GGUFWriter, dequantize, get_tensor_name_map, quantize
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from nspo.models.tiny import tiny_tokenizer

BLOCK = 16  # rows and columns that share a scale
FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])


def to_fp8(folder: Path) -> dict[str, Tensor]:
    """Rewrite a folder in block-scaled FP8; returns what its matrices in blocks mean now, by names on disk."""
    kept, meant = {}, {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if ".layers." not in name or weight.ndim != 2 or any(size % BLOCK for size in weight.shape):
            kept[name] = weight.bfloat16()
            continue
        rows, columns = (size // BLOCK for size in weight.shape)
        blocks = weight.reshape(rows, BLOCK, columns, BLOCK)
        scale = blocks.abs().amax((1, 3)) / 448
        codes = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
        meant[name] = (codes.float() * scale[:, None, :, None]).reshape(weight.shape)
        kept |= {name: codes.reshape(weight.shape), f"{name}_scale_inv": scale}
    _mark(folder, kept, {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK], "activation_scheme": "dynamic"})
    return meant


def to_mxfp4(folder: Path) -> dict[str, Tensor]:
    """Rewrite the experts of a gpt-oss folder as MXFP4: random codes; returns what they mean, by names in memory."""
    kept, meant = {}, {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if not name.endswith(("gate_up_proj", "down_proj")):
            kept[name] = weight.bfloat16()
            continue
        experts, inputs, outputs = weight.shape
        codes = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), dtype=torch.uint8)
        scales = torch.randint(118, 122, (experts, outputs, inputs // 32), dtype=torch.uint8)
        values = torch.stack([FP4[(codes & 15).long()], FP4[(codes >> 4).long()]], dim=-1).flatten(-2)
        values = values * (scales.float() - 127).exp2()[..., None]
        meant[name] = values.reshape(experts, outputs, inputs).transpose(1, 2)
        kept |= {f"{name}_blocks": codes, f"{name}_scales": scales}
    _mark(folder, kept, {"quant_method": "mxfp4"})
    return meant


def to_gguf(model: LlamaForCausalLM, file: Path) -> dict[str, Tensor]:
    """Write a Llama with bytes for tokens as Q4_1, norms as floats; returns what the weights mean, by their names."""
    config, names = model.config, get_tensor_name_map(MODEL_ARCH.LLAMA, model.config.num_hidden_layers)
    writer = GGUFWriter(file, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    vocabulary = tiny_tokenizer().get_vocab()
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(vocabulary, key=vocabulary.__getitem__))
    writer.add_token_scores([0.0] * len(vocabulary))  # no merges come of them
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(config.eos_token_id)
    meant = {}
    for name, weight in model.named_parameters():
        place, _, kind = name.rpartition(".")
        kept = GGMLQuantizationType.F32 if weight.ndim == 1 else GGMLQuantizationType.Q4_1
        codes = quantize(_paired(weight.detach(), name, config).numpy(), kept)
        writer.add_tensor(f"{names.get_name(place)}.{kind}", codes, raw_dtype=kept)
        meant[name] = torch.from_numpy(dequantize(quantize(weight.detach().numpy(), kept), kept))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return meant


def _paired(weight: Tensor, name: str, config: LlamaConfig) -> Tensor:
    """llama.cpp rotates neighbouring rows of a head, transformers rows that are half a head apart."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    if heads is None:
        return weight
    return weight.reshape(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape).contiguous()


def _mark(folder: Path, weights: dict[str, Tensor], how: dict[str, object]) -> None:
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": how}))
