"""policy/judged.py: a judge's verdicts as the reward, through the real trainer; failed ones are out of the group."""

import logging
import math
from collections import Counter
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.endpoint import KEY, FakeEndpoint, settings_of
from support.endpoint import fake as fake
from support.policy_runs import METHODS, Recorder, run, table, without_time

from nspo.errors import UserError
from nspo.judges.judge import Failures
from nspo.policy import stage as stage
from nspo.policy.rollouts import trainer as grpo
from nspo.policy.rollouts.judged import JudgedCost
from nspo.settings.policy.methods import MethodSettings
from nspo.settings.reading import check_config

ENDPOINT = {"kind": "endpoint", "url": "http://127.0.0.1:9/v1", "model": "m"}
ONE_STEP = {"autocast": "no", "micro_batch_size": 4, "steps": 1, "judge": ENDPOINT}
VERDICTS = [1.0, 0.0, math.nan, 1.0, *[math.nan] * 4]  # of two groups; nobody judged the second


def plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """A judge that gives `VERDICTS`, whatever it is shown."""

    def verdicts(prompts: Sequence[str], answers: Sequence[str], keep: Any) -> list[float]:
        for place, value in enumerate(VERDICTS):
            if math.isfinite(value):
                keep(place, value)
        return VERDICTS

    judge = SimpleNamespace(name="judge", key="policy.judge", failures=Failures(), identity={}, verdicts=verdicts)
    monkeypatch.setattr(stage, "judge_of", lambda *_, **__: judge)
    monkeypatch.setattr(grpo, "GRPOTrainer", Recorder)


def test_a_failed_verdict_is_out_of_its_group(inputs, tmp_path, monkeypatch, caplog):
    """Rewards -1, 0, -, -1: mean -2/3, deviation sqrt(1/3); the failure has advantage 0, and so has a failed group.

    Counted, logged, without a score in the samples; TRL's warning, which would print the answer, is not repeated.
    """
    plan(monkeypatch)
    caplog.set_level(logging.WARNING)
    out = run(inputs, tmp_path, "grpo_no_kl", **ONE_STEP, benign_share=0.0)
    scale = 1 / (math.sqrt(1 / 3) + 1e-4)
    expected = torch.tensor([-scale / 3, 2 * scale / 3, 0.0, -scale / 3, *[0.0] * 4])
    torch.testing.assert_close(Recorder.seen["rollouts"][0]["advantages"], expected, atol=1e-6, rtol=0)
    row = table(out, "training")[0]
    assert (row["failed_verdicts"], row["reward"]) == (5.0, pytest.approx(-2 / 3))
    assert row["cost"] == row["unsafe"] == pytest.approx(2 / 3)
    assert [sample["score"] for sample in table(out, "samples")] == [-1.0, 0.0, None, -1.0, *[None] * 4]
    assert "All reward functions returned None" not in caplog.text


def test_benign_answers_are_scored_by_the_reward_model(inputs, tmp_path, monkeypatch):
    """The judge sees the harmful group only, the other keeps the reward of helpfulness."""
    plan(monkeypatch)
    monkeypatch.setitem(globals(), "VERDICTS", VERDICTS[:4])
    out = run(inputs, tmp_path, "grpo_no_kl", **ONE_STEP, benign_share=0.5)
    samples = table(out, "samples")
    assert Counter(s["score"] for s in samples if s["role"] == "harmful") == {-1.0: 2, 0.0: 1, None: 1}
    benign = [s["score"] for s in samples if s["role"] == "benign"]
    assert len(set(benign)) > 1
    row = table(out, "training")[0]
    assert row["helpfulness"] == pytest.approx(sum(benign) / 4, abs=1e-5)
    assert row["failed_verdicts"] == 1.0
    assert 0 <= row["refusal_rate"] <= 1
    assert 0 <= row["over_refusal_rate"] <= 1


def test_the_limit_of_a_lagrangian_is_a_share(inputs, tmp_path, monkeypatch):
    """The multiplier follows the share of unsafe verdicts, failures aside; what failed has no part in either side."""
    plan(monkeypatch)
    method = MethodSettings(objective="grpo_lagrangian", learning_rate=1e-2, loss={"cost_limit": 0.25})
    monkeypatch.setitem(METHODS, "grpo_lagrangian", method)
    out = run(inputs, tmp_path, "grpo_lagrangian", **ONE_STEP, benign_share=0.0)
    row = table(out, "training")[0]
    assert row["mean_cost"] == pytest.approx(2 / 3)
    assert row["multiplier"] == pytest.approx(math.exp(0.1 * (2 / 3 - 0.25)))
    advantages, scores = Recorder.seen["rollouts"][0]["advantages"], [s["score"] for s in table(out, "samples")]
    assert [score is None for score in scores] == [math.isnan(value) for value in VERDICTS]
    expected = torch.tensor([0.0 if score is None else score for score in scores])
    torch.testing.assert_close(advantages, expected, atol=1e-6, rtol=0)
    assert advantages[:4].abs().sum() > 0.1
    assert advantages.sum() == pytest.approx(0, abs=1e-5)


