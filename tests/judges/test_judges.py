"""The judges that a configuration adds: grammar, endpoint, guard and classifier, and how verdicts are kept."""

import asyncio
import json
import logging
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from support.endpoint import KEY, FakeEndpoint, settings_of, text_of
from support.endpoint import fake as fake
from transformers import AutoModelForSequenceClassification

from nspo.cli.config_files import commented_yaml
from nspo.data.tables import PROMPT_COLUMNS
from nspo.errors import UserError
from nspo.evaluation import stage
from nspo.evaluation.scores import compute_scores
from nspo.files.manifest import MANIFEST_NAME, fingerprint_model, make_manifest, write_json
from nspo.judges.endpoint import LEAST_FAULTS, _Pace
from nspo.judges.kept import KeptVerdicts
from nspo.judges.make import added_judges
from nspo.judges.replies import fill, verdict
from nspo.models.loading import load_tokenizer
from nspo.settings.evaluation import EvaluationSettings
from nspo.settings.judges import EndpointJudge, GuardJudge
from nspo.settings.reading import check_config
from nspo.settings.runtime import RequestSettings, RuntimeSettings

# ------------------------------------------------------------------------------------------- grammar

LLAMA_GUARD = GuardJudge(kind="guard", source="x")
WILD_GUARD = GuardJudge(kind="guard", source="x", safe="no", unsafe="yes", line="Harmful response:")
REPLIES = [
    (LLAMA_GUARD, "safe", 0.0),
    (LLAMA_GUARD, "\n\nsafe \n", 0.0),
    (LLAMA_GUARD, "unsafe", 1.0),
    (LLAMA_GUARD, "\nunsafe\nS1,S2\n", 1.0),
    (LLAMA_GUARD, "unsafe\nO3", 1.0),
    (LLAMA_GUARD, "safe\nS1", None),
    (LLAMA_GUARD, "not unsafe", None),
    (LLAMA_GUARD, "This answer is unsafe.", None),
    (LLAMA_GUARD, "safe.", None),
    (LLAMA_GUARD, "Safe", None),
    (LLAMA_GUARD, "safe or unsafe", None),
    (LLAMA_GUARD, "safe\nunsafe", None),
    (LLAMA_GUARD, "unsafe\nbut harmless", None),
    (LLAMA_GUARD, "", None),
    (WILD_GUARD, "Harmful request: yes\nResponse refusal: yes\nHarmful response: no", 0.0),
    (WILD_GUARD, "Harmful request: no\nResponse refusal: no\nHarmful response: yes\n", 1.0),
    (WILD_GUARD, "Harmful request: yes\nResponse refusal: N/A\nHarmful response: N/A", None),
    (WILD_GUARD, "Harmful request: yes", None),
    (WILD_GUARD, "Harmful response: no\nHarmful response: yes", None),
    (WILD_GUARD, "no", None),
]


@pytest.mark.parametrize(("settings", "reply", "expected"), REPLIES)
def test_a_verdict_is_one_of_two_words(settings: GuardJudge, reply: str, expected: float | None) -> None:
    """Llama-Guard's and WildGuard's replies are read; anything that is not exactly a verdict is a failed one."""
    found = verdict(settings, reply)
    assert math.isnan(found) if expected is None else found == expected


def test_texts_cannot_write_into_the_template() -> None:
    """A placeholder inside a prompt stays as it is, and braces elsewhere mean nothing."""
    assert fill("{x} {prompt}|{response}", prompt="{response}", response="{prompt}{") == "{x} {response}|{prompt}{"


# ------------------------------------------------------------------------------------------- settings

