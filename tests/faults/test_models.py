"""Reports of models that were not what their folder said: random weights, pointers, halves, adapters."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.hostile import with_json, with_weights
from support.model_copy import copy_model

from nspo.errors import UserError
from nspo.files.manifest import INDEX
from nspo.models.chat import chat_ids
from nspo.models.generation import generate
from nspo.models.loading import load_model, load_tokenizer, model_identity
from nspo.models.stage import prepare_model
from nspo.settings.model import ModelSettings

Weights = dict[str, Any]


class Report(NamedTuple):
    """A replayed report: whose it is, what was wrong there, how a folder gets that way, and what is to be said."""

    reported: str
    wrong_there: str
    spoil: Callable[[Path, Path], Path]
    said: str


def renamed(change: Callable[[str], str]) -> Callable[[Path, Path], Path]:
    """Other names for all tensors."""
    return lambda model, folder: with_weights(model, folder, lambda w: {change(name): v for name, v in w.items()})


def altered(change: Callable[[Weights], Any]) -> Callable[[Path, Path], Path]:
    """Tensors changed in place."""

    def spoil(model: Path, folder: Path) -> Path:
        def both(weights: Weights) -> Weights:
            change(weights)
            return weights

        return with_weights(model, folder, both)

    return spoil


def filed(name: str, content: bytes | None) -> Callable[[Path, Path], Path]:
    """A file with this content, or without what it had in its second half."""

    def spoil(model: Path, folder: Path) -> Path:
        path = copy_model(model, folder) / name
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] if content is None else content)
        return folder

    return spoil


def sharded(change: Callable[[Path], Any]) -> Callable[[Path, Path], Path]:
    """A model in several files, of which something is then changed."""

    def spoil(model: Path, folder: Path) -> Path:
        load_model(model).save_pretrained(folder, max_shard_size="20KB")
        load_tokenizer(model).save_pretrained(folder)
        change(folder)
        return folder

    return spoil


def indexed(weight_map: Any) -> Callable[[Path, Path], Path]:
    """A model in several files whose index says this."""
    return sharded(lambda folder: (folder / INDEX).write_text(json.dumps({"weight_map": weight_map})))


def configured(**values: Any) -> Callable[[Path, Path], Path]:
    """Other values in config.json."""
    return lambda model, folder: with_json(model, folder, "config.json", **values)


def doubled(folder: Path) -> None:
    """A tensor of the last file in the first as well, with other numbers."""
    first = next(folder.glob("*-00001-*"))
    save_file({**load_file(first), "model.norm.weight": torch.ones(32)}, first, {"format": "pt"})


def dangling(model: Path, folder: Path) -> Path:
    """A snapshot of the hub's cache, copied without what its links mean."""
    path = copy_model(model, folder) / "model.safetensors"
    path.unlink()
    path.symlink_to("../../blobs/0123")
    return folder


def load_both(folder: Path) -> None:
    """What every stage loads."""
    load_tokenizer(folder)
    load_model(folder)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 269060552\n"
