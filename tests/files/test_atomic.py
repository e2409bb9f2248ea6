"""Atomic writes: what readers and other users find afterwards."""

import os
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from nspo.cli import commands, config_files
from nspo.cli.main import main
from nspo.files.atomic import atomic_path
from nspo.files.manifest import read_json, write_json
from nspo.files.tables import read_table, write_table
from nspo.files.tensors import read_tensor_manifest, save_tensors

NOBODY = 65534
_ = commands, config_files  # loaded now: another user may not be able to


def modes(folder: Path) -> dict[str, str]:
    """The permissions of all that lies below `folder`, as octal numbers by path."""
    return {str(p.relative_to(folder)): f"{stat.S_IMODE(p.stat().st_mode):o}" for p in sorted(folder.rglob("*"))}


@pytest.fixture
def umask() -> Iterator[None]:
    """Whatever umask a test sets, the old one comes back."""
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.mark.parametrize(
    ("mask", "file", "program", "folder"),
    [(0o022, "644", "755", "755"), (0o002, "664", "775", "775"), (0o077, "600", "700", "700")],
)
def test_artifacts_have_the_permissions_of_any_new_file(
    tmp_path: Path, umask: None, mask: int, file: str, program: str, folder: str
) -> None:
    """Files and folders, at every depth, also where the library that writes them has a will of its own."""
    os.umask(mask)
    save_tensors(tmp_path / "a.safetensors", {"x": torch.zeros(2)}, {"kind": "bases"})
    write_table([{"a": 1}], tmp_path / "a.parquet")
    write_json(tmp_path / "a.json", {})
    with atomic_path(tmp_path / "made") as scratch:
        (scratch / "inner").mkdir(parents=True, mode=0o700)
        for name, mode in (("inner/private", 0o600), ("read_only", 0o444), ("program", 0o755)):
            (scratch / name).touch()
            (scratch / name).chmod(mode)
    assert modes(tmp_path) == {
        "a.json": file,
        "a.parquet": file,
        "a.safetensors": file,
        "made": folder,
        "made/inner": folder,
        "made/inner/private": file,
        "made/program": program,
        "made/read_only": file,
    }


def test_a_default_acl_counts_more_than_the_umask(tmp_path: Path, umask: None) -> None:
    """In a folder whose new files a group may write by ACL, so it may those that come by an atomic write."""
    if not shutil.which("setfacl"):
        pytest.skip("needs setfacl")
    set_acl = subprocess.run(["setfacl", "-d", "-m", "g::rwx,m::rwx", tmp_path], check=False, capture_output=True)
    if set_acl.returncode:
        pytest.skip("a file system without ACLs")
    (tmp_path / "plain").touch()
    save_tensors(tmp_path / "a.safetensors", {"x": torch.zeros(2)}, {"kind": "bases"})
    assert len(set(modes(tmp_path).values())) == 1


@pytest.fixture
def foreign() -> Iterator[Path]:
    """A folder of artifacts that only their owner may read; the test runs as another user."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    save_tensors(folder / "bases.safetensors", {"x": torch.zeros(2)}, {"kind": "bases", "schema": 1})
    write_table([{"a": 1}], folder / "a.parquet")
    write_json(folder / "a.json", {})
    for path in folder.iterdir():
        path.chmod(0o000)
    root = os.geteuid() == 0
    if root:
        os.seteuid(NOBODY)
    yield folder
    if root:
        os.seteuid(0)
    shutil.rmtree(folder)


def test_a_missing_permission_is_told_as_such(foreign: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nobody is told to delete what another user may not read; a folder that may not be written is one line too."""
    readers = {
        "a.parquet": read_table,
        "a.json": read_json,
        "bases.safetensors": lambda path: read_tensor_manifest(path, "bases"),
    }
    for name, read in readers.items():
        with pytest.raises(Exception, match=rf"{name}: no permission to read it, .* ask its owner") as error:
            read(foreign / name)
        assert "delete" not in str(error.value)
    if os.geteuid() == NOBODY:
        assert main(["config", "write", "--out", str(foreign / "config.yaml")]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"nspo: error: {foreign}/.config.yaml.")
        assert "Permission denied: this user may not" in line
