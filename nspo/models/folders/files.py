"""Is this folder, or GGUF file, a whole model? Asked before transformers is, which tells it late or not at all."""

import re
from pathlib import Path

from nspo.errors import UserError, first_line
from nspo.files.manifest import read_json

INDEX = "model.safetensors.index.json"
POINTER = b"version https://git-lfs.github.com/spec/"
MODEL_FILES = {".safetensors", ".bin", ".gguf", ".json", ".jinja", ".model", ".txt"}


def check_model_files(path: Path | str, named: str) -> None:
    """Refuse a model folder, or GGUF file, that is not whole or is not a model of its own; weights are not read.

    Args:
        named: what errors call it.

    Raises:
        UserError: git-LFS pointers, links to nowhere, an adapter, a shard that is missing or cut off, two sets of
            weights, or one part of a split GGUF.
    """
    path = Path(path)
    files = sorted(file for file in path.iterdir() if file.suffix in MODEL_FILES) if path.is_dir() else [path]
    for file in files:
        if file.is_symlink() and not file.exists():
            raise UserError(f"{named}: {file} links to {file.readlink()}, which is not there: copy the files it means")
        if file.is_file() and _starts_with(file, POINTER):
            raise UserError(f"{named}: {file} is a git-LFS pointer, not the file itself: run `git lfs pull` there")
    if path.suffix == ".gguf":
        _check_gguf(path, named)
    elif path.is_dir():
        if (path / "adapter_config.json").is_file():
            raise UserError(
                f"{named}: {path} holds an adapter (adapter_config.json)",
                expected=(
                    "a model: merge it into its base (peft: merge_and_unload, save_pretrained) and give that folder"
                ),
            )
        weight_files(path, named)


def _starts_with(file: Path, opening: bytes) -> bool:
    with file.open("rb") as content:
        return content.read(len(opening)) == opening


def weight_files(folder: Path, named: str) -> dict[str, Path]:
    """The file of every tensor in the safetensors weights that transformers reads, sharded or not; headers only.

    Raises:
        UserError: a file that is missing or cut off, a tensor that the index names and no file has, or two sets of
            weights.
    """
    from safetensors import SafetensorError, safe_open

    single, index = folder / "model.safetensors", folder / INDEX
    if single.is_file() and index.is_file():
        raise UserError(
            f"{named}: {folder} holds both {single.name} and {INDEX}", expected="one", change="remove the stale one"
        )
    listed = read_json(index)["weight_map"] if index.is_file() else {}
    shards = [folder / name for name in sorted(set(listed.values()))] or [single] * single.is_file()
    found: dict[str, Path] = {}
    for shard in shards:
        if not shard.is_file():
            raise UserError(f"{named}: {shard} does not exist, {INDEX} expects it: copy the whole model")
        try:
            with safe_open(shard, framework="pt") as file:
                found.update(dict.fromkeys(file.keys(), shard))
        except (SafetensorError, OSError) as error:
            raise UserError(f"{named}: {shard} is not a whole safetensors file ({error}): copy it again") from error
    if lost := sorted(listed.keys() - found):
        raise UserError(f"{named}: {folder} lacks the tensor {lost[0]}, {INDEX} expects it: copy the whole model")
    return found


def _check_gguf(path: Path, named: str) -> None:
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
    except (ValueError, LookupError, OSError) as error:
        raise UserError(f"{named}: {path} is not a whole GGUF file ({first_line(error)}): copy it again") from error
    split = reader.get_field("split.count")
    parts = int(split.contents()) if split else 1
    if name := re.fullmatch(r".*-\d{5}-of-(\d{5})\.gguf", path.name):
        parts = max(parts, int(name[1]))
    if parts > 1:
        raise UserError(
            f"{named}: {path} is one of {parts} parts of a split GGUF",
            expected="a whole one",
            change="join them (`llama-gguf-split --merge FIRST-PART WHOLE.gguf`)",
        )
