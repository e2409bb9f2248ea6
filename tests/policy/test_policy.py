"""policy/: the reward and the prompt order, one GRPO step against a written one, the constraint on disk."""

import json
import math
import random
import re
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.policy_runs import (
    METHODS,
    TRAINING,
    UPDATES,
    Recorder,
    leakage,
    run,
    run_interrupted,
    table,
    weights,
    without_time,
    write_bases,
)
from torch import Tensor
from transformers import TrainingArguments

from nspo.bases.derived import random_like
from nspo.bases.file import NullSpaceBases
from nspo.data.tables import Prompts
from nspo.errors import UserError
from nspo.models.chat import chat_ids
from nspo.models.loading import load_model
from nspo.models.tiny import tiny_model, tiny_tokenizer
from nspo.policy import stage as stage
from nspo.policy.log import LogCallback, LoggedConstraint
from nspo.policy.rollouts import trainer as grpo
from nspo.policy.rollouts.lagrangian import LagrangianReward
from nspo.policy.rollouts.prompts import rollout_prompts
from nspo.policy.rollouts.reward import SafetyReward, safety_reward
from nspo.policy.rollouts.trainer import trainer_arguments
from nspo.preference.model import PreferenceModel
from nspo.settings.policy.methods import MethodSettings
from nspo.settings.policy.section import TrainingSettings
from nspo.settings.runtime import RuntimeSettings

# Reward and prompts


def test_reward_by_hand():
    """-max(cost, -margin) on harmful prompts, min(reward, margin) on benign ones; flat beyond, not before."""
    cost = torch.tensor([2.0, 0.5, -0.4, -1.5, -9.0, 7.0, 7.0, 7.0])
    reward = torch.tensor([7.0, 7.0, 7.0, 7.0, 7.0, -2.0, 0.3, 9.0])
    harmful = torch.tensor([True] * 5 + [False] * 3)
    expected = torch.tensor([-2.0, -0.5, 0.4, 1.0, 1.0, -2.0, 0.3, 1.0])
    torch.testing.assert_close(safety_reward(cost, reward, harmful, 1.0), expected, rtol=0, atol=0)


def test_a_benign_refusal_earns_less_than_an_answer():
    """However safe a refusal is, on a benign prompt only its (low) helpfulness counts."""
    refusal, answer = safety_reward(
        torch.tensor([-9.0, 2.0]), torch.tensor([-1.0, 0.5]), torch.tensor([False] * 2), 1.0
    )
    assert refusal < answer


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5])
def test_each_step_holds_the_benign_share(inputs, share):
    """Every rollout step has the same number of benign prompts, and all text comes from the training split."""
    settings = TrainingSettings(**TRAINING.dump() | {"prompts_per_step": 4, "benign_share": share, "steps": 6})
    rows = rollout_prompts(settings, Prompts(inputs["prompts"]), tiny_tokenizer(), tiny_model().config, 0).to_list()
    assert len(rows) == 24
    for step in range(6):
        roles = [row["role"] for row in rows[4 * step : 4 * step + 4]]
        assert roles.count("benign") == 4 * share
    assert all(row["prompt"][0]["content"].startswith(f"{row['role']} train") for row in rows)


def test_prompt_order_depends_on_the_seed_only(inputs):
    """Whatever else drew random numbers, equal seeds give equal orders, other seeds others; all are used in a pass."""

    def order(seed: int, noise: int) -> list[str]:
        random.seed(noise)
        torch.manual_seed(noise)
        rows = rollout_prompts(settings, Prompts(inputs["prompts"]), tiny_tokenizer(), tiny_model().config, seed)
        return [row["prompt"][0]["content"] for row in rows]

    settings = TrainingSettings(**TRAINING.dump() | {"steps": 5})
    assert order(0, 1) == order(0, 2) != order(1, 1)
    assert len(set(order(0, 1))) == 10


