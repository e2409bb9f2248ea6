"""Paths of a configuration reach every command whole, whatever characters a shell or Snakemake has a use for."""

import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml
from support.workflow_project import BENCHMARK, ROOT, snakemake

from nspo.errors import UserError
from nspo.settings.reading import check_config

pytestmark = pytest.mark.workflow

ODD = """a b $HOME 'c' "d" \\n \\ *[e]? & ; | # ! (f) 100% ~g `echo h` é: i=j,k"""
LABELS = {"kind": "safe_rlhf", "target": "cost"}
STUB = """#!/bin/sh
printf '%s\\0' "$@" >> "$ARGV"
printf '\\n\\0' >> "$ARGV"
"""


def commands(config: Path) -> dict[str, str]:
    """The command of a job of every rule in a plan of `config`, by rule."""
    run = snakemake(ROOT, "--dry-run", "--forceall", "--printshellcmds", "--nolock", config=str(config))
    assert run.returncode == 0, run.stdout[-3000:]
    return dict(re.findall(r"^(?:local)?rule (\w+):$.*?^Shell command: (.*?)$", run.stdout, re.M | re.S))


@pytest.mark.parametrize("own_bases", [True, False])
def test_every_command_gets_its_paths_whole(tmp_path: Path, own_bases: bool) -> None:
    """The planned commands, run by a shell with stages that only write down what they were given."""
    folder = tmp_path / ODD
    folder.mkdir()
    results, bases, judge, data = (str(folder / name) for name in ("re sults", "b.safetensors", "guard", "data"))
    for made in (judge, data):
        Path(made).mkdir()
    for made in (bases, f"{judge}/config.json", f"{data}/advbench.csv"):
        Path(made).write_text("{}", encoding="utf-8")
    config = tmp_path / "config.yaml"
    sections = {
        "bases": {"jobs": 2} if own_bases else {"precomputed": bases},
        "policy": {"methods": {name: {"objective": name, "learning_rate": 1e-4} for name in ("nspo", "dpo")}},
        "evaluation": {"judges": {"guard": {"kind": "guard", "source": judge}}},
        "benchmarks": {**BENCHMARK, "sources": {"advbench": f"{data}/advbench.csv"}},
        "runtime": {"results": results},
    }
    config.write_text(yaml.safe_dump(sections, allow_unicode=True), encoding="utf-8")
    found = {rule: command for rule, command in commands(config).items() if rule != "all"}
    assert len(found) >= 14, sorted(found)

    programs, argv = tmp_path / "bin", tmp_path / "argv"
    programs.mkdir()
    for name in ("python", "accelerate"):
        (programs / name).write_text(STUB, encoding="utf-8")
        (programs / name).chmod(0o755)
    for name in (
        "evaluate",
        "benchmark",
        "train_policy",
        "match_safety",
        "certify",
        "attribute",
        "make_pairs",
        "fetch_hub",
        "fetch_wheel",
    ):
        (Path(results) / "logs" / name).mkdir(parents=True)
    (Path(results) / "logs/compute_bases").mkdir()
    empty = tmp_path / "empty"
    empty.mkdir()
    environment = {**os.environ, "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "ARGV": str(argv)}
    for rule, command in found.items():
        argv.unlink(missing_ok=True)
        done = subprocess.run(["bash", "-c", command], cwd=empty, env=environment, capture_output=True, check=False)
        assert done.returncode == 0, (rule, done.stderr)
        assert done.stderr == b"", (rule, done.stderr)
        words, end = argv.read_text(encoding="utf-8").split("\n\0")
        assert end == ""  # one program was started, once
        for word in words.split("\0"):
            if "re sults" in word or word.startswith(str(tmp_path)):
                assert word.startswith((results, bases, judge, data)), (rule, word)
    assert not any(empty.iterdir())  # no word became a file of its own
    assert len(list(Path(results, "logs").rglob("*.log"))) == len(found)


@pytest.mark.parametrize(
    ("path", "shown"),
    [
        ("a/{method}", "'{' in the path"),
        ("a}b", "'}' in the path"),
        ("<results>", "'<' in the path"),
        ("a\nb", "'\\n' in the path"),
        ("a\u2028b", "'\\u2028' in the path"),
        ("-rf", "does not begin with '-'"),
        ("~/runs", "does not begin with '~'"),
        ("runs ", "ends with a space"),
    ],
)
def test_what_cannot_be_carried_is_refused_before_any_work(path: str, shown: str) -> None:
    """Wherever the configuration takes a path, with the key named."""
    settings = {
        "runtime.results": {"runtime": {"results": path}},
        "model.source": {"model": {"source": path}},
        "bases.precomputed": {"bases": {"precomputed": path}},
        "cost.backbone": {"cost": {"backbone": path}},
        "benchmarks.data": {"benchmarks": {"data": path}},
        "benchmarks.sources.advbench": {"benchmarks": {"sources": {"advbench": path}}},
        "data.benign.source": {"data": {"benign": {"source": path}}},
        "data.labels.x.source.0": {"data": {"labels": {"x": {**LABELS, "source": [path]}}}},
        "evaluation.judges.g.source": {"evaluation": {"judges": {"g": {"kind": "guard", "source": path}}}},
        "policy.judge.source": {"policy": {"judge": {"kind": "guard", "source": path}}},
    }
    for key, raw in settings.items():
        with pytest.raises(UserError) as error:
            check_config(raw, "my.yaml")
        (line,) = (line for line in str(error.value).split("\n") if line.startswith(f"my.yaml: {key}: "))
        assert shown in line
