"""The command `nspo benchmark`: named benchmarks on any model folder, whoever trained it, judged by whom you choose.

It differs from the evaluation of the workflow (`nspo/evaluation`) in its prompts, which are published sets and not the
run's own held-out ones; answers, judges, marks and statistics are the same code. Each benchmark gets a folder of its
own below `out`:

- `responses.parquet`: one row per prompt asked, with the columns `COLUMNS` and `judge_NAME` for each added judge.
  `role` is harmful, benign or general; `domain` the benchmark (XSTest has two, xstest_safe and xstest_unsafe).
- `metrics.json`: the manifest (`kind` benchmark, `schema`, `method`, `seed`), `model` (identity of the folder),
  `benchmark` (the record of `nspo/evaluation/benchmarks/loading.py`: source, revision, split, licence, leaks, prompts,
  asked), `left_out` (how many of these are too long for the model, by domain), `unread` (by domain, how many answers
  are longer than the cost model reads), `settings`, `judges` (identity by name),
  and `scores`: rows as in `nspo/evaluation/scores.py` (axis, name, domain, judge, value, low, high, n, failures, unit)
  and `category`, empty for the whole benchmark. Names of scores:
  safety: unsafe_rate (one per judge), refusal_rate; over_refusal: refusal_rate, refusal_contrast (XSTest: refusal rate
  on unsafe minus safe prompts); ability: accuracy, accuracy_answered, win_rate and tie_rate (AlpacaEval, where
  `benchmarks.comparison` names who compares); refusal: refusal_rate on ability prompts.

A model that refuses everything scores like one that lost its ability. What tells them apart: `refusal_rate` on ability
prompts, `accuracy_answered` (over the prompts that were not refused, with its own n), multiple choice by likelihood,
where nothing can be refused, and XSTest's contrast, which is 0 for a model that refuses everything.

Answers stay in the working folder after the run, so another judge asks the model nothing again. A benchmark whose
`metrics.json` is there and was made of the same parts is left as it is.

Command: `nspo benchmark --model DIR --tasks advbench,xstest --data FOLDER --out DIR [--cost DIR] [--judges JSON]`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nspo.data.tables import training_prompts
from nspo.errors import UserError
from nspo.evaluation.answers import add_verdicts, greedy_answers, judge_answers, write_responses
from nspo.evaluation.benchmarks import harness
from nspo.evaluation.benchmarks.loading import Benchmark, check_benchmarks, load
from nspo.evaluation.benchmarks.registry import TASKS
from nspo.evaluation.checks import mark, runs_code
from nspo.evaluation.pairwise import Comparison, add_wins
from nspo.evaluation.scores import accuracy, refusal, refusal_contrast, safety, wins
from nspo.files.manifest import (
    check_made_with,
    fingerprint,
    make_manifest,
    read_json,
    write_json,
)
from nspo.files.tables import load_table, read_table
from nspo.judges.judge import Judge, RefusalPhrases
from nspo.judges.make import added_judges
from nspo.models.generation import Generate
from nspo.models.loading import load_model, load_tokenizer, model_identity
from nspo.models.structure.positions import fitting
from nspo.models.vllm_engine import answering, check_engine
from nspo.preference.model import CostModel
from nspo.run.devices import device_of
from nspo.run.progress import say
from nspo.settings.evaluation import BenchmarkSettings
from nspo.settings.judges import JudgeSettings
from nspo.settings.runtime import RuntimeSettings

KIND = "benchmark"
COLUMNS = {
    "role": pa.string(),
    "domain": pa.string(),
    "category": pa.string(),
    "id": pa.string(),
    "prompt": pa.string(),
    "response": pa.string(),  # of multiple choice: the option with the highest likelihood
    "answer_ids": pa.list_(pa.int32()),  # missing where the harness asked
    "response_tokens": pa.int32(),
    "refused": pa.bool_(),  # missing for multiple choice
    "cost": pa.float32(),  # this and the next two: harmful prompts, with a cost model
    "unsafe": pa.bool_(),
    "cost_failed": pa.bool_(),
    "correct": pa.bool_(),  # ability only
    "reference": pa.string(),  # this and the next, where answers are compared: the other answer
    "win": pa.float32(),  # 1, 1/2 or 0; missing where the judge failed
}
Rows = list[dict[str, Any]]


def run_benchmarks(
    settings: BenchmarkSettings,
    judging: JudgeSettings,
    runtime: RuntimeSettings,
    model: Path,
    out: Path,
    cost: Path | None = None,
    training: Sequence[Path] | None = None,
    base_answers: Path | None = None,
    name: str | None = None,
    seed: int | None = None,
) -> None:
    """Answer, judge and score the benchmarks of `settings.tasks` with the model folder `model`.

    Args:
        judging: judges of safety beside the cost model.
        out: folder that gets a folder per benchmark.
        cost: folder of a cost model that judges safety.
        training: files `prompts.parquet` or `labels.parquet`; what they train on is left out. None: not checked.
        base_answers: `responses.parquet` of the base model on the benchmark whose answers are compared with its
            (`comparison.against: base`); None for the base itself, which is compared with nobody.
        name, seed: method and seed that the model was trained with, for the record; the folder's name and 0 if None.

    Raises:
        UserError: before any answer is made, for data, a model or a judge that is missing; after the answers, for a
            judge that cannot go on.
    """
    if not settings.tasks:
        raise UserError("no benchmark is named", expected="--tasks NAME,NAME (see docs/evaluation.md)")
    device = device_of(runtime.device)
    check_engine("benchmarks.engine", settings.engine, device)
    check_benchmarks(settings)
    identity = model_identity(model)
    seen = training_prompts(training) if training else None
    benchmarks = {task: load(task, settings, seen) for task in settings.tasks}
    for task, benchmark in benchmarks.items():
        if "doc" in benchmark.items[0]:
            harness.check(task)
    judges = CostModel(cost, device) if cost else None, RefusalPhrases()
    added = added_judges(judging.judges, runtime)
    every: list[Judge] = [*(judge for judge in judges if judge), *added]
    identities = {judge.name: judge.identity for judge in every}
    comparison = _comparison(settings, runtime, base_answers)
    facts: dict[str, Any] = {
        "method": name or model.resolve().name,
        "seed": seed or 0,
        "model": identity,
        "settings": settings.model_dump(mode="json", exclude={"tasks", "data", "sources", "comparison"}),
    }
    waiting = {}
    for task, benchmark in benchmarks.items():
        asked = dict(identities)
        if comparison and TASKS[task].compared:
            other = _refer(task, benchmark, facts["settings"], base_answers if comparison.with_base else None)
            asked[comparison.name] = {**comparison.identity, "other": other}
        manifest = make_manifest(KIND, benchmark=benchmark.record, judges=asked, **facts)
        if not _is_made(out / task / "metrics.json", manifest):
            waiting[task] = benchmark, manifest
    if not waiting:
        say(f"{out}: every benchmark is there already")
        return
    loaded, tokenizer = load_model(model, device, "auto"), load_tokenizer(model)
    with answering(settings.engine, model, loaded, tokenizer, runtime.vllm) as generate:
        for task, (benchmark, manifest) in waiting.items():
            work = Path(runtime.workdir)
            rows, left_out = _answered(task, benchmark, loaded, tokenizer, generate, settings, identity, work)
            unread = judge_answers(rows, *judges)
            for row in rows:
                row["refused"] = row["refused"] if row.get("response_tokens") is not None else None
            for judge in added:
                kept = _work(runtime.workdir, "verdicts", task, judge.name, fingerprint(judge.identity), identity)
                add_verdicts(rows, judge, kept)
            if comparison and TASKS[task].compared:
                kept = _work(runtime.workdir, "wins", task, fingerprint(comparison.identity), identity)
                add_wins(rows, comparison, kept)
            write_responses(rows, COLUMNS, judging.judges, manifest, out / task / "responses.parquet")
            written = read_table(out / task / "responses.parquet")
            scores = benchmark_scores(task, written, list(judging.judges), cost is not None)
            found = {"left_out": left_out, "unread": unread, "scores": scores}
            write_json(out / task / "metrics.json", {**manifest, **found})


def benchmark_scores(task: str, rows: Rows, judges: Sequence[str], cost_model: bool) -> list[dict[str, Any]]:
    """The scores of one benchmark: of the whole, then of each category where there are several."""
    found = [{**score, "category": ""} for score in _scores(rows, judges, cost_model)]
    harmful, benign = ([row for row in rows if row["role"] == role] for role in ("harmful", "benign"))
    if harmful and benign:
        found.append({**refusal_contrast(task, harmful, benign), "category": ""})
    categories = sorted({row["category"] for row in rows})
    for category in categories if len(categories) > 1 else ():
        part = [row for row in rows if row["category"] == category]
        found += [{**score, "category": category} for score in _scores(part, judges, cost_model)]
    return found


def _scores(rows: Rows, judges: Sequence[str], cost_model: bool) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for role, domain in sorted({(row["role"], row["domain"]) for row in rows}):
        part = [row for row in rows if row["domain"] == domain]
        if role == "harmful":
            found += safety(domain, part, judges, cost_model)
        elif role == "benign":
            found.append(refusal("over_refusal", domain, part))
        else:
            found += _ability(domain, part)
    return found


def _ability(domain: str, rows: Rows) -> list[dict[str, Any]]:
    marked = [row for row in rows if row["correct"] is not None]
    spoken = [row for row in rows if row["refused"] is not None]
    answered = [row for row in marked if row["refused"] is False]
    found = [accuracy(domain, marked, "check")] if marked else []
    if spoken:
        found.append(refusal("refusal", domain, spoken))
    if answered:
        found.append(accuracy(domain, answered, "check", "accuracy_answered"))
    if compared := [row for row in rows if row["reference"] is not None]:
        found += wins(domain, compared)
    return found


def _comparison(settings: BenchmarkSettings, runtime: RuntimeSettings, base_answers: Path | None) -> Comparison | None:
    """Who compares the answers; None where nobody does, or the model is the base that others are compared with."""
    if settings.comparison is None or (settings.comparison.against == "base" and base_answers is None):
        return None
    return Comparison(settings.comparison, runtime.requests)


def _refer(task: str, benchmark: Benchmark, settings: dict[str, Any], base_answers: Path | None) -> dict[str, Any]:
    """Give every item the `reference` that its answer is compared with, and say whose they are.

    Raises:
        UserError: answers that are missing, or that the base model gave to other prompts or with other settings.
    """
    if base_answers is None:
        if missing := [item for item in benchmark.items if not isinstance(item["published"], str)]:
            raise UserError(
                f"{task}: {len(missing)} of {len(benchmark.items)} prompts have no published answer (`output`)",
                expected="the benchmark's own file, or `benchmarks.comparison.against",
                change="base`",
            )
        given = {item["id"]: item["published"].strip() for item in benchmark.items}
        whose = {"answers": fingerprint(sorted(given.items()))}
    else:
        manifest, written = load_table(base_answers, KIND)
        expected = {"benchmark": benchmark.record, "settings": settings}
        check_made_with(manifest, expected, base_answers, f"evaluate the base model on {task} again")
        given = {row["id"]: row["response"] for row in written}
        whose = manifest["model"]
    for item in benchmark.items:
        item["reference"] = given.get(item["id"])  # none where the base has no room for the prompt
    return whose


def _answered(
    task: str,
    benchmark: Benchmark,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    generate: Generate,
    settings: BenchmarkSettings,
    identity: dict[str, Any],
    workdir: Path,
) -> tuple[Rows, dict[str, int]]:
    """The rows with what the model answered, and whether that is right; how many it has no room for, by domain."""
    rows = [dict(item) for item in benchmark.items]
    size = settings.max_new_tokens, settings.batch_size
    if "doc" in rows[0]:
        docs = [row["doc"] for row in rows]
        work = _work(workdir, "answers", task, docs, *size, settings.engine, identity)
        return harness.answer(task, TASKS[task], rows, model, tokenizer, generate, *size, work)
    for row in rows:
        row["check"] = None if not settings.run_code and runs_code(row.get("check") or {}) else row.get("check")
    if rows[0]["check"]:
        mark(rows[0]["check"], "")  # refuses a machine that cannot mark, before any answer is made
    limit = settings.max_new_tokens, task, "benchmarks.max_new_tokens"
    rows, ids, left_out = fitting(rows, tokenizer, model.config, *limit)
    work = _work(workdir, "answers", task, ids, *size, settings.engine, identity)
    for row, answer in zip(rows, greedy_answers(generate, ids, *size, work, f"answers to {task}"), strict=True):
        response = str(tokenizer.decode(answer, skip_special_tokens=True)).strip()
        row.update(response=response, answer_ids=answer, response_tokens=len(answer))
        row["correct"] = mark(row["check"], response) if row["check"] else None
    return rows, left_out


def _work(workdir: Path | str, what: str, task: str, *shaped_by: Any) -> Path:
    return Path(workdir) / f"{what}-{task}-{fingerprint(list(shaped_by))}.jsonl"


def _is_made(path: Path, manifest: dict[str, Any]) -> bool:
    if not path.is_file():
        return False
    found = read_json(path)
    return all(found.get(key) == value for key, value in manifest.items())
