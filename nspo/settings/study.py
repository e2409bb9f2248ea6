"""A study: variants of one configuration, each a whole configuration of its own.

A variant says which keys differ, nested or with dots (`bases.threshold: 0.9`); a grid says it for every combination of
the values of its keys, of which a value may hold several (`bases: [{rule: energy, threshold: 0.9}, ...]`). All other
keys are those of the file that holds the study. What is written goes over it key by key; but another `kind` comes with
its own keys alone, and `null` in place of a mapping takes it away.
"""

import re
from collections.abc import Iterator, Mapping
from itertools import product
from typing import Any

from nspo.errors import UserError
from nspo.settings.config import Config
from nspo.settings.reading import validate

Changes = Mapping[str, Any]


def variants(config: Config, where: str) -> dict[str, Config]:
    """Every variant of the study in `config`, by name; none where it holds no study.

    Args:
        where: what faults are told of, such as the file.

    Raises:
        UserError: for two variants of one name, or the faults of a variant's settings, each in a line that says where
            it was written.
    """
    base = config.model_dump(mode="json", exclude={"study"})
    found: dict[str, Config] = {}
    for place, name, changes in _written(config):
        if name in found:
            raise UserError(f"{where}: {place}: a variant is called {name!r} already", expected="another name")
        found[name] = validate(Config, changed(base, changes), f"{where}: {place}")
        if found[name].runtime != config.runtime or found[name].study:
            raise UserError(f"{where}: {place}: `runtime` and `study` are of the whole file", expected="no key of them")
    return found


def _written(config: Config) -> Iterator[tuple[str, str, Changes]]:
    """Where it stands, its name, and its keys, of every variant."""
    if config.study is None:
        return
    for name, changes in config.study.variants.items():
        yield f"study.variants.{name}", name, changes or {}
    for grid, axes in config.study.grids.items():
        for values in product(*axes.values()):
            yield f"study.grids.{grid}", f"{grid}-{_label(values)}", dict(zip(axes, values, strict=True))


def _label(value: Any) -> str:
    """A value, or the values in it, as a part of a folder's name."""
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else None
    return re.sub(r"[^\w.+=~-]+", "-", str(value)) if parts is None else "-".join(map(_label, parts))


def changed(base: Any, changes: Changes) -> Any:
    """Plain values `base` with `changes` over them, whose keys may be paths with dots."""
    for path, value in changes.items():
        for key in reversed(path.split(".")):
            value = {key: value}
        base = _over(base, value)
    return base


def _over(under: Any, over: Any) -> Any:
    if not (isinstance(under, Mapping) and isinstance(over, Mapping)):
        return over
    if over.get("kind", under.get("kind")) != under.get("kind"):
        return over
    spelt_out = ("loss", "constraint") if "objective" in over else ()
    merged = {key: value for key, value in under.items() if key not in spelt_out}
    for key, value in over.items():
        if value is None and isinstance(merged.get(key), Mapping):
            del merged[key]
        else:
            merged[key] = _over(merged.get(key), value)
    return merged
