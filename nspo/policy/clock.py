"""The seconds of every update, by part."""

from collections.abc import Callable
from typing import Any

from accelerate import PartialState

from nspo.policy.log import LoggedCallback
from nspo.run.devices import now

Scored = tuple[float, float, int]  # when the scoring of a rollout began and ended, and the tokens that were scored


class Clock(LoggedCallback):
    """Times every update on this process, from its first micro-batch to the end of the optimizer's step.

    Probes, checkpoints and the loading of data are left out. A rollout counts in the update that it is made for, so the
    later updates of a step have none.

    Args:
        scored: gives the rollout that was scored since it was last asked, None where there was none.
    """

    def __init__(self, scored: Callable[[], Scored | None] = lambda: None) -> None:
        self.scored = scored
        self.began = self.ended = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start."""
        self.began = now()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop."""
        self.ended = now()

    def columns(self, step: int) -> dict[str, float]:
        """Seconds of the update and of its parts: `rollout_seconds`, `scoring_seconds`, and `update_seconds`, the rest.

        A rollout is sampling and what the trainer computes before it asks for rewards; with one come
        `tokens_per_second`, the tokens that all processes sampled over its seconds.
        """
        start, end, tokens = self.scored() or (self.began, self.began, 0)
        found = {"seconds": self.ended - self.began, "rollout_seconds": start - self.began}
        found |= {"scoring_seconds": end - start, "update_seconds": self.ended - end}
        if tokens:
            found["tokens_per_second"] = tokens * PartialState().num_processes / found["rollout_seconds"]
        return found
