"""Answers and what is found about them, for every evaluation: greedy generation that resumes, verdicts, and the file.

Answers are kept in the working folder while they come; so are the verdicts of judges that a configuration adds.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow as pa

from nspo.evaluation.scores import JUDGED
from nspo.files.journal import JsonLines
from nspo.files.tables import write_table
from nspo.judges.judge import AddedJudge, RefusalPhrases, flags
from nspo.judges.kept import KeptVerdicts
from nspo.judges.second.judge import SecondJudge
from nspo.judges.second.kinds import ANSWERED
from nspo.models.generation import Generate, Ids, batches
from nspo.preference.model import CostModel
from nspo.run.progress import say


def greedy_answers(
    generate: Generate,
    prompt_ids: Sequence[Ids],
    max_new_tokens: int,
    batch_size: int,
    work: Path,
    description: str,
) -> list[list[int]]:
    """Answer ids to every prompt, in the given order; continues from those that the file `work` already holds.

    Only whole batches are taken from an earlier run: every answer is made in the same batch, with the same padding, as
    without the interruption, so rounding cannot make a resumed run differ.
    """
    whole, journal = batches(list(map(len, prompt_ids)), batch_size), JsonLines(work)
    order, kept = [place for batch in whole for place in batch], journal.rows()
    done = max(end for end in accumulate(map(len, whole), initial=0) if end <= len(kept))
    journal.keep(kept[:done])
    answers = dict(kept[:done])
    if done:
        say(f"{description}: continuing after {done} of {len(order)} prompts, kept in {work}")
    rest = order[done:]
    for place, ids in generate([prompt_ids[i] for i in rest], max_new_tokens, batch_size, description):
        answers[rest[place]] = ids
        journal.append([[rest[place], ids]])
    return [answers[i] for i in range(len(prompt_ids))]


def judge_answers(rows: Sequence[dict[str, Any]], cost: CostModel | None, refusal: RefusalPhrases) -> dict[str, int]:
    """Add the verdicts: refusals everywhere; on harmful prompts costs, where there is a cost model.

    Returns:
        by domain, of how many answers the cost model does not read the end.
    """
    said = refusal.verdicts([row["prompt"] for row in rows], [row["response"] for row in rows])
    for row, refused in zip(rows, flags(said, if_failed=False), strict=True):
        row["refused"] = refused
    harmful = [row for row in rows if row["role"] == "harmful"]
    if cost is None or not harmful:
        return {}
    costs, unread = cost.read([row["prompt"] for row in harmful], [row["response"] for row in harmful])
    for row, value, unsafe in zip(harmful, costs, flags(costs, if_failed=True), strict=True):
        failed = math.isnan(value)
        row.update(cost=None if failed else value, unsafe=unsafe, cost_failed=failed)
    return dict(Counter(row["domain"] for row, cut in zip(harmful, unread, strict=True) if cut))


def add_second_opinion(rows: Sequence[dict[str, Any]], judge: SecondJudge) -> None:
    """Add what the second judge says of the answers to harmful prompts; and to these and harmless ones the kind of
    answer. The answers must be judged for refusals."""
    asked = [row for row in rows if row["role"] in ("harmful", "benign")]
    found = judge.read([row["prompt"] for row in asked], [row["response"] for row in asked])
    kinds = judge.kinds([row["response"] for row in asked], [row["refused"] for row in asked], found.closeness)
    for row, verdict, kind in zip(asked, found.verdicts, kinds, strict=True):
        row.update(kind=kind, unanswered=kind != ANSWERED)
        if row["role"] == "harmful":
            row[JUDGED + judge.name] = None if math.isnan(verdict) else verdict


def add_verdicts(rows: Sequence[dict[str, Any]], judge: AddedJudge, work: Path) -> None:
    """Add what one more judge says of the answers to harmful prompts."""
    harmful = [row for row in rows if row["role"] == "harmful"]
    found = KeptVerdicts(judge, work).verdicts([row["prompt"] for row in harmful], [row["response"] for row in harmful])
    for row, value in zip(harmful, found, strict=True):
        row[JUDGED + judge.name] = None if math.isnan(value) else value


def write_responses(
    rows: Sequence[dict[str, Any]],
    columns: Mapping[str, pa.DataType],
    judges: Iterable[str],
    manifest: dict[str, Any],
    path: Path,
) -> None:
    """Write the rows as Parquet with these columns and one for each added judge (none of a row is dropped)."""
    columns = {**columns, **{JUDGED + name: pa.float32() for name in judges}}
    write_table(rows, path, columns, manifest)
