"""What README and the documentation show: code runs, commands are what the command line takes, links lead somewhere."""

import argparse
import ast
import re
import shlex
import shutil
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from support.policy_runs import write_bases

from nspo.cli.main import parser_for
from nspo.models.loading import load_model
from nspo.settings.config import Config
from nspo.settings.reading import check_config
from nspo.settings.study import variants

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "config/README.md"]
PAGES += [ROOT / "performance/README.md", ROOT / "CHANGELOG.md"]
BLOCK = re.compile(r"^```(?P<kind>\w+)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r'\[[^\]]*\]\(([^)\s]+)\)|src="([^"]+)"')
MAKE = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def blocks(*kinds: str) -> list[Any]:
    """The code blocks of all pages, as cases of a test."""
    return [
        pytest.param(match["text"], id=f"{page.relative_to(ROOT)}-{index}")
        for page in PAGES
        for index, match in enumerate(BLOCK.finditer(page.read_text()))
        if match["kind"] in kinds
    ]


@pytest.fixture(scope="module")
def scene(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what a finished run leaves."""
    folder = tmp_path_factory.mktemp("run")
    for model in ("results/model", "results/policy/nspo/seed0"):
        shutil.copytree(tiny_model_dir, folder / model)
    write_bases(tiny_model_dir, folder / "results/bases/bases.safetensors")
    return folder


@pytest.mark.parametrize("text", blocks("python"))
def test_python_runs(text: str, scene: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it stands, with a model and an optimizer that a reader has; what is a Snakefile is left to its own tests."""
    if "use rule" in text:
        return
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom):
            assert all(hasattr(import_module(str(node.module)), alias.name) for alias in node.names)
    monkeypatch.chdir(scene)
    model = load_model(scene / "results/model")
    exec(compile(text, "docs", "exec"), {"model": model, "optimizer": torch.optim.AdamW(model.parameters())})


@pytest.mark.parametrize("text", blocks("bash", "console"))
def test_commands_are_what_the_command_line_takes(text: str) -> None:
    """A flag, a target or a script that was renamed fails here."""
    for words in commands(text):
        check(words)


@pytest.mark.parametrize("text", blocks("yaml"))
def test_configurations_are_valid(text: str) -> None:
    """A part of a configuration has keys that there are; one of a profile has keys of Snakemake."""
    values = yaml.safe_load(text)
    if set(values) <= set(Config.model_fields):
        variants(check_config(values), "docs")
    else:
        assert set(values) <= {"set-resources", "default-resources", *snakemake_flags()}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    """Every file that a page links to is there, and so is the heading."""
    for match in LINK.finditer(BLOCK.sub("", page.read_text())):
        target, _, anchor = (match[1] or match[2]).partition("#")
        if "://" in target:
            continue
        file = page.parent / target if target else page
        assert file.exists(), target
        if anchor:
            assert anchor in headings(file), f"{target}#{anchor}"


def headings(page: Path) -> set[str]:
    """The anchors of a page, as both GitHub and MkDocs make them."""
    found = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in found}


def commands(text: str) -> Iterator[list[str]]:
    """The commands of a block, word by word, without comments, variables before them and brackets around options."""
    console = text.startswith("$ ")
    for line in text.replace("\\\n", " ").splitlines():
        if console and not line.startswith("$ "):
            continue  # what a command printed
        for part in re.split(r" && | -- ", line.removeprefix("$ ").replace("[--", "--").replace("] ", " ").rstrip("]")):
            words = shlex.split(part.replace("$(", "").replace(')"', '"'), comments=True)
            while words and re.fullmatch(r"[A-Z_]+=\S+", words[0]):
                words.pop(0)
            if words:
                yield words


def check(words: list[str]) -> None:
    """One command of ours, or of Snakemake, as its own parser takes it."""
    name, rest = words[0], words[1:]
    if name == "eval":
        name, *rest = shlex.split(rest[0])
    if name in ("python", "accelerate"):
        place = next((word for word in rest if word.endswith(".py") or word == "nspo" or "." in word), "")
        if place == "nspo":
            name, rest = "nspo", [word for word in rest[rest.index("nspo") + 1 :] if word != "..."]
            known = parser_for(rest)[0].format_help()
            assert all(word in known for word in rest if word.startswith("--"))
            return
        assert (ROOT / place).is_file() or (ROOT / "tests" / f"{place.replace('.', '/')}.py").is_file(), place
    elif name == "nspo":
        parser, left, stage = parser_for(rest)
        assert stage, words
        parser.parse_args([*left, "command"] if stage == "with-server" else left)
    elif name == "snakemake":
        snakemake_parser().parse_args(rest)
        for file in [word for word in rest if word.startswith("config/")]:
            assert (ROOT / file).is_file(), file
    elif name == "make":
        assert rest[0] in MAKE


@cache
def snakemake_parser() -> argparse.ArgumentParser:
    """Snakemake's own."""
    from snakemake.cli import get_argument_parser

    return get_argument_parser()


def snakemake_flags() -> set[str]:
    """What a profile may set."""
    return {option.lstrip("-") for action in snakemake_parser()._actions for option in action.option_strings}
