"""Which split a prompt belongs to, and which share of a set is used.

Near duplicates and prompts of one template form a family (`nspo.data.leaks.families`), across all sets. A family
belongs to the split that the hash of one of its members gives it, so nothing like a test prompt is ever trained on, and
no file's order matters. Half of what is held out is sealed: the default run never shows it, a final evaluation opens it
once (`evaluation.split`).
"""

import hashlib
import math
from collections.abc import Sequence
from typing import Any

OPEN = 0.5  # share of the held-out prompts that a default run may ask


def normal(prompt: str) -> str:
    """A prompt without its case and spacing: prompts that are equal in this form count as one."""
    return " ".join(prompt.lower().split())


def position(prompt: str, seed: int) -> float:
    """A number in [0, 1) from the text and the seed alone: its place in the shuffle, and so its split."""
    digest = hashlib.sha256(f"{seed}\0{normal(prompt)}".encode()).digest()
    return int.from_bytes(digest[:8]) / 2**64


def split_of(place: float, heldout: float, second: float, name: str = "validation") -> str:
    """`heldout` for the first share of places, then `name` for the second, then `train`."""
    if place < heldout:
        return "heldout"
    return name if place < heldout + second else "train"


def places(prompts: Sequence[str], families: Sequence[int], seed: int) -> list[tuple[float, bool]]:
    """For each prompt its family's place in the shuffle, and whether the family is sealed where it is held out.

    A family is sealed when every member stands in the second half of the order in which held-out prompts are asked.
    """
    name: dict[int, str] = {}
    opened: dict[int, bool] = {}
    for prompt, family in zip(prompts, families, strict=True):
        name[family] = min(name.get(family, normal(prompt)), normal(prompt))
        opened[family] = opened.get(family, False) or position(prompt, seed + 1) < OPEN
    return [(position(name[family], seed), not opened[family]) for family in families]


def sample(rows: Sequence[dict[str, Any]], fraction: float, seed: int) -> list[dict[str, Any]]:
    """The rows of a share of the prompts, drawn alike from every split, category and class (by systematic sampling).

    Prompts are shuffled by `seed` within the strata that their rows form, the strata laid end to end, and every
    1/fraction-th prompt taken: a stratum of n gives n times `fraction` of them, rounded up or down.
    """
    strata: dict[str, set[tuple[str, str, str]]] = {}
    for row in rows:
        strata.setdefault(normal(row["prompt"]), set()).add((row["split"], row["category"], str(row.get("grade", ""))))
    order = sorted(strata, key=lambda prompt: (sorted(strata[prompt]), position(prompt, seed + 2)))
    kept = {p for i, p in enumerate(order) if math.floor((i + 1) * fraction) > math.floor(i * fraction)}
    return [row for row in rows if normal(row["prompt"]) in kept]
