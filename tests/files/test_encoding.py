"""Every text file is UTF-8 whatever the locale: the code says so wherever it opens one, and a run shows it."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from support.workflow_project import ROOT

from nspo.files.tables import read_table
from nspo.settings.reading import load_config

TEXT_FILES = {"read_text", "write_text", "open", "fdopen", "NamedTemporaryFile"}
PROCESSES = {"run", "Popen", "check_output", "check_call", "getoutput"}
NOT_FILES = {"Image", "safe_open", "zipfile", "os", "self", "_base", "_tuned", "shard"}  # what else has a method `open`
ODD = "Prüfung für 中文 \u2028 😀"


def without_encoding(tree: ast.Module) -> Iterator[int]:
    """The lines of calls that open a text file, or read a process as text, in the encoding of the locale."""
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        owner = call.func.value if isinstance(call.func, ast.Attribute) else None
        owner_name = getattr(owner, "attr", getattr(owner, "id", ""))
        keywords = {keyword.arg: keyword.value for keyword in call.keywords}
        if "encoding" in keywords:
            continue
        values = [value.value for value in (*call.args, *keywords.values()) if isinstance(value, ast.Constant)]
        binary = any(isinstance(value, str) and "b" in value and set(value) <= set("rwaxbt+") for value in values)
        if name in TEXT_FILES and not binary and owner_name not in NOT_FILES:
            yield call.lineno
        if name in PROCESSES and {"text", "universal_newlines"} & keywords.keys():
            yield call.lineno


@pytest.mark.parametrize("folder", ["nspo", "performance", "examples", "workflow"])
def test_every_text_file_is_opened_as_utf8(folder: str) -> None:
    """Also what a process prints is read as UTF-8."""
    files = [path for path in (ROOT / folder).rglob("*") if path.suffix in {".py", ".smk"}]
    found = []
    for path in files:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".smk":  # Snakemake's own grammar; it opens nothing
            assert not any(f"{name}(" in text for name in ("read_text", "write_text", " open")), path
            continue
        found += [f"{path.relative_to(ROOT)}:{line}" for line in without_encoding(ast.parse(text))]
    assert files
    assert found == []


def test_the_check_sees_what_it_should() -> None:
    """Each way to open a file in the locale's encoding is found, and none that names one or reads bytes."""
    wrong = [
        'open("a")',
        'p.open("w")',
        "p.read_text()",
        "p.write_text(x)",
        "run(c, text=True)",
        'open("a", mode="a+")',
    ]
    right = ['open("a", "rb")', 'p.open(mode="wb")', 'p.read_text(encoding="utf-8")', "p.read_bytes()", "run(c)"]
    assert [list(without_encoding(ast.parse(line))) for line in wrong] == [[1]] * len(wrong)
    assert [list(without_encoding(ast.parse(line))) for line in right] == [[]] * len(right)


@pytest.mark.parametrize(
    "locale",
    [
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"LC_ALL": "C.ISO-8859-1", "PYTHONUTF8": "0", "PYTHONIOENCODING": "latin-1"},
    ],
    ids=["C", "latin-1"],
)
def test_stages_write_utf8_in_any_locale(tmp_path: Path, locale: dict[str, str]) -> None:
    """Configuration, prompts and page of a run in a locale that cannot write them; flags survive the shell."""
    data = tmp_path / "benign.jsonl"
    data.write_text("\n".join(f'{{"prompt": "{ODD.replace(chr(0x2028), "")} {i}"}}' for i in range(20)), "utf-8")
    program = (
        "import json, shlex, subprocess, sys\n"
        "from nspo.cli.main import to_flags, main\n"
        "from nspo.settings.config import Config\n"
        "from nspo.settings.data import DataSet, PromptSettings\n"
        f"odd = {ODD!a}\n"
        f"benign = DataSet(source={str(data)!r}, name=odd)\n"
        "settings = PromptSettings(benign=benign, harmful=benign.model_copy(update={'name': 'other'}),"
        " harmful_heldout={}, general_heldout={}, gold={}, general={odd: benign}, wheels={})\n"
        "whole = Config(data={**Config().dump()['data'], 'benign': benign.dump()})\n"
        f"folder = {str(tmp_path)!r}\n"
        "for stage, flags, out in (('config write', to_flags(whole, keep_order=True), 'config.yaml'),\n"
        "        ('prepare-prompts', to_flags(settings), 'prompts.parquet --wheels-dir none')):\n"
        "    command = f'{sys.executable} -m nspo {stage} {flags} --out {folder}/{out}'\n"
        "    subprocess.run(['bash', '-c', command], check=True)\n"
    )
    environment = {**os.environ, **locale}
    environment.pop("LANG", None)
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, check=False, cwd=ROOT)
    assert run.returncode == 0, run.stderr.decode("utf-8", "replace")[-2000:]
    assert load_config(tmp_path / "config.yaml").data.benign.name == ODD
    assert yaml.safe_load((tmp_path / "config.yaml").read_bytes())["data"]["benign"]["name"] == ODD
    found = read_table(tmp_path / "prompts.parquet", ("role", "domain"))
    assert {row["domain"] for row in found if row["role"] in ("general", "benign")} == {ODD}
