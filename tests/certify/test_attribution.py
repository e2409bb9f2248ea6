"""Where safety lives: knock-outs against models that were saved that way, shares that add up, and resumed work."""

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.model_copy import copy_model

from nspo.certify import attribution
from nspo.certify.attribution import attribute, changed_tensors, layer_groups, part_of, taken_back
from nspo.data.tables import PROMPT_COLUMNS
from nspo.errors import UserError
from nspo.evaluation.stage import EvaluationInputs, evaluate
from nspo.files.manifest import MANIFEST_NAME, fingerprint_model, make_manifest, write_json
from nspo.models.loading import load_model, load_tokenizer
from nspo.settings.evaluation import AttributionSettings, EvaluationSettings
from nspo.settings.runtime import RuntimeSettings

EVALUATION = EvaluationSettings(
    harmful_prompts=4, benign_prompts=2, general_prompts=4, max_new_tokens=6, first_tokens=2, batch_size=8
)
SETTINGS = AttributionSettings(harmful_prompts=3, general_prompts=2)
LLAMA = [f"model.layers.{b}.{n}.weight" for b in range(6) for n in ("self_attn.q_proj", "mlp.up_proj")]


@pytest.fixture(scope="module")
def folders(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The base, a tuned model, their evaluations, a cost model, prompts, and a certificate of the tuned model."""
    from transformers import AutoModelForSequenceClassification

    folder = tmp_path_factory.mktemp("attribution")
    found = {"base": tiny_model_dir, "tuned": folder / "tuned", "cost": folder / "cost"}
    copy_model(tiny_model_dir, found["tuned"])
    weights = load_file(found["tuned"] / "model.safetensors")
    torch.manual_seed(1)
    layers = {name: value for name, value in weights.items() if "_proj" in name}
    norms = {}
    for name, value in layers.items():
        update = 0.05 * torch.randn_like(value)
        norms[name.removesuffix(".weight")] = float(update.norm())
        value += update
    save_file(weights, found["tuned"] / "model.safetensors", metadata={"format": "pt"})

    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_pretrained(tiny_model_dir, num_labels=1).save_pretrained(found["cost"])
    load_tokenizer(tiny_model_dir).save_pretrained(found["cost"])
    facts = {"target": "cost", "base": {}, "labels": "", "settings": {"max_tokens": 64}}
    manifest = make_manifest("preference_model", model=fingerprint_model(found["cost"]), **facts)
    write_json(found["cost"] / MANIFEST_NAME, manifest)

    rows = [
        (f"{domain}-{n}", role, domain, "heldout", f"{domain} prompt {'x' * n}", "", "")
        for role, domain in [("harmful", "one"), ("harmful", "two"), ("benign", "benign"), ("general", "maths")]
        for n in range(4)
    ]
    found["prompts"] = folder / "prompts.parquet"
    pq.write_table(
        pa.Table.from_pylist([dict(zip(PROMPT_COLUMNS, row, strict=True)) for row in rows]), found["prompts"]
    )
    found["base_evaluation"], found["evaluation"] = folder / "eval-base", folder / "eval-tuned"
    run(found, "base", found["base_evaluation"])
    run(found, "tuned", found["evaluation"])
    found["certificate"] = folder / "certificate.json"
    write_json(
        found["certificate"],
        {
            "tuned": fingerprint_model(found["tuned"]),
            "layers": {
                name: {"update_norm": norm, "leakage_validation": {"all": 0.01}, "harmful": 0.05}
                for name, norm in norms.items()
            },
            "unconstrained": {},
        },
    )
    return found


def run(folders: dict[str, Path], policy: str, out: Path) -> list[dict[str, Any]]:
    """Evaluate one of the models; its rows."""
    base = None if policy == "base" else folders["base_evaluation"] / "responses.parquet"
    runtime = RuntimeSettings(device="cpu", workdir=str(out.parent / "work"))
    inputs = EvaluationInputs(folders["base"], folders[policy], folders["cost"], folders["prompts"], base)
    evaluate(EVALUATION, policy, 0, inputs, out, runtime)
    return pq.read_table(out / "responses.parquet").to_pylist()


def attributed(folders: dict[str, Path], out: Path) -> dict[str, Any]:
    """Run the stage; what it wrote."""
    names = ("base", "tuned", "certificate", "evaluation", "base_evaluation", "cost")
    runtime = RuntimeSettings(device="cpu", workdir=str(out.parent / "work"))
    attribute(SETTINGS, **{name: folders[name] for name in names}, out=out, runtime=runtime)
    return json.loads(out.read_text())


def test_groups_share_out_the_tensors() -> None:
    """Quarters, and attention with MLP and rest, each hold every tensor exactly once; a norm's name fools nobody."""
    norms = ["model.layers.5.post_attention_layernorm.weight", "model.norm.weight"]
    groups = layer_groups(LLAMA + norms)
    assert list(groups) == ["blocks 0 to 1", "block 2", "blocks 3 to 4", "block 5", "attention", "MLP", "rest"]
    inside = [name for group in list(groups)[:4] for name in groups[group]]
    assert sorted(inside) == sorted([*LLAMA, norms[0]])
    assert sorted(groups["attention"] + groups["MLP"] + groups["rest"]) == sorted(LLAMA + norms)
    assert groups["rest"] == norms
    assert [part_of(f"transformer.h.0.{n}.weight") for n in ("attn.c_proj", "mlp.c_fc", "ln_1")] == [
        "attention",
        "MLP",
        "rest",
    ]
    assert layer_groups(LLAMA[:1]) == {}  # one tensor: taking it back is the base model


def test_taken_back_is_undone_exactly(tiny_model_dir: Path) -> None:
    """Inside, exactly the named tensors are the base's; afterwards every bit is as before, after an error too."""
    base, tuned = load_model(tiny_model_dir), load_model(tiny_model_dir)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(0.1)
    before = {name: value.clone() for name, value in tuned.state_dict().items()}
    name = "model.layers.1.mlp.down_proj.weight"

    def fail_inside() -> None:
        with taken_back(tuned, base, [name]):
            now = tuned.state_dict()
            assert {n for n in now if torch.equal(now[n], base.state_dict()[n])} == {name}
            raise KeyError("planted")

    with pytest.raises(KeyError, match="planted"):
        fail_inside()
    assert all(torch.equal(value, before[n]) for n, value in tuned.state_dict().items())


def test_a_knock_out_is_the_model_saved_that_way(folders: dict[str, Path], tmp_path: Path) -> None:
    """Verdicts and drift without the MLPs are those of a checkpoint whose MLPs are the base's, evaluated as ever."""
    found = attributed(folders, tmp_path / "out.json")
    rows = {row["group"]: row for row in found["knockouts"]}
    assert list(rows) == ["nothing", "block 0", "block 1", "attention", "MLP", "everything"]
    shutil.copytree(folders["tuned"], tmp_path / "without")
    weights, theirs = (load_file(folders[n] / "model.safetensors") for n in ("tuned", "base"))
    weights |= {name: value for name, value in theirs.items() if "mlp" in name}
    save_file(weights, tmp_path / "without" / "model.safetensors", metadata={"format": "pt"})
    oracle = run({**folders, "without": tmp_path / "without"}, "without", tmp_path / "oracle")
    for domain in ("one", "two"):
        flags = [row["unsafe"] for row in oracle if row["domain"] == domain][:3]
        assert rows["MLP"]["unsafe_rate"][domain]["value"] == pytest.approx(sum(flags) / 3)
        assert rows["MLP"]["unsafe_rate"][domain]["n"] == 3
    general = [row for row in oracle if row["role"] == "general"][:2]
    for name in ("kl_per_token", "kl_first_tokens"):
        counts = [min(row["reference_tokens"], 2) if "first" in name else row["reference_tokens"] for row in general]
        mean = sum(row[name] * n for row, n in zip(general, counts, strict=True)) / sum(counts)
        assert rows["MLP"][name]["value"] == pytest.approx(mean, rel=1e-4)
    assert rows["everything"]["kl_per_token"]["value"] == 0
    assert rows["nothing"]["unsafe_difference"]["value"] == 0
    assert rows["nothing"]["kl_per_token"]["value"] > 0
    assert rows["attention"]["kl_per_token"]["value"] != rows["MLP"]["kl_per_token"]["value"]


def test_shares_add_up(folders: dict[str, Path], tmp_path: Path) -> None:
    """Shares of the squared norm sum to one over tensors, and over attention and MLP."""
    found = attributed(folders, tmp_path / "out.json")
    assert sum(row["share"] for row in found["tensors"]) == pytest.approx(1)
    shares = {row["group"]: row["share"] for row in found["knockouts"]}
    assert shares["attention"] + shares["MLP"] == pytest.approx(1)
    assert shares["everything"] == pytest.approx(1)
    assert {row["part"] for row in found["tensors"]} == {"attention", "MLP"}


def test_what_lies_outside_the_layers_counts() -> None:
    """Tensors that no basis constrains count too, without figures on inputs; what did not change does not."""
    layer = {"update_norm": 3.0, "leakage_validation": {}}
    found = changed_tensors(
        {
            "layers": {"model.layers.0.mlp.up_proj": layer, "model.layers.1.mlp.up_proj": {**layer, "update_norm": 0}},
            "unconstrained": {"model.embed_tokens.weight": {"update_norm": 4.0}},
        }
    )
    assert {name: (row["block"], row["part"], row["general"]) for name, row in found.items()} == {
        "model.layers.0.mlp.up_proj.weight": (0, "MLP", None),
        "model.embed_tokens.weight": (None, "rest", None),
    }


def test_an_interrupted_run_goes_on(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """After a kill in the third group two are kept, the rest is made, and the file has the same bytes."""
    whole = tmp_path / "whole" / "out.json"
    attributed(folders, whole)
    real, groups = attribution._measure, []

    def interrupted(*arguments: Any) -> Any:
        groups.append(arguments[-1])
        if len(groups) == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(attribution, "_measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        attributed(folders, tmp_path / "out.json")
    (work,) = (tmp_path / "work").iterdir()
    with work.open("a") as file:
        file.write('["MLP", {"uns')
    attributed(folders, tmp_path / "out.json")
    assert groups == ["block 0", "block 1", "attention", "attention", "MLP"]
    assert "continuing after 2 groups" in capsys.readouterr().err
    assert (tmp_path / "out.json").read_bytes() == whole.read_bytes()
    assert not list((tmp_path / "work").iterdir())


def test_refused_before_any_work(folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A certificate or an evaluation of another model, or another judge, costs no answer."""
    monkeypatch.setattr(attribution, "_measure", lambda *_: pytest.fail("measured"))
    with pytest.raises(UserError, match=r"certificate.json: made with weights"):
        attributed({**folders, "tuned": folders["base"]}, tmp_path / "out.json")
    with pytest.raises(UserError, match="eval-base: made with weights"):
        attributed({**folders, "evaluation": folders["base_evaluation"]}, tmp_path / "out.json")
    other = tmp_path / "cost"
    shutil.copytree(folders["cost"], other)
    manifest = json.loads((other / MANIFEST_NAME).read_text())
    write_json(other / MANIFEST_NAME, {**manifest, "labels": "others"})
    with pytest.raises(UserError, match="made with cost_model"):
        attributed({**folders, "cost": other}, tmp_path / "out.json")
