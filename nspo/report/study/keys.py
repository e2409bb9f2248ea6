"""The keys in which the variants of a study differ, and how they are written."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from nspo.settings.config import Config
from nspo.settings.types import Section

APART = {"runtime", "study"}  # sections that make no difference to a result


def varied(configs: Mapping[str, Config]) -> dict[str, dict[str, Any]]:
    """Every key of which variants hold several values -> variant -> its value; of those that lack the key, none.

    Where named entries themselves come and go (domains, methods), their names are the value.
    """
    flat = {name: dict(_leaves(config, "")) for name, config in configs.items()}
    keys = dict.fromkeys(key for leaves in flat.values() for key in leaves)
    found = {key: {name: leaves[key] for name, leaves in flat.items() if key in leaves} for key in keys}
    return {key: values for key, values in found.items() if len({shown(value) for value in values.values()}) > 1}


def _leaves(section: Section, path: str) -> Iterator[tuple[str, Any]]:
    for name in type(section).model_fields:
        if path or name not in APART:
            yield from _of_value(getattr(section, name), f"{path}{name}")


def _of_value(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Section):
        yield from _leaves(value, f"{path}.")
    elif isinstance(value, Mapping) and value and all(isinstance(item, Section) for item in value.values()):
        yield path, list(value)
        for name, item in value.items():
            yield from _of_value(item, f"{path}.{name}")
    else:
        yield path, value


def shown(value: Any) -> str:
    """A value as a reader writes it: `maths: 0, code: 1`."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {shown(item)}" for key, item in value.items()) or "none"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(shown, value)) or "none"
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)


def short(keys: Sequence[str]) -> dict[str, str]:
    """Each key by its last parts: two, or as many as tell it from the others."""

    def last(key: str, parts: int) -> str:
        return ".".join(key.split(".")[-parts:])

    def enough(key: str) -> int:
        return next(n for n in range(2, 99) if [last(other, n) for other in keys].count(last(key, n)) == 1)

    return {key: last(key, enough(key)) for key in keys}