FIRST = "model.layers.0.mlp.up_proj.weight"
PEFT = json.dumps({"peft_type": "LORA", "base_model_name_or_path": "org/name"}).encode()
REPORTS = [
    Report(
        "huggingface/transformers#48722",
        "random weights, a warning",
        renamed("base_model.model.{}".format),
        "lack 21 of 21 weights",
    ),
    Report("of DataParallel", "random weights", renamed("module.{}".format), "take off a wrapper's prefix"),
    Report("of torch.compile", "random weights", renamed("_orig_mod.{}".format), "such as _orig_mod"),
    Report(
        "of unmerged LoRA",
        "base layers random",
        renamed(lambda n: n.replace("up_proj", "up_proj.base_layer")),
        "lack 2 of",
    ),
    Report(
        "of a lost tensor",
        "one random layer",
        altered(lambda w: w.pop(FIRST)),
        f"lack 1 of 21 weights, such as {FIRST}",
    ),
    Report(
        "of a lost embedding", "tied to noise", altered(lambda w: w.pop("model.embed_tokens.weight")), "lack 2 of 21"
    ),
    Report("of a stray tensor", "dropped", altered(lambda w: w.update({"x.y": torch.ones(2)})), "such as x.y"),
    Report(
        "of another width",
        "random",
        altered(lambda w: w.update({FIRST: torch.ones(3, 32)})),
        r"has the shape \[3, 32\]",
    ),
    Report(
        "of a diverged run",
        "answers of noise",
        altered(lambda w: w[FIRST].fill_(torch.nan)),
        f"{FIRST} holds NaN or Inf",
    ),
    Report(
        "of an overflow",
        "answers of noise",
        altered(lambda w: w[FIRST][0].fill_(torch.inf)),
        f"{FIRST} holds NaN or Inf",
    ),
    Report("huggingface/transformers#27923", "HeaderTooLarge", filed("model.safetensors", POINTER), "git-LFS pointer"),
    Report(
        "of a tokenizer's pointer", "traceback", filed("tokenizer.json", POINTER), "tokenizer.json is a git-LFS pointer"
    ),
    Report("of a cut download", "SafetensorError", filed("model.safetensors", None), "not a whole safetensors file"),
    Report("of an empty file", "SafetensorError", filed("model.safetensors", b""), "not a whole safetensors file"),
    Report("of a cut tokenizer", "bare Exception", filed("tokenizer.json", None), "tokenizer cannot be loaded"),
    Report("of a cut configuration", "traceback", filed("config.json", None), r"config\.json"),
    Report("of a copied cache", "no such file", dangling, "links to .* which is not there"),
    Report("huggingface/peft#523", "its base loaded instead", filed("adapter_config.json", PEFT), "holds an adapter"),
    Report(
        "of a lost shard", "FileNotFoundError", sharded(lambda f: next(f.glob("*-00002-*")).unlink()), "does not exist"
    ),
    Report(
        "of a cut shard",
        "SafetensorError",
        sharded(lambda f: next(f.glob("*-00002-*")).write_bytes(b"xx")),
        "not a whole",
    ),
    Report(
        "of weights twice",
        "the loader and the certificate read other weights",
        sharded(lambda f: shutil.copyfile(next(f.glob("*-00001-*")), f / "model.safetensors")),
        "holds both",
    ),
    Report(
        "sgl-project/sglang#32279",
        "a shard that the index names is absent, its weights noise",
        sharded(lambda f: next(f.glob("*-00003-*")).unlink()),
        "does not exist",
    ),
    Report(
        "tenstorrent/tt-inference-server#4986",
        "an interrupted download is used",
        sharded(lambda f: (first := next(f.glob("*-00001-*"))).rename(f"{first}.incomplete")),
        "does not exist",
    ),
    Report("of a shard without tensors", "noise", sharded(lambda f: save_file({}, next(f.glob("*-00001-*")))), "lacks"),
    Report("of a tensor in two shards", "either is read", sharded(doubled), r"norm\.weight stands in .* and in "),
    Report("of an empty index", "IndexError", indexed({}), "names no tensors"),
    Report("of an index that is a list", "AttributeError", indexed(["a"]), "names no tensors"),
    Report("of an index of numbers", "TypeError", indexed({FIRST: 3}), "names 3, expected files beside it"),
    Report(
        "of an index that points outside",
        "weights that no fingerprint covers",
        indexed({FIRST: "../x.safetensors"}),
        "names '../x.safetensors', expected files beside it",
    ),
    Report(
        "Blaizzy/mlx-audio#902",
        "whole numbers taken for weights",
        altered(lambda w: w.update({FIRST: (w[FIRST] * 127).to(torch.int8)})),
        f"{FIRST} is stored as I8, and config.json has no quantization_config",
    ),
    Report(
        "of fp8 without its scales",
        "weights off by their scales",
        altered(lambda w: w.update({FIRST: w[FIRST].to(torch.float8_e4m3fn)})),
        "is stored as F8_E4M3",
    ),
    Report(
        "of a configuration with fewer blocks",
        "half a model",
        configured(num_hidden_layers=1),
        r"hold 9 that .* such as model\.layers\.1\.",
    ),
]
DUMB = {
    "NaN or Inf": configured(rms_norm_eps=float("nan")),
    "all alike": altered(lambda w: [value.zero_() for value in w.values()]),
}


@pytest.mark.parametrize("report", REPORTS, ids=[report.reported for report in REPORTS])
def test_no_model_but_its_own(report: Report, tiny_model_dir: Path, tmp_path: Path) -> None:
    """Prepared or loaded, it is refused in one line that says what is wrong, and nothing is written."""
    folder = report.spoil(tiny_model_dir, tmp_path / "model")
    with pytest.raises(UserError, match=report.said) as caught:
        prepare_model(ModelSettings(source=str(folder)), Path("wheels"), tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match=report.said):
        load_both(folder)


