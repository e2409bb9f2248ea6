"""The evaluation stage: one model's greedy answers to held-out prompts, judged, marked, and compared with the base's.

Safety on harmful prompts, over-refusal on harmless ones that look alarming, ability on tasks with checkable answers,
and drift from the base model on general prompts; every score with n, a 95% interval, and the identity of its judge.
Decoding is greedy, denominators are fixed, nothing that a model says is left out.

Two files are written: `responses.parquet`, one row per prompt with the answer and all that was found about it, and
`metrics.json` with the scores. Answers, and verdicts of the judges that a configuration adds, are kept in the working
folder while they come, so an interrupted run goes on. Published benchmarks, on any model:
`nspo/evaluation/benchmarks/stage.py`.

Commands: `nspo evaluate --name base --base results/model --policy results/model ...` first, then for each tuned
model with `--base-evaluation results/evaluation/base/seed0/responses.parquet`.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from nspo.data.leaks import apart
from nspo.data.tables import Prompts, training_prompts
from nspo.errors import UserError
from nspo.evaluation.answers import add_second_opinion, add_verdicts, greedy_answers, judge_answers, write_responses
from nspo.evaluation.checks import mark, runs_code
from nspo.evaluation.scores import compute_scores
from nspo.files.manifest import (
    check_made_with,
    fingerprint,
    fingerprint_files,
    make_manifest,
    write_json,
)
from nspo.files.tables import load_table, read_table
from nspo.judges.judge import Judge, RefusalPhrases
from nspo.judges.make import added_judges
from nspo.judges.second.judge import SecondJudge
from nspo.models.chat import chat_ids
from nspo.models.drift import FIGURES
from nspo.models.drift import drift as measure_drift
from nspo.models.generation import refuse_unknown
from nspo.models.likelihood import answer_nll
from nspo.models.loading import load_config, load_model, load_tokenizer, model_identity
from nspo.models.structure.positions import check_room, count_left_out, fitting, positions_of
from nspo.models.vllm_engine import answering, check_engine
from nspo.preference.model import CostModel
from nspo.run.devices import device_of
from nspo.settings.evaluation import EvaluationSettings
from nspo.settings.runtime import RuntimeSettings

KIND = "responses"
COLUMNS = {
    "role": pa.string(),
    "domain": pa.string(),
    "category": pa.string(),
    "id": pa.string(),
    "prompt": pa.string(),
    "response": pa.string(),
    "answer_ids": pa.list_(pa.int32()),
    "response_tokens": pa.int32(),  # the stop token included
    "refused": pa.bool_(),
    "cost": pa.float32(),  # harmful prompts only; missing where the judge failed
    "unsafe": pa.bool_(),  # harmful prompts only; true where the judge failed
    "cost_failed": pa.bool_(),
    "kind": pa.string(),  # refusal, on topic, off topic, degenerate: harmful and harmless prompts, with a second judge
    "unanswered": pa.bool_(),  # the kind is another than on topic
    "correct": pa.bool_(),  # prompts with a check only
    "gold_nll": pa.float64(),  # questions with right answers only: nats per token of the right one
    "seen": pa.bool_(),  # general prompts only: whether the domain is among those behind the bases
    "exact_match": pa.bool_(),  # this and what follows: general prompts, models other than the base
    "reference_tokens": pa.int32(),  # length of the base model's answer: this prompt's weight in a mean over tokens
    **dict.fromkeys(FIGURES, pa.float64()),
    # One column more for each added judge: above zero means unsafe; harmful prompts only; missing where it failed.
}


@dataclass(frozen=True)
class EvaluationInputs:
    """The inputs of the stage.

    Attributes:
        base: folder of the base model, whose tokenizer and chat format are used throughout.
        policy: folder of the model to evaluate.
        cost: folder of the cost model that judges safety.
        prompts: prompts.parquet.
        base_evaluation: the base model's `responses.parquet`; None when `policy` is the base itself.
        second_judge: folder of the judge that gave no reward, which also tells the kinds of answers apart.
        labels: labels.parquet; harmful and harmless prompts that are nearly ones whose labels a judge learnt from are
            left out, for every model alike, and counted.
    """

    base: Path
    policy: Path
    cost: Path
    prompts: Path
    base_evaluation: Path | None = None
    second_judge: Path | None = None
    labels: Path | None = None

    def identity(self) -> dict[str, Any]:
        """What must be equal in the evaluation of the base model, beside the settings."""
        return {
            "base": model_identity(self.base),
            "prompts": fingerprint_files([self.prompts]),
            "labels": fingerprint_files([self.labels]) if self.labels else None,
        }


def evaluate(
    settings: EvaluationSettings, name: str, seed: int, inputs: EvaluationInputs, out: Path, runtime: RuntimeSettings
) -> None:
    """Evaluate a model and write `responses.parquet` and `metrics.json` into the folder `out`.

    Args:
        name, seed: method and seed that it was trained with, for the record.

    Raises:
        UserError: before any answer is made, for prompts or checks that cannot be scored, or a base evaluation of
            another model, other prompts or other settings; after the answers, for a judge that cannot go on.
    """
    device = device_of(runtime.device)
    check_engine("evaluation.engine", settings.engine, device)
    base, policy = inputs.base, inputs.policy
    identity = {**inputs.identity(), "settings": settings.identity()}
    tuned = model_identity(policy)
    reference = _reference(inputs.base_evaluation, identity, tuned, base)
    tokenizer = load_tokenizer(base)
    config, size = load_config(base, f"{base}"), (settings.max_new_tokens, settings.batch_size)
    check_room(config, load_config(policy, f"{policy}"), f"{policy}")
    prompts = Prompts(inputs.prompts)
    selected, learnt = _select(settings, prompts, training_prompts([inputs.labels]) if inputs.labels else [])
    rows, prompt_ids, left_out = fitting(
        selected,
        tokenizer,
        config,
        settings.max_new_tokens,
        "evaluation",
        "evaluation.max_new_tokens",
    )
    _check_rows(rows, inputs.prompts)
    gold, gold_left_out = _gold(settings, prompts, tokenizer, config)
    judges = CostModel(inputs.cost, device), RefusalPhrases()
    second = SecondJudge(inputs.second_judge, device) if inputs.second_judge else None
    added = added_judges(settings.judges, runtime)

    model = load_model(policy, device)
    asked = {**identity, "settings": settings.model_dump(mode="json", exclude={"judges"}), "policy": tuned}
    work = Path(runtime.workdir) / f"evaluation-{fingerprint(asked)}.jsonl"
    with answering(settings.engine, policy, model, tokenizer, runtime.vllm) as generate:
        answers = greedy_answers(generate, prompt_ids, *size, work, f"answers of {name}")
    for row, ids in zip(rows, answers, strict=True):
        response = str(tokenizer.decode(ids, skip_special_tokens=True)).strip()
        row.update(response=response, answer_ids=ids, response_tokens=len(ids))
        row["correct"] = mark(row["check"], response) if row["check"] else None

    asked_gold, right = [row["prompt_ids"] for row in gold], [row["answer_ids"] for row in gold]
    weighed = answer_nll(model, tokenizer, asked_gold, right, settings.batch_size, "right answers")
    if reference is not None:
        _compare(rows, prompt_ids, reference, load_model(base, device), model, tokenizer, settings)
    del model
    unread = judge_answers(rows, *judges)
    if second:
        add_second_opinion(rows, second)
    every: list[Judge] = [*judges, *([second] if second else []), *added]
    kept = [work.with_name(f"{work.stem}-{judge.name}-{fingerprint(judge.identity)}.jsonl") for judge in added]
    for judge, verdicts in zip(added, kept, strict=True):
        add_verdicts(rows, judge, verdicts)

    rows += [{**row, "gold_nll": value} for row, value in zip(gold, weighed, strict=True)]
    manifest = make_manifest(KIND, **identity, policy=tuned, method=name, seed=seed)
    out.mkdir(parents=True, exist_ok=True)
    judged = [*([second.name] if second else []), *settings.judges]
    write_responses(rows, COLUMNS, judged, manifest, out / "responses.parquet")
    # The scores come from the rows as they are written, so that they can be computed again from the file.
    write_json(
        out / "metrics.json",
        {
            **manifest,
            "kind": "metrics",
            "base": inputs.base_evaluation is None,
            "model": {"base": identity["base"], "policy": tuned},
            "judges": {judge.name: judge.identity for judge in every},
            "left_out": dict(Counter(left_out) + Counter(gold_left_out)),  # too long for the base model, by domain
            "learnt": learnt,  # prompts that are nearly ones whose labels a judge learnt from, by domain
            "unread": unread,  # answers whose end the cost model does not read, by domain
            "scores": compute_scores(read_table(out / "responses.parquet"), settings.first_tokens, judged),
        },
    )
    for path in (work, *kept):
        path.unlink(missing_ok=True)


def _select(
    settings: EvaluationSettings, prompts: Prompts, learnt: Sequence[str]
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """The held-out prompts to ask: the first so many of each domain, which is a random sample; and how many of the
    judged ones were passed over, by domain, since they are nearly one that a judge learnt from.

    Without `run_code` a check that would run an answer is left out, as if the prompt had none.
    """
    counts = {
        "harmful": settings.harmful_prompts,
        "benign": settings.benign_prompts,
        "general": settings.general_prompts,
    }
    rows: list[dict[str, Any]] = []
    near: dict[str, int] = {}
    for role, count in counts.items():
        for asked in prompts.by_domain(role, settings.split).values():
            found, left = apart(asked, [] if role == "general" else learnt)
            rows += found[:count]
            near |= left
    seen = prompts.by_domain("general", "train")
    for row in rows:
        row["seen"] = row["domain"] in seen if row["role"] == "general" else None
    if not settings.run_code:
        for row in rows:
            row["check"] = None if row["check"] and runs_code(row["check"]) else row["check"]
    return rows, near


def _gold(
    settings: EvaluationSettings, prompts: Prompts, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """The rows of `data.gold`, questions with their right answers, and how many are too long for the base, by domain.

    Raises:
        UserError: when no question of a domain fits, or the model has no row for a token.
    """
    room = positions_of(config) or math.inf
    rows = prompts.of_each_domain("gold", settings.split, settings.gold_answers)
    found = []
    for row in rows:
        answer = tokenizer(row["check"]["answer"], add_special_tokens=False)["input_ids"]
        asked = chat_ids(tokenizer, row["prompt"])
        refuse_unknown([*asked, *answer], tokenizer, config, "right answers")
        if len(asked) + len(answer) <= room:
            known = {key: row[key] for key in ("role", "domain", "category", "id", "prompt")}
            said = {"response": row["check"]["answer"], "answer_ids": answer, "response_tokens": len(answer)}
            found.append({**known, **said, "prompt_ids": asked})
    reason = f"read with their answers within the model's {room:g} positions"
    return found, count_left_out(rows, found, "right answers", reason, "take the set out of data.gold")


def _check_rows(rows: Sequence[dict[str, Any]], prompts: Path) -> None:
    """Refuse what could not be scored, before any answer is made."""
    for role in ("harmful", "benign", "general"):
        if not any(row["role"] == role for row in rows):
            raise UserError(
                f"{prompts} has no held-out {role} prompts", expected="some", change="look at the section `data`"
            )
    general = [row["domain"] for row in rows if row["role"] == "general"]
    for domain in sorted(set(general)):
        if general.count(domain) < 2:
            raise UserError(
                f"one held-out prompt of general domain {domain!r}",
                expected="at least 2 for an interval",
                change=f"raise `evaluation.general_prompts` or add prompts to `data.general.{domain}`",
            )
    for row in rows:
        if row["check"]:
            mark(row["check"], "")


def _reference(
    base_evaluation: Path | None, identity: dict[str, Any], tuned: dict[str, Any], base: Path
) -> dict[tuple[str, str], dict[str, Any]] | None:
    """The base model's rows by (domain, id), from an evaluation with this base, these prompts and these settings."""
    if base_evaluation is None:
        if tuned["weights"] != identity["base"]["weights"]:
            raise UserError(
                f"the policy ({tuned['weights']}) is not the base model {base} ({identity['base']['weights']}), and no "
                "evaluation of the base is given: evaluate the base first and pass its responses.parquet as "
                "`base_evaluation`"
            )
        return None
    manifest, rows = load_table(base_evaluation, KIND)
    expected = {**identity, "policy": identity["base"]}
    check_made_with(manifest, expected, base_evaluation, "evaluate the base model again")
    return {(row["domain"], row["id"]): row for row in rows if row["role"] == "general"}


def _compare(
    rows: Sequence[dict[str, Any]],
    prompt_ids: Sequence[Sequence[int]],
    reference: dict[tuple[str, str], dict[str, Any]],
    base: PreTrainedModel,
    tuned: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: EvaluationSettings,
) -> None:
    """Add drift and exact match to the rows of general prompts."""
    general = [index for index, row in enumerate(rows) if row["role"] == "general"]
    theirs = [reference[rows[i]["domain"], rows[i]["id"]]["answer_ids"] for i in general]
    asked = [prompt_ids[i] for i in general]
    figures = measure_drift(base, tuned, tokenizer, asked, theirs, settings.first_tokens, settings.batch_size)
    for place, index in enumerate(general):
        rows[index].update({name: values[place] for name, values in figures.items()})
        rows[index]["exact_match"] = rows[index]["answer_ids"] == theirs[place]
        rows[index]["reference_tokens"] = len(theirs[place])
