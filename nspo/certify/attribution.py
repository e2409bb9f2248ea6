"""Where safety lives: which parts of an update hold its norm, what each does to harmful and to general inputs, and what
the model loses when it is taken back.

From the certificate, per changed tensor: its share of the update, ||dW||^2 over the sum of all (shares add up to one),
and the relative change of its layer's output on validation general and harmful inputs, ||dW K|| / ||W K||. Then the
knock-outs: for every group of layers (a quarter of the depth, all attention, all MLPs, the rest) the group's weights
are set back to the base model's, in memory, and the model answers harmful prompts and is compared with the base on
general ones. What the unsafe rate loses says how much of the safety sits there; what the drift loses, how much of the
cost. Groups overlap (a quarter holds attention and MLPs) and a network is not additive: effects need not add up.

Prompts, base answers, limits and the rows for the whole update and for none of it come from the evaluation, so that
only the groups are computed here. Finished groups are kept in the working folder. (The paper claims that null-space
updates can be explained by layer; neither it nor the release measures it.)

Command: `nspo attribute --base results/model --tuned results/policy/nspo/seed0 --certificate ... --evaluation ...`.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nspo.bases.table import find_block
from nspo.errors import UserError
from nspo.evaluation.statistics.intervals import bootstrap_mean, paired_difference, wilson
from nspo.files.journal import JsonLines
from nspo.files.manifest import check_made_with, fingerprint, make_manifest, read_json, write_json
from nspo.files.tables import read_table
from nspo.judges.judge import flags
from nspo.models.chat import chat_ids
from nspo.models.drift import Remembered, drift, token_weights
from nspo.models.generation import generate
from nspo.models.loading import load_model, load_tokenizer, model_identity
from nspo.preference.model import CostModel
from nspo.run.devices import device_of
from nspo.run.progress import say
from nspo.settings.evaluation import AttributionSettings, EvaluationSettings
from nspo.settings.runtime import RuntimeSettings

QUARTERS = 4
ATTENTION = re.compile(r"(^|\.)\w*(attn|attention)\.")
MLP = re.compile(r"(^|\.)\w*(mlp|ffn|feed_forward|moe|experts)\.")
DRIFT = ("kl_per_token", "kl_first_tokens")
Row = dict[str, Any]


def attribute(
    settings: AttributionSettings,
    base: Path,
    tuned: Path,
    certificate: Path,
    evaluation: Path,
    base_evaluation: Path,
    cost: Path,
    out: Path,
    runtime: RuntimeSettings,
) -> None:
    """Write the attribution of one tuned model as JSON.

    Args:
        base, tuned: model folders.
        certificate: of `tuned`.
        evaluation, base_evaluation: folders of the evaluations of `tuned` and of the base, with the same settings.
        cost: folder of the cost model that judged them.

    Raises:
        UserError: before any answer is made, for a certificate or evaluation of another model, or another judge.
    """
    certified, scored = read_json(certificate), read_json(evaluation / "metrics.json")
    identity = {"base": model_identity(base), "tuned": model_identity(tuned)}
    for found, path in ((certified["tuned"], certificate), (scored["model"]["policy"], evaluation)):
        expected = {"weights": identity["tuned"]["weights"]}
        check_made_with(found, expected, path, f"certify and evaluate the tuned model {tuned} first")
    device = device_of(runtime.device)
    judge = CostModel(cost, device)
    check_made_with(scored["judges"], {judge.name: judge.identity}, evaluation, f"evaluate again with {cost}")

    changed = changed_tensors(certified)
    groups = layer_groups(list(changed))
    asked = choose(settings, evaluation / "responses.parquet", base_evaluation / "responses.parquet")
    limits = EvaluationSettings.model_validate(scored["settings"])
    known = {**identity, "settings": settings.dump(), "evaluation": fingerprint(scored), "groups": groups}
    work = Path(runtime.workdir) / f"attribution-{fingerprint(known)}.jsonl"
    journal = JsonLines(work)
    done: dict[str, dict[str, list[float]]] = dict(journal.rows())
    if done:
        say(f"attribution: continuing after {len(done)} groups, kept in {work}")
    if rest := [name for name in groups if name not in done]:
        tokenizer = load_tokenizer(base)
        before, after = load_model(base, device), load_model(tuned, device)
        remembered = Remembered(before)
        for name in rest:
            with taken_back(after, before, groups[name]):
                done[name] = _measure(remembered, after, tokenizer, judge, asked, limits, name)
            journal.append([[name, done[name]]])
    total = sum(row["update_norm"] ** 2 for row in changed.values())
    nothing, everything = _as_evaluated(asked, "tuned"), _as_evaluated(asked, "base")
    rows = [("nothing", [], nothing), *((n, groups[n], done[n]) for n in groups)]
    rows.append(("everything", list(changed), everything))
    write_json(
        out,
        make_manifest(
            "attribution",
            **identity,
            method=scored["method"],
            seed=scored["seed"],
            settings=settings.dump(),
            first_tokens=limits.first_tokens,
            tensors=[
                {"tensor": name, **row, "share": row["update_norm"] ** 2 / total if total else 0.0}
                for name, row in changed.items()
            ],
            knockouts=[
                {
                    "group": name,
                    "tensors": len(tensors),
                    "share": sum(changed[t]["update_norm"] ** 2 for t in tensors) / total if total else 0.0,
                    **_scores(asked, found, nothing, limits.first_tokens),
                }
                for name, tensors, found in rows
            ],
        ),
    )
    work.unlink(missing_ok=True)


def changed_tensors(certificate: Mapping[str, Any]) -> dict[str, Row]:
    """Every tensor that training changed: `block` (None outside the blocks), `part`, `update_norm`, and the relative
    change of its layer's output on validation `general` and `harmful` inputs (None where no certificate has it; of a
    tensor of experts the root mean square of theirs)."""
    rows: dict[str, list[Row]] = {}
    for layer, row in certificate["layers"].items():
        if row["update_norm"]:
            rows.setdefault(row.get("tensor", f"{layer}.weight"), []).append(row)  # experts share a tensor
    found: dict[str, Row] = {
        name: {
            "update_norm": math.hypot(*(row["update_norm"] for row in several)),
            "general": _root_mean_square([row["leakage_validation"].get("all") for row in several]),
            "harmful": _root_mean_square([row.get("harmful") for row in several]),
        }
        for name, several in rows.items()
    }
    for name, row in certificate["unconstrained"].items():
        found[name] = {"update_norm": row["update_norm"], "general": None, "harmful": None}
    return {name: {"block": find_block(name), "part": part_of(name), **row} for name, row in found.items()}


def _root_mean_square(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.hypot(*known) / math.sqrt(len(known)) if known else None


def part_of(tensor: str) -> str:
    """`attention`, `MLP`, or `rest` (norms, embeddings, head), by the tensor's full name."""
    if ATTENTION.search(tensor):
        return "attention"
    return "MLP" if MLP.search(tensor) else "rest"


