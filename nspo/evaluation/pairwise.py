"""Which of two answers to an instruction is better, by a language model at an endpoint: AlpacaEval's question.

Every pair is shown in both orders, because such judges favour a place. An answer that wins both ways has won (1), one
that loses both ways has lost (0); a verdict that follows the order is a tie (1/2), and so are equal answers, about
which nobody is asked. The verdict is one letter, A or B, and nothing else. A prompt with a failed verdict, in either
order, counts as lost and is counted as failed: it stays in the denominator.

Differences from AlpacaEval: it draws one order per prompt, weighs the judge's probabilities of the two letters, and
corrects for length by a regression over many models' answers. Here nothing is corrected: judges favour long answers, so
look at the lengths (`response_tokens`) beside a win rate.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nspo.judges.endpoint import Endpoint
from nspo.judges.judge import Keep
from nspo.judges.kept import KeptVerdicts
from nspo.judges.replies import fill
from nspo.settings.judges import ComparisonJudge
from nspo.settings.runtime import RequestSettings

BETTER = {"A": 1.0, "B": 0.0}


class Comparison(Endpoint):
    """Is the first answer the better one, by the model at an endpoint?"""

    def __init__(self, settings: ComparisonJudge, requests: RequestSettings) -> None:
        """See `Endpoint`."""
        super().__init__("benchmarks.comparison", settings, requests)
        self.template, self.with_base = settings.template, settings.against == "base"

    def verdicts(
        self, prompts: Sequence[str], answers: Sequence[tuple[str, str]], keep: Keep = lambda *_: None
    ) -> list[float]:
        """1 where the first answer of a pair is better, 0 for the second, NaN where no verdict was reached.

        Raises:
            UserError: as `Endpoint.ask`.
        """
        shown = [
            [{"role": "user", "content": fill(self.template, prompt=prompt, first=first, second=second)}]
            for prompt, (first, second) in zip(prompts, answers, strict=True)
        ]
        return self.ask(shown, lambda reply: BETTER.get(reply.strip(), math.nan), "'A' or 'B'", keep)


def add_wins(rows: Sequence[dict[str, Any]], judge: Comparison, work: Path) -> None:
    """Add `win` to rows with `prompt`, `response` and `reference`: 1, 1/2 or 0, None where a verdict failed.

    Rows without a reference are compared with nothing.

    Verdicts are kept in the file `work` while they come.
    """
    rows = [row for row in rows if row["reference"] is not None]
    differing = [row for row in rows if row["response"] != row["reference"]]
    prompts = [row["prompt"] for row in differing]
    ours, theirs = ([row[column] for row in differing] for column in ("response", "reference"))
    kept = KeptVerdicts(judge, work)
    pairs = [*zip(ours, theirs, strict=True), *zip(theirs, ours, strict=True)]
    found = kept.verdicts([*prompts, *prompts], pairs)
    for row in rows:
        row["win"] = 0.5
    for row, first, second in zip(differing, found[: len(differing)], found[len(differing) :], strict=True):
        win = (first + 1 - second) / 2
        row["win"] = None if math.isnan(win) else win
