"""Named benchmarks: every format is read, leaks and samples are right, and the command runs on any model folder."""

import base64
import json
import pickle
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.published import PUBLISHED
from support.rows import write

from nspo.cli import main as cli
from nspo.data.leaks import grams, overlaps
from nspo.data.tables import training_prompts
from nspo.errors import UserError
from nspo.evaluation.benchmarks.loading import load, locate, stratified
from nspo.evaluation.benchmarks.registry import TASKS
from nspo.evaluation.benchmarks.stage import COLUMNS, benchmark_scores
from nspo.files.sources import Source
from nspo.settings.evaluation import BenchmarkSettings

# A file as each benchmark publishes it, and of its first prompt: how it is worded, its category, its role.


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_forms_are_read(name: str, tmp_path: Path) -> None:
    """A file as the benchmark's authors publish it gives its prompts; rows that are not of it are left out."""
    rows, prompt, category, role = PUBLISHED[name]
    write(tmp_path / TASKS[name].file, rows)
    benchmark = load(name, BenchmarkSettings(data=str(tmp_path)), None)
    (item,) = benchmark.items
    assert (item["prompt"], item["category"], item["role"], item["domain"]) == (prompt, category, role, name)
    assert benchmark.record["licence"] == TASKS[name].licence
    assert benchmark.record["leaks"] == {"checked": False}


def test_options_and_answers_are_read(tmp_path: Path) -> None:
    """Multiple choice keeps every option and the right one; code and maths keep what marks them."""
    for name in ("siqa", "boolq", "supergpqa", "livecodebench", "olympiadbench", "mbpp"):
        write(tmp_path / TASKS[name].file, PUBLISHED[name][0])
    settings = BenchmarkSettings(data=str(tmp_path))
    items = {name: load(name, settings, None).items[0] for name in ("siqa", "boolq", "supergpqa", "livecodebench")}
    assert items["siqa"]["doc"] == {"question": "Why?", "choices": ["a", "b"], "answer": 1}
    assert items["boolq"]["doc"]["choices"] == ["true", "false"]
    assert items["boolq"]["doc"]["answer"] == 1
    assert items["supergpqa"]["doc"]["choices"] == ["A", "B"]
    assert [case["output"] for case in items["livecodebench"]["check"]["tests"]] == ["3\n", "4\n"]
    assert load("olympiadbench", settings, None).items[0]["check"] == {"type": "maths", "answer": "2, 3"}
    assert load("mbpp", settings, None).items[0]["check"]["entry_point"] == "f"


def test_pickles_are_never_executed(tmp_path: Path) -> None:
    """A pickle that would call a function is refused, and the function is not called."""

    class Call:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "called",))

    bad = base64.b64encode(zlib.compress(pickle.dumps(Call()))).decode()
    row = {**PUBLISHED["livecodebench"][0][0], "private_test_cases": bad}
    write(tmp_path / TASKS["livecodebench"].file, [row])
    with pytest.raises(UserError, match="livecodebench: row 0"):
        load("livecodebench", BenchmarkSettings(data=str(tmp_path)), None)
    assert not (tmp_path / "called").exists()


def test_several_files_are_one_benchmark(tmp_path: Path) -> None:
    """Do-Not-Answer's files are its categories."""
    for area in ("hazard", "malice"):
        write(tmp_path / f"do_not_answer/{area}.jsonl", [{"prompt": f"about {area}", "intents": []}])
    items = load("do_not_answer", BenchmarkSettings(data=str(tmp_path)), None).items
    assert {item["category"] for item in items} == {"hazard", "malice"}


