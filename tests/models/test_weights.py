"""A checkpoint by its names in memory: whatever transformers renamed, stacked or split as it was saved."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nspo.certify.checkpoints import CheckpointPair
from nspo.errors import UserError
from nspo.models.folders.classes import model_class, other_inputs
from nspo.models.folders.weights import open_weights, saved_as_in_memory
from nspo.models.loading import load_config, load_model
from tests.support.families import CONFIGS, tiny_config, tiny_family


def rewritten(folder: Path, change) -> Path:
    """The folder, with its weights as `change` makes them of those by their names on disk."""
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("family", CONFIGS)
def test_every_weight_by_its_name_in_memory(family: str, tmp_path: Path) -> None:
    """Names, shapes and values are those of the loaded model, for a folder as published and one saved from it."""
    tiny_family(family).save_pretrained(tmp_path / "published")
    cls = model_class(load_config(tmp_path / "published", "it"))
    model = cls.from_pretrained(tmp_path / "published", dtype=torch.float32)
    model.save_pretrained(tmp_path / "saved")
    state = model.state_dict()
    for folder in ("published", "saved"):
        weights = open_weights(tmp_path / folder)
        assert set(weights.names) == set(state) - weights.tied
        assert weights.ignored == []
        for name in weights.names:
            assert weights.shape(name) == tuple(state[name].shape)
            assert torch.equal(weights.read(name), state[name]), name
        like = open_weights(tmp_path / folder, torch.nn.Sequential(model))
        assert like.names == weights.names


def test_names_without_the_prefix_of_the_base_model(tmp_path: Path) -> None:
    """GPT-2 as published has no `transformer.` before its names, and buffers that no class of today loads."""
    model = tiny_family("gpt2")
    model.save_pretrained(tmp_path)

    def as_published(weights: dict) -> dict:
        bare = {name.removeprefix("transformer."): value for name, value in weights.items()}
        return bare | {"h.0.attn.bias": torch.ones(1, 1, 4, 4, dtype=torch.uint8)}

    weights = open_weights(rewritten(tmp_path, as_published))
    assert set(weights.names) == set(model.state_dict()) - weights.tied
    assert weights.ignored == ["h.0.attn.bias"]


def test_what_the_model_never_loads_is_named(tmp_path: Path) -> None:
    """Heads that predict several tokens, and a second copy of the weights: told apart from what is compared."""
    for side in ("base", "tuned"):
        tiny_family("qwen3_5").save_pretrained(tmp_path / side)
    rewritten(tmp_path / "base", lambda weights: weights | {"mtp.fc.weight": torch.zeros(2, 2)})
    save_file({"anything": torch.zeros(1)}, tmp_path / "base" / "consolidated.safetensors")
    pair = CheckpointPair(tmp_path / "base", tmp_path / "tuned")
    assert pair.ignored == ["mtp.fc.weight"]
    assert "anything" not in pair.names


@pytest.mark.parametrize(
    ("quantised", "message"),
    [
        (lambda w, name: w | {name: w[name].to(torch.float8_e4m3fn)}, r"holds codes \(F8_E4M3\)"),
        (lambda w, name: w | {name: w[name].to(torch.int8)}, r"holds codes \(I8\)"),
        (lambda w, name: w | {f"{name}_scale_inv": torch.ones(1)}, "holds the scale of codes"),
        (lambda w, name: w | {name.replace("weight", "qweight"): torch.ones(1)}, "holds the scale of codes"),
    ],
)
def test_codes_are_no_weights(quantised, message: str, tmp_path: Path) -> None:
    """Numbers of one byte, and any weight with a scale beside it, are refused: a difference of codes says nothing."""
    tiny_family("llama").save_pretrained(tmp_path / "base")
    tiny_family("llama").save_pretrained(tmp_path / "tuned")
    name = "model.layers.0.mlp.up_proj.weight"
    rewritten(tmp_path / "tuned", lambda weights: quantised(weights, name))
    with pytest.raises(UserError, match=rf"tuned: the tensor .*{message}.*prepare-model"):
        CheckpointPair(tmp_path / "base", tmp_path / "tuned")


def test_the_class_is_the_one_that_saves_the_folder_whole(tmp_path: Path) -> None:
    """A multimodal folder stays multimodal; without a class, or with one of another task, the type decides."""
    config = tiny_config("qwen3_5")
    config.architectures = ["Qwen3_5ForConditionalGeneration"]
    assert model_class(config).__name__ == "Qwen3_5ForConditionalGeneration"
    assert other_inputs(config) == ["image"]
    for named in (None, [], ["NobodyKnowsThis"], ["LlamaForSequenceClassification"]):
        text = tiny_config("llama")
        text.architectures = named
        assert model_class(text).__name__ == "LlamaForCausalLM"
        assert other_inputs(text) == []
    refused = (("t5", "encoder-decoder"), ("vit", "no causal language"), ("blip-2", "cannot read text without pixel_v"))
    for kind, message in refused:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
        with pytest.raises(UserError, match=message):
            model_class(load_config(tmp_path, "it"))


@pytest.mark.parametrize("family", ["gemma3", "mixtral", "nemotron_h"])
def test_the_trainers_checkpoints_are_read_back_whole(family: str, tmp_path: Path) -> None:
    """Inside the context a saved folder holds the names in memory, so that no weight is passed over; then as before."""
    tiny_family(family).save_pretrained(tmp_path / "published")
    model = model_class(load_config(tmp_path / "published", "it")).from_pretrained(tmp_path / "published")
    with saved_as_in_memory(model):
        model.save_pretrained(tmp_path / "checkpoint")
    model.save_pretrained(tmp_path / "saved")
    names = {
        place: set(load_file(tmp_path / place / "model.safetensors")) for place in ("published", "checkpoint", "saved")
    }
    assert names["checkpoint"] == set(model.state_dict()) - set(model.all_tied_weights_keys)
    assert names["saved"] == names["published"] != names["checkpoint"]


def test_blocks_that_predict_further_tokens_may_be_left_over(tmp_path: Path) -> None:
    """Multi-token prediction is stored as more blocks, or under a name of its own; nothing else may be left over."""
    tiny_family("llama").save_pretrained(tmp_path)
    further = {"model.layers.2.eh_proj.weight": torch.zeros(2), "mtp.fc.weight": torch.zeros(2)}
    load_model(rewritten(tmp_path, lambda weights: weights | further))
    with pytest.raises(UserError, match=r"they hold 1 that LlamaForCausalLM does not have, such as model\.other"):
        load_model(rewritten(tmp_path, lambda weights: weights | {"model.other.weight": torch.zeros(2)}))
