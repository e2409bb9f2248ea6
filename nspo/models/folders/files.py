"""Is this folder or GGUF file a whole model? Checked before transformers loads it, which reports faults late or
never."""

from pathlib import Path

from nspo.errors import UserError, refuse_no_file
from nspo.files.manifest import INDEX, WEIGHTS, weight_map, weight_shards
from nspo.models.folders.gguf_file import check_gguf

POINTER = b"version https://git-lfs.github.com/spec/"
FLOATS = {"F64", "F32", "BF16", "F16"}  # safetensors' names of dtypes whose values are the weights
MODEL_FILES = {".safetensors", ".bin", ".gguf", ".json", ".jinja", ".model", ".txt"}


def check_model_files(path: Path | str, named: str) -> None:
    """Refuse a model folder, or GGUF file, that is not whole or is not a model of its own; weights are not read.

    Args:
        named: what errors call it.

    Raises:
        UserError: a folder or named pipe in a file's place, git-LFS pointers, links to nowhere, an adapter, a shard
            that is missing or cut off, two sets of weights, or one part of a split GGUF.
    """
    path = Path(path)
    files = sorted(file for file in path.iterdir() if file.suffix in MODEL_FILES) if path.is_dir() else [path]
    for file in files:
        if file.is_symlink() and not file.exists():
            raise UserError(f"{named}: {file} links to {file.readlink()}, which is not there: copy the files it means")
        refuse_no_file(file)
        if file.is_file() and _starts_with(file, POINTER):
            raise UserError(f"{named}: {file} is a git-LFS pointer, not the file itself: run `git lfs pull` there")
    if path.suffix == ".gguf":
        check_gguf(path, named)
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

    index = folder / INDEX
    if index.is_file() and (folder / WEIGHTS).is_file():
        raise UserError(
            f"{named}: {folder} holds both {WEIGHTS} and {INDEX}", expected="one", change="remove the stale one"
        )
    listed = weight_map(index) if index.is_file() else {}
    found: dict[str, Path] = {}
    for shard in weight_shards(folder):
        try:
            with safe_open(shard, framework="pt") as file:
                names = list(file.keys())
        except (SafetensorError, OSError) as error:
            raise UserError(f"{named}: {shard} is not a whole safetensors file ({error}): copy it again") from error
        if twice := sorted(found.keys() & names):
            raise UserError(
                f"{named}: the tensor {twice[0]} stands in {found[twice[0]].name} and in {shard.name}",
                expected="it in one file",
                change="copy the whole model",
            )
        found.update(dict.fromkeys(names, shard))
    if lost := sorted(listed.keys() - found):
        raise UserError(f"{named}: {folder} lacks the tensor {lost[0]}, {INDEX} expects it: copy the whole model")
    return found


def stored_dtypes(folder: Path, named: str) -> dict[str, str]:
    """What every tensor of the safetensors weights is stored as, as safetensors spells it; headers only."""
    from safetensors import safe_open

    found: dict[str, str] = {}
    for shard in sorted(set(weight_files(folder, named).values())):
        with safe_open(shard, framework="pt") as file:
            found.update((name, file.get_slice(name).get_dtype()) for name in file.keys())  # noqa: SIM118
    return found
