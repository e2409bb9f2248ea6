"""Models: one way of loading, chatting and generating; what batching must not change; what is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from nspo.errors import UserError
from nspo.files.manifest import fingerprint_model
from nspo.models.chat import chat_ids
from nspo.models.generation import batches, generate, pad_left, stop_ids
from nspo.models.loading import load_model, load_tokenizer, model_identity
from nspo.models.stage import prepare_model
from nspo.run.devices import device_of
from nspo.settings.model import ModelSettings


def test_prepared_folder_says_what_it_is(tiny_model_dir: Path) -> None:
    """The manifest holds the fingerprints of the saved weights and tokenizer; weights are fp32."""
    manifest = json.loads((tiny_model_dir / "manifest.json").read_text())
    assert manifest["kind"] == "model"
    assert fingerprint_model(tiny_model_dir).items() <= manifest["model"].items()
    assert model_identity(tiny_model_dir)["architecture"] == "LlamaForCausalLM"
    assert {p.dtype for p in load_model(tiny_model_dir).parameters()} == {torch.float32}


def test_preparing_a_folder_keeps_the_weights(tiny_model_dir: Path, tmp_path: Path) -> None:
    """A model on disk is copied as it is: bf16 becomes the same values in fp32, and runs are equal."""
    half = load_model(tiny_model_dir).to(torch.bfloat16)
    half.save_pretrained(tmp_path / "half")
    load_tokenizer(tiny_model_dir).save_pretrained(tmp_path / "half")
    for name in ("a", "b"):
        prepare_model(ModelSettings(source=str(tmp_path / "half")), Path("wheels"), tmp_path / name)
    prepared = load_model(tmp_path / "a").state_dict()
    assert all(torch.equal(prepared[name], value.float()) for name, value in half.state_dict().items())
    assert fingerprint_model(tmp_path / "a") == fingerprint_model(tmp_path / "b")


def test_identity_is_of_the_files_that_are_loaded(tiny_model_dir: Path, tmp_path: Path) -> None:
    """The same weights in another form, or shards of an older copy, are not the model, sharded or whole."""
    model, tokenizer = load_model(tiny_model_dir), load_tokenizer(tiny_model_dir)
    for size in ("1GB", "20KB"):
        folder = tmp_path / size
        model.save_pretrained(folder, max_shard_size=size)
        tokenizer.save_pretrained(folder)
        before = fingerprint_model(folder)
        for name in ("consolidated.safetensors", "model-00001-of-00077.safetensors"):
            (folder / name).write_bytes(b"another form")
        assert fingerprint_model(folder) == before
        assert model_identity(folder).items() >= before.items()
        used = max(path for path in folder.glob("model*.safetensors") if "00077" not in path.name)
        used.write_bytes(used.read_bytes()[:-1] + b"!")
        assert fingerprint_model(folder)["weights"] != before["weights"]
    used.unlink()
    with pytest.raises(UserError, match=r"safetensors does not exist, model\.safetensors\.index\.json expects it"):
        fingerprint_model(folder)


def test_a_model_without_chat_template_is_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    """A base model that was not made for chat is refused before anything is written."""
    load_model(tiny_model_dir).save_pretrained(tmp_path / "m")
    tokenizer = load_tokenizer(tiny_model_dir)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "m")
    with pytest.raises(UserError, match="no chat template"):
        prepare_model(ModelSettings(source=str(tmp_path / "m")), Path("wheels"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    """An empty folder is refused by both ways of loading."""
    with pytest.raises(UserError, match="expected a Hugging Face model folder"):
        load_model(tmp_path)
    with pytest.raises(UserError, match=r"^model\.source: .*holds no model"):
        prepare_model(ModelSettings(source=str(tmp_path)), Path("wheels"), tmp_path / "out")


def test_chat_format_has_no_doubled_specials(tiny_model_dir: Path) -> None:
    """The template is applied once: each turn opens once, and the answer's turn is open at the end."""
    tokenizer = load_tokenizer(tiny_model_dir)
    text = tokenizer.decode(chat_ids(tokenizer, "Hello"))
    assert text == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"


