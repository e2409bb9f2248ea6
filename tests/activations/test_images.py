"""Prompts with an image: what is collected is what the model reads, what is protected stays, and what cannot be read
is told in one line before the model is loaded."""

import shutil
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from support.activation_runs import raw_rows, run
from support.images import image_folder, multimodal_folder

from nspo import constrain
from nspo.activations.images import ImageReader
from nspo.activations.store import ActivationStore
from nspo.bases.derived import merge
from nspo.bases.file import NullSpaceBases
from nspo.bases.stage import compute_bases
from nspo.certify.certificate import verify
from nspo.errors import UserError
from nspo.models.loading import PROCESSOR, load_config, load_model, load_tokenizer, save_model
from nspo.models.stage import prepare_model
from nspo.models.structure.coverage import coverage_of, in_words
from nspo.settings.bases import BasesSettings
from nspo.settings.model import ModelSettings
from nspo.settings.runtime import RuntimeSettings

FAMILIES = ["llava", "gemma3"]
WIDE = {"hidden_size": 256, "intermediate_size": 288, "head_dim": 64}  # more directions than tokens are kept
FEW = {"samples": 2, "harmful_samples": 0, "tokens_per_domain": 84, "max_new_tokens": 3}
PROMPTS = ["What is it?", "Name a colour.", "Why?"]
EXACT = 1e-6


@pytest.fixture(scope="module", params=FAMILIES)
def prepared(request, tmp_path_factory) -> Path:
    """A tiny multimodal model as `prepare_model` writes it."""
    folder = tmp_path_factory.mktemp(request.param)
    multimodal_folder(request.param, folder / "published", **WIDE)
    prepare_model(ModelSettings(source=str(folder / "published")), Path("unused"), folder / "base")
    return folder / "base"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    return image_folder(tmp_path_factory.mktemp("images"), PROMPTS)


@pytest.fixture(scope="module")
def store(prepared, prompts, pictures) -> ActivationStore:
    return run(prepared.parent / "activations", prepared, prompts, images=str(pictures), **FEW)


def test_collected_is_what_the_model_reads_as_it_answers(prepared, prompts, pictures, tmp_path) -> None:
    """Rows of the domain `image` are those that a hook sees while transformers itself answers the prompt: the same at
    every position, where an image stands too."""
    store = run(tmp_path / "a", prepared, prompts, images=str(pictures), samples=3, max_new_tokens=4)
    site = next(name for name in store.sites if "layers.1." in name and "q_proj" in name)
    rows = raw_rows(store, site, domain="image", split="basis")
    assert {row["sample"] for row in rows} == {0, 1}  # the third image is of the split validation
    model, tokenizer = load_model(prepared), load_tokenizer(prepared)
    reader, seen = ImageReader(prepared, model.config, tokenizer), []
    module = model.get_submodule(site)
    module.register_forward_pre_hook(lambda _, args: seen.append(args[0][0].detach()))
    for sample in (0, 1):
        seen.clear()
        inputs = reader.inputs(pictures / f"{sample}.png", PROMPTS[sample])
        answer = model.generate(**inputs, max_new_tokens=4, do_sample=False, eos_token_id=tokenizer.eos_token_id)
        found = [row for row in rows if row["sample"] == sample]
        assert [row["token"] for row in found] == answer[0, 1:].tolist()  # drop_first
        read = torch.cat(seen)[1:]
        kept = torch.tensor([row["activation"] for row in found])[: len(read)]
        torch.testing.assert_close(kept, read, atol=1e-5, rtol=1e-4)
    images = [row for row in rows if row["token"] == model.config.image_token_id]
    assert len(images) == 8
    assert images[0]["activation"] != images[4]["activation"]  # of two images


def test_image_inputs_are_protected_where_they_are_collected_and_not_where_they_are_not(
    prepared, store, pictures, tmp_path
) -> None:
    """After training on images and text, W K stays for every kept image position under bases of both; bases of text
    alone let it change, so the first figure could have been large. The certificate says which it is."""
    leaked, certificates, made = {}, {}, []
    for weight in (1.0, 0.0):
        settings = BasesSettings(rule="relative", threshold=1e-13, weights={"image": weight})
        file = tmp_path / f"{weight}.safetensors"
        compute_bases(settings, store.path, file, RuntimeSettings(device="cpu", workdir=str(tmp_path / "work")))
        bases = NullSpaceBases.load(file)
        made.append(bases)
        _train(prepared, bases, pictures, tmp_path / f"tuned {weight}")
        leaked[weight] = _leak_at_images(prepared, tmp_path / f"tuned {weight}", store)
        certificates[weight] = verify(prepared, tmp_path / f"tuned {weight}", bases, store)
    assert leaked[1.0] < EXACT
    assert leaked[0.0] > 1e-3
    assert all(found["summary"]["leakage_basis"]["max"] < EXACT for found in certificates.values())
    held_out = {
        weight: [row["leakage_validation"]["image"] for row in found["layers"].values()]
        for weight, found in certificates.items()
    }
    assert sum(held_out[1.0]) < sum(held_out[0.0])
    for weight, kind in ((1.0, "protected"), (0.0, "unprotected")):
        assert certificates[weight]["coverage"][f"{kind}_inputs"] == ["image"]
    for bases, kind in zip((*made, merge(made)), ("protected", "unprotected", "protected"), strict=True):
        assert f"image inputs are {kind}" in in_words(coverage_of(bases.manifest))
    for name in PROCESSOR:
        assert (tmp_path / "tuned 1.0" / name).is_file() == (prepared / name).is_file()


