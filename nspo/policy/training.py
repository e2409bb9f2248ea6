"""Train one policy: GRPO (clip 0.2) with one of the objectives of `nspo.policy.objectives`.

Differences from the authors' release: every linear layer of every block (that `activations.layers` matches) is
constrained and all else is frozen (theirs constrains MLP layers and lets the rest train); the weights are re-anchored
after every optimizer step (theirs every fifth trainer step, discarded under FSDP, and never before a checkpoint); decay
acts inside the null space only. The unconstrained methods train the same layers from the same data order, seed and
rollout budget, so the objective is the only difference. The fields of TRL's trainer that shape the result are set
here, not left to defaults that move between its releases.

Command: `nspo train-policy --objective nspo --bases results/bases/bases.safetensors ... --out FOLDER`.
"""

import random
import shutil
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, set_seed
from transformers.trainer_callback import PrinterCallback
from trl import GRPOConfig, GRPOTrainer

from nspo.artifacts import (
    MANIFEST_NAME,
    atomic_path,
    fingerprint,
    fingerprint_files,
    make_manifest,
    read_json,
    write_json,
)
from nspo.config import RuntimeSettings
from nspo.errors import UserError
from nspo.models import chat_ids, device_of, load_model, load_tokenizer, model_identity
from nspo.policy.callbacks import JsonLines, LogCallback, ProbeCallback
from nspo.policy.objectives import constraint_of, load_bases, prepare_layers, reward_of
from nspo.policy.probes import Probe
from nspo.policy_settings import MethodSettings, TrainingSettings
from nspo.progress import say
from nspo.prompts import load_prompts


