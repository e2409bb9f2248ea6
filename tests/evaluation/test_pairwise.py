"""comparison.py: wins in both orders, ties, failures, and AlpacaEval's win rate from the command."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from support.endpoint import KEY, FakeEndpoint
from support.endpoint import fake as fake
from support.rows import write

from nspo.cli import main as cli
from nspo.errors import UserError
from nspo.evaluation.benchmarks.registry import TASKS
from nspo.evaluation.pairwise import Comparison, add_wins
from nspo.evaluation.scores import wins
from nspo.evaluation.statistics.intervals import wilson, wilson_mean
from nspo.settings.judges import ComparisonJudge
from nspo.settings.reading import check_config
from nspo.settings.runtime import RequestSettings

SHOWN = "compare:{prompt}\x1f{first}\x1f{second}"


def merit(answer: str) -> int:
    return answer.startswith("best") - answer.startswith("worst")


@pytest.fixture
def choosing(fake: FakeEndpoint) -> FakeEndpoint:
    """A judge that goes by what the prompt names: the answer (best, worst), the one shown first, none, an error."""
    handler: Any = fake.server.RequestHandlerClass
    other = handler.reply

    def reply(self: Any, content: str, tried: int) -> None:
        kind, _, rest = content.partition(":")
        if kind != "compare":
            return other(self, content, tried)
        prompt, first, second = rest.split("\x1f")
        if "error" in prompt:
            return other(self, "status:400", tried)
        by_merit = "A" if merit(first) > merit(second) else "B\n"
        said = {"first": "A", "none": "Both are good"}.get(prompt.split()[0], by_merit)
        return other(self, f"say:{said}", tried)

    handler.reply = reply
    return fake


def settings_of(fake: FakeEndpoint, **changes: Any) -> dict[str, Any]:
    return {"url": fake.url, "model": "judge", "template": SHOWN, **changes}


def compared(fake: FakeEndpoint, rows: list[tuple[str, str, str]], work: Path) -> list[dict[str, Any]]:
    """Rows of (prompt, our answer, the other answer) with what `add_wins` adds."""
    made = [dict(zip(("prompt", "response", "reference"), row, strict=True)) for row in rows]
    limits = RequestSettings(concurrency=2, retries=0, timeout=5.0)
    add_wins(made, Comparison(ComparisonJudge(**settings_of(fake)), limits), work)
    return made


ROWS = [
    ("merit 1", "best", "another"),  # wins both ways
    ("merit 2", "worst", "another"),  # loses both ways
    ("first 1", "this", "that"),  # the verdict follows the order
    ("merit 3", "the same", "the same"),  # nobody is asked
    ("none 1", "this", "that"),  # no verdict
    ("error 1", "this", "that"),  # no reply
]


def test_both_orders_decide(choosing: FakeEndpoint, tmp_path: Path) -> None:
    """1 and 0 only where both orders agree, else a tie; a failure is none of them. Requests are greedy and keyed.

    A request that is refused ends the first run; refused a second time, it counts as a failed verdict.
    """
    with pytest.raises(UserError, match="so 2 of 10 verdicts are missing"):
        compared(choosing, ROWS, tmp_path / "wins")
    found = compared(choosing, ROWS, tmp_path / "wins")
    assert [row["win"] for row in found] == [1.0, 0.0, 0.5, 0.5, None, None]
    shown = [body["messages"][-1]["content"] for body in choosing.asked]
    assert set(shown) == {
        f"compare:{prompt}\x1f{a}\x1f{b}" for prompt, x, y in ROWS if x != y for a, b in ((x, y), (y, x))
    }
    assert {body["temperature"] for body in choosing.asked} == {0}
    assert choosing.keys == {f"Bearer {KEY}"}


def test_verdicts_are_kept(choosing: FakeEndpoint, tmp_path: Path) -> None:
    """The same command again asks for what failed only."""
    with pytest.raises(UserError, match="2 requests failed with status 400"):
        compared(choosing, ROWS, tmp_path / "wins")
    before = len(choosing.asked)
    assert [row["win"] for row in compared(choosing, ROWS, tmp_path / "wins")] == [1.0, 0.0, 0.5, 0.5, None, None]
    assert {body["messages"][-1]["content"].split()[0] for body in choosing.asked[before:]} == {
        "compare:none",
        "compare:error",
    }


def test_the_default_template_shows_all(choosing: FakeEndpoint) -> None:
    """The instruction and both answers, in one turn, in the order that they are given."""
    judge = Comparison(ComparisonJudge(url=choosing.url, model="m"), RequestSettings(retries=0))
    judge.verdicts(["the instruction"], [("one answer {second}", "another answer")])
    (message,) = choosing.asked[0]["messages"]
    places = [message["content"].index(text) for text in ("the instruction", "one answer {second}", "another answer")]
    assert places == sorted(places)


def test_failures_count_as_lost() -> None:
    """A fixed denominator: ties are half, failures nothing, both are shown."""
    win, tie = wins("alpaca_eval", [{"win": value} for value in (1.0, 1.0, 0.5, 0.0, None)])
    assert (win["name"], win["value"], win["n"], win["failures"]) == ("win_rate", 0.5, 5, 1)
    assert (tie["name"], tie["value"], tie["n"]) == ("tie_rate", 0.2, 5)
    assert 0 < win["low"] < 0.5 < win["high"] < 1


def test_the_interval_of_a_mean() -> None:
    """Wilson's own for zeros and ones; never empty; a half counts half."""
    for successes in (0, 3, 10):
        values = [1.0] * successes + [0.0] * (10 - successes)
        assert wilson_mean(values) == pytest.approx(wilson(successes, 10), abs=1e-12)
    assert wilson_mean([0.5] * 4) == pytest.approx(wilson(2, 4), abs=1e-12)
    with pytest.raises(UserError, match="over 0 prompts"):
        wilson_mean([])


