"""Logs and probes: one row per update, and what the rows say of the run."""

import json

import pytest
from support.policy_runs import (
    UPDATES,
    table,
)

from nspo.models.loading import load_model, load_tokenizer
from nspo.policy import stage as stage
from nspo.policy.log import shares, theory


def test_every_row_says_how_the_run_goes(nspo_run, free_run):
    """Both updates of a rollout have its reward, cost, refusals and the like; what a probe measures is at its steps."""
    for folder in (nspo_run, free_run):
        rows = table(folder, "training")
        rollout = ("reward", "cost", "unsafe", "refusal_rate", "over_refusal_rate", "zero_variance_groups")
        for key in (*rollout, "failed_verdicts", "helpfulness", "completion_length", "clip_fraction", "loss"):
            assert all(row[key] is not None for row in rows), key
        assert [[row[key] for key in rollout] for row in rows[::2]] == [
            [row[key] for key in rollout] for row in rows[1::2]
        ]
        assert len({row["reward"] for row in rows}) == UPDATES / 2
        assert [row["kl_to_base"] is not None for row in rows] == [False, False, False, True] * 2


def test_the_parts_of_an_update_are_its_whole(nspo_run, free_run):
    """Rollout, scoring and the rest add up; a rollout is timed once; only the constraint takes time to project."""
    for folder in (nspo_run, free_run):
        for index, row in enumerate(table(folder, "training")):
            parts = [row[f"{part}_seconds"] for part in ("rollout", "scoring", "update")]
            assert sum(parts) == pytest.approx(row["seconds"])
            assert all(part > 0 for part in parts) if index % 2 == 0 else parts[:2] == [0, 0]
            assert row["tokens_per_second"] > 0
    rows = table(nspo_run, "training")
    assert all(0 < row["projection_seconds"] < row["update_seconds"] for row in rows)
    assert "projection_seconds" not in table(free_run, "training")[0]
    tokens = rows[0]["completion_length"] * 8
    assert rows[0]["tokens_per_second"] == pytest.approx(tokens / rows[0]["rollout_seconds"])
    halves = [
        {"seconds": 4.0, "rollout_seconds": 3.0, "update_seconds": 1.0, "projection_seconds": 0.4},
        {"seconds": 4.0},
    ]
    assert shares(halves).endswith("rollout 37.5%, scoring 0.0%, update 12.5%, of which projection 5.0%")


def test_the_theory_holds_on_the_run(nspo_run, free_run):
    """Every step says how far it descended its own gradient; probes measure the leakage and the KL.

    The summary in settings.json is the worst of the rows; a run without constraint has none.
    """
    rows = table(nspo_run, "training")
    found = json.loads((nspo_run / "settings.json").read_text())["theory"]
    descents = [row["step_descent"] for row in rows]
    assert found["updates"] == len(descents) == UPDATES
    assert found["least_step_descent"] == min(descents)
    assert found["descending"] == sum(value > 0 for value in descents) / UPDATES > 0.5
    probes = {row["step"]: row for row in table(nspo_run, "probes")}
    assert probes[0]["leakage"] == 0
    for row in rows:
        probe = probes.get(row["step"], {"leakage": None, "kl_per_token": None})
        assert (row["leakage"], row["kl_to_base"]) == (probe["leakage"], probe["kl_per_token"])
    assert found["most_leakage"] == max(row["leakage"] or 0 for row in rows)
    assert 0 < found["most_leakage"] <= 1e-6
    assert json.loads((free_run / "settings.json").read_text())["theory"] is None
    assert table(free_run, "training")[3]["kl_to_base"] > 0


def test_the_summary_of_the_theory_is_the_worst_row():
    rows = [
        {"step_descent": 2.0, "descent": 0.5, "kept": 0.7},
        {"step_descent": -1.0, "descent": 0.1, "kept": 0.9, "leakage": 3e-8},
    ]
    found = theory(rows)
    assert found == {
        "updates": 2,
        "descending": 0.5,
        "least_step_descent": -1.0,
        "least_descent": 0.1,
        "least_kept": 0.7,
        "most_kept": 0.9,
        "most_leakage": 3e-8,
    }
    assert theory([{"step_descent": 1.0}])["least_kept"] is None
    assert theory([{"loss": 1.0}]) is None


def test_logs_have_one_row_per_update(nspo_run, free_run):
    """training.parquet counts updates, probes.parquet the probed ones; only nspo says how its steps descend."""
    assert [row["step"] for row in table(nspo_run, "training")] == list(range(1, UPDATES + 1))
    assert [row["step"] for row in table(nspo_run, "probes")] == [0, 4, 8]
    assert all(row["step_descent"] is not None for row in table(nspo_run, "training"))
    assert all(
        {"loss", "reward", "learning_rate", "clip_fraction"} <= row.keys() for row in table(free_run, "training")
    )
    assert "step_descent" not in table(free_run, "training")[0]
    assert {row["step"] for row in table(nspo_run, "samples")} == {1, 3, 5, 7}


def test_first_probe_has_no_drift_at_all(nspo_run):
    """Before any update the policy is its base: KL is exactly zero although training autocasts to bf16; later not."""
    first, *_, last = table(nspo_run, "probes")
    assert (first["kl_per_token"], first["kl_first_tokens"], first["nll_change"]) == (0.0, 0.0, 0.0)
    assert first["top1_agreement"] == 1.0
    assert last["kl_per_token"] > 0


def test_out_holds_a_model_and_its_logs_only(nspo_run):
    """No README, optimizer or trainer state of TRL; the work folder is gone; settings name both sides."""
    names = {path.name for path in nspo_run.iterdir()}
    logs = {"training.parquet", "probes.parquet", "samples.parquet", "settings.json", "manifest.json"}
    assert names >= logs | {"model.safetensors", "config.json", "tokenizer.json"}
    assert names <= logs | {path.name for path in nspo_run.glob("*.json")} | {
        "model.safetensors",
        "chat_template.jinja",
    }
    assert not list((nspo_run.parent / "work").iterdir())
    settings = json.loads((nspo_run / "settings.json").read_text())
    assert settings["trainer"]["weight_decay"] == settings["nspo"]["weight_decay"] == 0.1
    load_model(nspo_run)
    load_tokenizer(nspo_run)
