"""The prepared model: proven float32 from every source, and a tokenizer that chats as the settings say."""

import json
from pathlib import Path

import pytest
import torch
import transformers

from nspo.errors import UserError
from nspo.models.chat import chat_ids, chat_text
from nspo.models.folders.weights import open_weights
from nspo.models.loading import load_model, load_tokenizer, model_identity
from nspo.models.stage import prepare_model
from nspo.models.tiny import tiny_model, tiny_tokenizer
from nspo.settings.model import ModelSettings
from tests.support.families import EXPERTS, tiny_family
from tests.support.quantised import to_fp8, to_gguf, to_mxfp4

TURNS = "{% for message in messages %}[{{ message.role }}] {{ message.content }}\n{% endfor %}"
WANTS_SYSTEM = "{% if messages[0].role != 'system' %}{{ raise_exception('a system turn first') }}{% endif %}" + TURNS
PARTS = "{% for m in messages %}{% for c in m.content if c.type == 'text' %}<{{ c.text }}>{% endfor %}{% endfor %}"


def published(model, folder: Path) -> Path:
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def prepare(folder: Path, **settings: str) -> Path:
    out = folder.with_name("prepared")
    prepare_model(ModelSettings(source=str(folder), **settings), folder, out)
    return out


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "gemma3"])
def test_fp8_becomes_what_it_means(family: str, tmp_path: Path) -> None:
    """Codes times scales, in float32, under the names that a reload finds; nothing is left that says quantised."""
    meant = to_fp8(published(tiny_family(family), tmp_path / "fp8"))
    out = prepare(tmp_path / "fp8")
    prepared = load_model(out)
    assert {value.dtype for value in prepared.parameters()} == {torch.float32}
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    assert meant
    as_published = open_weights(out, torch.nn.Module())  # by the names on disk
    for name, value in meant.items():
        assert torch.equal(as_published.read(name), value), name


def test_mxfp4_becomes_what_it_means(tmp_path: Path) -> None:
    """The experts of gpt-oss are there again, as floats."""
    torch.manual_seed(0)
    config = transformers.GptOssConfig(**{**EXPERTS, "intermediate_size": 32})
    meant = to_mxfp4(published(transformers.GptOssForCausalLM(config).float(), tmp_path / "mxfp4"))
    state = load_model(prepare(tmp_path / "mxfp4")).state_dict()
    assert len(meant) == 4
    for name, value in meant.items():
        assert torch.equal(state[name], value), name


def test_gguf_becomes_what_it_means(tmp_path: Path, monkeypatch) -> None:
    """Codes times scales, by the package's own arithmetic, under transformers' names; the file is parsed once."""
    import gguf

    parsed, reader = [], gguf.GGUFReader
    monkeypatch.setattr(gguf, "GGUFReader", lambda path: parsed.append(path) or reader(path))
    meant = to_gguf(tiny_model(), tmp_path / "model.gguf")
    state = load_model(prepare(tmp_path / "model.gguf", chat_template=TURNS)).state_dict()
    assert parsed == [str(tmp_path / "model.gguf")]
    assert meant.keys() == state.keys() - {"lm_head.weight"}
    for name, value in meant.items():
        assert torch.equal(state[name], value), name


def test_a_folder_that_does_not_give_the_weights_back_is_not_written(tmp_path: Path, monkeypatch) -> None:
    """The proof is a reload: saving that changes one value ends in a line, and leaves no folder."""
    folder = published(tiny_family("llama"), tmp_path / "model")

    def lossy(self, target, **_):
        with torch.no_grad():
            value = self.state_dict()["model.norm.weight"]
            value[0] += 1
            plain(self, target)
            value[0] -= 1

    plain = transformers.LlamaForCausalLM.save_pretrained
    monkeypatch.setattr(transformers.LlamaForCausalLM, "save_pretrained", lossy)
    with pytest.raises(UserError, match=r"1 of \d+ weights are others .* such as model\.norm\.weight"):
        prepare(folder)
    assert not (tmp_path / "prepared").exists()


def test_a_package_that_is_missing_is_named(tmp_path: Path) -> None:
    """Quantised by a library that is not installed: one line instead of its ImportError."""
    folder = published(tiny_family("llama"), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"^model\.source: .* cannot be loaded: .*(gptq|optimum)"):
        prepare(folder)


def test_the_chat_template_of_the_settings(tmp_path: Path) -> None:
    """A template for a base model, as text or as a file, is the tokenizer's own ever after."""
    folder = published(tiny_family("llama"), tmp_path / "model")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    with pytest.raises(UserError, match=r"no chat template: give one as model\.chat_template"):
        prepare(folder)
    with pytest.raises(UserError, match=r"has no chat template: give one as model\.chat_template"):
        chat_ids(load_tokenizer(folder), "Hello")
    (tmp_path / "turns.jinja").write_text(TURNS)
    for given in (TURNS, str(tmp_path / "turns.jinja")):
        assert chat_text(load_tokenizer(prepare(folder, chat_template=given)), "Hello") == "[user] Hello\n"
    with pytest.raises(UserError, match=r"model\.chat_template: 'nowhere' is no Jinja text and cannot be read"):
        prepare(folder, chat_template="nowhere")
    with pytest.raises(UserError, match="does not show the prompt"):
        prepare(folder, chat_template="{{ bos_token }}")


def test_the_system_prompt_opens_every_chat(tmp_path: Path) -> None:
    """It becomes part of the template, so that every reader of the folder uses it; the identity says so."""
    folder = published(tiny_family("llama"), tmp_path / "model")
    with pytest.raises(UserError, match=r"refuses a single user turn \(a system turn first\): set model\.sys"):
        prepare(folder, chat_template=WANTS_SYSTEM)
    said = 'Be "kind".\nÜber all.'
    out = prepare(folder, chat_template=WANTS_SYSTEM, system_prompt=said)
    assert chat_text(load_tokenizer(out), "Hello") == f"[system] {said}\n[user] Hello\n"
    turns = [{"role": "system", "content": "Another."}, {"role": "user", "content": "Hello"}]
    assert load_tokenizer(out).apply_chat_template(turns, tokenize=False) == "[system] Another.\n[user] Hello\n"
    assert model_identity(out)["system_prompt"] == said
    assert model_identity(out)["tokenizer"] != model_identity(folder)["tokenizer"]
    with pytest.raises(UserError, match=r"model\.system_prompt: the chat template of .* does not show it"):
        prepare(folder, chat_template="{{ messages[-1].content }}", system_prompt=said)


def test_templates_that_read_parts_alone(tmp_path: Path) -> None:
    """A multimodal template that shows nothing of plain text would silently drop every prompt; it is given parts."""
    folder = published(tiny_family("llama"), tmp_path / "model")
    out = prepare(folder, chat_template=PARTS, system_prompt="Be kind.")
    assert chat_text(load_tokenizer(out), "Hello") == "<Be kind.><Hello>"
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = PARTS
    tokenizer.save_pretrained(folder)
    assert chat_text(load_tokenizer(folder), "Hello") == "<Hello>"


def test_neither_pad_nor_eos(tmp_path: Path) -> None:
    """A tokenizer without both is refused in one line."""
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="neither a pad nor an eos token"):
        load_tokenizer(tmp_path)
