"""What a run logs of every update, under our names, and the paper's statements checked on that log."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from nspo.constraint.callback import NullSpaceCallback
from nspo.constraint.constrain import innermost
from nspo.errors import UserError
from nspo.files.journal import JsonLines
from nspo.run.devices import now
from nspo.run.progress import say, track

REMEDY = "lower the method's learning_rate (policy.methods)"  # where training diverges
ALIKE = (  # where no answer has an advantage
    "the answers of every group earn the same: raise policy.temperature, policy.group_size or policy.margin, or look "
    "at the reward and cost models"
)
UNREAD = (
    "some answers were longer than the cost or reward model reads, and what stood at their ends earned nothing: raise "
    "cost.max_tokens and reward.max_tokens, or lower policy.max_new_tokens"
)
LEAST_KEPT = 0.01  # share of the gradient's norm below which a run hardly learns, and is told so
LOOSER_WHEN_RAISED = {"relative", "absolute", "leakage"}  # for all other rules a lower threshold protects less
Columns = Callable[[int], dict[str, float]]  # what a callback adds to the log of an update
Samples = Callable[[int], list[dict[str, Any]]]  # the scored answers that an update is the first to learn from


class LoggedCallback(TrainerCallback, ABC):
    """A callback that knows something of every update."""

    @abstractmethod
    def columns(self, step: int) -> dict[str, float]:
        """What it adds to the log of update `step`."""


class LoggedConstraint(NullSpaceCallback, LoggedCallback):
    """The public callback, with what it did to every update for the log."""

    _said, _first = False, True
    _since = _seconds = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Attach as `NullSpaceCallback` does, and time what that adds to the optimizer's step."""
        with self._timed(kwargs["optimizer"]):
            super().on_train_begin(args, state, control, **kwargs)

    def columns(self, step: int) -> dict[str, float]:
        """What the constraint did to update `step`, and the seconds that took.

        In mode "gradient" the worst layer's leakage too. Says once when hardly anything is left of a gradient, or of
        the first step, and which setting to change.
        """
        found = self.attached.step_stats()
        what, kept = "gradient's", found.get("kept")
        if self.mode == "anchor" and self._first:
            what, kept = "first step's", self.attached.first_kept()
        if kept is not None and 0 < kept < LEAST_KEPT and not self._said:
            say(f"step {step}: the constraint keeps {kept:.2%} of the {what} norm: {self._remedy()}")
            self._said = True
        self._first = False
        found["projection_seconds"], self._seconds = self._seconds, 0.0
        return found | (self.leakage() if self.mode == "gradient" else {})

    def leakage(self) -> dict[str, float]:
        """The worst layer's leakage now; a product per layer, so it is measured with the probes where none is due."""
        return {"leakage": max(self.attached.leakage().values())}

    @contextmanager
    def _timed(self, optimizer: Any) -> Iterator[None]:
        """Time the hooks that the optimizer gets inside: they run between those before and those after."""
        inner = innermost(optimizer)
        registers = inner.register_step_pre_hook, inner.register_step_post_hook
        for register in registers:
            register(self._start)
        yield
        for register in registers:
            register(self._stop)

    def _start(self, *_: Any) -> None:
        self._since = now()

    def _stop(self, *_: Any) -> None:
        self._seconds += now() - self._since

    def _remedy(self) -> str:
        """The rule and rank in force, and what would leave more room to learn."""
        sites = list(self.bases.values())
        first, share = sites[0], sum(site.rank for site in sites) / sum(site.width for site in sites)
        change = "raise" if first.rule in LOOSER_WHEN_RAISED else "lower"
        return (
            f"rule {first.rule!r} with threshold {first.threshold:g} protects {share:.1%} of the directions; "
            f"{change} `bases.threshold` or choose another `bases.rule`"
        )


METRICS = {
    "loss": "loss",
    "reward": "reward",
    "cost": "cost",
    "unsafe": "unsafe",
    "helpfulness": "helpfulness",
    "refusal_rate": "refusal_rate",
    "over_refusal_rate": "over_refusal_rate",
    "failed_verdicts": "failed_verdicts",
    "unread_ends": "unread_ends",
    "kl": "kl_in_loss",
    "clip_ratio/region_mean": "clip_fraction",
    "frac_reward_zero_std": "zero_variance_groups",
    "completions/mean_length": "completion_length",
    "sampling/sampling_logp_difference/mean": "sampler_difference",
    "entropy": "entropy",
    "grad_norm": "grad_norm_clipped_from",
    "learning_rate": "learning_rate",
}
OF_ROLLOUT = (  # what is known of a rollout, and holds for each of its updates
    "reward",
    "cost",
    "unsafe",
    "helpfulness",
    "refusal_rate",
    "over_refusal_rate",
    "failed_verdicts",
    "unread_ends",
    "zero_variance_groups",
    "completion_length",
    "sampler_difference",
    "tokens_per_second",
)
FROM_PROBE = {"kl_per_token": "kl_to_base", "leakage": "leakage"}


