"""Atomic writes: a reader never sees half an artifact, whatever kills the writer."""

import fcntl
import glob
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """Yield a scratch path beside `path`; on success it takes `path`'s place, on failure it is removed.

    Works for a file or a folder (create whichever you need at the yielded path). A reader never sees half an artifact.
    Its permissions are those of any new file in that folder, whatever the library that wrote it thinks (safetensors
    writes for the owner alone). What a killed process left beside `path`, perhaps as large as the artifact, is removed.
    """
    path = Path(path).resolve() if Path(path).is_symlink() else Path(path)  # the link stays, what it means is replaced
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
        _share(scratch, scratch_dir)
        if path.is_dir():
            shutil.rmtree(path)
        os.replace(scratch, path)
    finally:
        shutil.rmtree(scratch_dir, ignore_errors=True)
        if owner is not None:
            os.close(owner)


def _share(written: Path, folder: Path) -> None:
    """Give a file, or a folder and all in it, the permissions of what is made anew in `folder`: by umask and ACL."""
    new_file, new_folder = folder / ".file", folder / ".folder"
    new_file.touch()
    new_folder.mkdir()
    for_file, for_folder = (stat.S_IMODE(path.stat().st_mode) for path in (new_file, new_folder))
    for path in (written, *(written.rglob("*") if written.is_dir() else ())):
        if path.is_symlink():
            continue
        if path.is_dir():
            path.chmod(for_folder)
        else:
            may_run = (for_file & 0o444) >> 2 if path.stat().st_mode & stat.S_IXUSR else 0
            path.chmod(for_file | may_run)


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
