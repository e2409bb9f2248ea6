"""Verdicts that are kept while they are asked for, so that an interrupted run asks for the rest only."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nspo.errors import UserError
from nspo.files.journal import JsonLines
from nspo.files.manifest import fingerprint
from nspo.judges.judge import Asked
from nspo.run.progress import say


class KeptVerdicts:
    """A judge that remembers: what the file `work` holds, from now or an earlier run, is not asked for again.

    Equal pairs of prompt and answer are judged once. Failed verdicts are not kept: they are asked for again.
    """

    def __init__(self, judge: Asked, work: Path, masked: bool = False) -> None:
        """Verdicts of `judge`.

        Args:
            masked: a request that failed leaves a failed verdict (NaN), which a rollout can do without. Scores cannot:
                by default the round ends there, unless the endpoint refused that very pair (4xx) in an earlier run too.
        """
        self.judge, self.journal, self.masked = judge, JsonLines(work), masked
        kept: dict[str, float | None] = dict(self.journal.rows())  # None where the endpoint refused the request
        self.known = {pair: value for pair, value in kept.items() if value is not None}
        self.refused = kept.keys() - self.known.keys()
        if self.known:
            say(f"{judge.name}: continuing after {len(self.known)} verdicts, kept in {work}")

    def verdicts(self, prompts: Sequence[str], answers: Sequence[Any]) -> list[float]:
        """As `Judge.verdicts`.

        Raises:
            UserError: also where no answer got a verdict, or requests failed that are not `masked`.
        """
        pairs = [fingerprint(pair) for pair in zip(prompts, answers, strict=True)]
        places = {pair: place for place, pair in reversed(list(enumerate(pairs))) if pair not in self.known}
        rest = sorted(places.values())

        def keep(place: int, value: float | None) -> None:
            if value is not None:
                self.known[pairs[rest[place]]] = value
            self.journal.append([[pairs[rest[place]], value]])

        if rest:
            self.judge.verdicts([prompts[i] for i in rest], [answers[i] for i in rest], keep)
            for place in self.judge.failures.refused:
                keep(place, None)
            self._check(pairs, rest)
        return [self.known.get(pair, math.nan) for pair in pairs]

    def _check(self, pairs: Sequence[str], rest: Sequence[int]) -> None:
        failures, key = self.judge.failures, self.judge.key
        again = "what there is is kept, and the same command goes on"
        if not any(pair in self.known for pair in pairs):
            raise UserError(f"{key}: none of the {len(pairs)} answers got a verdict: {failures.causes()}; {again}")
        failed = {place for places in failures.requests.values() for place in places}
        final = {place for place in failures.refused if pairs[rest[place]] in self.refused}
        if failed - final and not self.masked:
            raise UserError(
                f"{key}: {failures.causes()}, so {len(failed)} of {len(pairs)} verdicts are missing: {again} (what the "
                "endpoint then refuses a second time counts as a failed verdict)"
            )
