"""Reading and checking settings: a file or plain values in, typed settings or one clear line per fault out.

What is allowed stands in `nspo/settings/config.py`; here is how a violation is told: the file, the key, what was found,
what was expected, and the nearest key where one is misspelt. YAML is read safely: no tag of it can run code, and a key
that stands twice is refused. Nothing heavy is imported. Command: `nspo config check FILE`.
"""

import re
import reprlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from nspo.errors import UserError
from nspo.settings.config import Config
from nspo.settings.types import Section

S = TypeVar("S", bound=Section)
SHOWN = 20  # faults told at once
LONGEST = 400  # characters of a line
# Keys that stand elsewhere now: what a user wrote, and where it belongs.
MOVED = {
    r"(policy\.methods\.[^.]+)\.(kl|cost_limit|multiplier_\w+|beta|token_temperature|safety_share|guide)": (
        r"\1.loss.\2"
    ),
}
BRIEF = reprlib.Repr()
BRIEF.maxlevel, BRIEF.maxstring, BRIEF.maxother = 2, 80, 80


class StrictLoader(yaml.SafeLoader):
    """Safe YAML in which a key stands once: PyYAML would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """The mapping of `node`; a key that is merged in (`<<`) may stand again, since that is what merging is for."""
        seen = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if (key.tag, str(key.value)) in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"found the key {key.value!r} twice, expected it once", problem_mark=key.start_mark
                )
            seen.add((key.tag, str(key.value)))
        return super().construct_mapping(node, deep)

    def construct_number(self, node: yaml.ScalarNode) -> int | float:
        """A number as people read it: to YAML 1.1 010 is 8 and 1:30 is 90, which nobody means."""
        number = super().construct_yaml_int if node.tag.endswith(":int") else super().construct_yaml_float
        if ":" in node.value or re.fullmatch(r"[-+]?0[0-9_]+", node.value):
            raise yaml.constructor.ConstructorError(
                problem=f"found {node.value!r}, which YAML 1.1 reads as {number(node)}: write that, or quote the text",
                problem_mark=node.start_mark,
            )
        return number(node)


for _kind in ("int", "float"):
    StrictLoader.add_constructor(f"tag:yaml.org,2002:{_kind}", StrictLoader.construct_number)


def load_config(*paths: Path | str) -> Config:
    """Read and check YAML configurations, a later one over those before it; an empty one is the default.

    Raises:
        UserError: naming the file, the key, what was found and what is allowed; all faults in one line each.
    """
    return check_config(read_over(*paths), " + ".join(map(str, paths)))


def read_over(*paths: Path | str) -> Any:
    """The plain values of YAML files, later keys over earlier ones, as Snakemake merges its `--configfile`s."""
    found: Any = {}
    for path in paths:
        raw = read_yaml(path)
        found = found if raw is None else _over(found, raw)
    return found


def _over(under: Any, over: Any) -> Any:
    if not (isinstance(under, dict) and isinstance(over, dict)):
        return over
    return under | {key: _over(under.get(key), value) for key, value in over.items()}


def read_yaml(path: Path | str) -> Any:
    """The plain values of a YAML file.

    Raises:
        UserError: when the file is missing, unreadable or not valid YAML, or a key stands twice.
    """
    path = Path(path)
    try:
        return yaml.load(path.read_bytes(), Loader=StrictLoader)
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist", expected="a configuration file") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})", expected="a configuration file") from error
    except Exception as error:  # beside YAMLError, whatever int(), datetime and deep nesting raise inside PyYAML
        raise UserError(_one_line(f"{path} is not valid YAML: {_yaml_fault(error)}")) from error


def typed(values: Any) -> Any:
    """Values that Snakemake's `--config` took as text, typed as a YAML file would: "4" as 4, "null" as nothing."""
    if isinstance(values, Mapping):
        return {key: typed(value) for key, value in values.items()}
    if isinstance(values, list):
        return [typed(value) for value in values]
    if not isinstance(values, str):
        return values
    try:
        return yaml.load(values, Loader=StrictLoader)
    except Exception:  # no YAML: a text like any other
        return values


def check_config(raw: Any, where: str = "config") -> Config:
    """Check a configuration that is already parsed (see `load_config`)."""
    return validate(Config, raw, where)


