"""Properties: the walk sets exactly W0 + a (W - W0), asks the base once, resumes, and writes the weights it names."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from support.cost_model import random_cost_model
from support.model_copy import copy_model

from nspo.data.tables import PROMPT_COLUMNS
from nspo.errors import UserError
from nspo.evaluation.walk import stage, walker
from nspo.evaluation.walk.match import Match
from nspo.models.line import Line
from nspo.models.loading import load_model
from nspo.settings.evaluation import AnsweringSettings, MatchingSettings
from nspo.settings.runtime import RuntimeSettings

SETTINGS = MatchingSettings(scales=[0.5, 1.0], harmful_prompts=8, benign_prompts=2, general_prompts=2)
ANSWERING = AnsweringSettings(max_new_tokens=5, first_tokens=2, batch_size=4)


@pytest.fixture(scope="module")
def files(tiny_model_dir, tmp_path_factory):
    """Base, policy (with an update of rank 1 in every MLP), cost model and validation prompts."""
    folder = tmp_path_factory.mktemp("walk")
    policy, generator = load_model(tiny_model_dir), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in policy.named_parameters():
            if "mlp" in name:
                out, into = weight.shape
                weight += 0.3 * torch.randn(out, 1, generator=generator) @ torch.randn(1, into, generator=generator)
    tuned = copy_model(tiny_model_dir, folder / "tuned")
    policy.save_pretrained(tuned)
    sets = [("harmful", "advbench", 8), ("benign", "benign", 2), ("general", "maths", 2), ("general", "code", 2)]
    rows = [
        (f"{domain}-{n}", role, domain, "validation", f"{domain} prompt {'x' * n}", "", "")
        for role, domain, count in sets
        for n in range(count)
    ]
    pq.write_table(
        pa.Table.from_pylist([dict(zip(PROMPT_COLUMNS, row, strict=True)) for row in rows]), folder / "prompts.parquet"
    )
    cost = random_cost_model(tiny_model_dir, folder / "cost")
    return {"base": tiny_model_dir, "policy": tuned, "cost": cost, "prompts": folder / "prompts.parquet"}


def walk(files, out: Path, settings=SETTINGS, labels=None):
    runtime = RuntimeSettings(device="cpu", workdir=str(out.parent / "work"))
    inputs = stage.WalkInputs(**files, labels=labels)
    stage.match_safety(settings, ANSWERING, "nspo", 0, inputs, out, runtime)
    return json.loads((out / "match.json").read_text())


def test_the_ends_of_a_line_are_the_checkpoints_bit_for_bit(files):
    line, tuned = Line(load_model(files["base"]), files["base"], files["policy"]), load_model(files["policy"])
    assert line.changed
    assert all("mlp" in name for name in line.changed)
    for scale, end in ((1.0, tuned), (0.0, load_model(files["base"]))):
        ours = line.to(scale).model.state_dict()
        assert all(torch.equal(ours[name], value) for name, value in end.state_dict().items())


def test_an_update_in_a_null_space_stays_in_it_along_the_line(files, tmp_path):
    """The whole line leaves the outputs of protected inputs where they are, beyond the trained policy too."""
    base = load_model(files["base"])
    name = "model.layers.0.mlp.gate_proj.weight"
    weight, generator = base.get_parameter(name).detach().clone(), torch.Generator().manual_seed(1)
    protected = torch.linalg.qr(torch.randn(weight.shape[1], 5, generator=generator)).Q
    update = torch.randn(weight.shape, generator=generator)
    update -= update @ protected @ protected.T
    policy = load_model(files["base"])
    with torch.no_grad():
        policy.get_parameter(name).add_(update)
    tuned = copy_model(files["base"], tmp_path / "tuned")
    policy.save_pretrained(tuned)
    line = Line(base, files["base"], tuned)
    for scale in (0.3, 0.77, 1.25):
        moved = line.to(scale).model.get_parameter(name).detach() - weight
        assert (moved @ protected).norm() < 1e-6 * moved.norm()
        assert moved.norm() == pytest.approx(scale * update.norm().item(), rel=1e-4)


def test_the_folder_holds_the_model_at_the_scale_that_it_names(files, tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "matched", lambda *_: Match(0.7, "met", 0.3, 1.0, 0.0))
    found = walk(files, tmp_path / "matched")
    assert (found["scale"], found["found"]) == (0.7, "met")
    assert [stop["scale"] for stop in found["stops"]] == [0.0, 0.5, 0.7, 1.0]  # measured at a* too
    ours = load_model(tmp_path / "matched").state_dict()
    base, tuned = load_model(files["base"]).state_dict(), load_model(files["policy"]).state_dict()
    for name, value in ours.items():
        assert torch.allclose(value, base[name] + 0.7 * (tuned[name] - base[name]), atol=1e-6)


def test_drift_is_zero_at_the_base_and_grows(files, tmp_path):
    stops = walk(files, tmp_path / "matched")["stops"]
    kl = [stop["kl_per_token"] for stop in stops]
    assert kl[0] == 0.0
    assert kl == sorted(kl)
    assert kl[-1] > kl[1] > 0
    rows = pq.read_table(tmp_path / "matched" / "walk.parquet").to_pylist()
    assert len(rows) == len(stops) * (8 + 2 + 4)


def test_prompts_that_a_judge_learnt_from_are_not_asked(files, tmp_path):
    rows = [{"split": "train", "prompt": f"Advbench prompt {'x' * n}."} for n in (1, 3)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "labels.parquet")
    found = walk(files, tmp_path / "out", labels=tmp_path / "labels.parquet")
    assert found["learnt"] == {"advbench": 2}
    assert {stop["n"] for stop in found["stops"]} == {6}


def test_a_target_that_is_not_met_is_told(files, tmp_path, capsys):
    found = walk(files, tmp_path / "matched", SETTINGS.model_copy(update={"target_unsafe": 1e-6}))
    assert found["found"] == "not reached"
    assert "NOT matched" in capsys.readouterr().err


def test_an_interrupted_walk_goes_on_to_the_same_bytes(files, tmp_path, monkeypatch, capsys):
    walk(files, tmp_path / "whole" / "matched")
    real, calls = walker.Walker._stop, []

    def stop(self, scale):
        calls.append(scale)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(self, scale)

    monkeypatch.setattr(walker.Walker, "_stop", stop)
    with pytest.raises(KeyboardInterrupt):
        walk(files, tmp_path / "resumed" / "matched")
    assert not (tmp_path / "resumed" / "matched").exists()
    walk(files, tmp_path / "resumed" / "matched")
    assert calls[:3] == [0.0, 0.5, 1.0]
    assert calls[3:5] == [0.0, 1.0]  # 0.5 was kept
    assert "continuing after" in capsys.readouterr().err
    ours, theirs = tmp_path / "resumed" / "matched", tmp_path / "whole" / "matched"
    for path in sorted(theirs.iterdir()):
        assert (ours / path.name).read_bytes() == path.read_bytes(), path.name


def test_one_walker_walks_several_policies_and_is_the_base_again_between(files):
    several = walker.Walker.load(files["base"], files["cost"], files["prompts"], SETTINGS, ANSWERING, "cpu")
    first = several.walk(files["policy"], [1.0])
    again = several.walk(files["policy"], [1.0])
    assert first == again
    assert several.walk(files["base"], [1.0])[1.0] == [{**row, "scale": 1.0} for row in several.start]


def test_another_architecture_is_refused(files, tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(files["base"])
    config.intermediate_size += 8
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "wide")
    with pytest.raises(UserError, match="differ in the tensor"):
        Line(load_model(files["base"]), files["base"], tmp_path / "wide")
