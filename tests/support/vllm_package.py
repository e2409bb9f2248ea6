"""The installed vllm, read as text: importing it needs a GPU's libraries."""

import ast
import importlib.util
from pathlib import Path

import pytest


def vllm_folder() -> Path:
    """The folder of the package; skips the test where it is not installed."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        pytest.skip("vllm is not installed (requirements-vllm.lock)")
    return Path(spec.origin).parent


def class_of(path: Path, name: str) -> ast.ClassDef:
    """The class `name` of a module."""
    found = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ClassDef)]
    return next(node for node in found if node.name == name)


def field_names(node: ast.ClassDef) -> set[str]:
    """The annotated fields of a class."""
    return {
        part.target.id for part in node.body if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name)
    }


def parameters(node: ast.ClassDef, name: str) -> ast.arguments:
    """The parameters of the last definition of a method (what stands before are overloads)."""
    return [part for part in node.body if isinstance(part, ast.FunctionDef) and part.name == name][-1].args


def engine_parameters(folder: Path) -> set[str]:
    """What `LLM(...)` takes: its own parameters, and the fields of `EngineArgs` that it hands on."""
    init = parameters(class_of(folder / "entrypoints/llm.py", "LLM"), "__init__")
    own = {argument.arg for argument in init.args + init.kwonlyargs}
    return own | (field_names(class_of(folder / "engine/arg_utils.py", "EngineArgs")) if init.kwarg else set())
