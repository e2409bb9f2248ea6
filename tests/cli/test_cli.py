"""The command line: flags spelt like keys, heavy imports late, every mistake of a user one line and exit code 2."""

import errno
import inspect
import json
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nspo.cli import commands
from nspo.cli import main as cli
from nspo.errors import UserError
from nspo.settings.bases import BasesSettings
from nspo.settings.config import Config
from nspo.settings.data import PromptSettings
from nspo.settings.policy.methods import MethodSettings
from nspo.settings.reading import load_config
from nspo.settings.runtime import RuntimeSettings

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@given(JSON)
def test_values_survive_the_command_line(value: object) -> None:
    """A value written as a flag is read back as the same value, strings that look like JSON too."""
    assert cli.parse_value(cli.format_value(value)) == value


def test_sections_survive_the_command_line() -> None:
    """The flags of a section, through a shell and the parser, give the same section."""
    settings = PromptSettings()
    given = shlex.split(cli.to_flags(settings))
    values = {key[2:].replace("-", "_"): cli.parse_value(v) for key, v in zip(given[::2], given[1::2], strict=True)}
    assert PromptSettings.model_validate_json(json.dumps(values)) == settings


def test_flags_keep_the_order_of_the_section() -> None:
    """Flags stand in a fixed order whatever the order of the names, so equal settings give equal commands."""
    settings = BasesSettings(threshold=0.5)
    assert cli.to_flags(settings, ["threshold", "rule"]) == "--rule contrast --threshold 0.5"


@pytest.mark.parametrize("name", cli.STAGES)
def test_flags_match_the_stage(name: str) -> None:
    """Each stage is called with exactly the parameters that its function has, inputs that are one object as such."""
    stage = cli.STAGES[name]
    module, _, function = stage.function.partition(":")
    run = getattr(import_module(module), function)
    given = cli._gathered(run, dict.fromkeys({*stage.settings, *stage.arguments}))
    assert set(inspect.signature(run).parameters) == set(given)


