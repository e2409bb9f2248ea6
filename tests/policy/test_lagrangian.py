"""policy/lagrangian.py: the multiplier and the combined advantage against numbers worked out by hand."""

import math
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import PartialState
from support.processes import launched, spawn
from torch import Tensor

from nspo.policy.rollouts.lagrangian import LagrangianReward, Multiplier, MultiplierCallback, combined_advantage
from nspo.policy.rollouts.reward import whole_rollout
from nspo.settings.policy.losses import Lagrangian

REWARD = torch.tensor([1.0, 2.0, 3.0, 2.0, 5.0, 5.0, 5.0, 5.0])
COST = torch.tensor([10.0, 30.0, 20.0, 20.0, -1.0, 1.0, -1.0, 1.0])


def multiplier(**keys: float) -> Multiplier:
    """A multiplier with the defaults of the settings, but for `keys`."""
    return Multiplier.of(Lagrangian(**keys))


def test_trajectory_by_hand():
    """ln x += 0.1 x (cost - 0.5): from 2, a cost of 1.5 gives 2 e^0.2, then 0 gives that times e^(-0.05 x)."""
    it = multiplier(multiplier_init=2.0, cost_limit=0.5)
    it.update(reward=7.0, cost=1.5)
    assert it.value == pytest.approx(2.4428055163, rel=1e-9)  # 2 e^0.2
    it.update(reward=7.0, cost=0.0)
    assert it.value == pytest.approx(2.161942028, rel=1e-9)  # 2.4428055163 e^-0.12214027582
    assert (it.reward, it.cost, it.lowest_cost) == (7.0, 0.0, 0.0)


def test_a_violated_limit_raises_and_a_kept_one_lowers():
    """Monotone in every step; at the limit it stays where it is; it is never negative."""
    for cost, grows in ((0.3, True), (-0.3, False)):
        it = multiplier(cost_limit=0.0)
        values = [it.value]
        for _ in range(10):
            it.update(0.0, cost)
            values.append(it.value)
        assert all((b > a) == grows for a, b in pairwise(values))
        assert values[-1] > 0
        it.limit = cost
        it.update(0.0, cost)
        assert it.value == values[-1]


def test_it_stops_at_the_maximum_and_comes_back():
    """The logarithm is cut, not only its value: the first cost below the limit lowers it at once."""
    it = multiplier(multiplier_max=3.0)
    for _ in range(5):
        it.update(0.0, 1e6)
    assert it.value == pytest.approx(3.0)
    assert it.at_maximum
    it.update(0.0, -1.0)
    assert it.value == pytest.approx(3.0 * math.exp(-0.3))
    assert not it.at_maximum


def test_advantages_by_hand():
    """Rewards 1 2 3 2 deviate by sqrt(2/3), costs by ten times that; the rewards of the second group are all equal."""
    root = math.sqrt(2 / 3)
    reward, cost = 1 / (root + 1e-4), 10 / (10 * root + 1e-4)
    flat = 1 / (math.sqrt(4 / 3) + 1e-4)
    expected = torch.tensor([-reward + 3 * cost, -3 * cost, reward, 0, 3 * flat, -3 * flat, 3 * flat, -3 * flat]) / 4
    torch.testing.assert_close(combined_advantage(REWARD, COST, 3.0, 4), expected)


def test_an_answer_without_a_verdict_is_in_no_group():
    """The others are normalised as if it were not there: rewards 1 and 3, costs 1 and 0; its own advantage is none."""
    reward, cost = torch.tensor([1.0, math.nan, 3.0]), torch.tensor([1.0, math.nan, 0.0])
    side, other = 1 / (math.sqrt(2) + 1e-4), 0.5 / (math.sqrt(0.5) + 1e-4)
    expected = torch.tensor([-side - 2 * other, math.nan, side + 2 * other]) / 3
    torch.testing.assert_close(combined_advantage(reward, cost, 2.0, 3), expected, equal_nan=True)


def test_limits_of_the_multiplier():
    """At 0 the reward alone counts, at 1e6 the cost alone; scales of the scores cancel, up to the epsilon."""
    groups = REWARD.view(2, 4)
    alone = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)
    torch.testing.assert_close(combined_advantage(REWARD, COST, 0.0, 4), alone.flatten())
    huge = combined_advantage(REWARD, COST, 1e6, 4)
    torch.testing.assert_close(huge, combined_advantage(torch.zeros(8), COST, 1e6, 4), atol=1e-5, rtol=0)
    assert huge[0] > huge[2] > huge[1]  # by cost, although the second answer has more reward than the first
    scaled = combined_advantage(100 * REWARD, COST / 100, 1.0, 4)
    torch.testing.assert_close(scaled, combined_advantage(REWARD, COST, 1.0, 4), atol=2e-2, rtol=0)


def scorer(**keys: float) -> LagrangianReward:
    """A reward without its models: what it does with scores."""
    return LagrangianReward(None, None, multiplier(**keys), group_size=8)  # type: ignore[arg-type]


def half_of_a_group(rank: int, port: int, out: str) -> None:
    """One of two processes with four of a group's eight answers each."""
    launched(rank, port)
    PartialState(cpu=True)
    reward, mine = scorer(), slice(4 * rank, 4 * rank + 4)
    rollout = whole_rollout(COST[mine], REWARD[mine], torch.ones(4, dtype=torch.bool), torch.zeros(4))
    torch.save((reward.combine(*rollout), reward.multiplier.log), f"{out}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_see_one_rollout(tmp_path: Path):
    """A group that lies across two processes is normalised as one by both, and both step the multiplier alike."""
    spawn(half_of_a_group, str(tmp_path))
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    alone = scorer()
    expected: Tensor = alone.combine(COST, REWARD, torch.ones(8, dtype=torch.bool), torch.zeros(8))
    assert all(torch.equal(part[0], expected) for part in parts)
    assert {part[1] for part in parts} == {alone.multiplier.log}


def test_saturation_is_said(capsys):
    """Reaching the maximum is said once, with the step and the keys; so is a limit that no rollout kept."""
    callback = MultiplierCallback(multiplier(multiplier_max=1.5))
    assert callback.columns(1)["multiplier_at_max"] == 0.0
    for step in (2, 3):
        callback.multiplier.update(0.2, 9.0)
        assert callback.columns(step) == {
            "reward": 0.2,
            "mean_cost": 9.0,
            "multiplier": pytest.approx(1.5),
            "multiplier_at_max": 1.0,
        }
    said = capsys.readouterr().err
    assert said.count("the multiplier is at its maximum 1.5") == 1
    assert "step 2" in said
    assert "`multiplier_max`" in said
    callback.on_train_end(None, None, None)
    assert "never reached the limit 0 (lowest 9.000" in capsys.readouterr().err
    callback.multiplier.update(0.2, -0.1)
    callback.on_train_end(None, None, None)
    assert capsys.readouterr().err == ""


def test_a_checkpoint_holds_it_exactly():
    """Through the JSON of a trainer's state, to the bit, with what it has seen."""
    import json

    before = MultiplierCallback(multiplier(multiplier_lr=0.3))
    for cost in (1 / 3, 0.7, -0.2):
        before.multiplier.update(cost / 7, cost)
    stored = json.loads(json.dumps({"MultiplierCallback": before.state()}))
    after = MultiplierCallback(multiplier(multiplier_lr=0.3))
    after.on_train_begin(None, SimpleNamespace(stateful_callbacks=stored), None)
    assert after.multiplier == before.multiplier
