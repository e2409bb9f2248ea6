"""What nspo adds to TRL's trainer: the constraint, the probes and the logs, as callbacks and nothing else.

Of several processes each calls them alike; only the main one (`state.is_world_process_zero`) writes files.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback

from nspo.bases import NullSpaceBases
from nspo.errors import UserError
from nspo.json_lines import JsonLines
from nspo.policy.probes import Probe
from nspo.policy.rewards import SafetyReward
from nspo.policy.timing import now, shares
from nspo.progress import say, track
from nspo.projection import Constraint, Mode, constrain, innermost

REMEDY = "lower the method's learning_rate (policy.methods)"  # where training diverges
LEAST_KEPT = 0.01  # share of the gradient's norm below which a run hardly learns, and is told so
LOOSER_WHEN_RAISED = {"relative", "absolute", "leakage"}  # for all other rules a lower threshold protects less
Columns = Callable[[int], dict[str, float]]  # what a callback adds to the log of an update
Samples = Callable[[int], list[dict[str, Any]]]  # the scored answers that an update is the first to learn from


class LoggedCallback(TrainerCallback):
    """A callback that knows something of every update."""

    def columns(self, step: int) -> dict[str, float]:
        """What it adds to the log of update `step`."""
        raise NotImplementedError


class ConstraintCallback(LoggedCallback):
    """Attach the public `constrain` once the trainer has prepared model and optimizer; check it at every save.

    Mode "gradient" leaks by design: nothing is refused then, and the leakage is logged instead.
    """

    def __init__(self, bases: NullSpaceBases, base_folder: Path, mode: Mode = "both", freeze_rest: bool = True) -> None:
        self.bases, self.base_folder, self.mode, self.freeze_rest = bases, base_folder, mode, freeze_rest
        self.constraint: Constraint | None = None
        self._said = False
        self._since = self._seconds = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Anchor at the base checkpoint, not at the weights in memory: after a resume those are no longer the base."""
        with self._timed(kwargs["optimizer"]):
            self.constraint = constrain(
                kwargs["model"],
                kwargs["optimizer"],
                self.bases,
                anchor=self.base_folder,
                mode=self.mode,
                freeze_rest=self.freeze_rest,
            )
        say(self.constraint.describe())

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refuse to go on from weights that left the null space."""
        self._verify()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Verify the final weights and detach, so that the saved model is the constrained one."""
        self._verify()
        self._attached.remove()

    def columns(self, step: int) -> dict[str, float]:
        """What the projection did to the gradient of update `step`, and the seconds that it and the anchor took.

        In mode "gradient" the worst layer's leakage too. Says once when hardly anything is left of a gradient, and
        which setting to change.
        """
        found = self._attached.step_stats()
        if found.get("gradient_norm", 0.0) > 0 and found["kept"] < LEAST_KEPT and not self._said:
            say(f"step {step}: the constraint keeps {found['kept']:.2%} of the gradient's norm: {self._remedy()}")
            self._said = True
        found["projection_seconds"], self._seconds = self._seconds, 0.0
        return found | (self.leakage() if self.mode == "gradient" else {})

    def leakage(self) -> dict[str, float]:
        """The worst layer's leakage now; a product per layer, so it is measured with the probes where none is due."""
        return {"leakage": max(self._attached.leakage().values())}

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

    @property
    def _attached(self) -> Constraint:
        assert self.constraint is not None, "training has not begun"
        return self.constraint

    def _verify(self) -> None:
        if self.mode != "gradient":
            self._attached.verify()

    def _remedy(self) -> str:
        """The rule and rank in force, and what would leave more room to learn."""
        sites = list(self.bases.values())
        first, share = sites[0], sum(site.rank for site in sites) / sum(site.width for site in sites)
        change = "raise" if first.rule in LOOSER_WHEN_RAISED else "lower"
        return (
            f"rule {first.rule!r} with threshold {first.threshold:g} protects {share:.1%} of the directions; "
            f"{change} `bases.threshold` or choose another `bases.rule`"
        )


class Clock(LoggedCallback):
    """Times every update on this process, from its first micro-batch to the end of the optimizer's step.

    Probes, checkpoints and the loading of data are left out. A rollout counts in the update that it is made for, so the
    later updates of a step have none.

    Args:
        reward: says when it scored a rollout; None where answers are not sampled.
    """

    def __init__(self, reward: SafetyReward | None = None) -> None:
        self.reward = reward
        self.began = self.ended = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start."""
        if self.reward is not None:
            self.reward.scoring = None
        self.began = now()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop."""
        self.ended = now()

    def columns(self, step: int) -> dict[str, float]:
        """Seconds of the update and of its parts: `rollout_seconds`, `scoring_seconds`, and `update_seconds`, the rest.

        A rollout is sampling and what the trainer computes before it asks for rewards; with one come
        `tokens_per_second`, the tokens that all processes sampled over its seconds.
        """
        start, end, tokens = (self.reward and self.reward.scoring) or (self.began, self.began, 0)
        found = {"seconds": self.ended - self.began, "rollout_seconds": start - self.began}
        found |= {"scoring_seconds": end - start, "update_seconds": self.ended - end}
        if tokens:
            found["tokens_per_second"] = tokens * PartialState().num_processes / found["rollout_seconds"]
        return found


