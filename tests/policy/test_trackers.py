"""policy/trackers.py: what they are shown, where it lies, and that nothing is tracked unasked."""

from pathlib import Path
from typing import Any

import pytest
from support.policy_runs import METHODS, TRAINING, table

from nspo.errors import UserError
from nspo.policy import stage as stage
from nspo.policy import trackers
from nspo.policy.methods.inputs import PolicyInputs
from nspo.policy.stage import train_policy
from nspo.settings.policy.section import TrainingSettings
from nspo.settings.runtime import RuntimeSettings


def test_a_tracker_that_is_not_installed_is_refused_first(monkeypatch: pytest.MonkeyPatch, inputs: Any, tmp_path: Path):
    """One line with the package, before a model is read; without trackers nothing is looked for."""
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    monkeypatch.setattr(stage, "load_bases", None)
    with pytest.raises(UserError, match=r"runtime\.trackers: trackio is not installed: pip install trackio"):
        train(inputs, tmp_path, "trackio")
    assert trackers.tracker_callbacks([], tmp_path, 0) == []
    trackers.check_trackers([])
    assert not list(tmp_path.iterdir())


def train(inputs: dict[str, Path], folder: Path, *names: str) -> Path:
    """Two steps of grpo_no_kl, shown to the trackers `names`."""
    settings = TrainingSettings(**TRAINING.dump() | {"steps": 2})
    runtime = RuntimeSettings(device="cpu", workdir=str(folder / "work"), trackers=list(names))  # type: ignore[arg-type]
    given = inputs | {"bases": None, "layers": ".*", "pairs": None, "guide_policy": None}
    train_policy(settings, METHODS["grpo_no_kl"], "run", 0, PolicyInputs(**given), out=folder / "out", runtime=runtime)
    return folder / "out"


def test_tensorboard_shows_the_rows_of_the_log(inputs: Any, tmp_path: Path):
    """Every figure of every update under its name in training.parquet, and the probes; kept beside the policy."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = train(inputs, tmp_path, "tensorboard")
    shown = EventAccumulator(str(out / "tensorboard"))
    shown.Reload()
    rows = table(out, "training")
    for key in ("reward", "refusal_rate", "seconds", "kl_to_base"):
        found = {event.step: event.value for event in shown.Scalars(f"train/{key}")}
        assert found == {row["step"]: pytest.approx(row[key]) for row in rows if row[key] is not None}
    assert [event.step for event in shown.Scalars("train/probe_unsafe_rate")] == [4]


def test_trackio_shows_the_rows_of_the_log(inputs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """In its database on this machine, one run of the project nspo."""
    pytest.importorskip("trackio")
    from trackio import sqlite_storage, utils

    for module in (sqlite_storage, utils):
        monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path / "trackio")
    out = train(inputs, tmp_path, "trackio")
    (name,) = sqlite_storage.SQLiteStorage.get_runs("nspo")
    shown: dict[int, dict[str, Any]] = {}
    for row in sqlite_storage.SQLiteStorage.get_logs("nspo", name):
        shown.setdefault(row["train/global_step"], {}).update(row)
    assert name.startswith("policy-run-seed0-")
    for row in table(out, "training"):
        assert shown[row["step"]]["train/refusal_rate"] == row["refusal_rate"]
        assert shown[row["step"]]["train/seconds"] == pytest.approx(row["seconds"])
    assert "train/probe_unsafe_rate" in shown[4]