def test_long_prompts_are_left_out(inputs):
    """No prompt over max_prompt_tokens is used; when none is left the key to change is named."""
    settings = TrainingSettings(**TRAINING.dump() | {"steps": 30})
    rows = rollout_prompts(settings, Prompts(inputs["prompts"]), tiny_tokenizer(), tiny_model().config, 0)
    texts = {row["prompt"][0]["content"] for row in rows}
    assert max(len(chat_ids(tiny_tokenizer(), text)) for text in texts) <= 64
    assert len(texts) == 10
    settings = TrainingSettings(**TRAINING.dump() | {"max_prompt_tokens": 3, "benign_share": 0.0})
    with pytest.raises(UserError, match=r"no harmful training prompt has at most 3 tokens: .*max_prompt_tokens"):
        rollout_prompts(settings, Prompts(inputs["prompts"]), tiny_tokenizer(), tiny_model().config, 0)


def test_every_method_sees_the_same_prompts(nspo_run, free_run):
    """The rollouts of two methods hold the same prompts, group by group."""
    first, second = ([(r["step"], r["role"], r["prompt"]) for r in table(f, "samples")] for f in (nspo_run, free_run))
    assert first == second
    assert len(first) == 4 * 8


# Settings


def test_trainer_arguments_are_written_out(monkeypatch, tmp_path):
    """Every field that shapes the update is passed to TRL, with the configured value."""
    monkeypatch.setattr(grpo, "GRPOConfig", dict)
    changes: dict[str, Any] = {
        "clip": 0.3,
        "weight_decay": 0.02,
        "max_grad_norm": 0.7,
        "temperature": 0.9,
        "max_new_tokens": 33,
        "delta": 2.5,
    }
    settings = TrainingSettings(**TRAINING.dump() | changes)
    method = MethodSettings(objective="grpo", learning_rate=3e-5, loss={"kl": 0.07})
    given = trainer_arguments(settings, method, 5, torch.device("cpu"), tmp_path, RuntimeSettings())
    expected = {
        "epsilon": 0.3,
        "epsilon_high": 0.3,
        "delta": 2.5,
        "beta": 0.07,
        "loss_type": "bnpo",
        "scale_rewards": "group",
        "num_iterations": 1,
        "importance_sampling_level": "token",
        "mask_truncated_completions": False,
        "weight_decay": 0.02,
        "max_grad_norm": 0.7,
        "learning_rate": 3e-5,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "optim": "adamw_torch",
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "adam_epsilon": 1e-8,
        "temperature": 0.9,
        "top_p": 1.0,
        "top_k": 0,
        "repetition_penalty": 1.0,
        "max_completion_length": 33,
        "num_generations": 4,
        "generation_batch_size": 8,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 8,
        "bf16": True,
        "fp16": False,
        "shuffle_dataset": False,
        "disable_dropout": True,
        "seed": 5,
    }
    assert {key: given.get(key, "not set") for key in expected} == expected


# What GRPOConfig has beside: of another loss, of features that are off, of logs and servers, or set by other fields.
WITHOUT_EFFECT = r"""sapo_.*|vespo_.*|entropy_(coef_.+|target)|ref_model_.*|router_aux_loss_coef|log_.*
|num_completions_to_print|reward_weights|multi_objective_aggregation|max_tool_calling_iterations|.*transformers_continuous_batching.*
|use_transformers_paged|cache_implementation|model_init_kwargs|trust_remote_code|pad_to_multiple_of|chat_template_kwargs
|generation_kwargs|num_generations_eval|steps_per_generation|ds3_gather_for_generation
|vllm_(server_host|server_port|server_timeout|group_port|structured_outputs_regex|importance_sampling_cap)"""


