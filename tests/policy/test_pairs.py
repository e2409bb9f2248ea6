"""policy/pairs.py, pair_batches.py, offline.py: the pairs, one step against TRL's, the constraint, resuming."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from support.policy_runs import METHODS, TRAINING, leakage, run, run_interrupted, table, weights, without_time
from transformers import TrainingArguments
from trl import DPOConfig, DPOTrainer

from nspo.data.tables import LABEL_COLUMNS, Prompts
from nspo.errors import UserError
from nspo.files.journal import JsonLines
from nspo.files.manifest import fingerprint_files
from nspo.files.tables import load_table, write_table
from nspo.models.chat import chat_ids
from nspo.models.loading import load_model, load_tokenizer
from nspo.models.tiny import tiny_model, tiny_tokenizer
from nspo.policy.pairs import sources as pair_sources
from nspo.policy.pairs.batches import Collator, Pair, Side, answer_logps, every_logps, in_order, with_prefixes
from nspo.policy.pairs.sources import best_and_worst
from nspo.policy.pairs.stage import make_pairs
from nspo.policy.pairs.trainer import PairMetrics, PairTrainer, trainer_arguments
from nspo.policy.rollouts.prompts import rollout_prompts
from nspo.preference.model import PreferenceModel
from nspo.settings.policy.losses import DPO
from nspo.settings.policy.section import PairSettings, TrainingSettings
from nspo.settings.runtime import RuntimeSettings

ROLLOUTS = PairSettings(**{key: value for key, value in TRAINING.dump().items() if key in PairSettings.model_fields})
FREE, CONSTRAINED = ("dpo", "bfpo", "wdoor"), ("nspo_dpo", "nspo_bfpo", "nspo_wdoor")


def sample(inputs: dict[str, Path], folder: Path, seed: int = 0, labels: Path | None = None, **changes: Any) -> Path:
    """The file of pairs for `ROLLOUTS` with `changes`."""
    given = {key: inputs[key] for key in ("model", "reward", "cost", "prompts")}
    runtime = RuntimeSettings(device="cpu", workdir=str(folder / "work"))
    make_pairs(
        ROLLOUTS.model_copy(update=changes), seed, **given, labels=labels, out=folder / "pairs.parquet", runtime=runtime
    )
    return folder / "pairs.parquet"


@pytest.fixture(scope="module")
def pairs(inputs, tmp_path_factory) -> Path:
    return sample(inputs, tmp_path_factory.mktemp("pairs"))


@pytest.fixture(scope="module")
def given(inputs, pairs) -> dict[str, Path]:
    """What a preference objective trains from."""
    return inputs | {"pairs": pairs}


@pytest.fixture(scope="module")
def dpo_run(given, tmp_path_factory) -> Path:
    return run(given, tmp_path_factory.mktemp("dpo"), "dpo")


def guided(given: dict[str, Path], guide: Path, name: str) -> dict[str, Path]:
    """`given`, with the guide where the objective takes one."""
    return given | ({"guide_policy": guide} if METHODS[name].loss.kind == "wdoor" else {})


def rows_of(path: Path) -> list[dict[str, Any]]:
    return pq.read_table(path).to_pylist()


# Pairs


def test_best_and_worst_by_hand():
    """The largest and the smallest, the first of equals; no group of equals, and no answer whose verdict failed."""
    nan = math.nan
    rows = [
        [1.0, 3.0, -2.0, 3.0],
        [5.0] * 4,
        [0.0, -1.0, -1.0, -0.5],
        [nan, 2.0, nan, 1.0],
        [nan, 2.0, nan, nan],
        [nan] * 4,
    ]
    assert best_and_worst(torch.tensor(rows)) == [(0, 1, 2), (2, 0, 1), (3, 1, 3)]


def test_pairs_are_of_the_prompts_and_scores_of_a_rollout(inputs, pairs):
    """In the order of the rollouts; scores, helpfulness and safety as the models give them; ids that make the text."""
    tokenizer, rows = tiny_tokenizer(), rows_of(pairs)
    asked = rollout_prompts(ROLLOUTS, Prompts(inputs["prompts"]), tokenizer, tiny_model().config, 0).to_list()
    assert [(row["role"], row["prompt"]) for row in rows] == [(r["role"], r["prompt"][0]["content"]) for r in asked]
    assert {row["role"] for row in rows} == {"harmful", "benign"}
    models = {target: PreferenceModel.load(inputs[target], target) for target in ("cost", "reward")}
    for row in rows:
        assert row["prompt_ids"] == chat_ids(tokenizer, row["prompt"])
        assert row["chosen_score"] > row["rejected_score"]
        for side in ("chosen", "rejected"):
            assert tokenizer.decode(row[f"{side}_ids"], skip_special_tokens=True) == row[side]
            assert 1 <= len(row[f"{side}_ids"]) <= ROLLOUTS.max_new_tokens
            cost, reward = (models[name].score([row["prompt"]], [row[side]]).item() for name in ("cost", "reward"))
            assert row[f"{side}_helpfulness"] == pytest.approx(reward, abs=1e-2)  # bf16 in batches
            assert row[f"{side}_score"] == pytest.approx(-cost if row["role"] == "harmful" else reward, abs=1e-2)
            assert row[f"{side}_safe"] == (row["role"] == "benign" or cost <= 0)


def test_groups_that_score_alike_are_dropped(inputs, tmp_path):
    """All but greedy, the answers of a group are one: nothing is to be learnt, and that is said."""
    with pytest.raises(UserError, match=r"none of 8 groups has a best and a worst answer: raise `policy.margin`"):
        sample(inputs, tmp_path, temperature=1e-6)
    assert not (tmp_path / "pairs.parquet").exists()


def test_sampling_resumes_to_the_same_bytes(inputs, tmp_path, monkeypatch, capsys):
    """Interrupted in the third of four batches, half a line written: the rest is made, and the file is the same."""
    monkeypatch.setattr(pair_sources, "BATCH", 8)
    whole = sample(inputs, tmp_path / "whole").read_bytes()
    append = JsonLines.append

    def interrupted(self: JsonLines, rows: list[dict[str, Any]]) -> None:
        if rows[0]["step"] == 2:
            with self.path.open("a") as file:
                file.write('{"step": 2, "pa')
            raise KeyboardInterrupt
        append(self, rows)

    with monkeypatch.context() as patch:
        patch.setattr(JsonLines, "append", interrupted)
        with pytest.raises(KeyboardInterrupt):
            sample(inputs, tmp_path / "cut")
    capsys.readouterr()
    assert sample(inputs, tmp_path / "cut").read_bytes() == whole
    assert "continuing after 2 of 4 batches" in capsys.readouterr().err
    assert not list((tmp_path / "cut/work").iterdir())
    assert sample(inputs, tmp_path / "other", seed=1).read_bytes() != whole


def test_people_choose_pairs(inputs, tmp_path):
    """The safer of two is chosen; labels say what is safe, where they do; the rest is as with sampled pairs."""

    def label(pair: str, role: str, response: str, grade: float | None) -> dict[str, Any]:
        row = dict.fromkeys(LABEL_COLUMNS, "") | {"target": "cost", "split": "train", "prompt": f"prompt {pair}"}
        return row | {"pair": pair, "role": role, "response": response, "grade": grade}

    sides = {"a": ("no", 0.0, "yes", 1.0), "b": ("bad", 0.9, "worse", 1.0), "c": ("long answer one", None, "x", None)}
    rows = [label("", "", "alone", 1.0)]
    for pair, (chosen, good, rejected, bad) in sides.items():
        rows += [label(pair, "rejected", rejected, bad), label(pair, "chosen", chosen, good)]
    rows += [label("same", role, f"the same at first, {role}", 0.0) for role in ("chosen", "rejected")]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "labels.parquet")

    found = rows_of(sample(inputs, tmp_path, pairs="labels", labels=tmp_path / "labels.parquet"))
    assert {row["prompt"]: (row["chosen"], row["rejected"]) for row in found} == {
        "prompt a": ("no", "yes"),
        "prompt b": ("bad", "worse"),
        "prompt c": ("long ans", "x"),  # a character is a token here, and eight are kept
    }
    tokenizer = tiny_tokenizer()
    for row in found:
        asked, cost = [row["prompt"]], PreferenceModel.load(inputs["cost"], "cost")
        by_model = cost.score(asked, [row["chosen"]]).item() <= 0
        assert row["chosen_safe"] == {"prompt a": True, "prompt b": False}.get(row["prompt"], by_model)
        assert row["role"] == "harmful"
        assert (row["rejected_ids"][-1] == tokenizer.eos_token_id) == (len(row["rejected"]) < 8)
        assert (row["chosen_ids"][-1] == tokenizer.eos_token_id) == (len(row["chosen"]) < 8)
    for mistake in ({"pairs": "labels"}, {"labels": tmp_path / "labels.parquet"}):
        with pytest.raises(UserError, match=r"policy.pairs is '.*`--labels`"):
            sample(inputs, tmp_path, **mistake)


# Order and contexts


def some_pairs(pairs: Path) -> list[Pair]:
    return [Pair.of(row) for row in rows_of(pairs)]


def test_pairs_are_used_in_order_then_shuffled(pairs):
    """A pass holds every pair once; the first is as sampled, the second is not; the seed says how."""
    some = some_pairs(pairs)
    found = [id(pair) for pair in in_order(some, 20, 0)]
    passes = found[:8], found[8:16]
    assert passes[0] == [id(pair) for pair in some] != passes[1]
    assert sorted(passes[0]) == sorted(passes[1])
    assert found == [id(pair) for pair in in_order(some, 20, 0)] != [id(pair) for pair in in_order(some, 20, 1)]


def test_safe_answers_follow_the_beginning_of_harmful_ones(pairs):
    """About half of the harmful prompts; never a benign one; answers and rejected sides stay as they are."""
    before = some_pairs(pairs) * 20
    after = with_prefixes(before, 0)
    longer = 0
    for old, new in zip(before, after, strict=True):
        prefix = new.chosen.context[len(old.chosen.context) :]
        assert prefix == old.rejected.ids[: len(prefix)]
        assert not prefix or old.role == "harmful"
        assert (new.chosen.ids, new.rejected) == (old.chosen.ids, old.rejected)
        longer += bool(prefix)
    assert 0.3 < longer / sum(pair.role == "harmful" for pair in before) < 0.7


# One step


def test_log_probabilities_are_those_of_the_answers_alone(inputs, pairs):
    """Padding and batch do not matter: each row has the log-softmax of its answer's tokens, one by one."""
    model, some = load_model(inputs["model"]), with_prefixes(some_pairs(pairs), 0)[:3]
    sides = [*(pair.chosen for pair in some), *(pair.rejected for pair in some)]
    assert len({len(side.context) + len(side.ids) for side in sides}) > 1
    found = answer_logps(model, Collator(pad_id=5)([replace_base(pair) for pair in some]))
    for row, side in zip(found, sides, strict=True):
        logits = model(torch.tensor([side.context + side.ids])).logits[0].log_softmax(-1)
        first = len(side.context) - 1
        expected = [logits[first + i, token] for i, token in enumerate(side.ids)]
        torch.testing.assert_close(row[first : first + len(side.ids)], torch.stack(expected), atol=1e-5, rtol=0)
        assert row.count_nonzero() == len(side.ids)


