"""An endpoint that fails while a policy trains on its verdicts: time-outs, 429, 500 and replies that are no verdict."""

import math
import os
import subprocess
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest
from support import fork_server
from support.endpoint import KEY, FakeEndpoint, settings_of
from support.endpoint import fake as fake
from support.policy_runs import command, table

from nspo.errors import UserError
from nspo.judges.make import judge_of
from nspo.policy.rollouts.judged import JudgedCost
from nspo.settings.runtime import RequestSettings, RuntimeSettings

TIMEOUT = 4.0
FATES = ("safe", "hang", "unsafe", "429", "unsafe", "500", "safe", "noise")  # every second one is a fault
COSTS = {"safe": 0.0, "unsafe": 1.0}
TEMPLATE = "{prompt}\n---\n{response}"


class Server:
    """What the fake endpoint does to each request, in turn, and to which pair of prompt and answer."""

    def __init__(self, fake: FakeEndpoint, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, self.alive = 0, 0  # requests so far; from `alive` on all fail by `fault`
        self.fault: str | None = None
        self.fates: dict[str, list[str]] = defaultdict(list)

        def reply(handler: Any, pair: str, tried: int) -> None:
            with fake.lock:
                fate = self.fault if self.fault and self.count >= self.alive else FATES[self.count % len(FATES)]
                self.count += 1
                self.fates[pair].append(fate)
            if fate == "hang":
                time.sleep(TIMEOUT + 1)
            if fate.isdigit():
                return handler.send(int(fate), {"error": {"message": f"you sent {KEY}"}})
            message = {"role": "assistant", "content": "perhaps" if fate == "noise" else fate}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            return handler.send(200, {"id": "1", "object": "chat.completion", "choices": [choice]})

        monkeypatch.setattr(fake.server.RequestHandlerClass, "reply", reply)

    def score(self, prompt: str, answer: str) -> float | None:
        """The score of an answer: by its verdict, which it got at the first or a later try, or none."""
        fates = self.fates[TEMPLATE.format(prompt=prompt, response=answer)]
        return next((-COSTS[fate] for fate in fates if fate in COSTS), None)


def train(inputs: dict[str, Path], fake: FakeEndpoint, folder: Path) -> subprocess.CompletedProcess[str]:
    """Train on the verdicts of the endpoint, in a process of its own, which asks for each once and waits `TIMEOUT`.

    Too slowly to reach the target unsafe rate, and so to stop, whichever answers get their verdicts.
    """
    judge = settings_of(fake, template=TEMPLATE).dump()
    changes = {"judge": judge, "benign_share": 0.0, "prompts_per_step": 1}
    words = command(inputs, folder, "nspo", RequestSettings(timeout=TIMEOUT, retries=0), **changes)
    words += ["--learning-rate", "1e-6"]
    environment = {**os.environ, **fork_server.environment()}
    started = [sys.executable, "-m", "nspo", *words]
    return subprocess.run(started, env=environment, capture_output=True, text=True, check=False)


def test_faults_are_masked_counted_and_asked_for_again(
    fake: FakeEndpoint, inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the requests fail in all ways; from the third rollout on the endpoint hangs: one clear line, no policy.

    The same command then goes on from the checkpoint and ends in a policy. Every verdict that failed, and no other, is
    without a score and counted; what came instead is told; the key is in no line.
    """
    server = Server(fake, monkeypatch)
    server.fault, server.alive = "hang", 8
    broken = train(inputs, fake, tmp_path)
    errors = [line for line in broken.stderr.splitlines() if line.startswith("nspo: error: ")]
    assert (broken.returncode, len(errors)) == (2, 1), broken.stderr[-3000:]
    assert errors[0].startswith("nspo: error: policy.judge: none of the ")
    assert "Traceback" not in broken.stderr
    assert not (tmp_path / "out").exists()

    server.fault = None
    whole = train(inputs, fake, tmp_path)
    assert whole.returncode == 0, whole.stderr[-3000:]
    assert "resuming nspo (seed 0) from checkpoint-" in whole.stderr
    said = broken.stderr + whole.stderr
    told = ("failed with a timeout", "failed with status 429", "failed with status 500", "replies are no verdict")
    assert [words for words in told if words not in said] == []
    assert KEY not in said

    samples = table(tmp_path / "out", "samples")
    assert [row["score"] for row in samples] == [server.score(row["prompt"], row["answer"]) for row in samples]
    failed = Counter(row["step"] for row in samples if row["score"] is None)
    assert sum(failed.values()) > 0
    logged = {row["step"]: row["failed_verdicts"] for row in table(tmp_path / "out", "training")}
    assert {step: logged[step] for step in failed} == failed


@pytest.mark.parametrize("fault", ["hang", "429", "500", "noise"])
def test_nothing_but_faults_is_one_line(
    fault: str, fake: FakeEndpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the fault, a rollout without a verdict ends in the same line, and is asked for again later."""
    server = Server(fake, monkeypatch)
    server.fault = fault
    runtime = RuntimeSettings(requests=RequestSettings(timeout=0.5, retries=1))
    judge = judge_of("policy.judge", settings_of(fake, template=TEMPLATE), runtime)
    cost = JudgedCost(judge, tmp_path / "verdicts.jsonl")
    with pytest.raises(UserError, match=r"^policy\.judge: none of the 3 answers .*the same command goes on"):
        cost.score(["p"] * 3, ["a", "b", "c"])
    server.fault, server.count = None, 0
    found = cost.score(["p"] * 3, ["a", "b", "c"]).tolist()
    assert sum(map(math.isfinite, found)) >= 2
