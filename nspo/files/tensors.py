"""Tensors in safetensors files that carry a manifest and notice damage."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nspo.errors import UserError, unreadable
from nspo.files.atomic import atomic_path
from nspo.files.manifest import METADATA_KEY, check_manifest, dumps

if TYPE_CHECKING:
    from torch import Tensor


def save_tensors(path: Path | str, tensors: Mapping[str, "Tensor"], manifest: Mapping[str, Any]) -> None:
    """Write `tensors` and their `manifest` atomically as safetensors; equal content gives equal bytes.

    The manifest gets the key `content`, a fingerprint of the tensors by which `load_tensors` notices a flipped bit.
    """
    from safetensors.torch import save_file

    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    text = dumps({**manifest, "content": _fingerprint_tensors(tensors)})
    with atomic_path(path) as scratch:
        save_file(tensors, scratch, metadata={METADATA_KEY: text})


def load_tensors(path: Path | str, kind: str) -> tuple[dict[str, Any], dict[str, "Tensor"]]:
    """The manifest and the tensors that were given to `save_tensors`.

    Raises:
        UserError: as `read_tensor_manifest`, or when the tensors are not those that were written.
    """
    from safetensors.torch import load_file

    manifest = read_tensor_manifest(path, kind)
    tensors = load_file(path)
    if manifest.pop("content", None) != _fingerprint_tensors(tensors):
        raise UserError(f"{path} was damaged after it was written: delete it and rerun the stage that makes it")
    return manifest, tensors


def _fingerprint_tensors(tensors: Mapping[str, "Tensor"]) -> str:
    """16 hex digits over the names and bytes of contiguous tensors on the CPU."""
    import torch

    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name}\0".encode())
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def read_tensor_manifest(path: Path | str, kind: str) -> dict[str, Any]:
    """The manifest in a safetensors header, read without touching the tensors.

    Raises:
        UserError: when the file is missing, truncated, without an nspo manifest, or of another kind or schema.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist", expected=f"a {kind} file (safetensors)")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError, ValueError) as error:
        raise unreadable(path, "a whole safetensors file", error) from error
    if METADATA_KEY not in metadata:
        raise UserError(f"{path} carries no nspo manifest", expected=f"a {kind} file written by nspo")
    try:
        manifest = json.loads(metadata[METADATA_KEY])
    except ValueError as error:
        raise UserError(
            f"{path} carries a damaged nspo manifest ({error}): delete it and rerun the stage that makes it"
        ) from error
    check_manifest(manifest, kind, path)
    return manifest
