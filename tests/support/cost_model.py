"""A cost model with random weights, in the form that the training stage writes."""

from pathlib import Path

import torch

from nspo.files.manifest import MANIFEST_NAME, fingerprint_model, make_manifest, write_json
from nspo.models.loading import load_tokenizer


def random_cost_model(model: Path, folder: Path) -> Path:
    """Write it into `folder`, built on the model folder `model`."""
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_pretrained(model, num_labels=1).save_pretrained(folder)
    load_tokenizer(model).save_pretrained(folder)
    facts = {"target": "cost", "base": {}, "labels": "", "settings": {"max_tokens": 64}}
    write_json(folder / MANIFEST_NAME, make_manifest("preference_model", model=fingerprint_model(folder), **facts))
    return folder