def layer_groups(tensors: Sequence[str]) -> dict[str, list[str]]:
    """Which tensors each knock-out takes back: quarters of the depth, then attention, MLP and the rest.

    The depth is that of the deepest changed block. Groups without a changed tensor are left out, and so is a group of
    all of them, which is the base model.
    """
    blocks = {name: find_block(name) for name in tensors}
    depth = max((block + 1 for block in blocks.values() if block is not None), default=0)
    groups: dict[str, list[str]] = {}
    for quarter in range(QUARTERS):
        first, end = (math.ceil(depth * q / QUARTERS) for q in (quarter, quarter + 1))
        inside = [name for name, block in blocks.items() if block is not None and first <= block < end]
        if inside:
            groups[f"blocks {first} to {end - 1}" if end - first > 1 else f"block {first}"] = inside
    for part in ("attention", "MLP", "rest"):
        groups[part] = [name for name in tensors if part_of(name) == part]
    return {name: inside for name, inside in groups.items() if 0 < len(inside) < len(tensors)}


@contextmanager
def taken_back(tuned: PreTrainedModel, base: PreTrainedModel, tensors: Sequence[str]) -> Iterator[None]:
    """`tuned` with these tensors as in `base`; its own values are back, bit for bit, when the block ends."""
    ours, theirs = tuned.state_dict(), base.state_dict()
    kept = {name: ours[name].clone() for name in tensors}
    with torch.no_grad():
        for name in tensors:
            ours[name].copy_(theirs[name])
    try:
        yield
    finally:
        with torch.no_grad():
            for name, value in kept.items():
                ours[name].copy_(value)