WRONG = [
    ({"kind": "oracle"}, "evaluation.judges.mine.kind: expected one of: classifier, endpoint, guard"),
    ({}, "evaluation.judges.mine.kind: expected one of"),
    ({"kind": "guard", "sorce": "x"}, "evaluation.judges.mine.sorce: unknown key, did you mean 'source'?"),
    ({"kind": "guard", "source": "hub:a/b"}, "expected hub:ORG/NAME@REVISION"),
    ({"kind": "guard", "source": "x", "template": "{prompt}"}, "a judge must see both"),
    ({"kind": "guard", "source": "x", "safe": "unsafe"}, "expected two different words"),
    ({"kind": "classifier", "source": "x", "unsafe": []}, "evaluation.judges.mine.unsafe"),
    ({"kind": "endpoint", "url": f"http://me:{KEY}@host/v1", "model": "m"}, "without user, password or query"),
    ({"kind": "endpoint", "url": "host:8000", "model": "m"}, "expected http://HOST/v1"),
    ({"kind": "endpoint", "url": "http://host/v1", "model": "m", "api_key_env": KEY}, "never the key"),
    ({"kind": "endpoint", "url": "http://host/v1", "model": "m", "api_key": KEY}, "unknown key"),
    ({"kind": "endpoint", "api_key": KEY, "model": "m"}, "url: missing"),
    ({"kind": "point", "api_key": KEY}, "kind: expected one of"),
]


@pytest.mark.parametrize(("judge", "message"), WRONG)
def test_wrong_settings_are_refused(judge: dict[str, Any], message: str) -> None:
    """Each fault names its key as the user wrote it, and no message repeats what may be a secret."""
    with pytest.raises(UserError, match="mine") as caught:
        check_config({"evaluation": {"judges": {"mine": judge}}})
    assert message in str(caught.value)
    assert KEY not in str(caught.value)


@pytest.mark.parametrize("name", ["cost_model", "refusal_phrases", "My Judge", "a-b", "../x"])
def test_names_of_judges_are_columns(name: str) -> None:
    """A name that another judge has, or that is no column's, is refused."""
    with pytest.raises(UserError, match="names a column"):
        check_config({"evaluation": {"judges": {name: {"kind": "guard", "source": "x"}}}})


def test_a_configuration_with_judges_is_written_as_it_is() -> None:
    """The resolved configuration that a run stores reads back equal, a template of several lines on one line."""
    judges = {
        "net": {"kind": "endpoint", "url": "http://host/v1", "model": "m"},
        "wild": {"kind": "guard", "source": "x", "safe": "no", "unsafe": "yes", "line": "Harmful response:"},
        "labels": {"kind": "classifier", "source": "x", "unsafe": ["bad"]},
    }
    config = check_config({"evaluation": {"judges": judges}})
    text = commented_yaml(config)
    assert check_config(yaml.safe_load(text)) == config
    assert "\nREQUEST" not in text


# ------------------------------------------------------------------------------------------- endpoint


def ask(fake: FakeEndpoint, answers: list[str], requests: dict[str, Any] | None = None, **changes: Any) -> list[float]:
    """The verdicts on `answers`."""
    limits = RequestSettings(**{"concurrency": 4, "timeout": 5.0, "retries": 2, **(requests or {})})
    (judge,) = added_judges({"mine": settings_of(fake, **changes)}, RuntimeSettings(requests=limits))
    return judge.verdicts([f"prompt {n}" for n in range(len(answers))], answers)


def test_endpoint_judges_prompt_and_answer_greedily(fake: FakeEndpoint) -> None:
    """Verdicts come in order; every request is greedy and holds the prompt, the answer and the key from outside."""
    assert text_of(ask(fake, ["fine", "bad", "slow: bad", "fine too"])) == "sUUs"
    assert {body["temperature"] for body in fake.asked} == {0}
    first = next(body for body in fake.asked if body["messages"][-1]["content"] == "fine")
    assert first["messages"] == [{"role": "user", "content": "prompt 0"}, {"role": "assistant", "content": "fine"}]
    assert fake.keys == {f"Bearer {KEY}"}


def test_the_default_template_shows_both(fake: FakeEndpoint) -> None:
    """A language model is asked in one user turn that holds both texts."""
    ask(fake, ["the answer"], template=EndpointJudge(kind="endpoint", url=fake.url, model="m").template)
    (message,) = fake.asked[0]["messages"]
    assert message["role"] == "user"
    assert "prompt 0" in message["content"]
    assert "the answer" in message["content"]


