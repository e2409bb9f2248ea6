"""Training that is asked to stop, by SIGTERM or SIGUSR1, writes a checkpoint first: a cluster asks before it takes the
machine away. The same command goes on from there.
"""

import signal
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback

from nspo.run.progress import say

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class PauseCallback(TrainerCallback):
    """Ends training after the rollout step in which a signal came, with a checkpoint.

    Attributes:
        paused: whether it did so.
    """

    def __init__(self, updates: int) -> None:
        """`updates`: optimizer updates per rollout step; between them a checkpoint would lose the rollout."""
        self.updates, self.paused = updates, False
        self._asked = False
        self._before: dict[signal.Signals, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Listen; until `on_train_end`."""
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Listen no more."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Save and stop at the end of a rollout step when any process has been asked to; all of them together."""
        last = state.global_step >= state.max_steps or control.should_training_stop
        if state.global_step % self.updates == 0 and not last and self._any(args.device):
            self.paused = control.should_save = control.should_training_stop = True
        return control

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._asked = True
        say(f"{signal.Signals(number).name}: a checkpoint is written at the end of this step, then training stops")

    def _any(self, device: torch.device) -> bool:
        asked = torch.tensor(int(self._asked), device=device)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(asked, torch.distributed.ReduceOp.MAX)
        return bool(asked)
