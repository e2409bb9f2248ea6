"""Another Snakefile, in another folder, imports the workflow as a module, twice, with configurations of its own."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from support.workflow_project import ROOT, copy_project

from nspo import NullSpaceBases
from nspo.settings.bases import SelectionSettings

pytestmark = pytest.mark.workflow

OUTER = """
configfile: "settings.yaml"

module first:
    snakefile: "{root}/Snakefile"
    config: config["a"]
    prefix: "runs/a"

use rule * from first as first_*

module second:
    snakefile: "{root}/Snakefile"
    config: config["b"]
    pathvars:
        results="else where",

use rule * from second as second_*

rule all:
    input: rules.first_all.input, rules.second_report.output.page, "mine.txt"

rule mine:
    output: "mine.txt"
    shell: "touch {{output}}"
"""


@pytest.fixture
def outer(tmp_path: Path) -> Path:
    """A folder with a Snakefile of its own, its data and its configuration, and nothing of nspo."""
    shutil.copytree(ROOT / "tests/data", tmp_path / "data", ignore=shutil.ignore_patterns("__pycache__"))
    smoke = (ROOT / "config/smoke.yaml").read_text().replace("tests/data/", "data/")
    a, b = yaml.safe_load(smoke), yaml.safe_load(smoke)
    b["bases"] = {"threshold": 0.8}
    b["runtime"] = {"results": "not here"}
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump({"a": a, "b": b}))
    (tmp_path / "Snakefile").write_text(OUTER.format(root=ROOT))
    return tmp_path


def plan(folder: Path, *arguments: str) -> str:
    """What Snakemake plans in `folder`."""
    command = [sys.executable, "-m", "snakemake", "--cores", "2", "--dry-run", "--printshellcmds", *arguments]
    run = subprocess.run(command, cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    assert run.returncode == 0, run.stdout[-3000:]
    return run.stdout


def test_two_configurations_run_side_by_side(outer: Path) -> None:
    """Each with its own settings below its own prefix or path variable; data stays where the configuration says."""
    text = plan(outer)
    outputs = [path for line in re.findall(r"^    output: (.*)", text, re.M) for path in line.split(", ")]
    assert {"mine.txt", "runs/a/results/smoke/report.html", "else where/report.html"} <= set(outputs)
    assert all(path.startswith(("runs/a/results/smoke/", "else where/", "mine.txt")) for path in outputs)
    commands = re.findall(r"nspo bases .*", text)
    assert sorted("--threshold 0.8" in command for command in commands) == [False, True]
    assert "--workdir runs/a/results/smoke/.work" in text
    assert "--workdir 'else where/.work'" in text
    assert re.search(r"^    input: data/gold.jsonl, data/harmful.jsonl, data/harmful_heldout.jsonl$", text, re.M)
    assert "not here" not in text
    assert str(ROOT / "nspo") not in text


def test_a_study_is_imported_as_any_configuration(outer: Path) -> None:
    """Below its own prefix; the homes are those of the study by itself, whatever the rules are called."""
    raw = yaml.safe_load((outer / "settings.yaml").read_text())
    raw["a"]["study"] = {"variants": {"one": None, "two": {"bases.threshold": 2.0}}}
    (outer / "settings.yaml").write_text(yaml.safe_dump(raw))
    (outer / "Snakefile").write_text(
        OUTER.format(root=ROOT).partition("module second")[0] + "rule all:\n    input: rules.first_all.input"
    )
    homes = set(re.findall(r"runs/a/results/smoke/stages/(\w+)/bases/bases", plan(outer)))
    text = f'configfile: "settings.yaml"\nmodule nspo:\n    snakefile: "{ROOT}/Snakefile"\n    config: config["a"]\n'
    (outer / "Snakefile").write_text(text + "use rule * from nspo\n")
    assert homes == set(re.findall(r" results/smoke/stages/(\w+)/bases/bases", plan(outer)))
    assert len(homes) == 2


@pytest.mark.parametrize("place", ["before", "after"])
def test_the_importers_target_stays(outer: Path, place: str) -> None:
    """A bare run makes what the importing Snakefile says first, wherever the module stands."""
    rule = 'rule all:\n    input: "mine.txt"\n'
    parts = (
        OUTER.format(root=ROOT).partition("module second")[0],
        'rule mine:\n    output: "mine.txt"\n    shell: "x"\n',
    )
    (outer / "Snakefile").write_text("\n".join((rule, *parts) if place == "before" else (parts[0], rule, parts[1])))
    assert set(re.findall(r"^(?:local)?rule (\w+):", plan(outer), re.M)) == {"all", "mine"}


@pytest.mark.parametrize("file", ["Snakefile", "workflow/Snakefile"])
def test_an_import_under_its_own_names_makes_all(outer: Path, file: str) -> None:
    """As `snakedeploy deploy-workflow` writes it, which looks into `workflow`."""
    text = 'configfile: "settings.yaml"\nmodule nspo:\n    snakefile: "{}/{}"\n    config: config["a"]\n'
    (outer / "Snakefile").write_text(text.format(ROOT, file) + "use rule * from nspo\n")
    assert "rule report:" in plan(outer)


def test_rules_are_read_from_a_git_host(outer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By `github(...)`, with the package that is installed. Snakemake's cache of repositories stands for the host."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(outer / "cache"))
    host = outer / "cache/snakemake/snakemake/source-cache/snakemake-git-cache/github.com"
    (outer / "clone").mkdir()
    git = ("git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(copy_project(outer / "clone")))
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "all"], ["tag", "v1"]):
        subprocess.run([*git, *command], check=True)
    subprocess.run(["git", "clone", "-q", "--bare", outer / "clone", host / "lab/nspo"], check=True)
    source = 'github("lab/nspo", path="workflow/Snakefile", tag="v1")'
    text = OUTER.partition("module second")[0].replace('"{root}/Snakefile"', source)
    (outer / "Snakefile").write_text(text + "rule all:\n    input: rules.first_all.input")
    assert "runs/a/results/smoke/report.html" in plan(outer)


def test_the_command_line_is_the_importers(outer: Path) -> None:
    """`--config` sets keys of the importing Snakefile and none of the module."""
    assert "--name nspo" in plan(outer, "--config", "anything=1", "policy=3")


def test_faults_name_the_module(outer: Path) -> None:
    """A misspelt key of a module's configuration ends the run in one line."""
    raw = yaml.safe_load((outer / "settings.yaml").read_text())
    raw["b"]["bases"]["treshold"] = 1
    (outer / "settings.yaml").write_text(yaml.safe_dump(raw))
    command = [sys.executable, "-m", "snakemake", "--cores", "2", "--dry-run"]
    run = subprocess.run(command, cwd=outer, text=True, capture_output=True, check=False)
    assert run.returncode == 1
    assert "the configuration of module second: bases.treshold: unknown key" in run.stderr


def test_two_configurations_make_bases_of_their_own(outer: Path) -> None:
    """A real run, from models to bases: each below its own folder, by its own threshold; a second run does nothing."""
    bases = ("runs/a/results/smoke/bases/bases.safetensors", "else where/bases/bases.safetensors")
    command = [sys.executable, "-m", "snakemake", "--cores", "2", *bases]
    run = subprocess.run(command, cwd=outer, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    assert run.returncode == 0, run.stdout[-3000:]
    made = [NullSpaceBases.load(outer / file) for file in bases]
    assert [{sites[name].threshold for name in sites} for sites in made] == [{SelectionSettings().threshold}, {0.8}]
    assert not (outer / "results").exists()
    assert "Nothing to be done" in plan(outer, *bases)