def test_only_a_verdict_is_a_verdict(fake: FakeEndpoint, capsys: pytest.CaptureFixture[str]) -> None:
    """Nonsense, nothing, a sentence and a cut reply fail, and are told; what is no reply at all is a failed request."""
    no_reply = ['raw:{"choices": [', "raw:[]", "raw:null", "raw:{}", 'raw:{"choices": []}', "raw:gibberish", "raw:"]
    bad = ["say:not unsafe", "say:It is unsafe to say", "say:", "long:fine"]
    bad += [f'raw:{{"choices": [{{"message": {{"content": {said}}}}}]}}' for said in ("null", '["safe"]')]
    assert text_of(ask(fake, [*no_reply, *bad, "say:unsafe\nS1,S2", "fine"])) == "-" * 13 + "Us"
    said = capsys.readouterr().err
    assert "7 requests failed with status 200 but no chat completion" in said
    assert f"mine: {len(bad)} replies are no verdict" in said


def test_what_passes_is_asked_again(fake: FakeEndpoint) -> None:
    """A 500, a timeout and a 429 are tried again, the last not before Retry-After says so."""
    started = time.monotonic()
    assert text_of(ask(fake, ["once: bad", "stuck: fine", "later: bad"], {"timeout": 0.3})) == "UsU"
    assert fake.tries == {"once: bad": 2, "stuck: fine": 2, "later: bad": 2}
    assert time.monotonic() - started >= 1.0


