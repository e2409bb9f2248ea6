"""Verdicts that are kept while they are asked for, so that an interrupted run asks for the rest only."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nspo.files.manifest import fingerprint
from nspo.judges.judge import Asked
from nspo.run.progress import say


class KeptVerdicts:
    """A judge that remembers: what the file `work` holds, from now or an earlier run, is not asked for again.

    Equal pairs of prompt and answer are judged once. Failed verdicts are not kept: they are asked for again.
    """

    def __init__(self, judge: Asked, work: Path) -> None:
        self.judge, self.work, self.known = judge, work, _known(work)
        if self.known:
            say(f"{judge.name}: continuing after {len(self.known)} verdicts, kept in {work}")

    def verdicts(self, prompts: Sequence[str], answers: Sequence[Any]) -> list[float]:
        """As `Judge.verdicts`."""
        pairs = [fingerprint(pair) for pair in zip(prompts, answers, strict=True)]
        places = {pair: place for place, pair in reversed(list(enumerate(pairs))) if pair not in self.known}
        rest = sorted(places.values())
        with self.work.open("a") as file:
            file.write("\n")  # ends a line that was cut off

            def keep(place: int, value: float) -> None:
                self.known[pairs[rest[place]]] = value
                file.write(json.dumps([pairs[rest[place]], value]) + "\n")
                file.flush()

            if rest:
                self.judge.verdicts([prompts[i] for i in rest], [answers[i] for i in rest], keep)
        return [self.known.get(pair, math.nan) for pair in pairs]


def _known(work: Path) -> dict[str, float]:
    """The verdicts in a file of `KeptVerdicts`; a line that was cut off is passed over."""
    known = {}
    for line in work.read_text().split("\n") if work.is_file() else ():
        try:
            pair, value = json.loads(line)
        except ValueError:
            continue
        known[pair] = value
    return known
