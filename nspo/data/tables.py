"""Prompts and human labels in one form each: who reads them never sees where they came from.

`prompts.parquet` has one row per prompt: role (general, harmful, benign, gold), domain, split (train, validation,
heldout, sealed), prompt, check (JSON, how an answer is marked, or the right answer; empty if neither), category. Rows
stand in a seeded random order, so the first n of any filter are a random sample. Commands: `nspo prepare-prompts`,
`nspo prepare-labels`.

`labels.parquet` has one row per judged response: id, set, target (cost or reward), split (train, heldout, and
judge, which only the second judge learns from), prompt, response, category, and what people said of it:

- grade: of the response alone, from 0 to 1 (cost: 1 is harmful; reward: 1 does what was asked); null where
  nobody judged it alone, as in plain preference pairs;
- pair, role: two rows with one `pair` are two responses to one prompt that people compared. Role `chosen` is the one
  that they prefer, the safer for target cost and the better for target reward; the other is `rejected`. Both empty
  where a response stands alone. So the cost model scores `rejected` above `chosen`, the reward model the reverse.

A prompt and all that is nearly the same belong to one split (`nspo.data.splits`), so no prompt is in two, whatever the
set, and no file's order matters.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nspo.errors import UserError
from nspo.files.tables import read_table

PROMPT_COLUMNS = ("id", "role", "domain", "split", "prompt", "check", "category")
LABEL_COLUMNS = ("id", "set", "target", "split", "prompt", "response", "grade", "category", "pair", "role")


class Prompts:
    """The rows of `prompts.parquet`, read once: a stage asks for those of a role, split and domain.

    Raises:
        UserError: when the file is missing or damaged.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._rows = path, read_table(path, PROMPT_COLUMNS)

    def of(self, role: str, split: str, domain: str | None = None, limit: int | None = None) -> list[dict[str, Any]]:
        """The first `limit` rows with this role, split and domain, `check` already parsed; the caller may change them.

        Raises:
            UserError: when there is none.
        """
        rows = [r for r in self._rows if r["role"] == role and r["split"] == split and domain in (None, r["domain"])]
        if not rows:
            of_domain = f" of domain {domain!r}" if domain else ""
            raise UserError(f"{self._path} has no {role} prompts in split {split!r}{of_domain}")
        return [{**row, "check": json.loads(row["check"]) if row["check"] else None} for row in rows[:limit]]

    def by_domain(self, role: str, split: str, limit: int | None = None) -> dict[str, list[dict[str, Any]]]:
        """The first `limit` rows of every domain that has prompts with this role and split, domains in sorted order."""
        domains = sorted({row["domain"] for row in self._rows if row["role"] == role and row["split"] == split})
        return {domain: self.of(role, split, domain, limit) for domain in domains}

    def of_each_domain(self, role: str, split: str, limit: int) -> list[dict[str, Any]]:
        """The first `limit` rows of every domain, one domain after the other; none where no domain has any."""
        return [row for rows in self.by_domain(role, split, limit).values() for row in rows]


def training_prompts(files: Sequence[Path]) -> list[str]:
    """The prompts of `prompts.parquet` or `labels.parquet` that training may have seen: all but the held-out ones."""
    rows = (row for path in files for row in read_table(path, ("prompt", "split")))
    return sorted({row["prompt"] for row in rows if row["split"] not in ("heldout", "sealed")})


def load_labels(path: Path, target: str, split: str) -> list[dict[str, Any]]:
    """The rows of `labels.parquet` for one model and split.

    Raises:
        UserError: when there is no such row, or the file is damaged.
    """
    rows = [r for r in read_table(path, LABEL_COLUMNS) if r["target"] == target and r["split"] == split]
    if not rows:
        raise UserError(f"{path} has no labels for the {target} model in split {split!r}: add a set to data.labels")
    return rows
