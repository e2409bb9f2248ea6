"""Which prompts are the same, word for word or nearly: of a benchmark and of training, or within a run's own sets.

Two texts are near duplicates when the sets of their word trigrams overlap by a given share (Jaccard), computed exactly
for every pair by one sparse product, not estimated by hashing. Case, punctuation and spacing do not count.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import sparse
from scipy.sparse.csgraph import connected_components

WORDS = 3
NEAR = 0.5  # prompts that share this much count as one when they are split
SHORT = 5  # words below which a text has too few trigrams to be nearly anything
CELLS = 2**24  # of a dense block of similarities: 128 MiB


Row = dict[str, Any]


class Overlap(NamedTuple):
    """The training prompt most like a prompt."""

    similarity: float  # 0 to 1; 1 for equal words
    place: int  # of the training prompt, -1 where nothing is shared


def grams(text: str) -> set[tuple[str, ...]]:
    """The word trigrams of a text; a shorter text is one gram of its own."""
    words = re.findall(r"\w+", text.casefold())
    return {tuple(words[i : i + WORDS]) for i in range(max(1, len(words) - WORDS + 1))}


def overlaps(prompts: Sequence[str], training: Sequence[str]) -> list[Overlap]:
    """For each prompt the most similar training prompt, the first of those that are equally similar."""
    if not training:
        return [Overlap(0.0, -1)] * len(prompts)
    vocabulary: dict[tuple[str, ...], int] = {}
    theirs = _matrix((grams(text) for text in training), vocabulary)
    ours = _matrix((grams(text) for text in prompts), vocabulary)
    theirs.resize(len(training), len(vocabulary))
    our_sizes, their_sizes = (np.asarray(matrix.sum(axis=1)).ravel() for matrix in (ours, theirs))
    found = []
    step = max(1, CELLS // len(training))
    for start in range(0, len(prompts), step):
        rows = slice(start, start + step)
        shared = (ours[rows] @ theirs.T).toarray()
        similarity = shared / (our_sizes[rows, None] + their_sizes[None] - shared)
        best = similarity.argmax(axis=1)
        values = similarity[np.arange(len(best)), best]
        found += [Overlap(float(v), int(i) if v else -1) for v, i in zip(values, best, strict=True)]
    return found


def apart(rows: Sequence[Row], training: Sequence[str]) -> tuple[list[Row], dict[str, int]]:
    """The rows whose `prompt` is neither a training prompt nor nearly one, and how many others, by `domain`."""
    found = overlaps([row["prompt"] for row in rows], training)
    near = Counter(row["domain"] for row, it in zip(rows, found, strict=True) if it.similarity >= NEAR)
    return [row for row, it in zip(rows, found, strict=True) if it.similarity < NEAR], dict(sorted(near.items()))


def families(prompts: Sequence[str]) -> list[int]:
    """The family of each prompt: its near duplicates, theirs, and so on; given as the place of its first member.

    Two prompts made from one template are near duplicates too: numbers count as one number, and capitalised words
    within a sentence as one name. Texts of fewer than 5 words are compared as they stand.
    """
    vocabulary: dict[tuple[str, ...], int] = {}
    ours = _matrix((grams(_template(text)) for text in prompts), vocabulary)
    sizes = np.asarray(ours.sum(axis=1)).ravel()
    step = max(1, CELLS // max(1, len(prompts)))
    pairs: list[tuple[np.ndarray, np.ndarray]] = []
    for start in range(0, len(prompts), step):
        rows = slice(start, start + step)
        shared = (ours[rows] @ ours.T).tocoo()
        alike = shared.data >= NEAR * (sizes[rows][shared.row] + sizes[shared.col] - shared.data)
        pairs.append((shared.row[alike] + start, shared.col[alike]))
    places = np.concatenate([np.stack(found) for found in pairs], axis=1) if pairs else np.empty((2, 0), dtype=int)
    graph = sparse.coo_matrix((np.ones(places.shape[1]), places), shape=(len(prompts), len(prompts)))
    labels = connected_components(graph, directed=False)[1].tolist()
    return _first_places(labels)


def _first_places(labels: Sequence[int]) -> list[int]:
    first: dict[int, int] = {}
    return [first.setdefault(label, place) for place, label in enumerate(labels)]


def _template(text: str) -> str:
    if len(text.split()) < SHORT:
        return text
    return re.sub(r"(?<=[a-z,;:] )[A-Z][a-z]+", "Name", re.sub(r"\d+(?:[.,]\d+)*", "0", text))


def _matrix(sets: Iterable[set[tuple[str, ...]]], vocabulary: dict[tuple[str, ...], int]) -> sparse.csr_matrix:
    """One row per set, one column per gram of `vocabulary`, which grows."""
    columns: list[int] = []
    ends = [0]
    for one in sets:
        columns += sorted(vocabulary.setdefault(gram, len(vocabulary)) for gram in one)
        ends.append(len(columns))
    return sparse.csr_matrix((np.ones(len(columns)), columns, ends), shape=(len(ends) - 1, len(vocabulary)))