def test_a_request_that_fails_for_good_is_a_failed_verdict(
    fake: FakeEndpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    """After its tries a 500 fails alone, a refused request fails at once, both are counted and told."""
    found = ask(fake, ["fine", "broken:", "status:400", "bad", "status:403"])
    assert text_of(found) == "s--U-"
    assert fake.tries["broken:"] == 3
    assert fake.tries["status:400"] == 1
    said = capsys.readouterr().err
    assert "1 requests failed with status 500" in said
    assert "1 requests failed with status 400" in said


def test_concurrency_is_bounded_and_used(fake: FakeEndpoint) -> None:
    """Never more requests at once than allowed, and as many as are."""
    ask(fake, [f"slow:{n}" for n in range(12)], {"concurrency": 3})
    assert fake.most_busy == 3


def test_the_pace_counts_every_request(fake: FakeEndpoint) -> None:
    """At 600 a minute, four requests, one of them a repeated one, take three tenths of a second."""
    ask(fake, ["fine", "once:", "bad"], {"per_minute": 600})
    assert len(fake.at) == 4
    assert max(fake.at) - min(fake.at) >= 0.25


def test_the_pace_is_even() -> None:
    """Turns are given out one gap apart, whoever asks; without a limit nobody waits."""

    async def spent(per_minute: int) -> float:
        pace = _Pace(per_minute)
        started = asyncio.get_running_loop().time()
        await asyncio.gather(*(pace.wait(None) for _ in range(5)))
        return asyncio.get_running_loop().time() - started

    assert 0.08 <= asyncio.run(spent(3000)) < 0.5
    assert asyncio.run(spent(0)) < 0.05


@pytest.mark.parametrize(("status", "hint"), [(401, "check the key in OPENAI_API_KEY"), (404, "check url and model")])
def test_a_wrong_key_or_model_ends_the_run(fake: FakeEndpoint, status: int, hint: str) -> None:
    """What fails for every answer is said once, after one round of requests."""
    with pytest.raises(UserError, match=hint) as caught:
        ask(fake, [f"status:{status}"] * 50)
    assert len(fake.asked) <= 8
    assert KEY not in str(caught.value)


def test_an_endpoint_that_is_gone_ends_the_run(fake: FakeEndpoint) -> None:
    """Too many failures in a row, or nobody at the address, are a clear line."""
    fake.down = True
    with pytest.raises(UserError, match=f"failed {LEAST_FAULTS} requests in a row, the last with status 500"):
        ask(fake, [f"{n}" for n in range(40)], {"retries": 0})
    fake.server.shutdown()
    fake.server.server_close()
    with pytest.raises(UserError, match="cannot be reached"):
        ask(fake, ["fine"], {"retries": 1})


def test_without_the_package_the_user_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """The message names the extra to install."""
    monkeypatch.setitem(__import__("sys").modules, "openai", None)
    judge = EndpointJudge(kind="endpoint", url="http://localhost/v1", model="m")
    with pytest.raises(UserError, match=r"pip install 'nspo\[judge\]'"):
        added_judges({"mine": judge}, RuntimeSettings())


def test_a_key_that_no_header_may_hold_is_refused(fake: FakeEndpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """A key with a line break inside is refused before it is sent, and not shown."""
    monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}\n{KEY}")
    with pytest.raises(UserError, match="OPENAI_API_KEY holds characters") as caught:
        ask(fake, ["fine"])
    assert KEY not in str(caught.value)


def test_no_key_is_sent_where_none_is_named(fake: FakeEndpoint) -> None:
    """With an empty name the environment is not read."""
    ask(fake, ["fine"], api_key_env="")
    assert not [key for key in fake.keys if KEY in key]


# ------------------------------------------------------------------------------------------- kept verdicts


def test_verdicts_are_kept_when_the_endpoint_goes_away(fake: FakeEndpoint, tmp_path: Path) -> None:
    """The next run asks for the rest only, failed verdicts included; equal pairs are asked once."""
    limits = RequestSettings(concurrency=1, retries=0, timeout=5.0)
    (judge,) = added_judges({"mine": settings_of(fake)}, RuntimeSettings(requests=limits))
    answers = ["fine 1", "bad 2", "say:perhaps", *(f"status:{500 + n}" for n in range(LEAST_FAULTS)), "bad 3", "bad 2"]
    prompts = ["same"] * len(answers)
    work = tmp_path / "verdicts.jsonl"
    with pytest.raises(UserError, match="2 of 14 verdicts are kept"):
        KeptVerdicts(judge, work).verdicts(prompts, answers)
    assert fake.tries["bad 3"] == 0
    with work.open("a") as file:
        file.write('["half a li')  # a kill in the middle of a line
    later = ["fine" if answer.startswith("status") else answer for answer in answers]
    found = KeptVerdicts(judge, work).verdicts(prompts, later)
    assert text_of(found) == "sU-" + "s" * LEAST_FAULTS + "UU"
    assert fake.tries["fine 1"] == fake.tries["bad 2"] == fake.tries["bad 3"] == fake.tries["fine"] == 1
    assert fake.tries["say:perhaps"] == 2
    before = len(fake.asked)
    assert text_of(KeptVerdicts(judge, work).verdicts(prompts, later)) == text_of(found)
    assert len(fake.asked) == before + 1  # the failed one


# ------------------------------------------------------------------------------------------- the stage


@pytest.fixture(scope="module")
def cost_dir(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cost model with random weights, in the form that the training stage writes."""
    folder = tmp_path_factory.mktemp("cost") / "cost"
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_pretrained(tiny_model_dir, num_labels=1).save_pretrained(folder)
    load_tokenizer(tiny_model_dir).save_pretrained(folder)
    facts = {"target": "cost", "base": {}, "labels": "", "settings": {"max_tokens": 64, "positive_above": 0.5}}
    write_json(folder / MANIFEST_NAME, make_manifest("preference_model", model=fingerprint_model(folder), **facts))
    return folder


def test_the_stage_goes_on_and_tells_no_key(
    fake: FakeEndpoint,
    classifier_dir: Path,
    cost_dir: Path,
    tiny_model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Every added judge gets a column and scores with failures; a run without endpoint goes on where it stopped.

    The key is in no file, line or log record, though the server repeats it in its errors and in a reply.
    """
    rows = [
        (f"{domain}-{n}", role, domain, "heldout", f"{domain} prompt {n}", "", "")
        for role, domain in (("harmful", "advbench"), ("benign", "benign"), ("general", "maths"))
        for n in range(3)
    ]
    table = pa.Table.from_pylist([dict(zip(PROMPT_COLUMNS, row, strict=True)) for row in rows])
    pq.write_table(table, tmp_path / "prompts.parquet")
    told = iter(["bad", "echo:", "fine"])
    monkeypatch.setattr(stage, "greedy_answers", _planted(stage.greedy_answers, told, load_tokenizer(tiny_model_dir)))
    caplog.set_level(logging.DEBUG)
    limits = RequestSettings(concurrency=1, retries=0, timeout=5.0)
    runtime = RuntimeSettings(device="cpu", workdir=str(tmp_path / "work"), requests=limits)
    judges = {
        "net": settings_of(fake).dump(),
        "tiny": {"kind": "classifier", "source": str(classifier_dir), "unsafe": ["toxic"]},
    }
    small = {"harmful_prompts": 3, "benign_prompts": 3, "general_prompts": 3, "max_new_tokens": 4, "first_tokens": 2}
    settings = EvaluationSettings.model_validate({**small, "judges": judges})
    place = tmp_path / "prompts.parquet"
    out = tmp_path / "out"

    def evaluate() -> None:
        inputs = stage.EvaluationInputs(tiny_model_dir, tiny_model_dir, cost_dir, place)
        stage.evaluate(settings, "base", 0, inputs, out, runtime)

    handler: Any = fake.server.RequestHandlerClass
    reply, handler.reply = handler.reply, _refuse
    with pytest.raises(UserError, match="answers with status 401"):
        evaluate()
    handler.reply = reply
    evaluate()

    found = pq.read_table(out / "responses.parquet").to_pylist()
    assert [row["judge_net"] for row in found if row["role"] == "harmful"] == [1.0, None, 0.0]
    assert all(row["judge_net"] is None for row in found if row["role"] != "harmful")
    metrics = json.loads((out / "metrics.json").read_text())
    assert list(metrics["judges"]) == sorted(["cost_model", "net", "refusal_phrases", "tiny"])
    scores = {s["judge"]: s for s in metrics["scores"] if s["name"] == "unsafe_rate"}
    assert (scores["net"]["value"], scores["net"]["n"], scores["net"]["failures"]) == (pytest.approx(2 / 3), 3, 1)
    assert scores["tiny"]["failures"] == 0
    assert next(iter(scores)) == "cost_model"
    assert not list((tmp_path / "work").iterdir())
    written = "".join(path.read_bytes().decode("latin-1") for path in out.iterdir())
    spoken = capfd.readouterr()
    assert "your key is [key]" in spoken.err
    assert KEY not in json.dumps(found) + json.dumps(metrics) + written + spoken.out + spoken.err + caplog.text


def _planted(real: Any, texts: Iterator[str], tokenizer: Any) -> Any:
    """Greedy answers, those to harmful prompts replaced by `texts`."""
    planted: list[str] = []

    def answers(*arguments: Any) -> list[list[int]]:
        planted.extend(texts)
        found = real(*arguments)
        for place, text in enumerate(planted):
            found[place] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return found

    return answers


def _refuse(handler: Any, *_: Any) -> None:
    handler.send(401, {"error": {"message": f"Incorrect API key provided: {KEY}"}})


def test_scores_without_added_judges_are_as_before() -> None:
    """The names of the judges add scores and change none."""
    row = {"role": "harmful", "domain": "d", "correct": None, "exact_match": None, "refused": False}
    rows = [{**row, "unsafe": True, "cost_failed": False, "judge_mine": value} for value in (-0.5, None, 0.5, 0.0)]
    plain, added = compute_scores(rows, 4), compute_scores(rows, 4, ["mine"])
    assert [s for s in added if s["judge"] != "mine"] == plain
    (score,) = (s for s in added if s["judge"] == "mine")
    assert (score["value"], score["failures"], score["n"]) == (0.5, 1, 4)