def shares(rows: Sequence[Mapping[str, Any]]) -> str:
    """One line on the rows of a training log: the seconds of all updates, and the share of each part."""
    parts = ("seconds", "rollout_seconds", "scoring_seconds", "update_seconds", "projection_seconds")
    total, rollout, scoring, update, projection = (sum(row.get(part, 0.0) for row in rows) for part in parts)
    return (
        f"{total:.0f} s in updates: rollout {rollout / total:.1%}, scoring {scoring / total:.1%}, update "
        f"{update / total:.1%}, of which projection {projection / total:.1%}"
    )


class LogCallback(TrainerCallback):
    """Keep one row per optimizer step and the scored answers that it learnt from."""

    def __init__(self, folder: Path, samples: Samples, columns: Sequence[Columns], every: int) -> None:
        self.steps, self.samples = JsonLines(folder / "training.jsonl"), JsonLines(folder / "samples.jsonl")
        self.samples_of, self.columns, self.every = samples, columns, every
        self.rollout: dict[str, Any] = {}
        self.progress = ExitStack()
        self.told = False  # of a step without an advantage

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Drop what an interrupted run logged after the checkpoint it resumes from; start the progress bar."""
        if state.is_world_process_zero:
            self.steps.rewind(state.global_step)
            self.samples.rewind(state.global_step)
        self.bar = self.progress.enter_context(track("train policy", state.max_steps, "step", start=state.global_step))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the progress bar; say where the time went."""
        self.progress.close()
        if rows := self.steps.rows():
            say(shares(rows))
            if all(row.get("zero_variance_groups") == 1 for row in rows):
                say(f"nothing was learnt in any of {len(rows)} updates: {ALIKE}")
            if unread := sum(bool(row.get("unread_ends")) for row in rows):
                say(f"in {unread} of {len(rows)} updates {UNREAD}")

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Translate TRL's metric names to ours and add what other callbacks know of this update.

        Trackers, which come after this callback, are shown the same row.

        Raises:
            UserError: when the loss or the gradient is no finite number. Nothing of this update has been saved yet.
        """
        logs = kwargs["logs"]
        row: dict[str, Any] = {ours: logs[theirs] for theirs, ours in METRICS.items() if logs.get(theirs) is not None}
        if "loss" not in row:
            return
        for name, key in (("loss", "loss"), ("norm of the gradient", "grad_norm_clipped_from")):
            if not math.isfinite(row.get(key, 0.0)):
                raise UserError(
                    f"step {state.global_step}: the {name} is {row[key]}",
                    expected="a finite number",
                    change=REMEDY,
                )
        for columns in self.columns:
            row |= columns(state.global_step)
        if "completion_length" in row:
            self.rollout = {key: row[key] for key in OF_ROLLOUT if key in row}
        row |= {key: value for key, value in self.rollout.items() if key not in row}
        logs.clear()
        logs.update(row)
        if row.get("zero_variance_groups") == 1 and not self.told:
            say(f"step {state.global_step}: nothing is learnt: {ALIKE}")
            self.told = True
        samples = self.samples_of(state.global_step)
        if state.is_world_process_zero:
            self.steps.append([{"step": state.global_step, **row}])
            self.samples.append(samples)
        self.bar.update(1)
        if state.global_step % self.every == 0:
            shown = ("reward", "cost", "unsafe", "helpfulness", "multiplier", "margin", "accuracy", "seconds")
            say(f"step {state.global_step}: " + ", ".join(f"{k} {row[k]:.3f}" for k in shown if k in row))


def theory(rows: Sequence[Mapping[str, Any]]) -> dict[str, float | None] | None:
    """The worst case of each statement over the rows of a training log; None where nothing was constrained.

    Returns:
        `updates`; `descending`, the share of them whose step had a positive `step_descent`, and `least_step_descent`;
        `least_descent`, the smallest <g, P g>, `least_kept` and `most_kept`, of ||P g|| / ||g||, where gradients were
        projected; `most_leakage`, the largest relative leakage of any layer at any probe. None for what was not
        measured.
    """
    measured = [row["step_descent"] for row in rows if row.get("step_descent") is not None]
    projected = [row for row in rows if "descent" in row]
    if not measured and not projected:
        return None
    kept = [row["kept"] for row in projected]
    return {
        "updates": max(len(measured), len(projected)),
        "descending": sum(value > 0 for value in measured) / len(measured) if measured else None,
        "least_step_descent": min(measured, default=None),
        "least_descent": min((row["descent"] for row in projected), default=None),
        "least_kept": min(kept, default=None),
        "most_kept": max(kept, default=None),
        "most_leakage": max((row["leakage"] for row in rows if "leakage" in row), default=None),
    }
