"""A judge's verdicts in place of the cost model's scores: the paper's reward, -1 for unsafe answers, 0 for safe ones.

The judges, their grammar and their client are those of the evaluation (`nspo.judges.judge`): greedy, shown prompt
and answer, asked at the pace of `runtime.requests`. The cost of an answer is 1 (unsafe), 0 (safe), or NaN where no
verdict was reached. TRL leaves a reward that is NaN out of the mean and deviation of its group and gives it the
advantage 0, so a failure neither teaches anything nor shifts what the others earn; a group of failures is no group.

Verdicts are kept beside the checkpoints. An interrupted run samples the same answers again and asks for what is missing
only: verdicts that failed, which may succeed then, and so are the one thing by which a resumed run can differ.
"""

import logging
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from nspo.judges.judge import AddedJudge
from nspo.judges.kept import KeptVerdicts

TRL_LOG = "trl.trainer.grpo_trainer"


class JudgedCost:
    """Scores answers by what a judge says of them; takes the place of the cost model in a reward."""

    def __init__(self, judge: AddedJudge, path: Path) -> None:
        """Verdicts of `judge`, kept in the file `path`, which no other process writes."""
        self.kept = KeptVerdicts(judge, path, masked=True)
        logging.getLogger(TRL_LOG).addFilter(_told_already)

    def score(self, prompts: Sequence[str], answers: Sequence[str]) -> Tensor:
        """Cost (B,) float32 of answers: 1 unsafe, 0 safe, NaN where there is no verdict.

        Raises:
            UserError: when the judge cannot go on, or gave no verdict at all.
        """
        found = self.kept.verdicts(prompts, answers)
        return torch.tensor([value if math.isnan(value) else float(value > 0) for value in found])


def _told_already(record: logging.LogRecord) -> bool:
    """False for TRL's warning of an answer without reward, which would print prompt and answer on every rollout."""
    return "All reward functions returned None" not in record.getMessage()