def test_no_field_of_grpo_is_left_to_its_default(monkeypatch, tmp_path):
    """A field that a newer TRL adds fails here until it is set, or found to have no effect."""
    own = {field.name for field in fields(grpo.GRPOConfig)} - {field.name for field in fields(TrainingArguments)}
    monkeypatch.setattr(grpo, "GRPOConfig", dict)
    given = trainer_arguments(TRAINING, METHODS["nspo"], 0, torch.device("cpu"), tmp_path, RuntimeSettings())
    pattern = WITHOUT_EFFECT.replace("\n", "")
    assert {name for name in own - given.keys() if not re.fullmatch(pattern, name)} == set()


def test_recomputed_activations_make_the_same_policy(inputs, tmp_path, nspo_run):
    """A key of `runtime`: how, not what."""
    made = run(inputs, tmp_path, "nspo", recompute=True)
    assert (made / "model.safetensors").read_bytes() == (nspo_run / "model.safetensors").read_bytes()


def test_batch_sizes_of_the_paper_divide(tmp_path):
    """200 prompts x 8 answers, minibatches of 800: TRL accepts the sizes and makes two updates per rollout."""
    sizes = {"prompts_per_step": 200, "group_size": 8, "minibatch_size": 800, "micro_batch_size": 16}
    given = trainer_arguments(
        TrainingSettings(**TRAINING.dump() | sizes),
        METHODS["nspo"],
        0,
        torch.device("cpu"),
        tmp_path,
        RuntimeSettings(),
    )
    assert (given.steps_per_generation, given.gradient_accumulation_steps, given.max_steps) == (100, 50, 8)


# One step, written out


