"""From plain tables to the page: the template, and how values are written in it."""

import base64
import hashlib
import json
from importlib.resources import files
from typing import Any

import yaml
from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

PACKAGES = {"page": "nspo.report", "study": "nspo.report.study"}  # where the template of a page is


def render(page: dict[str, Any], name: str = "page") -> str:
    """The HTML of the page of a run, or of a `study`. Its one script is allowed by its hash, so no other can run."""
    script = (files(PACKAGES[name]) / "templates" / f"{name}.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment().get_template(f"{name}.html.j2").render(page, script=Markup(script), script_hash=digest)


def environment() -> Environment:
    """Templates, autoescaped where they are HTML; any name that one misspells is an error."""
    found = Environment(
        loader=ChoiceLoader([PackageLoader(name) for name in (*PACKAGES.values(), "nspo.report.sections")]),
        autoescape=lambda name: "html" in (name or ""),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters |= {"amount": amount, "signed": signed, "identity": identity, "embedded": embedded}
    return found


def embedded(value: Any) -> Markup:
    """JSON to stand inside a script element: it holds no `<`, so nothing in it can end the element."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))


def amount(value: float | None, unit: str = "number") -> str:
    """A value for a table: `12.3%` for a rate, three digits otherwise, a dash for what was not measured."""
    if value is None:
        return "\u2013"
    if unit == "rate":
        return f"{100 * value:.1f}%"
    return f"{value:.1e}" if 0 < abs(value) < 1e-4 else f"{value:.3g}"


def signed(value: float, unit: str) -> str:
    """A difference with its sign; rates in percentage points."""
    text = f"{100 * value:+.1f}" if unit == "rate" else f"{value:+.2g}"
    return text.replace("-", "\u2212")


def identity(value: Any) -> str:
    """A manifest as YAML, without the parts that other sections show."""
    if isinstance(value, dict):
        value = {key: inner for key, inner in value.items() if key not in {"sites", "layer_norms", "settings"}}
    return yaml.safe_dump(value, sort_keys=True, width=100, allow_unicode=True)