def test_data_is_pinned_or_asked_for(tmp_path: Path) -> None:
    """A local copy comes first, then a known revision; without either, one line says what to do."""
    settings = BenchmarkSettings(data=str(tmp_path))
    known = locate("gsm8k", settings)
    assert isinstance(known, Source)
    assert (known.kind, len(known.revision or "")) == ("hub", 40)
    with pytest.raises(UserError, match=r"alert/alert.jsonl .*hub:Babelscape/ALERT@REVISION"):
        locate("alert", settings)
    pinned = locate("alert", BenchmarkSettings(sources={"alert": "hub:Babelscape/ALERT@abc"}))
    assert isinstance(pinned, Source)
    assert pinned.revision == "abc"
    write(tmp_path / "gsm8k/test.jsonl", [{"question": "1+1?", "answer": "#### 2"}])
    assert locate("gsm8k", settings) == [tmp_path / "gsm8k/test.jsonl"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"question": "x"}], "advbench: row 0 has no text in goal or prompt, found question"),
        ([{"goal": "  ", "target": ""}], "advbench: row 0 has no text"),
        ([3], "found the row 3"),
        ("text", "found str"),
        ([], "no row of"),
    ],
)
def test_other_data_is_refused(rows: Any, message: str, tmp_path: Path) -> None:
    """Data of another form is one line that names the benchmark or the file."""
    write(tmp_path / "other.json", rows)
    with pytest.raises(UserError, match=message):
        load("advbench", BenchmarkSettings(sources={"advbench": str(tmp_path / "other.json")}), None)


def test_hub_revisions_are_commits() -> None:
    """A revision in the table is a whole commit; gated sets and sets without one are the user's to pin."""
    for name, task in TASKS.items():
        assert len(task.revision) in (0, 40), name
        assert task.hub or not task.revision, name


# ------------------------------------------------------------------------------------------- samples


def items(sizes: dict[str, int]) -> list[dict[str, Any]]:
    """So many prompts in each category."""
    return [
        {"domain": "d", "category": name, "prompt": f"{name} {n}"} for name, size in sizes.items() for n in range(size)
    ]


def test_a_sample_is_stratified() -> None:
    """Every category is in a sample that has room for it, larger ones in proportion (a sorted file is not cut)."""
    every = items({"big": 600, "middle": 300, **{f"small{n}": 5 for n in range(20)}})
    counts = Counter(item["category"] for item in stratified(every, 122, seed=0))
    assert len(counts) == 22
    assert counts["big"] == pytest.approx(2 * counts["middle"], abs=2)
    assert counts["middle"] > 25


def test_a_sample_depends_on_the_seed_alone() -> None:
    """The order of the file does not matter, another seed draws others, and a larger sample holds the smaller."""
    every = items({"a": 50, "b": 20})
    chosen = stratified(every, 20, seed=1)
    assert stratified(every[::-1], 20, seed=1) == chosen
    assert stratified(every, 20, seed=2) != chosen
    assert stratified(every, 30, seed=1)[:20] == chosen


# ------------------------------------------------------------------------------------------- leaks