def test_a_rollout_without_a_verdict_ends_the_run_and_the_rest_is_asked_later(
    fake: FakeEndpoint, inputs, tmp_path, monkeypatch
):
    """An endpoint is asked by the evaluation's client. It breaks down in the third rollout: one clear line.

    The same command goes on to the bytes and logs of an undisturbed run, and asks nothing twice.
    """
    handler: Any = fake.server.RequestHandlerClass
    seen: Counter[str] = Counter()
    limit = 10**6

    def reply(self: Any, answer: str, tried: int) -> None:
        seen[answer] += 1
        if len(seen) > limit:
            return self.send(500, {"error": {"message": KEY}})
        said = "perhaps" if len(answer) % 5 == 0 else "unsafe\nS1" if sum(map(ord, answer)) % 2 else "safe"
        choice = {"index": 0, "message": {"role": "assistant", "content": said}, "finish_reason": "stop"}
        self.send(200, {"id": "1", "object": "chat.completion", "choices": [choice]})

    monkeypatch.setattr(handler, "reply", reply)
    judge = settings_of(fake).dump()
    whole = run(inputs, tmp_path / "whole", "nspo", judge=judge)
    rows = table(whole, "training")
    assert {row["unsafe"] for row in rows} - {0.0, 1.0, None}
    harmful = [row for row in table(whole, "samples") if row["role"] == "harmful"]
    assert {row["score"] for row in harmful} >= {-1.0, 0.0}
    assert fake.keys == {f"Bearer {KEY}"}

    seen.clear()
    limit = 8
    with pytest.raises(UserError, match=r"policy\.judge: none of the 4 answers got a verdict") as caught:
        run(inputs, tmp_path, "nspo", judge=judge)
    assert KEY not in str(caught.value)
    assert not (tmp_path / "out").exists()
    first = [answer for answer in seen if seen[answer] == 1]
    limit = 10**6
    out = run(inputs, tmp_path, "nspo", judge=judge)
    assert len(first) == 8
    assert {answer: seen[answer] for answer in first} == dict.fromkeys(first, 1)
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    for name in ("training", "samples", "probes"):
        assert without_time(table(out, name)) == without_time(table(whole, name))
    written = b"".join(path.read_bytes() for path in out.iterdir())
    assert KEY.encode() not in written


def test_a_judge_that_lacks_something_is_refused_first(inputs, tmp_path, monkeypatch):
    """Without the package `openai` nothing is trained, and the key is named."""
    monkeypatch.setitem(__import__("sys").modules, "openai", None)
    monkeypatch.setattr(stage, "load_model", None)
    with pytest.raises(UserError, match=r"policy\.judge asks an endpoint, which needs the package openai"):
        run(inputs, tmp_path, "grpo_no_kl", judge=ENDPOINT)


def test_verdicts_become_costs(tmp_path):
    """Above zero is 1, at most zero is 0, a failure is NaN; nothing but failures is refused."""
    told = {"unsafe": 0.4, "safe": -0.3, "border": 0.0}

    def verdicts(prompts: Sequence[str], answers: Sequence[str], keep: Any) -> list[float]:
        for place, answer in enumerate(answers):
            if answer in told:
                keep(place, told[answer])
        return [told.get(answer, math.nan) for answer in answers]

    judge: Any = SimpleNamespace(name="judge", key="policy.judge", failures=Failures(), verdicts=verdicts)
    scorer = JudgedCost(judge, tmp_path / "verdicts.jsonl")
    found = scorer.score(["p"] * 4, ["unsafe", "safe", "?", "border"])
    torch.testing.assert_close(found, torch.tensor([1.0, 0.0, math.nan, 0.0]), equal_nan=True)
    with pytest.raises(UserError, match="none of the 2 answers"):
        scorer.score(["p"] * 2, ["?", "??"])


WRONG = [
    ({"kind": "oracle"}, "policy.judge.kind: expected one of: classifier, endpoint, guard"),
    ({"kind": "guard", "sorce": "x"}, "policy.judge.sorce: unknown key, did you mean 'source'?"),
    ({"kind": "endpoint", "url": "http://host/v1", "model": "m", "api_key_env": KEY}, "never the key"),
    ({"kind": "endpoint", "url": f"http://me:{KEY}@host/v1", "model": "m"}, "without user, password or query"),
]


@pytest.mark.parametrize(("judge", "message"), WRONG)
def test_wrong_settings_are_refused(judge: dict[str, Any], message: str):
    """Each fault names its key as the user wrote it, and no message repeats what may be a secret."""
    with pytest.raises(UserError, match="policy") as caught:
        check_config({"policy": {"judge": judge}})
    assert message in str(caught.value)
    assert KEY not in str(caught.value)


@pytest.mark.parametrize("limit", [0.0, 1.0, -0.5])
def test_a_limit_that_no_share_can_keep_is_refused(limit: float):
    """With verdicts for costs a limit outside (0, 1) would only ever raise or lower the multiplier."""
    method = {"objective": "nspo_lagrangian", "learning_rate": 1e-4, "loss": {"cost_limit": limit}}
    policy = {"methods": {"mine": method}}
    check_config({"policy": policy})
    with pytest.raises(UserError, match=r"methods\.mine\.loss\.cost_limit is .*share of unsafe answers"):
        check_config({"policy": policy | {"judge": ENDPOINT}})
