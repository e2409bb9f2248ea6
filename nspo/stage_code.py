"""Which source files shape what a stage makes: its module and whatever of this package that imports, at any depth.

The workflow lists them as inputs of the stage's rule, so an edit reruns the stage and a mere touch does not. Left out
is what settings, messages and the sharing of artifacts are made of: a changed default reaches a stage through its
flags, which are tracked.
"""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parent
NOT_SHAPING = {
    "nspo",
    "nspo.benchmark_settings",
    "nspo.config",
    "nspo.config_files",
    "nspo.data_settings",
    "nspo.errors",
    "nspo.hub",
    "nspo.judge_settings",
    "nspo.policy_settings",
    "nspo.progress",
    "nspo.validation",
}


def stage_files(*modules: str, package: Path = PACKAGE) -> list[Path]:
    """Sorted files of the modules (such as `nspo.policy`) and of everything in `package` that they import.

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
        waiting += _imported(path)
        waiting.append(name.rpartition(".")[0])
    return sorted(found.values())


def _file(name: str, package: Path) -> Path | None:
    """The file of a module of this package, None for any other name."""
    head, *rest = name.split(".")
    if head != "nspo":
        return None
    base = package.joinpath(*rest)
    return next((path for path in (base.with_suffix(".py"), base / "__init__.py") if path.is_file()), None)


def _imported(path: Path) -> list[str]:
    """Every name an import statement in `path` may load: `from a import b` loads `a` and perhaps `a.b`."""
    names = []
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return names
