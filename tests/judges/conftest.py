"""A classifier that several tests ask and none changes."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from nspo.models.loading import load_tokenizer


@pytest.fixture(scope="session")
def classifier_dir(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sequence classifier with random weights and three named labels."""
    folder = tmp_path_factory.mktemp("classifier") / "classifier"
    torch.manual_seed(0)
    labels = {0: "fine", 1: "toxic", 2: "violent"}
    model = AutoModelForSequenceClassification.from_pretrained(tiny_model_dir, num_labels=3, id2label=labels)
    model.get_parameter("score.weight").data.mul_(50)
    model.save_pretrained(folder)
    load_tokenizer(tiny_model_dir).save_pretrained(folder)
    return folder
