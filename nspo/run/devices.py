"""The device that tensors live on, what it can do, and a clock that waits for it."""

import time

import torch

from nspo.errors import UserError


def device_of(name: str) -> torch.device:
    """The torch device for the runtime setting `device`.

    Raises:
        UserError: when cuda is asked for and there is none.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("runtime.device is 'cuda', but torch finds no GPU: set it to 'auto' or 'cpu'")
    return torch.device(name)


def has_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bf16 matrices in hardware (elsewhere autocast would be slower than fp32)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def now() -> float:
    """Seconds on a steady clock, once the accelerator has done all it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
