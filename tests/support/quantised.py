"""Checkpoints as they are published in few bits: FP8 with a scale per block, and MXFP4."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

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


def _mark(folder: Path, weights: dict[str, Tensor], how: dict[str, object]) -> None:
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": how}))