def train_policy(
    training: TrainingSettings,
    method: MethodSettings,
    name: str,
    seed: int,
    model: Path,
    bases: Path | None,
    layers: str,
    reward: Path,
    cost: Path,
    prompts: Path,
    out: Path,
    runtime: RuntimeSettings,
) -> None:
    """Train the policy `name` and write its folder: model, tokenizer, logs, probes, samples, manifest.

    Interrupted work resumes from the last checkpoint in `runtime.workdir` and says from which step.

    Args:
        layers: `activations.layers`. Unconstrained methods never see the bases, and so learn which layers to train.

    Raises:
        UserError: bases missing or not asked for, made for another model or tokenizer, or for other layers than
            `layers` matches; or no prompt short enough.
    """
    protected = load_bases(method, name, bases, model)
    device = device_of(runtime.device)
    identity = make_manifest(
        "policy",
        method=name,
        seed=seed,
        settings={**training.dump(), **method.dump()},
        layers=layers,
        base=model_identity(model),
        bases=fingerprint_files([bases]) if bases else None,
        reward=read_json(reward / MANIFEST_NAME),
        cost=read_json(cost / MANIFEST_NAME),
        prompts=fingerprint_files([prompts]),
    )
    work = Path(runtime.workdir) / f"policy-{name}-seed{seed}-{fingerprint(identity)}"
    work.mkdir(parents=True, exist_ok=True)

    set_seed(seed)
    tokenizer = load_tokenizer(model)
    policy = load_model(model, device)
    prepare_layers(policy, method, layers, protected)
    constraint = constraint_of(method, seed, protected, model)
    scorer, multiplier = reward_of(training, method, cost, reward, device)
    count, length = training.probe_prompts, training.max_new_tokens
    probe = Probe.load(model, tokenizer, scorer.cost, prompts, count, length, device)
    updates = training.prompts_per_step * training.group_size // training.minibatch_size
    probes = ProbeCallback(probe, work, training.probe_every * updates, training.target_unsafe)
    checkpoint = last_checkpoint(work)
    if checkpoint is not None and probes.met_target(step_of(checkpoint)):
        # Interrupted after its last update: a run of exactly this length has nothing left but to be written.
        training = training.model_copy(update={"steps": step_of(checkpoint) // updates})
    parts = [part for part in (constraint, multiplier) if part is not None]
    log = LogCallback(work, scorer, [part.columns for part in parts], runtime.log_every)
    trainer = GRPOTrainer(
        model=policy,
        reward_funcs=scorer,  # type: ignore[arg-type]  # TRL's type leaves out callables that are no functions
        args=trainer_arguments(training, method, seed, device, work),
        train_dataset=rollout_prompts(training, prompts, tokenizer, seed),
        processing_class=tokenizer,
        callbacks=[*parts, log, probes],
    )
    trainer.remove_callback(PrinterCallback)
    if checkpoint is not None:
        say(f"resuming {name} (seed {seed}) from {checkpoint.name}")
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)

    with atomic_path(out) as scratch:
        policy.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        for file in ("training", "probes", "samples"):
            write_rows(JsonLines(work / f"{file}.jsonl").rows(), scratch / f"{file}.parquet")
        write_json(scratch / "settings.json", resolved_settings(trainer, identity))
        write_json(scratch / MANIFEST_NAME, {**identity, "tuned": model_identity(scratch)})
    shutil.rmtree(work)


def trainer_arguments(
    training: TrainingSettings, method: MethodSettings, seed: int, device: torch.device, work: Path
) -> GRPOConfig:
    """TRL's configuration with every field that shapes the result written out."""
    rollouts = training.prompts_per_step * training.group_size
    updates = rollouts // training.minibatch_size
    return GRPOConfig(
        output_dir=str(work),
        seed=seed,
        max_steps=training.steps * updates,
        num_generations=training.group_size,
        generation_batch_size=rollouts,
        per_device_train_batch_size=training.micro_batch_size,
        gradient_accumulation_steps=training.minibatch_size // training.micro_batch_size,
        num_iterations=1,
        max_completion_length=training.max_new_tokens,
        temperature=training.temperature,
        top_p=1.0,
        top_k=0,
        repetition_penalty=1.0,
        epsilon=training.clip,
        epsilon_high=training.clip,
        delta=None,
        beta=method.kl,
        loss_type="bnpo",
        scale_rewards="none" if method.lagrangian else "group",  # combined advantages are scaled already
        importance_sampling_level="token",
        mask_truncated_completions=False,
        disable_dropout=True,
        entropy_coef=0.0,
        use_adaptive_entropy=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        sync_ref_model=False,
        learning_rate=method.learning_rate,
        lr_scheduler_type="constant",
        warmup_steps=0,
        optim="adamw_torch",
        adam_beta1=0.9,
        adam_beta2=0.999,
        adam_epsilon=1e-8,
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        shuffle_dataset=False,
        use_cpu=device.type == "cpu",
        bf16=training.autocast == "bf16",
        fp16=False,
        logging_steps=1,
        logging_strategy="steps",
        save_strategy="no",
        save_total_limit=1,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_num_workers=0,
    )


def rollout_prompts(
    training: TrainingSettings, prompts: Path, tokenizer: PreTrainedTokenizerBase, seed: int
) -> Dataset:
    """Conversational prompts in the order they are used: each step holds the same share of benign ones.

    Raises:
        UserError: when no prompt is within `policy.max_prompt_tokens`.
    """
    benign_per_step = round(training.prompts_per_step * training.benign_share)
    order = random.Random(seed)
    streams = {
        role: _stream(role, training.max_prompt_tokens, prompts, tokenizer, order) for role in ("harmful", "benign")
    }
    roles = ["benign"] * benign_per_step + ["harmful"] * (training.prompts_per_step - benign_per_step)
    rows = [{"prompt": next(streams[role]), "role": role} for _ in range(training.steps) for role in roles]
    return Dataset.from_list(
        [{"prompt": [{"role": "user", "content": row["prompt"]}], "role": row["role"]} for row in rows]
    )


def _stream(role: str, limit: int, prompts: Path, tokenizer: PreTrainedTokenizerBase, order: random.Random) -> Any:
    """Endless training prompts of a role, reshuffled after each pass."""
    texts = [row["prompt"] for row in load_prompts(prompts, role, "train")]
    texts = [text for text in texts if len(chat_ids(tokenizer, text)) <= limit]
    if not texts:
        raise UserError(f"no {role} training prompt has at most {limit} tokens: raise policy.max_prompt_tokens")
    while True:
        order.shuffle(texts)
        yield from texts


def last_checkpoint(work: Path) -> Path | None:
    """The newest whole checkpoint: the trainer writes its state file last."""
    whole = [p.parent for p in work.glob("checkpoint-*/trainer_state.json")]
    return max(whole, key=step_of, default=None)


def step_of(checkpoint: Path) -> int:
    """The update that a checkpoint folder was written after."""
    return int(checkpoint.name.split("-")[1])


def resolved_settings(trainer: GRPOTrainer, identity: dict[str, Any]) -> dict[str, Any]:
    """Everything that was in force: our settings and TRL's, less paths and run ids."""
    theirs = {
        key: value
        for key, value in trainer.args.to_dict().items()
        if not key.endswith(("_dir", "run_name", "token")) and isinstance(value, (int, float, str, bool, type(None)))
    }
    return {"nspo": identity["settings"], "trainer": theirs}


def write_rows(rows: list[dict[str, Any]], path: Path) -> None:
    """Rows as Parquet, with every column that any row has."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = list(dict.fromkeys(key for row in rows for key in row))
    pq.write_table(pa.Table.from_pylist([{c: row.get(c) for c in columns} for row in rows]), path)