def replace_base(pair: Pair) -> Pair:
    """The pair with all of its tensors."""
    chosen, rejected = (replace(side, base=torch.zeros(len(side.ids))) for side in (pair.chosen, pair.rejected))
    return replace(pair, chosen=chosen, rejected=rejected, token_weights=torch.ones(len(pair.chosen.ids)))


def test_dpo_is_trls(inputs, tmp_path):
    """On the same tokens and away from the base, loss and gradient are those of TRL's own trainer."""
    base, policy, tokenizer = load_model(inputs["model"]), load_model(inputs["model"]), load_tokenizer(inputs["model"])
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    turns = {
        "prompt": ("user", ["hello", "go on"]),
        "chosen": ("assistant", ["yes, sir", "no"]),
        "rejected": ("assistant", ["n", "never!"]),
    }
    data = {key: [[{"role": role, "content": text}] for text in texts] for key, (role, texts) in turns.items()}
    arguments = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "report_to": "none"}
    theirs = DPOTrainer(
        model=policy,
        ref_model=base,
        args=DPOConfig(beta=0.3, **arguments),
        train_dataset=Dataset.from_dict(data),
        processing_class=tokenizer,
    )
    rows = list(theirs.train_dataset)
    expected = theirs.compute_loss(policy, theirs.data_collator(rows))
    gradients = torch.autograd.grad(expected, list(policy.parameters()))

    ours = [
        Pair(
            "harmful",
            "",
            *(Side("", 0.0, True, 0.0, row["prompt_ids"], row[f"{side}_ids"]) for side in ("chosen", "rejected")),
        )
        for row in rows
    ]
    sides = [*(pair.chosen for pair in ours), *(pair.rejected for pair in ours)]
    known = list(every_logps(base, sides, tokenizer.pad_token_id, 3, False, "base"))
    measured = [
        replace(
            replace_base(pair),
            chosen=replace(pair.chosen, base=known[index]),
            rejected=replace(pair.rejected, base=known[len(ours) + index]),
        )
        for index, pair in enumerate(ours)
    ]
    trainer = PairTrainer(
        DPO(beta=0.3),
        PairMetrics(),
        model=policy,
        args=TrainingArguments(**arguments),
    )
    loss = trainer.compute_loss(policy, Collator(tokenizer.pad_token_id)(measured))
    assert abs(loss.item() - math.log(2)) > 1e-2
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    for found, other in zip(torch.autograd.grad(loss, list(policy.parameters())), gradients, strict=True):
        torch.testing.assert_close(found, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()))