@pytest.mark.parametrize("name", cli.STAGES)
def test_help_lists_every_setting(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """`nspo STAGE --help` works and names every setting of the stage."""
    with pytest.raises(SystemExit) as stop:
        cli.main([*name.split(), "--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    for section in cli.STAGES[name].settings.values():
        assert all(f"--{key.replace('_', '-')}" in text for key in cli._flags_of(section))


def test_help_and_settings_load_nothing_heavy() -> None:
    """`nspo --help` and configuration errors never wait for torch or transformers."""
    code = (
        "import sys, nspo.cli.main, nspo.cli.config_files; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize(
    ("command", "line"),
    [
        ("basis", "nspo: error: basis: unknown stage, did you mean `nspo bases`?"),
        (
            "bases --activations a --out o --treshold 0.9",
            "nspo: error: --treshold: unknown flag, did you mean --threshold? (see `nspo bases --help`)",
        ),
        (
            "bases --activations a --out o --rule energy --threshold 7",
            "nspo: error: bases: threshold 7.0 is a share for rule 'energy', expected 0 to 1",
        ),
        ("bases --out o", "nspo: error: the following arguments are required: --activations (see `nspo bases --help`)"),
        ("bases info missing.safetensors", "nspo: error: missing.safetensors does not exist, expected a bases file"),
        ("bases info x --plot x.pdf", "nspo: error: x.pdf: a figure is written as .png or .svg"),
        ("bases merge x --out y", "nspo: error: x does not exist, expected a bases file"),
        (
            "bases push x --repo a/b --licence mit --private yes",
            "nspo: error: argument --private: 'yes', expected true or false (see `nspo bases push --help`)",
        ),
        ("config check missing.yaml", "nspo: error: missing.yaml does not exist, expected a configuration file"),
        (
            "prepare-model --source wheel:x --wheels-dir w --out o",
            "nspo: error: prepare-model: source: source 'wheel:x', expected wheel:NAME==VERSION:PATH/IN/WHEEL",
        ),
    ],
)
def test_mistakes_are_one_line(command: str, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A mistake that the user can mend ends in one line that says what to change, and exit code 2."""
    assert cli.main(command.split()) == 2
    printed = capsys.readouterr().err
    assert printed.startswith(line)
    assert printed.count("\n") == 1


def test_every_fault_has_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    """Two faults in one command are told at once, a line each."""
    assert cli.main(["bases", "--activations", "a", "--out", "o", "--threshold", "high", "--rule", "best"]) == 2
    assert [line.split(": ")[:4] for line in capsys.readouterr().err.splitlines()] == [
        ["nspo", "error", "bases", "rule"],
        ["nspo", "error", "bases", "threshold"],
    ]


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (KeyboardInterrupt(), 130, "nspo: interrupted"),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "nspo: error: no space left on the disk"),
        (RuntimeError("write failed: No space left on device"), 2, "nspo: error: no space left on the disk"),
        (
            RuntimeError("PytorchStreamWriter failed writing file data/5"),
            2,
            "nspo: error: no space left",
        ),
        (MemoryError(), 2, "nspo: error: not enough memory"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), 2, "nspo: error: not enough memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 2, "nspo: error: not enough memory"),
        (RuntimeError("CUDA out of memory. Tried to allocate"), 2, "nspo: error: not enough memory"),
        (RuntimeError("can't start new thread"), 2, "nspo: error: not enough memory"),
        (RuntimeError("could not create a primitive"), 2, "nspo: error: not enough memory"),
        (UserError("first\nsecond"), 2, "nspo: error: first\nnspo: error: second"),
    ],
)
def test_ends_without_a_traceback(
    error: BaseException, code: int, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An interrupt, a full disk and too little memory, however a library words it, end in one line."""

    def fail(argv: object) -> None:
        raise error

    monkeypatch.setattr(cli, "_run", fail)
    assert cli.main([]) == code
    assert capsys.readouterr().err.startswith(said)


def test_defects_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error that is ours, not the user's, keeps its traceback."""

    def fail(argv: object) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr(cli, "_run", fail)
    with pytest.raises(RuntimeError, match="a defect"):
        cli.main([])


def test_config_write_keeps_what_is_given(tmp_path: Path) -> None:
    """`config write --out` writes a file that reads back as the given sections with the defaults of the rest."""
    out = tmp_path / "config.yaml"
    flags = cli.to_flags(Config().policy.model_copy(update={"steps": 3, "clip": 1e-06}))
    values = dict(zip(*[iter(shlex.split(flags))] * 2, strict=True))
    policy = {key[2:].replace("-", "_"): cli.parse_value(value) for key, value in values.items()}
    assert cli.main(["config", "write", "--policy", json.dumps(policy), "--out", str(out)]) == 0
    written = load_config(out)
    assert (written.policy.steps, written.policy.clip) == (3, 1e-06)
    assert written.policy.methods["nspo"] == MethodSettings(**Config().policy.methods["nspo"].dump())
    assert written.model == Config().model


def test_table_is_aligned() -> None:
    """Columns start at the same place in every row, numbers have four digits, what is unknown is a dash."""
    rows = [{"site": "layer.0", "rank": 12, "energy": 0.912345}, {"site": "x", "rank": 3, "energy": None}]
    assert commands.table(rows).splitlines() == [
        "site     rank  energy",
        "layer.0  12    0.9123",
        "x        3     -",
    ]


def test_what_the_workflow_sets_reaches_the_stages():
    """Every key of `runtime` is a flag, but for the folder of all outputs and what the rules themselves start."""
    assert set(RuntimeSettings.model_fields) - set(cli.RUNTIME_FLAGS) == {"results", "processes"}


def test_help_groups_every_command_once(capsys: pytest.CaptureFixture[str]) -> None:
    """`nspo --help` names each command under one heading, apart from what it does."""
    assert sorted(name for names in cli.GROUPS.values() for name in names) == sorted(cli.STAGES)
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--help"])
    lines = capsys.readouterr().out.splitlines()
    for name, stage in cli.STAGES.items():
        assert any(line.split(stage.help)[0].split() == name.split() for line in lines if stage.help in line), name


def test_completion_knows_commands_and_flags(capsys: pytest.CaptureFixture[str]) -> None:
    """The script for a shell holds every command and its flags; an unknown shell is one line."""
    assert cli.main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    assert all(words in script for words in ("train-policy", "--learning-rate", "merge", "_shtab_compgen_files"))
    assert cli.main(["completion", "tclsh"]) == 2
    assert "expected one of bash, zsh" in capsys.readouterr().err
