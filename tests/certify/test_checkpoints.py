"""Two checkpoints side by side: slices are small, cover everything once, and need no more than their tensor."""

import shutil

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM

from nspo.certify import checkpoints
from nspo.certify.checkpoints import CheckpointPair
from nspo.errors import UserError
from nspo.models.structure.linears import is_transposed


def moved(model, folder):
    """The folder of `model`, and the state of it and of a copy that training moved, saved beside."""
    model.save_pretrained(folder / "base")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn_like(parameter)
    model.save_pretrained(folder / "tuned")
    return before, model.state_dict()


def gpt2():
    config = GPT2Config(vocab_size=40, n_embd=8, n_layer=1, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config)


def mixtral():
    shape = {"hidden_size": 8, "intermediate_size": 6, "num_hidden_layers": 1, "vocab_size": 12}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    return MixtralForCausalLM(MixtralConfig(**shape, **heads, num_local_experts=3, num_experts_per_tok=2))


@pytest.mark.parametrize("make", [gpt2, mixtral])
def test_slices_are_small_and_cover_every_tensor(make, tmp_path, monkeypatch):
    """Put together again, the slices are W and W_tuned - W of each weight in memory; none holds more than `SLICE`
    values, or than one row. Weights that are stored transposed, or expert by expert, are no exception."""
    monkeypatch.setattr(checkpoints, "SLICE", 40)
    before, after = moved(make(), tmp_path)
    pair = CheckpointPair(tmp_path / "base", tmp_path / "tuned")
    assert set(pair.names) == {name for name in before if name != "lm_head.weight" or make is mixtral}
    layers = [name for name, module in make().named_modules() if is_transposed(module)]
    experts = [name for name in before if ".experts." in name]
    layers += [f"{name}.{i}" for name in experts for i in range(len(before[name])) if "down" in name]
    layers += [name for name in experts if "down" not in name]
    places = {place.key: {} for place in pair.places(layers).values()}
    for place in pair.places(layers).values():
        places[place.key][place.expert] = place
    for name in pair.names:
        for place in (None, *places.get(name, {}).values()):
            found = zip(*pair.slices(name, place), strict=True)
            for parts, expected in zip(found, (before[name], after[name] - before[name]), strict=True):
                rows = expected if place is None else place.rows(expected)
                assert all(part.numel() <= max(40, rows[0].numel(), expected[0].numel()) for part in parts)
                assert torch.equal(torch.cat(parts), rows if place is None else rows.flatten(0, -2))
    assert bool(layers) == (make in (gpt2, mixtral))


def test_a_broken_file_is_named(tmp_path):
    """A download that was cut off ends in one line with the file."""
    gpt2().save_pretrained(tmp_path / "base")
    shutil.copytree(tmp_path / "base", tmp_path / "tuned")
    file = tmp_path / "tuned" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(UserError, match=r"tuned/model\.safetensors is not a whole safetensors file .*copy it again"):
        CheckpointPair(tmp_path / "base", tmp_path / "tuned")
    with pytest.raises(UserError, match=r"holds no model"):
        CheckpointPair(tmp_path / "base", tmp_path)