def choose(settings: AttributionSettings, tuned: Path, base: Path) -> dict[str, list[dict[str, Row]]]:
    """The prompts of the knock-outs: {`harmful`, `general`: pairs {tuned, base} of rows of responses.parquet}.

    The first so many of every set, which are a random sample.

    Raises:
        UserError: when the two evaluations asked different prompts, or too few.
    """
    columns = ("role", "domain", "id", "prompt", "unsafe", "answer_ids", *DRIFT)
    theirs = {(row["domain"], row["id"]): row for row in read_table(base, columns)}
    chosen: dict[str, list[dict[str, Row]]] = {"harmful": [], "general": []}
    for row in read_table(tuned, columns):
        limit = {"harmful": settings.harmful_prompts, "general": settings.general_prompts}.get(row["role"], 0)
        if sum(pair["tuned"]["domain"] == row["domain"] for pair in chosen.get(row["role"], ())) < limit:
            if (row["domain"], row["id"]) not in theirs:
                raise UserError(f"{base} has no answer to {row['id']} of {row['domain']}: evaluate both models again")
            chosen[row["role"]].append({"tuned": row, "base": theirs[row["domain"], row["id"]]})
    for role, pairs in chosen.items():
        if len(pairs) < 2:
            raise UserError(
                f"{tuned} has {len(pairs)} {role} prompts", expected="at least 2", change="evaluate more prompts"
            )
    return chosen


def _measure(
    base: Remembered,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    judge: CostModel,
    asked: Mapping[str, Sequence[Mapping[str, Row]]],
    limits: EvaluationSettings,
    group: str,
) -> dict[str, list[float]]:
    """Whether each answer of `model` is unsafe, and its drift per prompt, both in the order of `asked`."""
    prompts, general = [pair["base"]["prompt"] for pair in asked["harmful"]], asked["general"]
    ids = [chat_ids(tokenizer, prompt) for prompt in prompts]
    answers: dict[int, list[int]] = dict(
        generate(model, tokenizer, ids, limits.max_new_tokens, limits.batch_size, f"answers without {group}")
    )
    # decoded and stripped as in the evaluation, so that the judge reads the same text
    texts = [str(tokenizer.decode(answers[i], skip_special_tokens=True)).strip() for i in range(len(prompts))]
    moved = drift(
        base,
        model,
        tokenizer,
        [chat_ids(tokenizer, pair["base"]["prompt"]) for pair in general],
        [pair["base"]["answer_ids"] for pair in general],
        limits.first_tokens,
        limits.batch_size,
        f"drift without {group}",
    )
    unsafe = flags(judge.verdicts(prompts, texts), if_failed=True)
    return {"unsafe": [float(flag) for flag in unsafe], **{name: moved[name] for name in DRIFT}}


def _as_evaluated(asked: Mapping[str, Sequence[Mapping[str, Row]]], side: str) -> dict[str, list[float]]:
    """The same of the whole update (`tuned`) or none of it (`base`, which has no drift), from the evaluation."""
    unsafe = [float(pair[side]["unsafe"]) for pair in asked["harmful"]]
    return {"unsafe": unsafe, **{name: [pair[side][name] or 0.0 for pair in asked["general"]] for name in DRIFT}}


def _scores(
    asked: Mapping[str, Sequence[Mapping[str, Row]]],
    found: Mapping[str, Sequence[float]],
    whole: Mapping[str, Sequence[float]],
    first_tokens: int,
) -> Row:
    """Rates with Wilson's interval per harmful set, their paired difference from the whole update over all sets, and
    drift as a mean over answer tokens; each with n."""
    sets = [pair["base"]["domain"] for pair in asked["harmful"]]
    weights = token_weights([len(pair["base"]["answer_ids"]) for pair in asked["general"]], first_tokens)
    by_set = {
        domain: [value for value, at in zip(found["unsafe"], sets, strict=True) if at == domain]
        for domain in dict.fromkeys(sets)
    }
    return {
        "unsafe_rate": {
            domain: {**wilson(int(sum(values)), len(values))._asdict(), "n": len(values)}
            for domain, values in by_set.items()
        },
        "unsafe_difference": {**paired_difference(found["unsafe"], whole["unsafe"])._asdict(), "n": len(sets)},
        **{
            name: {**bootstrap_mean(found[name], weights=weights[name])._asdict(), "n": len(found[name])}
            for name in DRIFT
        },
    }
