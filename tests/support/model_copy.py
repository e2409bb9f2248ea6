"""A copy of a prepared model for a test to change."""

import shutil
from pathlib import Path

from nspo.files.manifest import MANIFEST_NAME


def copy_model(model: Path, folder: Path) -> Path:
    """Copy a model folder without the manifest of `prepare_model`, with which changed weights are refused."""
    return Path(shutil.copytree(model, folder, ignore=shutil.ignore_patterns(MANIFEST_NAME)))
