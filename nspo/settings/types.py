"""What settings are made of: sections, and kinds of value (counts, hashes, sources, patterns) with their limits.

`nspo/settings/config.py` uses them; the limits of one key stand there. Nothing heavy is imported.
"""

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from nspo.errors import UserError
from nspo.files.sources import REQUIREMENT, SHA256, Source

LONGEST_PATH, LONGEST_NAME = 2000, 255  # bytes: file systems take 4096 and 255, and there are names below
MOST = 2**31 - 1  # what 32 bits count: a larger number is a slip of the keyboard
Whole = Annotated[int, Field(ge=0, le=MOST)]
Count = Annotated[int, Field(ge=1, le=MOST)]
Engine = Literal["transformers", "vllm"]
Requirement = Annotated[str, Field(pattern=f"^{REQUIREMENT}$")]
Sha256 = Annotated[str, Field(pattern=f"^{SHA256}$")]


class Section(BaseModel):
    """Base of all settings: unknown keys and wrong types are refused, nothing is converted silently."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    def dump(self, names: set[str] | None = None) -> dict[str, Any]:
        """The settings (all, or those of `names`) as plain JSON values, defaults filled in."""
        return self.model_dump(mode="json", include=names)

    def identity(self, names: set[str] | None = None) -> dict[str, Any]:
        """As `dump`, without what changes no result, such as the address at which a judge is asked."""
        return self.model_dump(mode="json", include=names, context={"identity": True})


def path_fault(text: str) -> str | None:
    """Why the workflow cannot carry a path, None where it can: Snakemake gives braces and angle brackets a meaning of
    its own and takes a path apart at a line break, a command takes a leading dash for a flag, and nobody expands `~`.
    """
    if found := re.search(r"[{}<>\x00-\x1f\x7f\x85\u2028\u2029]", text):
        return f"found {found[0]!r} in the path {text!r}, expected none of {{}}, <>, line breaks and the like"
    try:
        bytes_ = text.encode()
    except UnicodeEncodeError:
        return f"found the path {text!r}, expected Unicode text: it holds half a surrogate pair"
    if len(bytes_) > LONGEST_PATH or any(len(part) > LONGEST_NAME for part in bytes_.split(b"/")):
        most = f"at most {LONGEST_PATH}, and {LONGEST_NAME} in each name"
        return f"found a path of {len(bytes_)} bytes, expected {most}"
    if text.startswith(("-", "~")):
        return f"found the path {text!r}, expected one that does not begin with {text[0]!r}: write the whole path"
    if text != text.strip() or not text:
        return f"found the path {text!r}, expected one that neither begins nor ends with a space"
    return None


def _path(text: str) -> str:
    if fault := path_fault(text):
        raise ValueError(fault)
    return text


PathText = Annotated[str, AfterValidator(_path)]
PathOrEmpty = Annotated[str, AfterValidator(lambda text: text and _path(text))]


def source_of(*kinds: str) -> AfterValidator:
    """A check that a setting is a source (`nspo.files.sources`) of one of these kinds."""

    def check(text: str) -> str:
        try:
            kind = Source.parse(text).kind
        except UserError as error:
            raise ValueError(str(error)) from error
        if kind not in kinds or not text:
            raise ValueError(f"found {text!r}, expected a source of one of the kinds {', '.join(kinds)}")
        return _path(text) if kind in ("path", "storage") else text

    return AfterValidator(check)


DataSource = Annotated[str, source_of("path", "builtin", "wheel", "hub")]


def _pattern(text: str) -> str:
    try:
        re.compile(text)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"found {text!r}, expected a regular expression: {error}") from error
    return text


Pattern = Annotated[str, AfterValidator(_pattern)]
