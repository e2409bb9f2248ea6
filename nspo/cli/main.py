"""The command line: `nspo STAGE --flags`, one subcommand a stage, one flag a setting.

A flag is spelt like its configuration key, with dashes; its value is JSON (`--seeds '[0, 1]'`) or plain text. Whatever
a user can mend ends in one line and exit code 2. Nothing heavy is imported before the settings have been checked.
Command: `nspo --help`.
"""

import argparse
import difflib
import errno
import inspect
import io
import json
import os
import shlex
import sys
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn, get_origin

from nspo.cli.stages import GROUPS, POSITIONAL, STAGES, Stage
from nspo.errors import Paused, UserError, first_line
from nspo.run.launch import forget_foreign_group
from nspo.run.workflow_lock import PARENT, end_with_workflow
from nspo.settings.reading import validate
from nspo.settings.runtime import RuntimeSettings
from nspo.settings.types import Section

TRANSFERS = ("fetch-hub", "bases fetch", "bases push")
NO_PLACE = {  # where nothing can be written at all
    errno.EEXIST: "what is there is no folder",
    errno.ENOTDIR: "what is there is no folder",
    errno.ENAMETOOLONG: "the name is too long for the disk",
}
NO_SPACE = ("No space left on device", "PytorchStreamWriter failed writing")
NO_MEMORY = (  # torch's CPU, the system, CUDA, Python for the stack of a thread, oneDNN for the code of a product
    "can't allocate memory",
    "Cannot allocate memory",
    "out of memory",
    "can't start new thread",
    "could not create a primitive",
)
RUNTIME_FLAGS = ("device", "log_every", "recompute_activations", "requests", "vllm", "trackers", "workdir")


def to_flags(
    settings: Section, names: Iterable[str] | None = None, keep_order: bool = False, identity: bool = False
) -> str:
    """The settings (all, or those of `names`) as shell-quoted flags in a fixed order, as `parse_value` reads them.

    Mappings are sorted by key, so that equal settings give equal flags; `keep_order` leaves them as they were written.
    `identity` leaves out what changes no result (`Section.identity`), to compare and not to run.
    """
    wanted = None if names is None else set(names)
    values = settings.identity(wanted) if identity else settings.dump(wanted)
    values = values if keep_order else json.loads(json.dumps(values, sort_keys=True))
    chosen = [name for name in type(settings).model_fields if name in values]
    return " ".join(_assignment(name, format_value(values[name])) for name in chosen)


def _assignment(name: str, value: str) -> str:
    """`--name value`, quoted; `--name=value` where the value would be taken for a flag."""
    return f"{_flag(name)}{'=' if value.startswith('-') else ' '}{shlex.quote(value)}"


def format_value(value: Any) -> str:
    """JSON, or the plain text of a string that could not be taken for JSON; ASCII, which every locale can write."""
    plain = isinstance(value, str) and value.isascii() and parse_value(value) == value
    return value if plain else json.dumps(value)