def test_micro_batches_do_not_matter(given, tmp_path):
    """One pair at a time or two at once: equal losses, and weights that differ by rounding."""
    same = {"minibatch_size": 8, "steps": 2, "autocast": "no"}
    one, two = (run(given, tmp_path / str(size), "dpo", micro_batch_size=size, **same) for size in (2, 4))
    losses = [[row["loss"] for row in table(out, "training")] for out in (one, two)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    for key, value in weights(one).items():
        torch.testing.assert_close(weights(two)[key], value, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", FREE)
def test_training_tells_the_answers_apart(name, given, pairs, dpo_run, tmp_path):
    """On one pair, over and over, the chosen answer rises above the rejected one; it starts at the base model."""
    row = next(row for row in rows_of(pairs) if row["role"] == "harmful") | {
        "chosen_safe": True,
        "rejected_safe": False,
    }
    write_table([row], tmp_path / "one.parquet", manifest=load_table(pairs, "pairs")[0])
    paths = guided(given, dpo_run, name) | {"pairs": tmp_path / "one.parquet"}
    rows = table(run(paths, tmp_path, name, steps=6, probe_every=6), "training")
    assert (rows[0]["margin"], rows[0]["accuracy"]) == (0.0, 0.0)
    assert rows[-1]["margin"] > 1
    assert rows[-1]["accuracy"] == 1.0
    assert rows[-1]["loss"] < rows[0]["loss"]


# The constraint, on disk


@pytest.mark.parametrize("name", [*FREE, *CONSTRAINED])
def test_the_constraint_holds_where_it_is_asked_for(name, given, dpo_run, tmp_path):
    """Every layer moves; with the constraint none leaks on disk, and the log says how each step descended."""
    out = run(guided(given, dpo_run, name), tmp_path, name, steps=1)
    found = leakage(out, given)
    assert min(moved for _, moved in found.values()) > 1e-3
    worst, log = max(inside for inside, _ in found.values()), table(out, "training")
    assert (worst <= 1e-6) == (name in CONSTRAINED)
    assert ["step_descent" in row for row in log] == [name in CONSTRAINED] * len(log)
    assert name in CONSTRAINED or worst > 1e-3


# Logs and interruptions


def test_a_run_is_laid_out_like_the_others(dpo_run, pairs):
    """As many updates and probes as a run on rollouts; the samples are the pairs; the manifest names the file."""
    log = table(dpo_run, "training")
    assert [row["step"] for row in log] == list(range(1, 9))
    assert {"loss", "margin", "accuracy", "grad_norm_clipped_from", "learning_rate", "seconds"} <= log[0].keys()
    assert [row["step"] for row in table(dpo_run, "probes")] == [0, 4, 8]
    samples, rows = table(dpo_run, "samples"), rows_of(pairs)
    assert [row["step"] for row in samples] == [step for step in range(1, 9) for _ in range(2)]
    assert [row["answer"] for row in samples] == [row[side] for row in rows for side in ("chosen", "rejected")]
    assert json.loads((dpo_run / "manifest.json").read_text())["pairs"] == fingerprint_files([pairs])
    settings = json.loads((dpo_run / "settings.json").read_text())["trainer"]
    assert (settings["optim"], settings["weight_decay"], settings["max_steps"]) == ("adamw_torch", 0.1, 8)


def test_an_interrupted_run_resumes_to_the_same_bytes(given, dpo_run, tmp_path, monkeypatch):
    """Ctrl-C two updates after a checkpoint: weights and logs are those of the undisturbed run."""
    run_interrupted(given, tmp_path, "dpo", 6, monkeypatch)
    out = run(given, tmp_path, "dpo")
    assert (out / "model.safetensors").read_bytes() == (dpo_run / "model.safetensors").read_bytes()
    for name in ("training", "probes", "samples"):
        assert without_time(table(out, name)) == without_time(table(dpo_run, name))


# Settings and refusals


def test_trainer_arguments(tmp_path):
    """Four pairs an update where the others see four groups of eight; pairs are whole, whatever the micro-batch."""
    sizes = {"prompts_per_step": 8, "group_size": 8, "minibatch_size": 32, "steps": 3}
    for micro, (batch, accumulation) in {1: (1, 4), 2: (1, 4), 4: (2, 2), 8: (4, 1), 16: (4, 1), 32: (4, 1)}.items():
        settings = TrainingSettings(**TRAINING.dump() | sizes | {"micro_batch_size": micro})
        found = trainer_arguments(settings, METHODS["dpo"], 5, torch.device("cpu"), tmp_path, RuntimeSettings())
        assert (found.per_device_train_batch_size, found.gradient_accumulation_steps) == (batch, accumulation)
        assert (found.max_steps, found.seed, found.train_sampling_strategy) == (6, 5, "sequential")
        assert (found.learning_rate, str(found.lr_scheduler_type)) == (1e-2, "SchedulerType.CONSTANT")


def test_what_an_objective_trains_from_is_checked_first(inputs, given, pairs, dpo_run, tmp_path):
    """Pairs or a guide missing, or given to who has no use for them; answers of another model: one line each."""
    for name, paths, line in (
        ("dpo", {}, "method 'dpo' needs pairs, found none: give the path (`--pairs`)"),
        ("nspo", {"pairs": pairs}, "'nspo' takes no pairs, found "),
        ("wdoor", {"pairs": pairs}, "'wdoor' needs guide policy, found none: give the path (`--guide-policy`)"),
        ("dpo", {"pairs": pairs, "guide_policy": dpo_run}, "'dpo' takes no guide policy"),
        ("dpo", {"pairs": inputs["prompts"]}, "prompts.parquet has no column"),
        ("dpo", {"pairs": pairs, "model": dpo_run}, ": made with base."),
    ):
        with pytest.raises(UserError, match=re.escape(line)) as caught:
            run(inputs | paths, tmp_path, name)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