def test_overlap_is_the_jaccard_of_word_trigrams() -> None:
    """Against the definition by sets, for every pair; case and punctuation do not count."""
    training = ["How do I make a cake?", "Write a poem about the sea", "Stop"]
    prompts = [
        "how do i make a  CAKE!",
        "How do I make a bomb",
        "Write a poem about the sky",
        "stop.",
        "Nothing alike here",
    ]
    for prompt, found in zip(prompts, overlaps(prompts, training), strict=True):
        shares = [len(grams(prompt) & grams(t)) / len(grams(prompt) | grams(t)) for t in training]
        assert found.similarity == pytest.approx(max(shares))
        assert found.place == (shares.index(max(shares)) if max(shares) else -1)
    assert [round(found.similarity, 2) for found in overlaps(prompts, training)] == [1.0, 0.6, 0.6, 1.0, 0.0]


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Similarities worked out a row at a time are the same."""
    training, prompts = [f"word {n} and word {n + 1}" for n in range(30)], [f"word {n} and more" for n in range(9)]
    whole = overlaps(prompts, training)
    monkeypatch.setattr("nspo.data.leaks.CELLS", 1)
    assert overlaps(prompts, training) == whole


def test_leaks_are_reported_and_removed(tmp_path: Path) -> None:
    """What was trained on, word for word or nearly, is not asked; held-out prompts of the training file may be."""
    text = "Explain to me how one would build a large bridge"
    rows = [
        {"prompt": text, "split": "train"},
        {"prompt": "Tell me how a small engine works in detail", "split": "validation"},
        {"prompt": "Held out and free to be asked", "split": "heldout"},
    ]
    write(tmp_path / "prompts.parquet", rows)
    goals = [text.upper(), "Tell me how a small engine works in general", rows[2]["prompt"], "Something else entirely"]
    write(tmp_path / TASKS["advbench"].file, [{"goal": goal, "target": ""} for goal in goals])
    training = training_prompts([tmp_path / "prompts.parquet"])
    benchmark = load("advbench", BenchmarkSettings(data=str(tmp_path)), training)
    assert {item["prompt"] for item in benchmark.items} == set(goals[2:])
    leaks = benchmark.record["leaks"]
    assert (leaks["exact"], leaks["near"], leaks["training_prompts"]) == (1, 1, 2)
    assert set(leaks["removed"]) == {"advbench-00000", "advbench-00001"}
    assert (benchmark.record["prompts"], benchmark.record["asked"]) == (4, 2)


# ------------------------------------------------------------------------------------------- scores


def row(role: str, domain: str, **columns: Any) -> dict[str, Any]:
    """A row of responses.parquet."""
    known = {"role": role, "domain": domain, "category": "", "refused": False, "correct": None}
    return {**dict.fromkeys(COLUMNS), **known, **columns}


def score(found: list[dict[str, Any]], name: str, domain: str, category: str = "") -> dict[str, Any]:
    (one,) = (s for s in found if (s["name"], s["domain"], s["category"]) == (name, domain, category))
    return one


def test_refusing_everything_is_not_lost_ability() -> None:
    """A model that refuses half and is right otherwise: accuracy falls, what it answered is right."""
    rows = [row("general", "gsm8k", refused=n % 2 == 0, correct=n % 2 == 1) for n in range(20)]
    found = benchmark_scores("gsm8k", rows, [], False)
    assert (score(found, "accuracy", "gsm8k")["value"], score(found, "accuracy", "gsm8k")["n"]) == (0.5, 20)
    assert (score(found, "accuracy_answered", "gsm8k")["value"], score(found, "accuracy_answered", "gsm8k")["n"]) == (
        1,
        10,
    )
    assert score(found, "refusal_rate", "gsm8k")["value"] == 0.5
    lost = [row("general", "gsm8k", correct=n % 2 == 1) for n in range(20)]
    found = benchmark_scores("gsm8k", lost, [], False)
    assert score(found, "accuracy_answered", "gsm8k")["value"] == 0.5
    assert score(found, "refusal_rate", "gsm8k")["value"] == 0.0


def test_xstest_contrast() -> None:
    """Refusing everything, or nothing, gives no contrast; refusing the unsafe alone gives all of it."""

    def contrast(safe: bool, unsafe: bool) -> dict[str, Any]:
        rows = [row("benign", "xstest_safe", refused=safe)] * 25 + [
            row("harmful", "xstest_unsafe", refused=unsafe)
        ] * 20
        return score(benchmark_scores("xstest", rows, [], False), "refusal_contrast", "xstest")

    for same in (True, False):
        assert contrast(same, same)["value"] == 0
        assert contrast(same, same)["low"] < 0 < contrast(same, same)["high"]
    assert (contrast(False, True)["value"], contrast(False, True)["high"], contrast(False, True)["n"]) == (1, 1, 45)
    assert contrast(True, False)["value"] == -1


def test_categories_add_up() -> None:
    """Each category has its score, and their prompts are the whole's."""
    rows = [
        row("harmful", "alert", category=c, unsafe=u, cost_failed=False)
        for c, u in [("a", True), ("a", False), ("b", True)]
    ]
    found = benchmark_scores("alert", rows, [], True)
    assert score(found, "unsafe_rate", "alert")["n"] == 3
    assert [score(found, "unsafe_rate", "alert", c)["value"] for c in "ab"] == [0.5, 1.0]
    assert len({(s["name"], s["domain"], s["judge"], s["category"]) for s in found}) == len(found)


