"""Which files count as a stage's code: all that it imports from this package, at any depth, and nothing else."""

from pathlib import Path

from nspo.stage_code import PACKAGE, stage_files


def names(*modules: str, package: Path = PACKAGE) -> set[str]:
    """The files of `stage_files`, relative to the package."""
    return {path.relative_to(package).as_posix() for path in stage_files(*modules, package=package)}


def test_imports_are_followed(tmp_path: Path) -> None:
    """Imports of imports, of submodules, and inside functions count; settings and other packages do not."""
    files = {
        "__init__.py": "from nspo.unused import x",
        "config.py": "",
        "stage.py": "from nspo.config import Config\nfrom nspo.part import tool\ndef f(): import nspo.late\n",
        "part/__init__.py": "from nspo.deep import x",
        "part/tool.py": "",
        "deep.py": "import nspo.stage",
        "late.py": "",
        "unused.py": "",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    found = names("nspo.stage", package=tmp_path)
    assert found == {"stage.py", "part/__init__.py", "part/tool.py", "deep.py", "late.py"}


def test_stages_of_this_package() -> None:
    """An edit of the report's code cannot retrain a policy, an edit of the projection must."""
    policy = names("nspo.policy.training")
    assert {"policy/training.py", "projection.py", "bases.py", "artifacts.py"} <= policy
    assert not {"report.py", "certificate.py", "cli.py", "config.py"} & policy
    assert "projection.py" not in names("nspo.activations")
    pairs = names("nspo.policy.pairs")
    assert "policy/rewards.py" in pairs
    assert not {"policy/training.py", "policy/offline.py", "projection.py"} & pairs
