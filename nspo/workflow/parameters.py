"""Parameters of rules: one named parameter for every setting that shapes an output, and the flags of the command.

Snakemake compares the values of a rule's parameters and not their names, and says which values differ. So each setting
is a parameter whose value holds the flag's name too: two settings that exchange their values are noticed, and the
reason of a rerun reads `before: --clip 0.2 now: --clip 0.3`. The flags that the command gets are one more parameter,
which is derived (it names `threads`) and therefore never causes a rerun by itself.
"""

import shlex
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nspo.cli.main import to_flags
from nspo.settings.data import SplitSettings
from nspo.settings.evaluation import BenchmarkSettings
from nspo.settings.types import Section


@dataclass(frozen=True)
class Chosen:
    """Settings that the wildcards of a job choose, and their class."""

    kind: type[Section]
    choose: Callable[[Any], Section]

    def __call__(self, wildcards: Any) -> Any:
        """The settings of the job."""
        return self.choose(wildcards)


def tracked(
    prefix: str, section: Chosen, names: Iterable[str] | None = None, keep_order: bool = False
) -> dict[str, Callable[[Any], str]]:
    """A parameter `PREFIX_KEY` for every setting of a section (or those of `names`), by name.

    Args:
        keep_order: leave mappings in the order in which they were written (see `to_flags`).
    """
    fields = section.kind.model_fields
    chosen = [name for name in fields if not fields[name].exclude and (names is None or name in names)]
    return {f"{prefix}_{name}": _value(section, name, keep_order) for name in chosen}


def _value(section: Chosen, name: str, keep_order: bool) -> Callable[[Any], str]:
    # A function and not the text itself, because Snakemake would take braces in it for wildcards.
    def value(wildcards: Any) -> str:
        return to_flags(section(wildcards), [name], keep_order, identity=True)

    return value


def flags(section: Chosen, names: Iterable[str] | None = None, keep_order: bool = False) -> Callable[[Any, Any], str]:
    """The flags of a section, or of those settings of it, as one text for the command; never a reason to run."""
    chosen = None if names is None else list(names)

    def text(wildcards: Any, threads: Any) -> str:
        return to_flags(section(wildcards), chosen, keep_order)

    return text


def part_of(section: Section, kind: type[Section]) -> Any:
    """The part of a section that is a `kind` of its own."""
    return kind.model_validate({name: getattr(section, name) for name in kind.model_fields})


def with_own_wheels(section: SplitSettings) -> Any:
    """The same settings with only the wheels that their own sources name, so that other pins rerun nothing."""
    named = {wheel for several in section.sources().values() for source in several for wheel in source.wheels}
    return section.model_copy(update={"wheels": {k: v for k, v in section.wheels.items() if k in named}})


def benchmark_of(section: BenchmarkSettings, task: str) -> BenchmarkSettings:
    """The settings of one benchmark alone, so that another reruns nothing."""
    from nspo.evaluation.benchmarks.registry import TASKS

    sources = {name: source for name, source in section.sources.items() if name == task}
    comparison = section.comparison if TASKS[task].compared else None
    return section.model_copy(update={"tasks": [task], "sources": sources, "comparison": comparison})


def optional(flag: str, name: str, folder: bool = False) -> Callable[[Any, Any], str]:
    """`flag` and the files of the input `name` (with `folder`: their folders), or nothing where the rule has none."""

    def text(wildcards: Any, input: Any) -> str:
        paths = paths_of(input, name)
        if folder:
            paths = list(dict.fromkeys(str(Path(path).parent) for path in paths))
        return " ".join([flag, *map(shlex.quote, paths)]) if paths else ""

    return text


def folders(name: str) -> Callable[[Any, Any], str]:
    """The folders of the files of the input `name`."""
    return lambda wildcards, input: optional("", name, folder=True)(wildcards, input).strip()


def paths_of(input: Any, name: str) -> list[str]:
    """The files of the input `name`, none where the rule has no such input."""
    found = input.get(name) or []
    return [str(found)] if isinstance(found, str) else [str(path) for path in found]
