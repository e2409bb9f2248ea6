"""A copy of the project in which tests run the workflow, and what they need to look at it."""

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from support import fork_server

ROOT = Path(__file__).parents[2]
PARTS = ("Snakefile", "workflow", "profiles", "config", "nspo", "tests/data")
CORES = str(min(2, os.cpu_count() or 1))
BENCHMARK = {  # a named benchmark of the smoke data, for runs in which every stage takes part
    "tasks": ["advbench"],
    "sources": {"advbench": "tests/data/harmful_heldout.jsonl"},
    "max_new_tokens": 8,
}


def copy_project(project: Path) -> Path:
    """Copy what the workflow needs into the folder `project`, and return it."""
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, project / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(ROOT / part, project / part)
    return project


def set_config(project: Path, **sections: Mapping[str, Any]) -> None:
    """Set these keys of these sections anew in the smoke configuration of `project`."""
    config = project / "config/smoke.yaml"
    raw = yaml.safe_load(config.read_text())
    raw |= {section: {**raw.get(section, {}), **keys} for section, keys in sections.items()}
    config.write_text(yaml.safe_dump(raw, sort_keys=False))


def snakemake_command(*arguments: str, config: str = "config/smoke.yaml") -> list[str]:
    """The command line of a Snakemake run on this machine."""
    return [sys.executable, "-m", "snakemake", "--cores", CORES, *arguments, "--configfile", config]


def snakemake(
    project: Path, *arguments: str, config: str = "config/smoke.yaml", environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run Snakemake in `project`; output and errors together. It and its stages are forks (`fork_server.py`)."""
    return subprocess.run(
        snakemake_command(*arguments, config=config),
        cwd=project,
        env={**os.environ, **fork_server.environment(), **(environment or {})},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below `folder`, by its path in it."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