def _train(prepared: Path, bases: NullSpaceBases, pictures: Path, out: Path) -> None:
    """Three constrained steps on prompts with images."""
    model, tokenizer = load_model(prepared), load_tokenizer(prepared)
    reader = ImageReader(prepared, model.config, tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    constrain(model, optimizer, bases, anchor=prepared, mode="anchor")
    for number, prompt in enumerate(PROMPTS):
        inputs = reader.inputs(pictures / f"{number}.png", prompt)
        optimizer.zero_grad()
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        optimizer.step()
    save_model(model, out, prepared)
    tokenizer.save_pretrained(out)


def _leak_at_images(base: Path, tuned: Path, store: ActivationStore) -> float:
    """||dW K|| / ||W K|| of the worst layer, K the kept inputs at the positions of images."""
    before, after = load_model(base), load_model(tuned)
    worst = 0.0
    for name, site in store.sites.items():
        rows = raw_rows(store, name, domain="image", split="basis")
        image = before.config.image_token_id
        inputs = torch.tensor([row["activation"] for row in rows if row["token"] == image]).double().T
        assert inputs.shape[1] >= 7
        for layer in site.layers:
            weights = [model.get_submodule(layer).weight.detach().double() for model in (before, after)]
            assert (weights[1] - weights[0]).norm() > 1e-3 * weights[0].norm()
            worst = max(worst, float(((weights[1] - weights[0]) @ inputs).norm() / (weights[0] @ inputs).norm()))
    return worst


def test_the_same_images_give_the_same_bytes_and_others_another_identity(prepared, prompts, pictures, tmp_path) -> None:
    """Images shape the identity by what is in them."""
    copy = shutil.copytree(pictures, tmp_path / "copy")
    Image.new("RGB", (20, 30)).save(copy / "0.png")
    data = [
        run(tmp_path / str(number), prepared, prompts, images=str(folder), **FEW, layers=".*layers.0.*q_proj")
        for number, folder in enumerate((pictures, pictures, copy))
    ]
    assert data[0].manifest == data[1].manifest
    assert data[0].manifest["data"] != data[2].manifest["data"]


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("text alone", "reads no images"),
        ("no processor", "has no processor"),
        ("another processor", "is a .*, without images"),
        ("no metadata", "holds no metadata.jsonl"),
        ("a column", "row 2 of .* lacks its `file_name` or `prompt`"),
        ("a file", "is no file, row 3"),
        ("no image", r"1\.png cannot be opened as an image"),
        ("cut off", r"1\.png cannot be opened as an image"),
        ("two images", "2 different images, expected at least three"),
        ("no mark", "shows no images: set model.chat_template"),
        ("no Pillow", r"needs the package Pillow: pip install 'nspo\[images\]'"),
        ("no room", "all 2 prompts are longer than"),
    ],
)
def test_what_cannot_be_read_is_told_before_the_model_is_loaded(
    prepared, tiny_model_dir, prompts, pictures, tmp_path, monkeypatch, fault, said
) -> None:
    model, images = shutil.copytree(prepared, tmp_path / "model"), shutil.copytree(pictures, tmp_path / "images")
    rows = (images / "metadata.jsonl").read_text().splitlines()
    match fault:
        case "text alone":
            model = tiny_model_dir
        case "no processor":
            (model / PROCESSOR[1]).unlink()
        case "another processor":
            (model / PROCESSOR[1]).write_text('{"processor_class": "NoSuchProcessor"}')
        case "no metadata":
            (images / "metadata.jsonl").unlink()
        case "a column":
            (images / "metadata.jsonl").write_text("\n".join([rows[0], '{"file_name": "1.png"}', rows[2]]))
        case "a file":
            (images / "2.png").unlink()
        case "no image":
            (images / "1.png").write_text("a picture")
        case "cut off":
            (images / "1.png").write_bytes((pictures / "1.png").read_bytes()[:900])
        case "two images":
            shutil.copyfile(images / "0.png", images / "2.png")
        case "no mark":
            template = (model / "chat_template.jinja").read_text()
            (model / "chat_template.jinja").write_text(template.replace("<image>", "").replace("<boi>", ""))
        case "no Pillow":
            monkeypatch.setitem(sys.modules, "PIL", None)
        case "no room":
            (images / "metadata.jsonl").write_text(
                "\n".join(rows).replace("?", "?" * 600).replace("a colour", "a" * 600)
            )
    monkeypatch.setattr("nspo.activations.stage.load_model", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(UserError, match=said) as told:
        run(tmp_path / "a", model, prompts, images=str(images), **{**FEW, "max_new_tokens": 5})
    assert "\n" not in str(told.value)


def test_a_prepared_model_keeps_its_processor(prepared) -> None:
    """Bit for bit, beside a chat template that may be the settings' own."""
    kept = [name for name in PROCESSOR if (prepared / name).is_file()]
    assert kept
    for name in kept:
        assert (prepared / name).read_bytes() == (prepared.parent / "published" / name).read_bytes()
    assert load_config(prepared, "model").vision_config
