"""Verdicts that are kept while they are asked for, so that an interrupted run asks for the rest only."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nspo.files.journal import JsonLines
from nspo.files.manifest import fingerprint
from nspo.judges.judge import Asked
from nspo.run.progress import say


class KeptVerdicts:
    """A judge that remembers: what the file `work` holds, from now or an earlier run, is not asked for again.

    Equal pairs of prompt and answer are judged once. Failed verdicts are not kept: they are asked for again.
    """

    def __init__(self, judge: Asked, work: Path) -> None:
        self.judge, self.journal = judge, JsonLines(work)
        self.known: dict[str, float] = dict(self.journal.rows())
        if self.known:
            say(f"{judge.name}: continuing after {len(self.known)} verdicts, kept in {work}")

    def verdicts(self, prompts: Sequence[str], answers: Sequence[Any]) -> list[float]:
        """As `Judge.verdicts`."""
        pairs = [fingerprint(pair) for pair in zip(prompts, answers, strict=True)]
        places = {pair: place for place, pair in reversed(list(enumerate(pairs))) if pair not in self.known}
        rest = sorted(places.values())

        def keep(place: int, value: float) -> None:
            self.known[pairs[rest[place]]] = value
            self.journal.append([[pairs[rest[place]], value]])

        if rest:
            self.judge.verdicts([prompts[i] for i in rest], [answers[i] for i in rest], keep)
        return [self.known.get(pair, math.nan) for pair in pairs]
