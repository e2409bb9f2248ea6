"""`nspo status` and `nspo doctor`: what is whole, and each kind of damage by the artifact that has it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from nspo.cli.doctor import examine
from nspo.cli.main import main
from nspo.errors import UserError
from nspo.files.tables import load_table, write_table

pytestmark = pytest.mark.workflow


@pytest.fixture
def results(finished: Path, tmp_path: Path) -> Path:
    """A copy of finished results."""
    return shutil.copytree(finished / "results/smoke", tmp_path / "smoke", ignore=shutil.ignore_patterns(".*"))


def flip(path: Path) -> None:
    """Flip a bit in the last tenth of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) * 9 // 10] ^= 1
    path.write_bytes(content)


def edit(path: Path, change: Callable[[dict], None]) -> None:
    """Change a JSON file."""
    value = json.loads(path.read_bytes())
    change(value)
    path.write_text(json.dumps(value), encoding="utf-8")


def drop_a_row(path: Path) -> None:
    """A table with a row less, whole otherwise."""
    manifest, rows = load_table(path, "prompts")
    write_table(rows[1:], path, manifest=manifest)


def test_finished_results_are_whole(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every artifact of a run is listed once, with what made it; the exit status is 0."""
    for command in ("status", "doctor"):
        assert main([command, str(results)]) == 0
        lines = capsys.readouterr().out.splitlines()[1:]
        assert len(lines) >= 20
        assert all("whole" in line for line in lines)
        assert sum(line.startswith("policy/nspo/seed0 ") for line in lines) == 1
    assert any("largest leakage on disk" in line for line in lines)


POLICY, TRAINING, EVALUATION = (f"{part}/nspo/seed0" for part in ("policy", "training", "evaluation"))
DAMAGES = {
    "weights": (lambda r: flip(r / POLICY / "model.safetensors"), POLICY, "weights with the fingerprint"),
    "bases": (lambda r: flip(r / "bases/bases.safetensors"), "bases/bases.safetensors", "damaged after it was"),
    "log": (
        lambda r: (r / TRAINING / "training.parquet").write_bytes(b"PAR1"),
        f"{TRAINING}/training.parquet",
        "not a",
    ),
    "rows": (lambda r: drop_a_row(r / "prompts.parquet"), "prompts.parquet", "rows, its manifest says"),
    "prompts": (lambda r: drop_a_row(r / "prompts.parquet"), POLICY, "made with prompts"),
    "score": (
        lambda r: edit(r / EVALUATION / "metrics.json", lambda m: m["scores"][0].update(value=0.123)),
        f"{EVALUATION}/metrics.json",
        "0.123, its answers give",
    ),
    "verdicts": (
        lambda r: edit(r / EVALUATION / "metrics.json", lambda m: [s.update(failures=s["n"]) for s in m["scores"]]),
        f"{EVALUATION}/metrics.json",
        "every verdict of cost_model failed",
    ),
    "leakage": (
        lambda r: edit(
            r / "certificates/nspo/seed0.json",
            lambda c: [layer.update(leakage_basis=0.5) for layer in c["layers"].values()],
        ),
        "certificates/nspo/seed0.json",
        "leaks 0.5, the weights on disk",
    ),
    "another policy": (
        lambda r: edit(r / "certificates/nspo/seed0.json", lambda c: c["tuned"].update(weights="another")),
        "certificates/nspo/seed0.json",
        "made with weights another",
    ),
    "no manifest": (lambda r: (r / "cost/manifest.json").write_text("{"), "cost", "is not valid JSON"),
    "a number for an object": (
        lambda r: (r / "cost/manifest.json").write_text('{"kind": "preference_model"}'),
        "cost",
        "cannot be",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_told_by_the_artifact_that_has_it(
    results: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """With exit status 1, and one line of the table each."""
    damage, artifact, said = DAMAGES[name]
    damage(results)
    with pytest.raises(SystemExit) as end:
        main(["doctor", str(results)])
    assert end.value.code == 1
    out = capsys.readouterr().out
    (line,) = (line for line in out.splitlines() if line.startswith(f"{artifact} "))
    assert said in line, line
    assert "are not whole" in out


def test_a_folder_without_results_is_refused(tmp_path: Path) -> None:
    """A wrong path is no clean bill of health."""
    with pytest.raises(UserError, match="holds no artifacts"):
        examine(tmp_path, deep=False)
    with pytest.raises(UserError, match="does not exist"):
        examine(tmp_path / "none", deep=True)