def token_logps(model: torch.nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """(B, C): log-probability of every answer token under the distribution that it was sampled from."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    length = batch["completion_ids"].shape[1]
    logits = model(input_ids=ids, attention_mask=mask).logits[:, -length - 1 : -1]
    return (logits / TRAINING.temperature).log_softmax(-1).gather(-1, batch["completion_ids"][..., None])[..., 0]


def test_a_step_is_the_written_grpo_step(inputs, tmp_path, monkeypatch):
    """Gradients of both updates of a rollout equal those of the loss below, the second one with clipped ratios."""
    monkeypatch.setattr(grpo, "GRPOTrainer", Recorder)
    same = {"autocast": "no", "max_grad_norm": 1e9, "micro_batch_size": 4, "steps": 1, "clip": 0.02}
    out = run(inputs, tmp_path, "grpo_no_kl", **same)
    seen = Recorder.seen
    rewards, rollout = seen["rewards"][0].view(2, 4), seen["rollouts"][0]
    advantages = ((rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)).flatten()
    assert rewards.std(1).min() > 1e-3

    policy, old = load_model(inputs["model"]), load_model(inputs["model"])
    for update in range(2):
        batch = seen["minibatches"][update]
        row_of = [  # TRL shuffles the rollout before it cuts the minibatches
            next(i for i in range(8) if torch.equal(rollout["completion_ids"][i], ids))
            for ids in batch["completion_ids"]
        ]
        advantage, mask = advantages[row_of][:, None], batch["completion_mask"].float()
        policy.load_state_dict(seen["weights"][update], strict=False)
        policy.zero_grad()
        with torch.no_grad():
            before = token_logps(old, batch)
        ratio = (token_logps(policy, batch) - before).exp()
        loss = -torch.minimum(ratio * advantage, ratio.clamp(0.98, 1.02) * advantage)
        ((loss * mask).sum() / mask.sum()).backward()
        expected = dict(policy.named_parameters())
        assert len(seen["gradients"][update]) == 14
        for name, found in seen["gradients"][update].items():
            torch.testing.assert_close(found, expected[name].grad, rtol=1e-4, atol=1e-5 * float(found.abs().max()))
    assert [row["clip_fraction"] > 0 for row in table(out, "training")] == [False, True]


# The constraint, on disk


def test_saved_nspo_weights_are_in_the_null_space(nspo_run, inputs):
    """With AdamW, decay, clipping and bf16: no constrained layer leaks on disk, and every one has moved."""
    found = leakage(nspo_run, inputs)
    assert len(found) == 14
    assert max(inside for inside, _ in found.values()) <= 1e-6
    assert min(moved for _, moved in found.values()) > 1e-2


def test_without_the_constraint_protected_directions_move(free_run, inputs):
    """The same run of grpo_no_kl leaks by several percent, so the test above can fail."""
    assert min(inside for inside, _ in leakage(free_run, inputs).values()) > 1e-2


@pytest.mark.parametrize("name", ["nspo_run", "free_run"])
def test_nothing_but_the_blocks_layers_moves(name, inputs, request):
    """Embeddings and norms are bit-equal to the base, in every method; all is stored in float32."""
    base, tuned = weights(inputs["model"]), weights(request.getfixturevalue(name))
    layers = {f"{layer}.weight" for layer in NullSpaceBases.load(inputs["bases"]).layers}
    assert base.keys() == tuned.keys()
    assert all(torch.equal(base[key], tuned[key]) for key in base.keys() - layers)
    assert not any(torch.equal(base[key], tuned[key]) for key in layers)
    assert {value.dtype for value in tuned.values()} == {torch.float32}


def test_every_method_trains_the_layers_that_were_asked_for(inputs, tmp_path, monkeypatch):
    """Without bases the pattern says which layers move; bases that cover other layers are refused by name."""
    chosen = {"layers": r".*\.mlp\..*"}
    base, tuned = weights(inputs["model"]), weights(run(inputs, tmp_path, "grpo_no_kl", chosen, steps=1))
    moved = {key for key in base if not torch.equal(base[key], tuned[key])}
    assert moved == {key for key in base if ".mlp." in key}
    monkeypatch.setattr(grpo, "GRPOTrainer", None)
    with pytest.raises(UserError, match=r"cover 14 layers, `activations.layers` '\.\*.*' matches 6 .*self_attn.k_proj"):
        run(inputs, tmp_path, "nspo", chosen)


def test_kl_is_in_the_loss_of_grpo_only(inputs, tmp_path, free_run):
    """The logged KL to the reference starts at zero (the reference is the base) and grows; else there is none."""
    rows = table(run(inputs, tmp_path, "grpo", steps=2), "training")
    assert rows[0]["kl_in_loss"] == pytest.approx(0, abs=1e-7)
    assert rows[-1]["kl_in_loss"] > 1e-6
    assert "kl_in_loss" not in table(free_run, "training")[0]


# The other objectives, on disk


def test_random_projector_keeps_to_its_own_directions(inputs, tmp_path):
    """Nothing leaks on the seed's random range of the same ranks, as much as ever on what the bases protect."""
    out = run(inputs, tmp_path, "random_projector", steps=1)
    bases = NullSpaceBases.load(inputs["bases"])
    own = random_like(bases, 0)
    assert [(site.kind, site.rank) for site in own.values()] == [(bases[s].kind, bases[s].rank) for s in own]
    assert max(inside for inside, _ in leakage(out, inputs, own).values()) <= 1e-6
    assert min(moved for _, moved in leakage(out, inputs, own).values()) > 1e-3
    assert min(inside for inside, _ in leakage(out, inputs).values()) > 1e-3


def test_gradient_only_leaks_and_says_how_much(inputs, tmp_path, nspo_run):
    """AdamW leaves the null space although every gradient lies in it; saves go through, the log has the figure."""
    out = run(inputs, tmp_path, "gradient_only")
    found = [inside for inside, _ in leakage(out, inputs).values()]
    assert min(found) > 1e-2 > 1e-6 >= max(inside for inside, _ in leakage(nspo_run, inputs).values())
    logged = [row["leakage"] for row in table(out, "training")]
    assert logged[-1] == pytest.approx(max(found), rel=1e-4)
    assert len(logged) == UPDATES
    assert logged[0] > 1e-3


def test_release_constrains_mlp_layers_and_frees_the_rest(inputs, tmp_path):
    """MLP layers move and do not leak; attention, embeddings and norms move, and attention leaks."""
    out = run(inputs, tmp_path, "release", steps=1)
    for layer, (inside, moved) in leakage(out, inputs).items():
        assert moved > 1e-3, layer
        assert inside <= 1e-6 if ".mlp." in layer else inside > 1e-3, layer
    base, tuned = weights(inputs["model"]), weights(out)
    assert not [key for key in base if torch.equal(base[key], tuned[key])]


@pytest.mark.parametrize("name", ["nspo_lagrangian", "grpo_lagrangian"])
def test_lagrangian_follows_the_cost(name, inputs, tmp_path):
    """Every update logs the multiplier, which is the written recursion on the logged mean cost; samples sum to zero."""
    out = run(inputs, tmp_path, name, steps=2)
    rows, log = table(out, "training"), 0.0
    for row in rows[::2]:  # two updates per rollout
        log = min(log + 0.1 * math.exp(log) * row["mean_cost"], math.log(5.0))
        assert row["multiplier"] == pytest.approx(math.exp(log), rel=1e-12)
    assert [row["multiplier"] for row in rows[::2]] == [row["multiplier"] for row in rows[1::2]]
    assert rows[0]["multiplier"] != 1.0
    groups = torch.tensor([row["score"] for row in table(out, "samples")]).view(-1, 4)
    torch.testing.assert_close(groups.sum(1), torch.zeros(len(groups)), atol=1e-5, rtol=0)
    worst = max(inside for inside, _ in leakage(out, inputs).values())
    assert worst <= 1e-6 if name == "nspo_lagrangian" else worst > 1e-2
    assert json.loads((out / "settings.json").read_text())["trainer"]["scale_rewards"] == "none"


def test_without_a_multiplier_the_reward_alone_trains(inputs, tmp_path, monkeypatch):
    """At 1e-30 advantages and weights are those of plain GRPO on the reward model's score of every answer."""
    monkeypatch.setattr(grpo, "GRPOTrainer", Recorder)
    same = {"autocast": "no", "micro_batch_size": 4, "steps": 1}
    tiny = MethodSettings(objective="grpo_lagrangian", learning_rate=1e-2, loss={"multiplier_init": 1e-30})
    monkeypatch.setitem(METHODS, "grpo_lagrangian", tiny)
    found = weights(run(inputs, tmp_path / "lagrangian", "grpo_lagrangian", **same))
    advantages = Recorder.seen["rollouts"][0]["advantages"]
    monkeypatch.setattr(SafetyReward, "judge", LagrangianReward.judge)
    monkeypatch.setattr(SafetyReward, "combine", lambda self, cost, reward, harmful, refused: reward)
    expected = weights(run(inputs, tmp_path / "plain", "grpo_no_kl", **same))
    torch.testing.assert_close(advantages, Recorder.seen["rollouts"][0]["advantages"], atol=1e-6, rtol=0)
    assert advantages.abs().max() > 0.5
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, atol=1e-4, rtol=0)


