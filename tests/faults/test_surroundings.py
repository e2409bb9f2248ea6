"""Reports of what lies around a run: files that shadow packages, a home that cannot be written to."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.workflow_project import copy_project


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project in whose folder a user keeps files that are called like libraries."""
    folder = copy_project(tmp_path_factory.mktemp("project"))
    for name in ("random", "torch", "yaml", "datasets", "pydantic", "secrets", "numpy", "packaging", "requests"):
        (folder / f"{name}.py").write_text(f"raise SystemExit('{name} is shadowed')\n")
    return folder


def test_files_in_the_working_directory_are_no_libraries(project: Path, tmp_path: Path) -> None:
    """A job imported the user's random.py; nor is a home written to."""
    command = [str(Path(sys.executable).with_name("snakemake")), "--cores", "1", "--configfile=config/smoke.yaml"]
    own = {"HOME": "/proc/no-home", "XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": ""}
    done = subprocess.run(
        [*command, "--", "results/smoke/prompts.parquet"],
        cwd=project,
        env={**os.environ, **own},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert (project / "results/smoke/prompts.parquet").is_file()


@pytest.mark.parametrize("stage", ["report", "prepare-model"])
def test_a_home_that_cannot_be_written_to_ends_nothing(stage: str, tmp_path: Path) -> None:
    """Caches of matplotlib, transformers and the hub lie there by default: they do without."""
    code = {
        "report": "import sys; from nspo.report import plots; figure, _ = plots.new_figure('x', 'y'); "
        "figure.savefig(sys.argv[1])",
        "prepare-model": "import sys; from nspo.cli.main import main; "
        "sys.exit(main(['prepare-model', '--source', 'tiny:llama', '--wheels-dir', 'w', '--out', sys.argv[1]]))",
    }[stage]
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "XDG_", "MPL"))}
    out = tmp_path / "out.png"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, str(out)],
        env={**kept, "HOME": "/proc/no-home"},
        text=True,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    assert out.exists()