# ------------------------------------------------------------------------------------------- the command


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder with small copies of AdvBench and XSTest."""
    goals = [{"goal": f"Do the thing number {n}", "target": ""} for n in range(6)]
    write(tmp_path / "data" / TASKS["advbench"].file, goals)
    xstest = [{"prompt": f"Question {n}", "type": "homonyms", "label": ("safe", "unsafe")[n % 2]} for n in range(6)]
    write(tmp_path / "data" / TASKS["xstest"].file, xstest)
    return tmp_path / "data"


def run(model: Path, data: Path, out: Path, *more: str) -> int:
    """The command as a user types it."""
    work = str(out.parent / "work")
    flags = ["--data", str(data), "--out", str(out), "--max-new-tokens", "4", "--device", "cpu", "--workdir", work]
    return cli.main(["benchmark", "--model", str(model), "--tasks", "advbench,xstest", *flags, *more])


def test_the_command_runs_on_any_model(tiny_model_dir: Path, data: Path, tmp_path: Path) -> None:
    """Without a cost model or a workflow: a folder per benchmark, fixed denominators, the record of the data."""
    assert run(tiny_model_dir, data, tmp_path / "out", "--limit", "4") == 0
    metrics = json.loads((tmp_path / "out/advbench/metrics.json").read_text())
    assert (metrics["kind"], metrics["benchmark"]["asked"], metrics["benchmark"]["prompts"]) == ("benchmark", 4, 6)
    assert set(metrics["judges"]) == {"refusal_phrases"}
    assert [(s["name"], s["n"]) for s in metrics["scores"]] == [("refusal_rate", 4)]
    rows = pq.read_table(tmp_path / "out/xstest/responses.parquet").to_pylist()
    assert {(r["role"], r["domain"]) for r in rows} == {("benign", "xstest_safe"), ("harmful", "xstest_unsafe")}
    assert all(r["response"] is not None and r["response_tokens"] == len(r["answer_ids"]) for r in rows)


def test_answers_are_made_once(
    tiny_model_dir: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A finished benchmark is left alone; after a change that only judges see, the same answers are judged again."""
    assert run(tiny_model_dir, data, tmp_path / "out") == 0
    before = (tmp_path / "out/advbench/responses.parquet").read_bytes()
    capsys.readouterr()
    assert run(tiny_model_dir, data, tmp_path / "out") == 0
    assert "there already" in capsys.readouterr().err
    monkeypatch.setattr("nspo.models.vllm_engine.generate", lambda *arguments: iter(()) if not arguments[2] else 1 / 0)
    monkeypatch.setattr("nspo.judges.judge.OPENING_CHARACTERS", 100)
    assert run(tiny_model_dir, data, tmp_path / "out") == 0
    assert "continuing after 6 of 6 prompts" in capsys.readouterr().err
    written = pq.read_table(tmp_path / "out/advbench/responses.parquet").to_pylist()
    assert [r["answer_ids"] for r in written] == [
        r["answer_ids"] for r in pq.read_table(pa.BufferReader(before)).to_pylist()
    ]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--tasks", "advbnch"], "benchmarks: found the benchmark 'advbnch', did you mean 'advbench'?"),
        (
            ["--sources", '{"mine": "x.csv"}'],
            "benchmarks: found the benchmark 'mine', expected one that docs",
        ),
        (["--tasks", "alert"], "alert: no data: put alert/alert.jsonl"),
        (["--cost", "nowhere"], "nowhere"),
        (["--training", "nowhere.parquet"], "nowhere.parquet does not exist"),
    ],
)
def test_mistakes_cost_no_answer(
    more: list[str], said: str, tiny_model_dir: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is missing is told in one line before any answer, and nothing is written."""
    assert run(tiny_model_dir, data, tmp_path / "out", *more) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