def test_pad_left() -> None:
    """Rows end together; the mask has a one for each real token."""
    ids, mask = pad_left([[5, 6, 7], [8]], pad_id=0)
    assert ids.tolist() == [[5, 6, 7], [0, 0, 8]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]


def test_a_batch_is_never_mostly_padding() -> None:
    """Every place once, shortest first, at most so many rows; a long text is not what short ones are padded to. A list
    that is cut at the end of a batch goes on with the same batches, which is what resumed answers rest on."""
    lengths = [50, 264, 45, 170, 90, 44, 130, 101]
    found = batches(lengths, 3)
    assert found == [[5, 2, 0], [4, 7, 6], [3, 1]]
    assert batches([10, 21], 8) == [[0], [1]]
    rest = [place for batch in found[1:] for place in batch]
    assert batches([lengths[place] for place in rest], 3) == [[0, 1, 2], [3, 4]]


def test_generation_does_not_depend_on_the_batch(tiny_model_dir: Path) -> None:
    """Greedy answers are the same one at a time and padded together, and belong to their prompt."""
    model, tokenizer = load_model(tiny_model_dir), load_tokenizer(tiny_model_dir)
    prompts = [chat_ids(tokenizer, text) for text in ("Hello", "A much longer question than that", "Why?", "One two")]
    alone = dict(generate(model, tokenizer, prompts, 8, 1, "alone"))
    together = dict(generate(model, tokenizer, prompts, 8, 4, "together"))
    assert alone == together
    assert sorted(alone) == [0, 1, 2, 3]


def test_answers_end_with_the_first_stop_token(tiny_model_dir: Path) -> None:
    """Nothing after the end of an answer is kept, as padding or otherwise."""
    model, tokenizer = load_model(tiny_model_dir), load_tokenizer(tiny_model_dir)
    prompts = [chat_ids(tokenizer, text) for text in ("Hello", "Why?")]
    free = dict(generate(model, tokenizer, prompts, 6, 2, "free"))
    stop = free[0][1]
    model.generation_config.eos_token_id = [*stop_ids(model, tokenizer), stop]
    for index, answer in generate(model, tokenizer, prompts, 6, 2, "stopped"):
        end = free[index].index(stop) + 1 if stop in free[index] else 6
        assert answer == free[index][:end]


def test_greedy_is_greedy(tiny_model_dir: Path) -> None:
    """A penalty on repetition in a model's own generation settings (Qwen2.5's) changes no answer."""
    model, tokenizer = load_model(tiny_model_dir), load_tokenizer(tiny_model_dir)
    prompts = [chat_ids(tokenizer, text) for text in ("Hello", "Why?")]
    plain = dict(generate(model, tokenizer, prompts, 8, 2, "plain"))
    model.generation_config.repetition_penalty = 5.0
    assert dict(generate(model, tokenizer, prompts, 8, 2, "penalised")) == plain


def test_device() -> None:
    """`auto` takes what there is; a GPU that is not there is refused with the key to change."""
    assert device_of("cpu").type == "cpu"
    assert device_of("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match=r"runtime\.device is 'cuda'"):
            device_of("cuda")


def test_changed_weights_are_noticed(tiny_model_dir: Path, tmp_path: Path) -> None:
    """A prepared folder whose weights are no longer those of its manifest is refused by name; whole, it is not."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_dir, folder)
    assert model_identity(folder) == model_identity(tiny_model_dir)
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-100] ^= 4
    for damaged in (content, content[:-100]):
        weights.write_bytes(damaged)
        with pytest.raises(UserError, match="model: weights with the fingerprint") as error:
            model_identity(folder)
        assert "\n" not in str(error.value)


def test_a_saved_tokenizer_does_not_say_how_it_was_loaded(tiny_model_dir: Path, tmp_path: Path) -> None:
    """Offline or not, from a folder or not: transformers would write that down, and equal runs would differ."""
    tokenizer = load_tokenizer(tiny_model_dir)
    tokenizer.save_pretrained(tmp_path)
    assert not {"is_local", "local_files_only"} & json.loads((tmp_path / "tokenizer_config.json").read_text()).keys()
