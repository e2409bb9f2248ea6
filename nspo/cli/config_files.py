"""The files made from the typed settings: the commented default configuration and its JSON Schema.

Both follow `nspo/settings/config.py`; a test fails when they drift. Command: `nspo config write`.
"""

import json
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml

from nspo.files.atomic import atomic_path
from nspo.settings.config import Config
from nspo.settings.types import Section

CONFIG_FILE = Path("config/config.yaml")
SCHEMA_FILE = Path("workflow/schemas/config.schema.json")
WIDTH = 100
HEADER = """\
# yaml-language-server: $schema=../workflow/schemas/config.schema.json
# Every setting with its default, written by `nspo config write` from nspo/settings/config.py.
# A key that is left out keeps its default. For settings of your own, copy this file (or only the keys that you change)
# and run `snakemake --cores all --configfile FILE`; a configuration stands alone and is never merged with this one.
"""


def write_files(root: Path) -> None:
    """Write the default configuration and the schema below `root`."""
    for path, text in ((CONFIG_FILE, HEADER + commented_yaml(Config())), (SCHEMA_FILE, json_schema())):
        with atomic_path(root / path) as scratch:
            scratch.write_text(text, encoding="utf-8")


def json_schema() -> str:
    """The JSON Schema (2020-12) of a configuration, unknown keys refused at every level."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **Config.model_json_schema()}
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


def commented_yaml(config: Config) -> str:
    """`config` as YAML, what each key means above it."""
    return "\n".join(_section(config, "", comments=True)) + "\n"


def _section(section: Section, indent: str, comments: bool) -> Iterator[str]:
    fields = type(section).model_fields
    for name in sorted(fields, key=lambda name: name != "kind"):  # what the other keys depend on comes first
        field = fields[name]
        if field.exclude:
            continue
        value = getattr(section, name)
        if indent == "":
            yield ""
        if comments:
            meaning = field.description or type(value).__doc__ or ""
            yield from _comment(" ".join(meaning.split()) + _choices(field.annotation), indent)
        yield from _entry(name, value, indent, comments)


def _entry(name: str, value: Any, indent: str, comments: bool) -> Iterator[str]:
    inner = f"{indent}  "
    if isinstance(value, Section):
        yield f"{indent}{_scalar(name)}:"
        yield from _section(value, inner, comments)
    elif isinstance(value, Mapping) and value:
        yield f"{indent}{_scalar(name)}:"
        # What the keys of an entry mean is said once, at the first.
        for index, (key, item) in enumerate(value.items()):
            yield from _entry(key, item, inner, comments and index == 0)
    elif isinstance(value, list) and len(value) > 1:
        yield f"{indent}{_scalar(name)}:"
        yield from (f"{inner}- {_scalar(item)}" for item in value)
    else:
        yield f"{indent}{_scalar(name)}: {_scalar(value)}"


def _comment(text: str, indent: str) -> Iterator[str]:
    prefix = f"{indent}# "
    return iter(textwrap.wrap(text, WIDTH, initial_indent=prefix, subsequent_indent=prefix, break_on_hyphens=False))


def _choices(annotation: Any) -> str:
    """The allowed values of a setting with a fixed set of them."""
    values = [str(value) for value in get_args(annotation) if isinstance(value, str)]
    return f" One of: {', '.join(values)}." if len(values) > 1 and get_origin(annotation) is not None else ""


def _scalar(value: Any) -> str:
    """One value on one line; PyYAML writes 1.0e-06 for 1e-6, which YAML 1.1 would read as text."""
    style = '"' if isinstance(value, str) and "\n" in value else None  # the only one that writes a line break as \n
    text = yaml.safe_dump(value, default_style=style, default_flow_style=True, width=10_000, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")
