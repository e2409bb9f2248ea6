"""Rivals of the constraint: each against numbers worked out by hand, and through the stage on the tiny model."""

import math

import pytest
import torch
from support.constrained import bases_of
from support.policy_runs import METHODS, run, table, weights
from torch import nn

from nspo.errors import UserError
from nspo.models.loading import load_model
from nspo.policy.methods.adapters import project_after
from nspo.policy.methods.objectives import load_bases
from nspo.policy.methods.ogpsa import orthonormal, remove_
from nspo.policy.methods.penalties import kl_to_base, pull_
from nspo.policy.methods.replay import IGNORED, encode
from nspo.policy.rollouts.reward import safety_reward


def test_l2_sp_by_hand():
    """3/2 ||W - W0||^2 has the gradient 3 (W - W0): 3 (2 - 1) on top of 0.5, 3 (0 - 2) on top of 1."""
    gradient = torch.tensor([0.5, 1.0])
    pull_(gradient, torch.tensor([2.0, 0.0]), torch.tensor([1.0, 2.0]), 3.0)
    assert gradient.tolist() == [3.5, -5.0]


def test_replayed_kl_by_hand():
    """Of (1/2, 1/2) against (1/4, 3/4): ln(4/3)/2 = 0.1438; equal rows give 0; what is no answer counts for nothing."""
    base = torch.tensor([[[0.0, 0.0], [0.0, 0.0], [0.0, 5.0]]])
    policy = torch.tensor([[[0.0, math.log(3)], [0.0, 0.0], [5.0, 0.0]]])
    found = kl_to_base(base, policy, torch.tensor([[0, 1, IGNORED]]))
    assert float(found) == pytest.approx(math.log(4 / 3) / 2 / 2, rel=1e-6)


def test_answers_are_what_is_predicted():
    """A prompt of two tokens and answers of two and one: targets stand where the model predicts them."""
    ids, mask, targets = encode([([5, 6], [7, 8]), ([5, 6], [9])], 0, torch.device("cpu"))
    assert ids.tolist() == [[5, 6, 7, 8], [5, 6, 9, 0]]
    assert mask.tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert targets.tolist() == [[IGNORED, 7, 8], [IGNORED, 9, IGNORED]]


def test_ogpsa_by_hand():
    """References (2, 0, 0) and (3, 4, 0) span the first two axes, so of (1, 2, 3) the third is left: 3 / sqrt(14)."""
    basis = orthonormal([torch.tensor([2.0, 0.0, 0.0]), torch.tensor([3.0, 4.0, 0.0])])
    gradient = torch.tensor([[1.0, 2.0, 3.0]])
    kept = remove_(gradient, basis)
    torch.testing.assert_close(gradient, torch.tensor([[0.0, 0.0, 3.0]]), rtol=0, atol=1e-6)
    assert float(kept) == pytest.approx(3 / math.sqrt(14), rel=1e-6)
    assert len(orthonormal([torch.ones(3), 2 * torch.ones(3)])) == 1  # one direction, told twice


def test_a_refusal_earns_where_it_is_right():
    """Two more on the harmful prompt, two less on the benign one, on top of -max(cost, -1) and min(reward, 1)."""
    cost, reward = torch.tensor([-3.0, 0.5, 0.0, 0.0]), torch.tensor([0.0, 0.0, 2.0, 0.3])
    harmful, refused = torch.tensor([True, True, False, False]), torch.tensor([True, False, True, False])
    found = safety_reward(cost, reward, harmful, 1.0, refused, 2.0)
    assert found.tolist() == pytest.approx([3.0, -0.5, -1.0, 0.3])


def test_projected_once_by_hand(tmp_path):
    """The update (3, 4) of a row, its first direction protected: (0, 4), made as long as it was: (0, 5)."""
    from safetensors.torch import save_file

    model = nn.Sequential(nn.Linear(2, 1, bias=False))
    model[0].weight.data = torch.tensor([[1.0, 1.0]])
    bases = bases_of(model, {"in": (["0"], 2, 1)})
    object.__setattr__(bases["in"], "basis", torch.tensor([[1.0], [0.0]]))
    object.__setattr__(bases["in"], "kind", "range")
    save_file({"0.weight": model[0].weight.data.clone()}, tmp_path / "model.safetensors")
    model[0].weight.data += torch.tensor([[3.0, 4.0]])
    assert project_after(model, bases, tmp_path) == pytest.approx(0.8)
    torch.testing.assert_close(model[0].weight.data, torch.tensor([[1.0, 6.0]]))


def test_bases_of_another_rule_are_refused(inputs):
    with pytest.raises(UserError, match=r"was made with .*, expected the bases of method 'nspo_paper'"):
        load_bases(METHODS["nspo_paper"], "nspo_paper", inputs["bases"], inputs["model"])


@pytest.mark.parametrize("name", ["lora", "null_space_adapter", "project_after"])
def test_what_is_saved_is_a_plain_model(inputs, tmp_path, name):
    """Adapters are merged, an update is projected: the names of the base, other values in every linear layer."""
    out = run(inputs, tmp_path, name, steps=1, target_unsafe=None)
    before, after = weights(inputs["model"]), weights(out)
    assert before.keys() == after.keys()
    layers = [key for key in before if "proj" in key and key.endswith(".weight")]
    assert all((before[key] != after[key]).any() for key in layers)
    assert all(torch.equal(before[key], after[key]) for key in before.keys() - set(layers))
    load_model(out)


@pytest.mark.parametrize(("name", "column"), [("replay_kl", "replay_kl"), ("l2_sp", "distance"), ("ogpsa", "kept")])
def test_what_acts_on_the_gradient_is_logged(inputs, tmp_path, name, column):
    rows = table(run(inputs, tmp_path, name, steps=2, target_unsafe=None), "training")
    found = [row[column] for row in rows]
    if name == "ogpsa":
        assert all(0 < value < 1 for value in found)
    else:
        assert found[0] == 0 < found[-1]  # the first update starts at the base