@pytest.mark.parametrize(
    ("judge", "message"),
    [
        ({"url": "http://host/v1", "model": "m", "template": "{prompt}{first}"}, "a judge must see both answers"),
        ({"url": "host", "model": "m"}, "expected http://HOST/v1"),
        ({"url": "http://host/v1", "model": "m", "against": "gpt4"}, "expected 'published' or 'base'"),
        ({"url": "http://host/v1", "model": "m", "api_key": KEY}, "unknown key"),
    ],
)
def test_wrong_settings_are_refused(judge: dict[str, Any], message: str) -> None:
    """Each fault names its key."""
    with pytest.raises(UserError, match=r"benchmarks\.comparison") as caught:
        check_config({"benchmarks": {"comparison": judge}})
    assert message in str(caught.value)
    assert KEY not in str(caught.value)


# ------------------------------------------------------------------------------------------- the command


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A small copy of AlpacaEval: two prompts whose other answer is the best and the worst, two without a verdict."""
    rows = [
        {"instruction": f"{kind} {n}", "output": output, "dataset": "koala"}
        for n, (kind, output) in enumerate([("merit", "best"), ("merit", "worst"), ("none", "z"), ("none", "z")])
    ]
    write(tmp_path / "data" / TASKS["alpaca_eval"].file, rows)
    return tmp_path / "data"


def run(fake: FakeEndpoint, model: Path, data: Path, out: Path, *more: str, **changes: Any) -> int:
    """The command as a user types it."""
    flags = ["--data", str(data), "--out", str(out), "--max-new-tokens", "4", "--device", "cpu"]
    flags += ["--workdir", str(out.parent / "work"), "--requests", '{"retries": 0}']
    flags += ["--comparison", json.dumps(settings_of(fake, **changes))]
    return cli.main(["benchmark", "--model", str(model), "--tasks", "alpaca_eval", *flags, *more])


def scores(out: Path) -> dict[str, dict[str, Any]]:
    found = json.loads((out / "alpaca_eval/metrics.json").read_text())["scores"]
    return {score["name"]: score for score in found if not score["category"]}


def test_against_the_published_answers(
    choosing: FakeEndpoint, tiny_model_dir: Path, data: Path, tmp_path: Path
) -> None:
    """The file's own outputs are the other answers."""
    assert run(choosing, tiny_model_dir, data, tmp_path / "out") == 0
    rows = pq.read_table(tmp_path / "out/alpaca_eval/responses.parquet").to_pylist()
    assert {row["reference"] for row in rows} == {"best", "worst", "z"}
    assert {(row["prompt"], row["win"]) for row in rows} == {
        ("merit 0", 0.0),
        ("merit 1", 1.0),
        ("none 2", None),
        ("none 3", None),
    }
    win = scores(tmp_path / "out")["win_rate"]
    assert (win["value"], win["n"], win["failures"], win["judge"]) == (0.25, 4, 2, "comparison")
    judges = json.loads((tmp_path / "out/alpaca_eval/metrics.json").read_text())["judges"]
    assert judges["comparison"]["template"] == SHOWN
    assert KEY not in json.dumps(judges)


def test_against_the_base(
    choosing: FakeEndpoint, tiny_model_dir: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The base itself is compared with nobody; a copy of it ties with it on every prompt, without a request."""
    assert run(choosing, tiny_model_dir, data, tmp_path / "base", against="base") == 0
    assert set(scores(tmp_path / "base")) == {"refusal_rate"}
    answers = str(tmp_path / "base/alpaca_eval/responses.parquet")
    assert run(choosing, tiny_model_dir, data, tmp_path / "copy", "--base-answers", answers, against="base") == 0
    found = scores(tmp_path / "copy")
    assert (found["win_rate"]["value"], found["tie_rate"]["value"], found["win_rate"]["n"]) == (0.5, 1.0, 4)
    assert not choosing.asked
    capsys.readouterr()
    more = ["--base-answers", answers, "--limit", "2"]
    assert run(choosing, tiny_model_dir, data, tmp_path / "other", *more, against="base") == 2
    assert ": made with benchmark." in capsys.readouterr().err
    missing = ["--base-answers", str(tmp_path / "nothing.parquet")]
    assert run(choosing, tiny_model_dir, data, tmp_path / "other", *missing, against="base") == 2
    assert "nothing.parquet does not exist: run the stage that makes it" in capsys.readouterr().err


def test_a_file_without_answers_is_refused(
    fake: FakeEndpoint, tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before anything is answered."""
    write(tmp_path / "data" / TASKS["alpaca_eval"].file, [{"instruction": "Name a city", "dataset": "koala"}])
    assert run(fake, tiny_model_dir, tmp_path / "data", tmp_path / "out") == 2
    assert "1 of 1 prompts have no published answer" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