def test_the_multiplier_is_resumed_to_the_bit(inputs, tmp_path, monkeypatch):
    """Interrupted after a checkpoint: weights and logs are those of the undisturbed run."""
    whole = run(inputs, tmp_path / "whole", "nspo_lagrangian")
    run_interrupted(inputs, tmp_path, "nspo_lagrangian", 6, monkeypatch)
    out = run(inputs, tmp_path, "nspo_lagrangian")
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert without_time(table(out, "training")) == without_time(table(whole, "training"))


def test_a_gradient_that_is_hardly_kept_is_reported(inputs, capsys):
    """Once, below 1%, with step, rule, rank and what to change; not where there was no gradient to begin with."""
    callback = LoggedConstraint(load_model(inputs["model"]), inputs["bases"], anchor=inputs["model"], mode="both")
    steps = iter([(0.0, 0.0), (2.0, 0.02), (2.0, 0.019), (2.0, 0.01)])

    def step_stats() -> dict[str, float]:
        before, after = next(steps)
        return {"gradient_norm": before, "projected_norm": after, "kept": after / before if before else 0.0}

    callback.constraint = SimpleNamespace(step_stats=step_stats)  # type: ignore[assignment]
    capsys.readouterr()  # the bar of the loading
    for step in (1, 2):
        callback.columns(step)
    assert capsys.readouterr().err == ""
    for step in (3, 4):
        callback.columns(step)
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "step 3: the constraint keeps 0.95% of the gradient's norm: rule 'rank' with threshold" in line
    assert "lower `bases.threshold`" in line


