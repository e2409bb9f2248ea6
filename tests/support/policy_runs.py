"""Runs of the policy stage on the tiny model: their inputs, made once, and what is read of them."""

import os
import random
import shlex
import signal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import TrainerCallback

from nspo.bases.file import NullSpaceBases
from nspo.bases.stage import compute_basis
from nspo.cli.main import RUNTIME_FLAGS, to_flags
from nspo.data.tables import PROMPT_COLUMNS
from nspo.models.loading import load_model, model_identity
from nspo.models.structure.linears import layer_norms
from nspo.models.structure.sites import find_sites
from nspo.policy import stage as stage
from nspo.policy.log import LogCallback
from nspo.policy.methods.inputs import PolicyInputs
from nspo.policy.rollouts import trainer as grpo
from nspo.policy.stage import train_policy
from nspo.preference.stage import train_preference
from nspo.settings.model import PreferenceSettings
from nspo.settings.policy.methods import PRESETS, MethodSettings
from nspo.settings.policy.section import TrainingSettings
from nspo.settings.runtime import RequestSettings, RuntimeSettings

TRAINING = TrainingSettings(
    steps=4,
    prompts_per_step=2,
    group_size=4,
    minibatch_size=4,  # two updates per rollout, so that the second is off-policy
    micro_batch_size=2,
    benign_share=0.5,
    margin=100.0,
    max_prompt_tokens=64,
    max_new_tokens=8,
    temperature=0.7,
    clip=0.2,
    weight_decay=0.1,
    max_grad_norm=0.1,
    autocast="bf16",
    probe_every=2,
    probe_prompts=3,
    target_unsafe=0.0,
)


UPDATES = 8


METHODS = {name: MethodSettings(objective=name, learning_rate=1e-2) for name in PRESETS}


def prompt_rows() -> list[dict[str, str]]:
    """Five short prompts of every role and split, and one long one to train on."""
    rows = [
        dict.fromkeys(PROMPT_COLUMNS, "")
        | {"id": f"{role}{split}{i}", "role": role, "domain": role, "split": split, "prompt": f"{role} {split} {i}"}
        for role in ("general", "harmful", "benign")
        for split in ("train", "validation", "heldout")
        for i in range(5)
    ]
    return [*rows, rows[15] | {"id": "long", "prompt": "long " * 40}]


def label_rows(target: str) -> list[dict[str, Any]]:
    """Forty answers to train on and sixteen held out: any characters, varied or repeated, graded 1, of s only graded 0.

    An untrained model writes noise or repeats itself, so it counts as unsafe and no run meets its target by accident.
    """
    pick = random.Random(0)
    noise = [chr(i) for i in range(33, 127) if chr(i) != "s"] + ["\ufffd"] * 30

    def answer(i: int) -> str:
        length = 2 + i % 7
        if i % 2:
            return "s" * length
        return "".join(pick.choices(noise, k=length)) if i % 4 else pick.choice(noise) * length

    return [
        {
            "id": f"{split}{i}",
            "set": "toy",
            "target": target,
            "split": split,
            "prompt": f"question {i // 2}",
            "response": answer(i),
            "grade": float(i % 2 == 0),
            "category": "toy",
            "pair": "",
            "role": "",
        }
        for split, count in (("train", 40), ("heldout", 16))
        for i in range(count)
    ]


def write_bases(folder: Path, path: Path, **identity: str) -> Path:
    """Bases of random inputs: 12 of 32 directions protected (a range basis), 40 of 64 (a null basis).

    They say that they belong to the model in `folder`, but for what `identity` changes.
    """
    model = load_model(folder)
    generator = torch.Generator().manual_seed(0)
    made = []
    for site in find_sites(model):
        inputs = torch.randn(site.width, 3 * site.width, generator=generator, dtype=torch.float64)
        rank = {32: 12, 64: 40}[site.width]
        made.append(compute_basis(site.name, site.layers, inputs @ inputs.T, 10_000, "rank", rank))
    names = [name for site in made for name in site.layers]
    NullSpaceBases(made, layer_norms(model, names), model=model_identity(folder) | identity).save(path)
    return path


def make_inputs(tiny_model_dir: Path, folder: Path) -> dict[str, Path]:
    """What the stage reads, made in `folder`: model, reward and cost folders, prompts; under "bases" a bases file."""
    pq.write_table(pa.Table.from_pylist(prompt_rows()), folder / "prompts.parquet")
    for target in ("cost", "reward"):
        pq.write_table(pa.Table.from_pylist(label_rows(target)), folder / "labels.parquet")
        settings = PreferenceSettings(backbone_layers=1, max_tokens=64)
        runtime = RuntimeSettings(device="cpu", workdir=str(folder / "work"))
        train_preference(settings, target, tiny_model_dir, folder / "labels.parquet", folder / target, runtime)
    return {
        "model": tiny_model_dir,
        "bases": write_bases(tiny_model_dir, folder / "bases.safetensors"),
        "reward": folder / "reward",
        "cost": folder / "cost",
        "prompts": folder / "prompts.parquet",
    }


