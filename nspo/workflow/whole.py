"""Is a folder that a rule made still whole? Snakemake asks only whether a `directory()` exists, not what it holds.

A model whose weights were deleted or cut short is made again, as a missing file would be. Cheap: names, sizes and the
headers of safetensors files are read, no weights.
"""

import json
from collections.abc import Iterable
from itertools import product
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
INDEX = "model.safetensors.index.json"
MODEL_FILES = ("config.json", "tokenizer_config.json")


def lacking(folder: Path) -> str | None:
    """The first file that a model or an activation store on disk should hold and does not hold whole; None: all there.

    A folder that does not exist lacks nothing: Snakemake sees that by itself.
    """
    if not folder.is_dir():
        return None
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        activations = manifest["kind"] == "activations"
        wanted = _of_store(manifest) if activations else [*MODEL_FILES, *_weights(folder)]
    except (OSError, ValueError, KeyError, TypeError):
        return MANIFEST
    return next((name for name in wanted if not _is_whole(folder / name)), None)


def _weights(folder: Path) -> Iterable[str]:
    index = folder / INDEX
    if not index.is_file() and not (folder / "model.safetensors").is_file() and any(folder.glob("model-*.safetensors")):
        return [INDEX]
    return (
        sorted(set(json.loads(index.read_bytes())["weight_map"].values())) if index.is_file() else ["model.safetensors"]
    )


def _of_store(manifest: dict[str, Any]) -> Iterable[str]:
    sites, parts = manifest["sites"], range(len(manifest["parts"]))
    return [f"{sites[site]['storage']}/site={site}/part-{part:03d}.parquet" for site, part in product(sites, parts)]


def _is_whole(path: Path) -> bool:
    try:
        size = path.stat().st_size
        return size == _expected_size(path) if path.suffix == ".safetensors" else size > 0
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _expected_size(path: Path) -> int:
    """Bytes of a safetensors file by its header: 8 bytes with the header's length, the header, the tensors."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length)) if length < 2**27 else {}
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    return 8 + length + max(ends, default=0)
