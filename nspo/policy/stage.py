"""Train one policy: a loss (GRPO with clip 0.2, or one on pairs) under a constraint (`nspo.policy.methods`).

Constrained are the linear layers of every block that `activations.layers` matches; all else is frozen. The weights are
re-anchored after every optimizer step, so decay acts inside the null space only. Unconstrained methods train the same
layers with the same data order, seed and rollout budget: loss and constraint are the only difference. docs/release.md
compares this with the authors' code.

Command: `nspo train-policy --objective nspo --bases results/bases/bases.safetensors ... --out FOLDER`.
"""

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, set_seed
from transformers.trainer_callback import PrinterCallback

from nspo.data.tables import Prompts
from nspo.errors import Paused, UserError
from nspo.files.atomic import atomic_path
from nspo.files.journal import JsonLines
from nspo.files.manifest import MANIFEST_NAME, fingerprint, make_manifest, write_json
from nspo.files.tables import write_table
from nspo.judges.make import judge_of
from nspo.models.folders.weights import saved_as_in_memory
from nspo.models.loading import load_model, load_tokenizer, model_identity, save_model
from nspo.policy.log import REMEDY, LogCallback, LoggedCallback, theory
from nspo.policy.methods.inputs import PolicyInputs
from nspo.policy.methods.objectives import (
    constraint_of,
    final_weights,
    load_bases,
    prepare_layers,
    pulls_of,
    trained_part,
)
from nspo.policy.pairs.trainer import PairLearner
from nspo.policy.probe import Probe, ProbeCallback
from nspo.policy.rollouts.judged import JudgedCost
from nspo.policy.rollouts.trainer import RolloutLearner
from nspo.policy.rollouts.vllm_rollouts import check_rollout, end_rollouts
from nspo.policy.sharding import check_processes, prepare_engine
from nspo.policy.trackers import TENSORBOARD_FOLDER, check_trackers, tracker_callbacks
from nspo.run.pause import PauseCallback
from nspo.run.processes import own_device, processes_of
from nspo.run.progress import say, silence
from nspo.settings.policy.methods import MethodSettings
from nspo.settings.policy.section import TrainingSettings
from nspo.settings.runtime import RuntimeSettings