def run(
    inputs: dict[str, Path], folder: Path, name: str, paths: Any = None, recompute: bool = False, **changes: Any
) -> Path:
    """Train the method `name` in `folder` with other `paths` (or `layers`) and `changes` to the settings."""
    given = {"pairs": None, "guide_policy": None, "layers": ".*"} | inputs
    given |= {"bases": inputs["bases"] if METHODS[name].constraint.needs_bases else None} | (paths or {})
    settings = TrainingSettings(**TRAINING.dump() | changes)
    runtime = RuntimeSettings(device="cpu", workdir=str(folder / "work"), recompute_activations=recompute)
    train_policy(settings, METHODS[name], name, 0, PolicyInputs(**given), out=folder / "out", runtime=runtime)
    return folder / "out"


def command(
    inputs: dict[str, Path], folder: Path, name: str, requests: RequestSettings | None = None, **changes: Any
) -> list[str]:
    """The words after `nspo` that do what `run` does, in a process of its own."""
    settings = TrainingSettings(**TRAINING.dump() | changes)
    runtime = RuntimeSettings(device="cpu", workdir=str(folder / "work"), requests=requests or RequestSettings())
    flags = to_flags(settings), to_flags(METHODS[name]), to_flags(runtime, RUNTIME_FLAGS)
    without = [] if METHODS[name].constraint.needs_bases else ["bases"]
    paths = {key: path for key, path in inputs.items() if key not in without}
    words = [word for key, path in paths.items() for word in (f"--{key}", str(path))]
    words += ["--name", name, "--seed", "0", "--layers", ".*", "--out", str(folder / "out")]
    return ["train-policy", *shlex.split(" ".join(flags)), *words]


def table(folder: Path, name: str) -> list[dict[str, Any]]:
    return pq.read_table(folder / f"{name}.parquet").to_pylist()


def weights(folder: Path) -> dict[str, Tensor]:
    """The saved weights, read from disk."""
    return load_file(folder / "model.safetensors")


def leakage(
    folder: Path, inputs: dict[str, Path], bases: NullSpaceBases | None = None
) -> dict[str, tuple[float, float]]:
    """{layer: (||dW Q|| / ||W Q||, ||dW|| / ||W||)} in float64 from the two files on disk; `bases`: others."""
    base, tuned, bases = weights(inputs["model"]), weights(folder), bases or NullSpaceBases.load(inputs["bases"])
    found = {}
    for layer in bases.layers:
        site, before = bases.for_layer(layer), base[f"{layer}.weight"].double()
        moved, basis = tuned[f"{layer}.weight"].double() - before, site.basis.double()
        projector = basis @ basis.T if site.kind == "range" else torch.eye(site.width) - basis @ basis.T
        inside = (moved @ projector).norm() / (before @ projector).norm()
        found[layer] = (float(inside), float(moved.norm() / before.norm()))
    return found


def without_time(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if not key.endswith(("seconds", "per_second"))} for row in rows]


class Recorder(grpo.GRPOTrainer):
    """TRL's trainer, whose rewards, completions, minibatches, weights and gradients are kept for comparison.

    Answers are cut to unequal lengths, so that a mean over tokens is not a mean over answers.
    """

    seen: dict[str, list[Any]]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        type(self).seen = {"rewards": [], "rollouts": [], "minibatches": [], "weights": [], "gradients": []}
        recorder = self

        class Gradients(TrainerCallback):
            def on_pre_optimizer_step(self, args, state, control, **kwargs):
                found = {n: p.grad.clone() for n, p in recorder.model.named_parameters() if p.grad is not None}
                recorder.seen["gradients"].append(found)

        self.add_callback(Gradients())

    def _calculate_rewards(self, *args: Any) -> Tensor:
        self.seen["rewards"].append(super()._calculate_rewards(*args))
        return self.seen["rewards"][-1]

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        rollout = super()._generate_and_score_completions(inputs)
        for row, mask in enumerate(rollout["completion_mask"]):
            mask[2 + row % 6 :] = 0
        self.seen["rollouts"].append(dict(rollout))
        return rollout

    def _compute_loss(self, model: Any, inputs: Any) -> Tensor:
        self.seen["minibatches"].append(dict(inputs))
        self.seen["weights"].append({n: p.detach().clone() for n, p in self.model.named_parameters()})
        return super()._compute_loss(model, inputs)


def run_interrupted(inputs: Any, folder: Path, name: str, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """`run` until Ctrl-C comes just after the log of update `step`."""
    log = LogCallback.on_log

    def interrupted(self: LogCallback, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        log(self, args, state, control, **kwargs)
        if state.global_step == step:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(LogCallback, "on_log", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(inputs, folder, name)


def killed_run(inputs: dict[str, Path], folder: Path, step: int) -> None:
    """Train nspo and die without warning right after logging `step`; runs in a process of its own."""
    log = LogCallback.on_log

    def dying(self: LogCallback, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        log(self, args, state, control, **kwargs)
        if state.global_step == step:
            os.kill(os.getpid(), signal.SIGKILL)

    LogCallback.on_log = dying
    run(inputs, folder, "nspo")
