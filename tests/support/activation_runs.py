"""Activations of the tiny model, collected in a second, and their rows."""

from pathlib import Path

import pyarrow.dataset as ds

from nspo.activations.stage import collect
from nspo.activations.store import ActivationStore
from nspo.settings.bases import ActivationSettings
from nspo.settings.runtime import RuntimeSettings


def settings(**changed) -> ActivationSettings:
    base = {"samples": 4, "harmful_samples": 4, "benign_samples": 0, "max_new_tokens": 5, "storage": "raw"}
    return ActivationSettings(**{**base, **changed})


def run(folder: Path, model: Path, prompts: Path, **changed) -> ActivationStore:
    """Collect into `folder`, with a work folder beside it."""
    runtime = RuntimeSettings(device="cpu", workdir=str(folder.parent / "work"))
    collect(settings(**changed), model, prompts, folder, runtime)
    return ActivationStore(folder)


def raw_rows(store: ActivationStore, site: str, **where: str) -> list[dict]:
    """Rows of one site, read the way the module docstring shows."""
    table = ds.dataset(store.path / "raw" / f"site={site}").to_table()
    return [row for row in table.to_pylist() if all(row[key] == value for key, value in where.items())]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
