"""Which split a prompt belongs to, and which share of a set is used.

A prompt belongs to the split that its own hash gives it, so no prompt is in two splits, whatever the set, and no file's
order matters.
"""

import hashlib
import math
from collections.abc import Sequence
from typing import Any


def normal(prompt: str) -> str:
    """What two prompts that count as one have in common: the words, whatever their case and the space between them."""
    return " ".join(prompt.lower().split())


def position(prompt: str, seed: int) -> float:
    """A number in [0, 1) from the text and the seed alone: its place in the shuffle, and so its split."""
    digest = hashlib.sha256(f"{seed}\0{normal(prompt)}".encode()).digest()
    return int.from_bytes(digest[:8]) / 2**64


def split_of(place: float, heldout: float, validation: float) -> str:
    """`heldout` for the first share of places, then `validation`, then `train`."""
    if place < heldout:
        return "heldout"
    return "validation" if place < heldout + validation else "train"


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
