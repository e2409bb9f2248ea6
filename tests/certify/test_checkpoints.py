"""Two checkpoints side by side: slices are small, cover everything once, and need no more than their tensor."""

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from nspo.certify import checkpoints
from nspo.certify.checkpoints import CheckpointPair
from nspo.errors import UserError

TENSORS = {
    "matrix": torch.randn(7, 6),
    "wide": torch.randn(3, 40),
    "experts": torch.randn(5, 2, 3),
    "norm": torch.randn(30),
    "scalar": torch.tensor(2.5),
}


def folder(path, tensors):
    LlamaConfig(num_hidden_layers=0, architectures=["LlamaForCausalLM"]).save_pretrained(path)
    save_file(tensors, path / "model.safetensors")
    return path


@pytest.mark.parametrize(
    ("name", "transposed"), [*((name, False) for name in TENSORS), ("matrix", True), ("wide", True)]
)
def test_slices_are_small_and_cover_a_tensor(name, transposed, tmp_path, monkeypatch):
    """Put together again, the slices are W and W_tuned - W; none holds more than `SLICE` values, or than one row."""
    monkeypatch.setattr(checkpoints, "SLICE", 12)
    moved = {key: value + torch.randn(value.shape) for key, value in TENSORS.items()}
    pair = CheckpointPair(folder(tmp_path / "base", TENSORS), folder(tmp_path / "tuned", moved))
    weights, updates = zip(*pair.slices(name, transposed), strict=True)
    for found, expected in ((weights, TENSORS[name]), (updates, moved[name] - TENSORS[name])):
        expected = expected.T if transposed else expected
        one_row = expected[0].numel() if expected.ndim else 1
        assert all(part.numel() <= max(12, one_row) for part in found)
        assert torch.equal(torch.cat(found) if expected.ndim else found[0], expected)


def test_a_broken_file_is_named(tmp_path):
    """A download that was cut off ends in one line with the file."""
    good, cut = folder(tmp_path / "base", TENSORS), folder(tmp_path / "tuned", TENSORS)
    file = cut / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(UserError, match=r"tuned/model\.safetensors is not a whole safetensors file .*copy"):
        CheckpointPair(good, cut)
    with pytest.raises(UserError, match=r"holds no config\.json"):
        CheckpointPair(good, tmp_path)