@pytest.mark.parametrize("said", DUMB)
def test_a_model_that_says_nothing_is_refused(said: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    """Whole files, of which no answer can come: before anything is built on it."""
    folder = DUMB[said](tiny_model_dir, tmp_path / "model")
    with pytest.raises(UserError, match=f"its logits for the next token of a short chat are {said}"):
        prepare_model(ModelSettings(source=str(folder)), Path("wheels"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("values", [{"num_attention_heads": 0}, {"num_attention_heads": 3}, {"num_hidden_layers": "2"}])
def test_a_configuration_of_no_sense_is_told(values: dict[str, Any], tiny_model_dir: Path, tmp_path: Path) -> None:
    """Zero heads were a ZeroDivisionError, a number as text an error of the hub's library."""
    folder = configured(**values)(tiny_model_dir, tmp_path / "model")
    with pytest.raises(UserError, match=r"config\.json is no model that transformers knows"):
        load_model(folder)
    with pytest.raises(UserError, match=r"config\.json is no model that transformers knows"):
        prepare_model(ModelSettings(source=str(folder)), Path("wheels"), tmp_path / "out")


def test_a_quantisation_package_that_is_missing_is_named(tiny_model_dir: Path, tmp_path: Path) -> None:
    """An ImportError of transformers becomes one line."""
    quantized = {"quant_method": "hqq", "weight_quant_params": {}}
    folder = with_json(tiny_model_dir, tmp_path / "model", "config.json", quantization_config=quantized)
    with pytest.raises(UserError, match="model") as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)


def test_a_tied_head_may_be_stored_or_not(tiny_model_dir: Path, tmp_path: Path) -> None:
    """The one weight that may be missing, and a copy of it that is no stray."""
    folder = with_weights(
        tiny_model_dir, tmp_path / "head", lambda w: {**w, "lm_head.weight": w["model.embed_tokens.weight"].clone()}
    )
    assert torch.equal(load_model(folder).get_parameter("lm_head.weight"), load_model(tiny_model_dir).lm_head.weight)


def test_a_folder_that_names_no_architecture_is_read_by_its_type(tiny_model_dir: Path, tmp_path: Path) -> None:
    """`architectures` absent was a TypeError."""
    folder = with_json(tiny_model_dir, tmp_path / "model", "config.json", architectures=None)
    assert model_identity(folder)["architecture"] == "LlamaForCausalLM"


def test_a_model_without_a_stop_token_is_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    """Nothing would end its answers."""
    folder = with_json(tiny_model_dir, tmp_path / "model", "config.json", eos_token_id=None)
    (folder / "generation_config.json").write_text("{}")
    values = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(values | {"eos_token": None}))
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    with pytest.raises(UserError, match="no stop token"):
        list(generate(model, tokenizer, [chat_ids(tokenizer, "Hi")], 4, 1, "answers"))
    with pytest.raises(UserError, match="no stop token"):
        prepare_model(ModelSettings(source=str(folder)), Path("wheels"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_token_that_the_model_has_no_row_for_is_named(tiny_model_dir: Path, tmp_path: Path) -> None:
    """A tokenizer that got tokens while its model was not resized was an IndexError; of a chat template, at once."""
    model, tokenizer = load_model(tiny_model_dir), load_tokenizer(tiny_model_dir)
    tokenizer.add_tokens(["<think>"])
    with pytest.raises(UserError, match=r"holds the token '<think>' \(259\), but the model knows 259"):
        list(generate(model, tokenizer, [chat_ids(tokenizer, "So <think>")], 4, 1, "answers"))
    folder = copy_model(tiny_model_dir, tmp_path / "model")
    tokenizer.chat_template = str(tokenizer.chat_template) + "<think>"
    tokenizer.save_pretrained(folder)
    with pytest.raises(UserError, match="holds the token '<think>'"):
        prepare_model(ModelSettings(source=str(folder)), Path("wheels"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_stop_token_that_the_model_cannot_say_is_none(tiny_model_dir: Path, tmp_path: Path) -> None:
    """A token beyond the rows of the embedding, as with a tokenizer that got further tokens."""
    folder = with_json(tiny_model_dir, tmp_path / "model", "generation_config.json", eos_token_id=10**6)
    values = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(values | {"eos_token": "<|new|>"}))
    with pytest.raises(UserError, match="no stop token among its 259 tokens"):
        prepare_model(ModelSettings(source=str(folder)), Path("wheels"), tmp_path / "out")


def test_a_chat_that_ends_otherwise_than_answers_do_is_told(
    tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A base model's eos ends no turn of its chat template, so answers run on."""
    folder = with_json(tiny_model_dir, tmp_path / "model", "generation_config.json", eos_token_id=0)
    values = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(values | {"eos_token": "<|endoftext|>"}))
    prepare_model(ModelSettings(source=str(folder)), Path("wheels"), tmp_path / "out")
    assert "its chat template ends an answer with '<|im_end|>', which ends none" in capsys.readouterr().err
    prepare_model(ModelSettings(source="tiny:llama"), Path("wheels"), tmp_path / "tiny")
    assert "ends none" not in capsys.readouterr().err


@pytest.mark.parametrize(("name", "count"), [("whole-00001-of-00002.gguf", 0), ("renamed.gguf", 3)])
def test_a_part_of_a_split_gguf_is_refused(name: str, count: int, tmp_path: Path) -> None:
    """huggingface/transformers#32266: the first part alone was taken for the model. By name, and by what it says."""
    gguf = pytest.importorskip("gguf")
    path = tmp_path / name
    writer = gguf.GGUFWriter(path, "llama")
    if count:
        writer.add_uint16("split.count", count)
    writer.add_tensor("token_embd.weight", torch.ones(4, 4).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UserError, match=f"one of {count or 2} parts of a split GGUF"):
        prepare_model(ModelSettings(source=str(path)), Path("wheels"), tmp_path / "out")
    path = tmp_path / "cut.gguf"
    path.write_bytes((tmp_path / name).read_bytes()[:40])
    with pytest.raises(UserError, match="not a whole GGUF file"):
        prepare_model(ModelSettings(source=str(path)), Path("wheels"), tmp_path / "out")
