"""GGUF files: whether they are whole, and how to parse them once where transformers would parse them repeatedly."""

import functools
import importlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nspo.errors import UserError, first_line


@contextmanager
def read_once() -> Iterator[None]:
    """While open, a GGUF file is parsed once, and its names are looked up once.

    The parser is pure Python and takes seconds to a minute for a large vocabulary. transformers starts it anew for the
    tokenizer, the configuration and the weights, and builds the map of names for every module of the model.
    """
    package: Any = importlib.import_module("gguf")
    kept = package.GGUFReader, package.get_tensor_name_map
    package.GGUFReader, package.get_tensor_name_map = map(functools.cache, kept)
    try:
        yield
    finally:
        package.GGUFReader, package.get_tensor_name_map = kept


def check_gguf(path: Path, named: str) -> None:
    """Refuse a GGUF file, called `named`, that is cut off or one part of several.

    Raises:
        UserError: saying what to do.
    """
    from gguf import GGUFReader

    try:
        reader = GGUFReader(str(path))  # a string, as transformers spells it: see `read_once`
    except (ValueError, LookupError, OSError) as error:
        raise UserError(f"{named}: {path} is not a whole GGUF file ({first_line(error)}): copy it again") from error
    split = reader.get_field("split.count")
    parts = int(split.contents()) if split else 1
    if name := re.fullmatch(r".*-\d{5}-of-(\d{5})\.gguf", path.name):
        parts = max(parts, int(name[1]))
    if parts > 1:
        raise UserError(
            f"{named}: {path} is one of {parts} parts of a split GGUF",
            expected="a whole one",
            change="join them (`llama-gguf-split --merge FIRST-PART WHOLE.gguf`)",
        )