def parse_value(text: str) -> Any:
    """The value of a setting's flag: JSON where it is JSON, plain text otherwise."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # also what Python says to a number of thousands of digits
        return text


def parse_list(text: str) -> Any:
    """As `parse_value`; plain text is a list divided by commas (`--tasks gsm8k,xstest`)."""
    value = parse_value(text)
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else value


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
        options: dict[str, Any] = {"help": argument.help, "type": argument.type, "metavar": name.upper()}
        options["nargs"] = "+" if argument.many else None
        if name in POSITIONAL:
            parser.add_argument(name, **options)
        else:
            parser.add_argument(_flag(name), required=argument.required, dest=name, **options)
    for keyword, section in stage.settings.items():
        group = parser.add_argument_group(keyword, " ".join((section.__doc__ or "").split()))
        for name in _flags_of(section):
            info = section.model_fields[name]
            default = "" if info.is_required() else f" [{format_value(_plain(info.default))}]"
            text = f"{info.description or ''}{default}".replace("%", "%%")
            text = text if len(text) < 400 else f"{text[:400]}..."
            parse = parse_list if get_origin(info.annotation) is list else parse_value
            options = {"dest": f"{keyword}.{name}", "default": argparse.SUPPRESS, "type": parse}
            group.add_argument(_flag(name), metavar="VALUE", help=text, **options)


def _flags_of(section: type[Section]) -> Collection[str]:
    return RUNTIME_FLAGS if section is RuntimeSettings else section.model_fields


def _plain(value: Any) -> Any:
    """A default as plain JSON values."""
    if isinstance(value, Section):
        return value.dump()
    return {key: _plain(item) for key, item in value.items()} if isinstance(value, Mapping) else value


def parser_for(argv: Sequence[str]) -> tuple[argparse.ArgumentParser, Sequence[str], str | None]:
    """The parser for this command line, the arguments left for it, and the stage; only that stage's flags are built."""
    longest_first = sorted(STAGES, key=len, reverse=True)  # `bases info` before `bases`
    name = next((n for n in longest_first if list(argv[: len(n.split())]) == n.split()), None)
    if name is not None:
        parser = _Parser(prog=f"nspo {name}", description=STAGES[name].help, allow_abbrev=False)
        _fill(parser, STAGES[name])
        return parser, argv[len(name.split()) :], name
    parser = _Parser(
        prog="nspo",
        description="Null-Space constrained Policy Optimization: safety training that leaves the rest of a model "
        "alone.\nA whole comparison is `snakemake --cores all --configfile FILE`; these are its parts and its tools.",
        epilog="\n\n".join(_group(title, names) for title, names in GROUPS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("stage", metavar="STAGE", help="one of the commands below; `nspo STAGE --help` lists its flags")
    return parser, argv, None


def _group(title: str, names: Iterable[str]) -> str:
    return "\n".join([f"{title}:", *(f"  {name:20}{STAGES[name].help}" for name in names)])


def whole_parser() -> argparse.ArgumentParser:
    """One parser that knows every stage and all its flags, for shells to complete."""
    import shtab

    top = _Parser(prog="nspo", allow_abbrev=False)
    top.add_argument("--version", action="store_true", help="print the version")
    holders = {"": top.add_subparsers()}
    for name in sorted(STAGES):  # `bases` before `bases info`
        first, _, second = name.partition(" ")
        if second and first not in holders:
            parent = holders[""].choices.get(first) or holders[""].add_parser(first, help=f"{first} ...")
            holders[first] = parent.add_subparsers()
        parser = holders[first if second else ""].add_parser(second or first, help=STAGES[name].help)
        _fill(parser, STAGES[name])
        for action in parser._actions:
            if action.type is Path:
                action.complete = shtab.FILE  # type: ignore[attr-defined]
    return top


def _run(argv: Sequence[str]) -> None:
    parser, rest, name = parser_for(argv)
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
    in_workflow = PARENT in os.environ
    if not name.startswith(TRANSFERS if in_workflow else (*TRANSFERS, "prepare")):  # elsewhere the hub's bars are noise
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        if in_workflow:  # whose rules fetched what jobs need: a node without a network is not waited for
            os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # other libraries' to their developers; ours are caught and said
    module, _, function = stage.function.partition(":")
    run = getattr(import_module(module), function)
    run(**_gathered(run, keywords))


def _gathered(run: Callable[..., None], keywords: dict[str, Any]) -> dict[str, Any]:
    """`keywords`, where those that are fields of a dataclass which `run` takes are given as one."""
    for name, kind in inspect.get_annotations(run).items():
        if name not in keywords and isinstance(kind, type) and is_dataclass(kind):
            inside = {one.name: keywords.pop(one.name) for one in fields(kind)}
            keywords[name] = kind(**inside)
    return keywords


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    0; 2 for a mistake the user can mend; 130 when interrupted; 143 when a signal asked training to stop, which it did
    with a checkpoint.
    """
    end_with_workflow()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as standard error: no locale ends a stage
    try:
        forget_foreign_group()
        _run(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        for line in str(error).splitlines():
            sys.stderr.write(f"nspo: error: {line}\n")
        return 2
    except Paused as pause:
        sys.stderr.write(f"nspo: {pause}; the same command goes on from there\n")
        return 143
    except KeyboardInterrupt:
        sys.stderr.write("nspo: interrupted; the same command goes on from what is done\n")
        return 130
    except Exception as error:
        if (said := _forbidden(error) or _exhausted(error)) is None:
            raise
        sys.stderr.write(f"nspo: error: {said}; what is done is kept, the same command goes on\n")
        return 2
    return 0


def _forbidden(error: Exception) -> str | None:
    """The path that this user may not read or write, or at which nothing can be written, where that ended a stage."""
    number = getattr(error, "errno", None)
    if number in NO_PLACE and (name := getattr(error, "filename", None)):
        return f"{name!s:.200}: {NO_PLACE[number]}: choose another path"
    if number not in (errno.EACCES, errno.EPERM, errno.EROFS) and "Permission denied" not in str(error):
        return None
    where = getattr(error, "filename", None) or first_line(error)
    reason = os.strerror(number) if number else "Permission denied"
    return f"{where}: {reason}: this user may not read or write it, ask its owner for access or choose another folder"


def _exhausted(error: Exception) -> str | None:
    """What this machine has too little of, where that is what ended a stage: libraries word it, and raise it, as they
    like."""
    text, number = str(error), getattr(error, "errno", None)
    if number == errno.ENOSPC or any(words in text for words in NO_SPACE):
        return f"no space left on the disk ({first_line(error)}): free some and rerun"
    if isinstance(error, MemoryError) or number == errno.ENOMEM or any(words in text for words in NO_MEMORY):
        return (
            f"not enough memory ({first_line(error)}): give the stage more, or lower batch_size, micro_batch_size or "
            "max_new_tokens"
        )
    return None
