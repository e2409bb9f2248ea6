"""Identity of artifacts: manifests, fingerprints, atomic writes, and checks on load.

Every file that passes from one stage to the next says what it is: kind, schema version, package version, and whatever
shaped it. In safetensors the manifest is one sorted-JSON value under the single metadata key `nspo` (several keys make
the bytes of the file depend on hash order); beside folders and Parquet datasets it is the file `manifest.json`.
"""

import fcntl
import glob
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nspo.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

SCHEMA_VERSION = 1
METADATA_KEY = "nspo"
MANIFEST_NAME = "manifest.json"


def dumps(value: Any) -> str:
    """JSON with sorted keys and no spaces that vary: equal values give equal bytes."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False)


def make_manifest(kind: str, **fields: Any) -> dict[str, Any]:
    """The identity of an artifact of `kind`: schema and package version, then the stage's own `fields`."""
    return {"kind": kind, "schema": SCHEMA_VERSION, "nspo_version": version("nspo"), **fields}


def check_manifest(manifest: Any, kind: str, path: Path) -> None:
    """Refuse what is no manifest, or one of another kind or of a newer schema.

    Raises:
        UserError: naming the file, what it is and what was expected.
    """
    if not isinstance(manifest, Mapping):
        raise UserError(f"{path} holds {type(manifest).__name__}, expected the manifest of a {kind} artifact")
    if manifest.get("kind") != kind:
        raise UserError(
            f"{path} holds {manifest.get('kind')!r}, expected {kind!r}: point the setting at a {kind} artifact"
        )
    if manifest.get("schema") != SCHEMA_VERSION:
        raise UserError(
            f"{path} has schema {manifest.get('schema')}, this nspo reads schema {SCHEMA_VERSION}: rebuild the file or "
            f"install the nspo that wrote it ({manifest.get('nspo_version')})"
        )


@contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """Yield a scratch path beside `path`; on success it takes `path`'s place, on failure it is removed.

    Works for a file or a folder (create whichever you need at the yielded path). A reader never sees half an artifact.
    What a killed process left beside `path`, perhaps as large as the artifact, is removed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{glob.escape(path.name)}.????????"):
        if (owner := _own(left)) is not None:
            shutil.rmtree(left, ignore_errors=True)
            os.close(owner)
    scratch_dir = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    owner = _own(scratch_dir)
    scratch = scratch_dir / path.name
    try:
        yield scratch
        if path.is_dir():
            shutil.rmtree(path)
        os.replace(scratch, path)
    finally:
        shutil.rmtree(scratch_dir, ignore_errors=True)
        if owner is not None:
            os.close(owner)


def _own(scratch_dir: Path) -> int | None:
    """An open handle that marks a scratch folder as in use until it is closed; None where another process has it."""
    try:
        handle = os.open(scratch_dir, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # in use, or a file system without locks
        os.close(handle)
        return None
    return handle


def write_json(path: Path | str, value: Any) -> None:
    """Write `value` atomically as indented JSON with sorted keys."""
    with atomic_path(path) as scratch:
        scratch.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path | str) -> Any:
    """Read a JSON file.

    Raises:
        UserError: when the file is missing, cannot be read or is not JSON.
    """
    path = Path(path)
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist: run the stage that makes it") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): expected a JSON file") from error
    except (ValueError, RecursionError) as error:  # ValueError: broken JSON, broken UTF-8
        raise UserError(f"{path} is not valid JSON ({error}): delete it and rerun the stage that makes it") from error


def read_table(path: Path | str, columns: Iterable[str]) -> list[dict[str, Any]]:
    """All rows of a Parquet file that must have `columns`.

    Raises:
        UserError: when the file is missing, truncated, altered since it was written, or lacks a column.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist: run the stage that makes it")
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            table = file.read()
        rows: list[dict[str, Any]] = table.to_pylist()
    except (OSError, ValueError, pa.ArrowException) as error:
        raise UserError(f"{path} is not a whole Parquet file: delete it and rerun the stage that makes it") from error
    if missing := sorted(set(columns) - set(table.column_names)):
        raise UserError(f"{path} has no column {missing[0]!r}: delete it and rerun the stage that makes it")
    return rows


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
    if manifest.pop("content", None) not in (None, _fingerprint_tensors(tensors)):  # None: a file of nspo before 0.2
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
        raise UserError(f"{path} does not exist: expected a {kind} file (safetensors)")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(
            f"{path} is not a whole safetensors file ({error}): delete it and rerun the stage that makes it"
        ) from error
    if METADATA_KEY not in metadata:
        raise UserError(f"{path} carries no nspo manifest: expected a {kind} file written by nspo")
    try:
        manifest = json.loads(metadata[METADATA_KEY])
    except ValueError as error:
        raise UserError(
            f"{path} carries a damaged nspo manifest ({error}): delete it and rerun the stage that makes it"
        ) from error
    check_manifest(manifest, kind, path)
    return manifest


def fingerprint(value: Any) -> str:
    """16 hex digits that identify a JSON-like value."""
    return hashlib.sha256(dumps(value).encode()).hexdigest()[:16]


def fingerprint_files(paths: Iterable[Path]) -> str:
    """16 hex digits over the names and contents of `paths`, in sorted order."""
    digest = hashlib.sha256()
    for path in sorted(paths, key=lambda p: p.name):
        digest.update(path.name.encode() + b"\0")
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def fingerprint_model(folder: Path | str) -> dict[str, str]:
    """`{"weights": ..., "tokenizer": ...}` for a model folder: safetensors shards, and tokenizer with chat template.

    Raises:
        UserError: when the folder holds no safetensors weights.
    """
    folder = Path(folder)
    weights = list(folder.glob("*.safetensors"))
    if not weights:
        raise UserError(
            f"{folder} holds no *.safetensors weights: expected a Hugging Face model folder (`model.source`)"
        )
    names = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    return {
        "weights": fingerprint_files(weights),
        "tokenizer": fingerprint_files(folder / name for name in names if (folder / name).is_file()),
    }


def check_fingerprints(folder: Path | str, recorded: Mapping[str, Any]) -> dict[str, str]:
    """`fingerprint_model` of a folder whose manifest recorded them; what is not recorded is not compared.

    Raises:
        UserError: when the files are no longer those that were written.
    """
    found = fingerprint_model(folder)
    for part, value in found.items():
        if recorded.get(part, value) != value:
            raise UserError(
                f"{folder}: {part} with the fingerprint {value}, its {MANIFEST_NAME} says {recorded[part]}: they were "
                "damaged or replaced since they were written, delete the folder and rerun the stage that makes it"
            )
    return found