def validate(section: type[S], raw: Any, where: str) -> S:
    """Build `section` from plain values, turning pydantic's report into one `UserError`, a line per fault."""
    if not isinstance(raw, dict):
        raise UserError(f"{where}: found {type(raw).__name__}", expected="a mapping of keys to values")
    try:
        return section.model_validate(raw)
    except ValidationError as error:
        faults = error.errors(include_url=False)
        lines = [_one_line(f"{where}: {_fault(section, fault)}") for fault in faults[:SHOWN]]
        more = [f"{where}: and {len(faults) - SHOWN} faults more"] if len(faults) > SHOWN else []
        raise UserError("\n".join(lines + more)) from error


def _yaml_fault(error: Exception) -> str:
    """Where and what, without the excerpt of several lines that PyYAML adds."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        what = ", ".join(part for part in (error.context, error.problem) if part)
        return f"line {error.problem_mark.line + 1}, column {error.problem_mark.column + 1}: {what}"
    return str(error) or type(error).__name__


def _one_line(text: str) -> str:
    """`text` cut to a readable length, with nothing in it that breaks the line or steers a terminal."""
    cut = text if len(text) <= LONGEST else f"{text[:LONGEST]}..."
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in cut)


def _fault(section: type[BaseModel], fault: Any) -> str:
    """One pydantic error as `key: found ..., expected ...`."""
    parts, holder, place = _walk(section, fault["loc"])
    key = ".".join(str(part) for part in parts if part != "[key]")
    if fault["type"] == "extra_forbidden":
        moved = (match.expand(new) for old, new in MOVED.items() if (match := re.fullmatch(old, key)))
        said = next((f"moved to {place}" for place in moved), f"unknown key{_nearest(holder, str(parts[-1]))}")
        return f"{key}: {said}"
    if fault["type"] in {"union_tag_invalid", "union_tag_not_found"}:
        kinds = place["discriminator"]
        return f"{key}.{kinds['propertyName']}: expected one of: {', '.join(kinds['mapping'])}"
    if fault["type"] == "missing":
        return f"{key}: missing, expected a value"
    if fault["type"] == "value_error":
        return f"{key + ': ' if key else ''}{fault['ctx']['error']}"
    if fault["type"] == "invalid_key":
        return f"found the key {_brief(fault['input'])}, expected text"
    if fault["type"] == "model_type":
        return f"{key}: found {_brief(fault['input'])}, expected a mapping of keys to values"
    expected = re.sub(r"^\w+ should (be|have|match) ", "expected ", fault["msg"])
    hint = ""
    if isinstance(fault["input"], str) and fault["type"] in {"float_type", "int_type"}:
        hint = " (YAML 1.1 reads 1e-6 as text: write 1.0e-6)"
    if isinstance(fault["input"], bool) and fault["type"] == "string_type":
        hint = " (YAML 1.1 reads yes, no, on and off as true and false: put the text in quotes)"
    return f"{key}: found {_brief(fault['input'])}, {expected}{hint}"


def _brief(value: Any) -> str:
    try:
        return BRIEF.repr(value)
    except ValueError:  # Python refuses to write out an integer of thousands of digits
        return "a number with thousands of digits"


def _walk(
    section: type[BaseModel], loc: tuple[int | str, ...]
) -> tuple[list[int | str], dict[str, Any], dict[str, Any]]:
    """A place as a user wrote it (pydantic adds the kind it chose), the schema of what holds it, and its own."""
    schema = _schema(section)
    node = holder = schema
    parts: list[int | str] = []
    for part in loc:
        kinds = node.get("discriminator", {}).get("mapping", {})
        if part in kinds:
            node = {"$ref": kinds[part]}
        else:
            parts.append(part)
            holder = node
            node = node.get("properties", {}).get(part) or node.get("additionalProperties") or {}
        if "discriminator" not in node:  # where it may be null, what it is otherwise
            node = next((kind for kind in node.get("anyOf", ()) if {"discriminator", "$ref"} & set(kind)), node)
        node = node if "$ref" not in node else schema["$defs"][node["$ref"].rsplit("/", 1)[1]]
    return parts, holder, node


def _nearest(holder: Mapping[str, Any], part: str) -> str:
    """A suggestion for a misspelt key: the most similar key at the same place."""
    import difflib

    known = list(holder.get("properties", {}))
    close = difflib.get_close_matches(part[:LONGEST], known, n=1)
    return f", did you mean {close[0]!r}?" if close else f", expected one of: {', '.join(known)}"


@cache
def _schema(section: type[BaseModel]) -> dict[str, Any]:
    return section.model_json_schema()
