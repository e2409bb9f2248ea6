"""Publishing bases: the card that says what a file is worth, and both on the hub.

A repository holds one file of bases and its card. Commands: `nspo bases push FILE --repo ORG/NAME --licence mit`,
`nspo bases card FILE --repo ORG/NAME ...`, and `nspo bases fetch --source hub:ORG/NAME@REVISION --out FILE`.
"""

import shutil
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from nspo.bases.file import NullSpaceBases
from nspo.bases.hub import FILE_NAME, download, one_line, upload
from nspo.bases.table import data_rows, facts, kind_rows
from nspo.errors import UserError
from nspo.files.atomic import atomic_path
from nspo.files.sources import Source
from nspo.run.progress import say

TAGS = ["nspo", "null-space", "safety", "alignment"]


def push_to_hub(bases: NullSpaceBases, repo: str, *, licence: str, private: bool = False) -> str:
    """Publish bases and their card in `repo` ("org/name") with one commit, whose address is returned.

    The token is the one of the hub's own login (`hf auth login`, or HF_TOKEN).

    Args:
        licence: identifier for the card, such as "apache-2.0".
        private: create the repository as private; one that is public already is refused.

    Raises:
        UserError: when the hub cannot be reached or refuses.
    """
    with TemporaryDirectory(prefix="nspo-push-") as folder:
        file = Path(folder, FILE_NAME)
        bases.save(file)
        return _publish(file, bases, repo, licence, private)


def _publish(file: Path, bases: NullSpaceBases, repo: str, licence: str, private: bool) -> str:
    with TemporaryDirectory(prefix="nspo-push-") as folder, one_line(repo):
        readme = Path(folder, "README.md")
        readme.write_text(card(bases, repo, licence), encoding="utf-8")
        return upload(repo, {FILE_NAME: file, readme.name: readme}, private)


def fetch_bases(source: Source, out: Path) -> None:
    """Write the file of a `hub:` source to `out`, checked.

    Raises:
        UserError: another kind of source, as `download`, or a file that is no whole bases file.
    """
    if source.kind != "hub":
        raise UserError(
            f"source {source.location!r}", expected="hub:ORG/NAME@REVISION", change="a file needs no fetching"
        )
    found = download(source.location, source.revision)
    NullSpaceBases.load(found)
    with atomic_path(out) as scratch:
        shutil.copyfile(found, scratch)


def push_bases(file: Path, repo: str, licence: str, private: bool | None) -> None:
    """Publish a bases file as it is, and say where.

    Raises:
        UserError: as `push_to_hub`, or for a file that is no bases file.
    """
    say(f"bases: {_publish(file, NullSpaceBases.load(file), repo, licence, bool(private))}")


def write_card(file: Path, repo: str, licence: str, out: Path) -> None:
    """Write the card that `push_bases` would publish."""
    with atomic_path(out) as scratch:
        scratch.write_text(card(NullSpaceBases.load(file), repo, licence), encoding="utf-8")


def card(bases: NullSpaceBases, repo: str, licence: str) -> str:
    """The model card as Markdown: which model, data and rule, what the bases are worth by kind of site, and their use.

    Args:
        repo: where they can be loaded from, "org/name".
        licence: identifier such as "apache-2.0".
    """
    source = bases.manifest.get("model", {}).get("source") or ""
    base_model = Source.parse(source).location if source.startswith("hub:") else None
    about = ModelCardData(license=licence, library_name="nspo", tags=TAGS, base_model=base_model)
    values: dict[str, Any] = {
        "repo": repo,
        "facts": facts(bases),
        "kinds": kind_rows(bases),
        "free": sum(site.null_dim for site in bases.values()) / sum(site.width for site in bases.values()),
        "data": data_rows(bases.manifest),
        "licence": licence,
        "version": version("nspo"),
    }
    template = files("nspo.bases").joinpath("card.md.j2").read_text(encoding="utf-8")
    return f"{ModelCard.from_template(about, template_str=template, **values)}\n"