METRICS = {
    "loss": "loss",
    "reward": "reward",
    "cost": "cost",
    "unsafe": "unsafe",
    "helpfulness": "helpfulness",
    "refusal_rate": "refusal_rate",
    "over_refusal_rate": "over_refusal_rate",
    "failed_verdicts": "failed_verdicts",
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
    "zero_variance_groups",
    "completion_length",
    "sampler_difference",
    "tokens_per_second",
)
FROM_PROBE = {"kl_per_token": "kl_to_base", "leakage": "leakage"}


class LogCallback(TrainerCallback):
    """Keep one row per optimizer step and the scored answers that it learnt from."""

    def __init__(self, folder: Path, samples: Samples, columns: Sequence[Columns], every: int) -> None:
        self.steps, self.samples = JsonLines(folder / "training.jsonl"), JsonLines(folder / "samples.jsonl")
        self.samples_of, self.columns, self.every = samples, columns, every
        self.rollout: dict[str, Any] = {}
        self.progress = ExitStack()

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
                    f"step {state.global_step}: the {name} is {row[key]}, expected a finite number: {REMEDY}"
                )
        for columns in self.columns:
            row |= columns(state.global_step)
        if "completion_length" in row:
            self.rollout = {key: row[key] for key in OF_ROLLOUT if key in row}
        row |= {key: value for key, value in self.rollout.items() if key not in row}
        logs.clear()
        logs.update(row)
        samples = self.samples_of(state.global_step)
        if state.is_world_process_zero:
            self.steps.append([{"step": state.global_step, **row}])
            self.samples.append(samples)
        self.bar.update(1)
        if state.global_step % self.every == 0:
            shown = ("reward", "cost", "unsafe", "helpfulness", "multiplier", "margin", "accuracy", "seconds")
            say(f"step {state.global_step}: " + ", ".join(f"{k} {row[k]:.3f}" for k in shown if k in row))


class ProbeCallback(LoggedCallback):
    """Probe before the first step and every `every` steps; stop at the target unsafe rate.

    Every process measures everything, in step, so that sharded weights can be gathered; what counts is the main one's
    row, so that all stop together.

    Args:
        also: what else is measured then, by other callbacks.
    """

    def __init__(
        self, probe: Probe, folder: Path, every: int, target: float, also: Sequence[Callable[[], dict[str, float]]] = ()
    ) -> None:
        self.probe, self.every, self.target, self.also = probe, every, target, also
        self.log = JsonLines(folder / "probes.jsonl")
        self.last: dict[str, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure the starting point, or forget probes later than the checkpoint that is resumed."""
        if state.is_world_process_zero:
            # A run that was interrupted before its first checkpoint has probed step 0 already.
            self.log.rewind(state.global_step or -1)
        if state.global_step == 0:
            self._measure(state, kwargs["model"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Probe when due; a checkpoint follows the probe, so a resumed run never repeats it."""
        if state.global_step % self.every and state.global_step != state.max_steps:
            return control
        row = self._measure(state, kwargs["model"])
        if row["unsafe_rate"] <= self.target:
            say(f"step {state.global_step}: unsafe rate {row['unsafe_rate']:.3f} meets the target {self.target}: done")
            control.should_training_stop = True
        control.should_save = True
        return control

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Show the probe to trackers."""
        if self.last.get("step") == state.global_step and "loss" in kwargs["logs"]:
            kwargs["logs"].update({f"probe_{key}": value for key, value in self.last.items() if key != "step"})

    def columns(self, step: int) -> dict[str, float]:
        """For the log of update `step`, where it was probed: its distance from the base, and what leaks."""
        if self.last.get("step") != step:
            return {}
        return {ours: self.last[theirs] for theirs, ours in FROM_PROBE.items() if theirs in self.last}

    def met_target(self, step: int) -> bool:
        """Whether the probe after update `step` met the target, so that training ended there."""
        return any(row["step"] == step and row["unsafe_rate"] <= self.target for row in self.log.rows())

    def _measure(self, state: Any, model: Any) -> dict[str, Any]:
        measured = {"step": state.global_step, **self.probe.measure(model)}
        for measure in self.also:
            measured |= measure()
        (row,) = broadcast_object_list([measured])
        if state.is_world_process_zero:
            self.log.append([row])
        self.last = row
        say("probe " + ", ".join(f"{k} {v:.4g}" for k, v in row.items()))
        return row
