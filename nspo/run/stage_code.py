"""The code that shapes what a stage makes, as one hash: its module and whatever of this package that imports.

The workflow gives the hash to the stage's rule as a parameter, so an edit that may change the artifact reruns the
stage. An edit of comments, docstrings or formatting does not: the syntax tree is hashed, without docstrings. Settings
reach a stage through its flags, which are tracked on their own, so of `nspo.settings` only what computes is hashed.
"""

import ast
import hashlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

PACKAGE = Path(__file__).parents[1]
NOT_SHAPING = {"nspo", "nspo.bases.hub", "nspo.errors", "nspo.run.progress", "nspo.settings.reading"}


def code_hash(*modules: str, package: Path = PACKAGE) -> str:
    """16 hex digits over the code of the modules (such as `nspo.policy.stage`) and of everything that they import."""
    digest = hashlib.sha256()
    for name, path in stage_modules(*modules, package=package).items():
        digest.update(f"{name}\0{_read(path, name).code}\0".encode())
    return digest.hexdigest()[:16]


def stage_modules(*modules: str, package: Path = PACKAGE) -> dict[str, Path]:
    """The files, by module name in sorted order, of the modules and of everything in `package` that they import.

    Imports inside functions count, imports for type checking too.
    """
    found: dict[str, Path] = {}
    waiting = list(modules)
    while waiting:
        name = waiting.pop()
        path = _file(name, package)
        if path is None or name in found or (name in NOT_SHAPING and name not in modules):
            continue
        found[name] = path
        waiting += _read(path, name).imported
        waiting.append(name.rpartition(".")[0])
    return dict(sorted(found.items()))


@cache
def _file(name: str, package: Path) -> Path | None:
    """The file of a module of this package, None for any other name."""
    head, *rest = name.split(".")
    if head != "nspo":
        return None
    base = package.joinpath(*rest)
    return next((path for path in (base.with_suffix(".py"), base / "__init__.py") if path.is_file()), None)


class Module(NamedTuple):
    """What of a module counts: the names that its import statements may load, and its code as text."""

    imported: tuple[str, ...]
    code: str


@cache
def _read(path: Path, name: str) -> Module:
    """Every name an import may load (`from a import b` loads `a` and perhaps `a.b`), and the syntax tree of the module
    without docstrings; of settings, only what computes.
    """
    tree = ast.parse(path.read_bytes())
    names: list[str] = []
    for node in list(_statements(tree)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            if ast.get_docstring(node) is not None:
                node.body = node.body[1:] or [ast.Pass()]
            if name.startswith("nspo.settings.") and isinstance(node, (ast.Module, ast.ClassDef)):
                node.body = list(_computing(node))
    return Module(tuple(names), ast.dump(tree))


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    """A module and every statement in it; nothing that is looked for stands inside an expression."""
    yield node
    for block in ("body", "orelse", "finalbody", "handlers", "cases"):
        for part in getattr(node, block, []):
            yield from _statements(part)


def _computing(node: ast.Module | ast.ClassDef) -> Iterator[ast.stmt]:
    """What of a module or class of settings may change a result: no fields, no texts, no checks, no imports."""
    for part in node.body:
        if isinstance(part, ast.AnnAssign) and ast.unparse(part.annotation).startswith("ClassVar"):
            yield part  # a fact about a class, not a field
            continue
        if isinstance(part, (ast.AnnAssign, ast.Import, ast.ImportFrom)):
            continue
        if isinstance(part, ast.Assign) and isinstance(part.value, (ast.Constant, ast.Subscript)):
            continue
        checks = [ast.unparse(decorator) for decorator in getattr(part, "decorator_list", [])]
        if not any(check.startswith("model_validator") for check in checks):
            yield part
