"""What every artifact says of itself: manifests and fingerprints, and the checks on load.

Every file that passes from one stage to the next carries its kind, schema version, package version, and whatever shaped
it. In safetensors the manifest is one sorted-JSON value under the single metadata key `nspo` (several keys make the
bytes of the file depend on hash order); beside folders and Parquet datasets it is the file `manifest.json`.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from nspo.errors import UserError, refuse_no_file, unreadable
from nspo.files.atomic import atomic_path

SCHEMA_VERSION = 1
METADATA_KEY = "nspo"
UNKNOWN = "unknown"  # of a part that an artifact does not record
MANIFEST_NAME = "manifest.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


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
        raise UserError(f"{path} holds {type(manifest).__name__}", expected=f"the manifest of a {kind} artifact")
    if manifest.get("kind") != kind:
        raise UserError(
            f"{path} holds {manifest.get('kind')!r}",
            expected=f"{kind!r}",
            change=f"point the setting at a {kind} artifact",
        )
    if manifest.get("schema") != SCHEMA_VERSION:
        raise UserError(
            f"{path} has schema {manifest.get('schema')}, this nspo reads schema {SCHEMA_VERSION}: rebuild the file or "
            f"install the nspo that wrote it ({manifest.get('nspo_version')})"
        )


def check_made_with(recorded: Mapping[str, Any], expected: Mapping[str, Any], what: object, change: str) -> None:
    """Refuse an artifact that was made with other parts than `expected`: another model, other data, other settings.

    Args:
        recorded: what the artifact says it was made with.
        what: the artifact, as the user knows it.
        change: what the user should do.

    Raises:
        UserError: naming the first part that differs, as deep as it can be named, and both values.
    """
    for part, value in expected.items():
        if (found := recorded.get(part, UNKNOWN)) != value:
            place, found, wanted = _difference(part, found, value)
            raise UserError(
                f"{what}: made with {place} {_shown(found)}", expected=f"{_shown(wanted)}", change=f"{change}"
            )


def _difference(part: str, found: Any, expected: Any) -> tuple[str, Any, Any]:
    """The first key, in sorted order, in which two values differ, and what stands there."""
    if isinstance(found, Mapping) and isinstance(expected, Mapping):
        pairs = {key: (found.get(key, UNKNOWN), expected.get(key, UNKNOWN)) for key in sorted({*found, *expected})}
        key, (one, other) = next((key, pair) for key, pair in pairs.items() if pair[0] != pair[1])
        return _difference(f"{part}.{key}", one, other)
    return part, found, expected


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else dumps(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


def write_json(path: Path | str, value: Any) -> None:
    """Write `value` atomically as indented JSON with sorted keys."""
    with atomic_path(path) as scratch:
        text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
        scratch.write_text(text + "\n", encoding="utf-8", newline="\n")


def read_json(path: Path | str) -> Any:
    """Read a JSON file.

    Raises:
        UserError: when the file is missing, cannot be read or is not JSON.
    """
    path = Path(path)
    refuse_no_file(path)
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist: run the stage that makes it") from error
    except OSError as error:
        raise unreadable(path, "a JSON file", error) from error
    except (ValueError, RecursionError) as error:  # ValueError: broken JSON, broken UTF-8
        raise UserError(f"{path} is not valid JSON ({error}): delete it and rerun the stage that makes it") from error


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


def weight_shards(folder: Path) -> list[Path]:
    """The safetensors files of a model folder that transformers loads: the one, or those that the index names.

    What else lies there, such as the same weights as `consolidated.safetensors`, is not the model.

    Raises:
        UserError: when a file that the index names is missing, or the index is damaged (`weight_map`).
    """
    single, index = folder / WEIGHTS, folder / INDEX
    if single.is_file() or not index.is_file():
        return [single] * single.is_file()
    shards = [folder / name for name in sorted(set(weight_map(index).values()))]
    if lost := [shard for shard in shards if not shard.is_file()]:
        raise UserError(f"{lost[0]} does not exist, {INDEX} expects it", change="copy the whole model")
    return shards


def weight_map(index: Path) -> dict[str, str]:
    """The file of every tensor, as the index of a model in several files says.

    Raises:
        UserError: when it names no tensors, or what is no file beside it.
    """
    written = read_json(index)
    listed = written.get("weight_map") if isinstance(written, dict) else None
    if not isinstance(listed, dict) or not listed:
        raise UserError(f"{index} names no tensors", expected="a `weight_map`", change="copy the whole model")
    for name in listed.values():
        if not isinstance(name, str) or Path(name).name != name:
            raise UserError(f"{index} names {name!r:.80}", expected="files beside it", change="copy the whole model")
    return listed


def fingerprint_model(folder: Path | str) -> dict[str, str]:
    """`{"weights": ..., "tokenizer": ...}` for a model folder: `weight_shards`, and tokenizer with chat template.

    Raises:
        UserError: when the folder holds no safetensors weights, or not all that the index names.
    """
    folder = Path(folder)
    weights = weight_shards(folder)
    if not weights:
        raise UserError(
            f"{folder} holds neither {WEIGHTS} nor {INDEX}", expected="a Hugging Face model folder (`model.source`)"
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
