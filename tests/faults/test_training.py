"""Reports of training that ended in nothing."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.rows import write

from nspo.data.stage import prepare_labels
from nspo.errors import UserError
from nspo.preference import stage
from nspo.settings.data import GradedSet, LabelSettings
from nspo.settings.model import PreferenceSettings
from nspo.settings.runtime import RuntimeSettings


def test_a_preference_model_that_diverged_names_its_remedy(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores of NaN are no model: the setting that mends it is named, and nothing is written."""
    rows = [
        {"objective": f"{word} {n}?", "assistant_response": f"{word} {n}", "human_score": n % 2}
        for n in range(40)
        for word in ("How", "Why")
    ]
    write(tmp_path / "labels.csv", rows)
    labels = GradedSet(kind="graded", target="cost", source=[str(tmp_path / "labels.csv")])
    prepare_labels(LabelSettings(labels={"own": labels}), tmp_path, tmp_path / "labels.parquet")

    def diverge(model: Any, *_: Any) -> None:
        with torch.no_grad():
            model.get_parameter("score.weight").fill_(torch.nan)

    monkeypatch.setattr(stage, "fine_tune", diverge)
    settings = PreferenceSettings(tune="all", backbone_layers=0)
    runtime = RuntimeSettings(device="cpu", workdir=str(tmp_path / "work"))
    with pytest.raises(UserError, match=r"training diverged, its scores are NaN or Inf: lower cost\.learning_rate"):
        stage.train_preference(settings, "cost", tiny_model_dir, tmp_path / "labels.parquet", tmp_path / "out", runtime)
    assert not (tmp_path / "out").exists()
