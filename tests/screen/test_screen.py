"""The screen: candidate steps and figures by hand, and the whole stage on the tiny model."""

import json
import math
from dataclasses import replace

import pytest
import torch
from support.constrained import gram, orthonormal

from nspo.activations.stage import collect
from nspo.bases.stage import compute_basis
from nspo.errors import UserError
from nspo.models.loading import load_model
from nspo.nullspace.projection import protected_part
from nspo.screen.rollout import Rollout
from nspo.screen.stage import screen
from nspo.screen.steps import Candidate, advantages, cost_of_gain, dot, first_step
from nspo.settings.bases import ActivationSettings, ScreenSettings, SelectionSettings
from nspo.settings.policy.section import RolloutSettings
from nspo.settings.runtime import RuntimeSettings


def site(rank: int = 1):
    """The first axis of three is protected."""
    made = compute_basis("s", ["a"], gram(3, 0), 100, "rank", rank)
    return replace(made, basis=torch.eye(3)[:, :rank].contiguous(), kind="range", rank=rank)


def step(mode: str, gradient: list[float]) -> list[float]:
    sites = {} if mode in ("sign", "plain") else {"a": site()}
    return first_step(Candidate("x", mode, sites), "a", torch.tensor([gradient]))[0].tolist()


def test_modes_are_orders_of_sign_and_projection():
    """With the first of three axes protected, of (5, -2, 1/8)."""
    gradient = [5.0, -2.0, 0.125]
    assert step("plain", gradient) == gradient
    assert step("sign", gradient) == [1.0, -1.0, 1.0]
    assert step("anchor", gradient) == [0.0, -1.0, 1.0]
    assert step("both", gradient) == [0.0, -1.0, 1.0]
    assert step("gradient", gradient) == [0.0, -1.0, 1.0]


def test_only_the_sign_after_the_projection_leaks():
    """Off the axes anchor and both stay in the free space, while sign(P g) leaves it."""
    q = orthonormal(8, 3, 1)
    made = compute_basis("s", ["a"], gram(8, 0), 100, "rank", 3)
    sites = {"a": replace(made, basis=q, kind="range", rank=3)}
    gradient = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    leak = {
        mode: float(protected_part(first_step(Candidate("x", mode, sites), "a", gradient), q, "range").norm())
        for mode in ("anchor", "both", "gradient")
    }
    assert max(leak["anchor"], leak["both"]) < 1e-5 < 0.1 < leak["gradient"]
    assert not torch.allclose(*(first_step(Candidate("x", mode, sites), "a", gradient) for mode in ("anchor", "both")))


def test_advantages_by_hand():
    """Rewards 1 and 3 are one standard deviation (sqrt 2) over and under 2, up to 1e-4; equal ones teach nothing."""
    found = advantages(torch.tensor([1.0, 3.0, 5.0, 5.0]), 2)
    expected = 1 / (math.sqrt(2) + 1e-4)
    assert found.tolist() == pytest.approx([-expected, expected, 0.0, 0.0])


def test_cost_does_not_depend_on_the_length_of_a_step():
    assert cost_of_gain(0.01, 0.1) == pytest.approx(cost_of_gain(0.04, 0.2)) == pytest.approx(1.0)
    assert cost_of_gain(0.01, 0.0) is None
    assert dot({"a": torch.tensor([[1.0, 2.0]])}, {"a": torch.tensor([[3.0, -1.0]])}) == 1.0


SAMPLING = RolloutSettings(prompts_per_step=2, group_size=4, benign_share=0.5, max_new_tokens=8, margin=100.0)
SETTINGS = ScreenSettings(
    answers=[8, 16],
    rules={"energy 0.5": SelectionSettings(rule="energy", threshold=0.5)},
    gain_prompts=4,
    general_prompts=2,
)


def run(inputs, folder, settings=SETTINGS):
    runtime = RuntimeSettings(device="cpu", workdir=str(folder / "work"))
    store = folder / "store"
    if not store.exists():
        kept = ActivationSettings(samples=4, harmful_samples=4, benign_samples=2, max_new_tokens=4, storage="moments")
        collect(kept, inputs["model"], inputs["prompts"], store, runtime)
    paths = {key: inputs[key] for key in ("model", "reward", "cost", "prompts")}
    screen(settings, SAMPLING, **paths, activations=store, out=folder / "out", runtime=runtime)
    return folder / "out"


def test_the_stage_compares_every_candidate_at_equal_gain(inputs, tmp_path, monkeypatch):
    """A row for each; all gains are equal to first order, what is measured is near; the base stays as it was.

    What is learnt from is judged too, or an untrained model might lose by every step.
    """
    samples, sample = [], Rollout.sample

    def same(*given):
        samples.append(samples[0] if samples else sample(*given))
        return samples[0]

    monkeypatch.setattr(Rollout, "sample", same)
    before = (inputs["model"] / "model.safetensors").read_bytes()
    rows = json.loads((run(inputs, tmp_path) / "screen.json").read_text())["rows"]
    names = {(row["space"], row["mode"], row["answers"]) for row in rows}
    modes = [("none", "sign"), ("none", "plain"), ("random", "anchor")]
    modes += [("energy 0.5", mode) for mode in ("anchor", "both", "gradient")]
    assert names == {(*mode, count) for mode in modes for count in (8, 16)}
    measured = [row for row in rows if row["cost"] is not None]
    assert ("none", "sign", 16) in {(row["space"], row["mode"], row["answers"]) for row in measured}
    for row in measured:
        same = [other["gain"] for other in measured if other["answers"] == row["answers"]]
        assert row["gain"] == pytest.approx(sum(same) / len(same), rel=0.1)
        assert row["cost"] == pytest.approx(row["kl_per_token"] / row["gain"] ** 2)
    lines = (tmp_path / "out" / "screen.csv").read_text().splitlines()
    assert len(lines) == 1 + len(rows)
    assert (inputs["model"] / "model.safetensors").read_bytes() == before
    load_model(inputs["model"])


def test_a_batch_of_no_whole_groups_is_refused(inputs, tmp_path):
    with pytest.raises(UserError, match=r"screen\.answers has 6, expected multiples of policy\.group_size \(4\)"):
        run(inputs, tmp_path, SETTINGS.model_copy(update={"answers": [6]}))