# What belongs together


def test_bases_belong_to_nspo_and_to_this_model(inputs, tmp_path, monkeypatch):
    """nspo without bases, bases without nspo, bases of another model: one line each, before anything is trained."""
    monkeypatch.setattr(grpo, "GRPOTrainer", None)
    with pytest.raises(UserError, match="method 'nspo' needs bases"):
        run(inputs, tmp_path, "nspo", {"bases": None})
    with pytest.raises(UserError, match="method 'grpo_no_kl' takes no bases"):
        run(inputs, tmp_path, "grpo_no_kl", {"bases": inputs["bases"]})
    for part in ("weights", "tokenizer"):
        other = write_bases(inputs["model"], tmp_path / f"{part}.safetensors", **{part: "another"})
        with pytest.raises(UserError, match=f"made with {part} another") as caught:
            run(inputs, tmp_path, "nspo", {"bases": other})
        assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("[ow]*/"))  # no work folder, no output


def test_swapped_judges_are_refused(inputs, tmp_path, monkeypatch):
    """The cost model given as the reward model, and the other way round, before anything is trained."""
    monkeypatch.setattr(grpo, "GRPOTrainer", None)
    with pytest.raises(UserError, match="holds a reward model, expected a cost model"):
        run(inputs, tmp_path, "grpo_no_kl", {"cost": inputs["reward"], "reward": inputs["cost"]})


# Numbers that are no longer finite


def test_a_score_that_is_no_number_ends_training_before_it_learns(inputs, tmp_path, monkeypatch):
    """A cost model whose head holds NaN is named; nothing is written."""
    loaded = PreferenceModel.load

    def broken(folder: Path, *arguments: Any, **options: Any) -> PreferenceModel:
        model = loaded(folder, *arguments, **options)
        if model.target == "cost":
            model.model.get_parameter("score.weight").data.fill_(math.nan)
        return model

    monkeypatch.setattr(PreferenceModel, "load", broken)
    with pytest.raises(UserError, match="the cost model scores an answer with NaN or Inf"):
        run(inputs, tmp_path, "grpo_no_kl")
    assert not (tmp_path / "out").exists()


def test_divergence_is_named_with_its_remedy(inputs, tmp_path, monkeypatch):
    """A learning rate that throws the weights away ends in one line that names the key; nothing is written."""
    monkeypatch.setitem(METHODS, "grpo_no_kl", MethodSettings(objective="grpo_no_kl", learning_rate=1e30))
    with pytest.raises(UserError, match=r"expected a finite number|are NaN or Inf") as error:
        run(inputs, tmp_path, "grpo_no_kl")
    assert "learning_rate" in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_gradient_that_is_no_number_is_not_learnt_from(inputs, tmp_path, monkeypatch):
    """NaN in a gradient ends the run at that update, before a checkpoint holds it."""
    begin = LogCallback.on_train_begin

    def poison(self: LogCallback, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        begin(self, args, state, control, **kwargs)
        weight = next(w for w in kwargs["model"].parameters() if w.requires_grad)
        weight.register_hook(lambda gradient: gradient * math.nan if state.global_step == 2 else gradient)

    monkeypatch.setattr(LogCallback, "on_train_begin", poison)
    with pytest.raises(UserError, match=r"step 3: the .* is nan"):
        run(inputs, tmp_path, "grpo_no_kl")
    assert not list((tmp_path / "work").glob("*/checkpoint-3"))
