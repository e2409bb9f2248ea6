"""A folder that a rule made and that lost something is noticed; a whole one is left alone."""

import shutil
from pathlib import Path

import pytest

from nspo.models.stage import prepare_model
from nspo.settings.model import ModelSettings
from nspo.workflow.whole import lacking


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A tiny model as `prepare_model` writes it."""
    prepare_model(ModelSettings(source="tiny:llama"), tmp_path, tmp_path / "model")
    return tmp_path / "model"


def test_a_whole_model_lacks_nothing(model: Path, tmp_path: Path) -> None:
    """Nor does a folder that is not there: Snakemake sees that by itself."""
    assert lacking(model) is None
    assert lacking(tmp_path / "nowhere") is None


@pytest.mark.parametrize("name", ["model.safetensors", "manifest.json", "config.json", "tokenizer_config.json"])
def test_a_lost_file_is_named(model: Path, name: str) -> None:
    """Weights, identity, sizes or tokenizer."""
    (model / name).unlink()
    assert lacking(model) == name


def test_cut_weights_are_noticed(model: Path) -> None:
    """By the sizes in the file's own header, also where the header itself is cut."""
    weights = model / "model.safetensors"
    whole = weights.read_bytes()
    for size in (len(whole) - 1, 100, 4, 0):
        weights.write_bytes(whole[:size])
        assert lacking(model) == "model.safetensors"
    weights.write_bytes(whole)
    assert lacking(model) is None


def test_a_lost_shard_or_index_is_noticed(model: Path) -> None:
    """Of weights in several files."""
    from nspo.models.loading import load_model

    load_model(model).save_pretrained(model, max_shard_size="50KB")
    (model / "model.safetensors").unlink(missing_ok=True)
    shards = sorted(model.glob("model-*.safetensors"))
    assert len(shards) > 1
    assert lacking(model) is None
    shutil.move(shards[1], model / "elsewhere")
    assert lacking(model) == shards[1].name
    (model / "model.safetensors.index.json").unlink()
    assert lacking(model) == "model.safetensors.index.json"
