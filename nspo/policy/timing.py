"""Where the time of a run goes: a clock that waits for the accelerator, and the shares of a whole log."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch


def now() -> float:
    """Seconds on a steady clock, once the accelerator has done all it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def shares(rows: Sequence[Mapping[str, Any]]) -> str:
    """One line on the rows of a training log: the seconds of all updates, and the share of each part."""
    parts = ("seconds", "rollout_seconds", "scoring_seconds", "update_seconds", "projection_seconds")
    total, rollout, scoring, update, projection = (sum(row.get(part, 0.0) for row in rows) for part in parts)
    return (
        f"{total:.0f} s in updates: rollout {rollout / total:.1%}, scoring {scoring / total:.1%}, update "
        f"{update / total:.1%}, of which projection {projection / total:.1%}"
    )