def train_policy(
    training: TrainingSettings,
    method: MethodSettings,
    name: str,
    seed: int,
    inputs: PolicyInputs,
    out: Path,
    runtime: RuntimeSettings,
    logs: Path | None = None,
) -> None:
    """Train the policy `name` and write its folder: model, tokenizer, manifest; and the logs, probes and samples.

    Interrupted work resumes from the last checkpoint in `runtime.workdir` and says from which step. Under `accelerate
    launch` the processes share out rollouts and updates, and the main one writes.

    Args:
        logs: folder of the logs; by default they lie in `out`, with the model.

    Raises:
        UserError: an input missing or not asked for, made for another model or tokenizer; bases for other layers than
            `activations.layers` matches; a judge or tracker that is missing something; vLLM asked for where it cannot
            run; no prompt short enough; or other processes than `policy.processes` and `policy.sharding` say.
        Paused: after SIGTERM or SIGUSR1, with a checkpoint written.
    """
    inputs.check(name, method)
    check_trackers(runtime.trackers)
    model, prompts, on_rollouts = inputs.model, Prompts(inputs.prompts), not method.loss.on_pairs
    with processes_of(runtime.device, "policy.processes") as processes:
        check_processes(training, method, processes)
        device = own_device(processes, runtime.device)
        if not processes.is_main_process:
            silence()
        bases = load_bases(method, name, inputs.bases, model)
        judge = judge_of("policy.judge", training.judge, runtime, stay=True) if training.judge and on_rollouts else None
        if on_rollouts:
            check_rollout(training, runtime.vllm, device, processes.num_processes)
        identity = make_manifest(
            "policy",
            method=name,
            seed=seed,
            settings={**training.identity(), **method.identity()},
            judge=judge and judge.identity,
            **inputs.identity(),
        )
        work = Path(runtime.workdir) / f"policy-{name}-seed{seed}-{fingerprint(identity)}"
        work.mkdir(parents=True, exist_ok=True)

        set_seed(seed)
        tokenizer = load_tokenizer(model)
        policy = load_model(model, device)
        prepare_layers(policy, method, inputs.layers, bases)
        constraint = constraint_of(method, seed, bases, policy, model)
        pulls = pulls_of(method, training, policy, tokenizer, model, prompts)
        judged = JudgedCost(judge, work / f"verdicts-{processes.process_index}.jsonl") if judge else None
        learner = learner_of(training, method, inputs, prompts, device, judged)
        updates = training.updates_per_step
        probes = ProbeCallback(
            Probe.load(training, model, prompts, tokenizer, learner.cost, device),
            work,
            training.probe_every * updates,
            training.target_unsafe,
            [] if constraint is None else [constraint.leakage],
        )
        checkpoint = last_checkpoint(work, updates)
        asked = training.steps * updates
        if checkpoint is not None and probes.met_target(step_of(checkpoint)):
            # Interrupted after its last update: a run of exactly this length has nothing left but to be written.
            training = training.model_copy(update={"steps": step_of(checkpoint) // updates})
        parts: list[LoggedCallback] = [*pulls, *([] if constraint is None else [constraint]), *learner.parts]
        log = LogCallback(work, learner.samples, [part.columns for part in (*parts, probes)], runtime.log_every)
        watched = tracker_callbacks(runtime.trackers, work, step_of(checkpoint) if checkpoint else 0)
        pause = PauseCallback(updates)
        callbacks = [*parts, log, probes, pause, *watched]
        trained = trained_part(method, policy, bases)
        trainer = learner.trainer(training, trained, tokenizer, seed, work, runtime, callbacks)
        trainer.remove_callback(PrinterCallback)
        prepare_engine(trainer, training.sharding, training.autocast)
        if checkpoint is not None:
            say(f"resuming {name} (seed {seed}) from {checkpoint.name}")
        learn(trainer, checkpoint, name)
        if pause.paused:
            raise Paused(f"{name} (seed {seed}): stopped after update {trainer.state.global_step}, as a signal asked")
        state = final_weights(trainer, method, policy, bases, model)
        processes.wait_for_everyone()  # nobody writes to the work folder any more
        if processes.is_main_process:
            settings = resolved_settings(trainer, identity) | {"theory": theory(log.steps.rows())}
            settings["trainer"]["max_steps"] = asked  # also where the interrupted run had met its target
            if logs is not None:
                write_logs(work, settings, logs)
            with atomic_path(out) as scratch:
                save_model(policy, scratch, model, state_dict=state)
                tokenizer.save_pretrained(scratch)
                if logs is None:
                    write_logs(work, settings, scratch)
                write_json(scratch / MANIFEST_NAME, {**identity, "tuned": model_identity(scratch)})
            shutil.rmtree(work)
        end_rollouts(trainer)


def learner_of(
    training: TrainingSettings,
    method: MethodSettings,
    inputs: PolicyInputs,
    prompts: Prompts,
    device: torch.device,
    judged: JudgedCost | None,
) -> RolloutLearner | PairLearner:
    """What the method learns from: pairs where it is given some, else answers that it samples as it goes."""
    if inputs.pairs is not None:
        return PairLearner(method, inputs.model, inputs.cost, inputs.pairs, inputs.guide_policy, device)
    return RolloutLearner(training, method, inputs.cost, inputs.reward, prompts, device, judged)


def learn(trainer: Trainer, checkpoint: Path | None, name: str) -> None:
    """Train from the checkpoint on, or from the start.

    Raises:
        UserError: when the policy diverges until its logits are NaN or Inf.
    """
    try:
        with saved_as_in_memory(trainer.model):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except RuntimeError as error:
        if "probability tensor contains" not in str(error):  # what torch says of logits that are NaN or Inf
            raise
        step = trainer.state.global_step
        raise UserError(f"{name}: after step {step} the policy's logits are NaN or Inf: {REMEDY}") from error


def write_logs(work: Path, settings: dict[str, Any], folder: Path) -> None:
    """What the run logged in `work`, and the settings in force, as files of `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "settings.json", settings)
    for file in ("training", "probes", "samples"):
        write_table(JsonLines(work / f"{file}.jsonl").rows(), folder / f"{file}.parquet")
    if (work / TENSORBOARD_FOLDER).is_dir():
        with atomic_path(folder / TENSORBOARD_FOLDER) as scratch:
            shutil.copytree(work / TENSORBOARD_FOLDER, scratch)


def last_checkpoint(work: Path, updates: int) -> Path | None:
    """The newest whole checkpoint that a step of `updates` ends with: the trainer writes its state file last.

    One between the updates of a rollout is passed over. The trainer keeps no rollout in it, so a run that went on from
    there would sample anew, with weights that have moved.
    """
    whole = [p.parent for p in work.glob("checkpoint-*/trainer_state.json")]
    return max((path for path in whole if step_of(path) % updates == 0), key=step_of, default=None)


def step_of(checkpoint: Path) -> int:
    """The update that a checkpoint folder was written after."""
    return int(checkpoint.name.split("-")[1])


def resolved_settings(trainer: Trainer, identity: dict[str, Any]) -> dict[str, Any]:
    """Everything that was in force: our settings and the trainer's, less paths and run ids."""
    theirs = {
        key: value
        for key, value in trainer.args.to_dict().items()
        if not key.endswith(("_dir", "run_name", "token")) and isinstance(value, (int, float, str, bool, type(None)))
    }
    return {"nspo": identity["settings"], "trainer": theirs}
