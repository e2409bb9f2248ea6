"""Pairs of answers for the preference objectives: sampled on the data of the other objectives, or chosen by people.

`policy.pairs: sampled` (default). The base model answers the training prompts that a GRPO run of this seed would roll
out, in that order, each `policy.group_size` times at `policy.temperature`, and the same reward scores the answers. Of
every group the best is chosen and the worst rejected; a group of equal scores says nothing (GRPO has no advantage
there) and is dropped. So a method that trains on pairs differs from one that trains on rollouts in its loss and in
whose answers it sees: the base model's, not its own. Answers are kept as token ids, so one that was cut at
`policy.max_new_tokens` teaches nobody to stop there. They are sampled by transformers, whatever `policy.rollout` says.

`policy.pairs: labels`. The pairs of the cost labels (`data.labels`, such as PKU-SafeRLHF's), of which people chose the
safer answer, as the authors' baselines use them: at most as many as there would be groups, cut at
`policy.max_new_tokens`. All of their prompts count as harmful. What is safe is what people say, where they say it.

The file has one row per pair: prompt, role, safety and scores of both answers, text to read, ids to train on. Command:
`nspo make-pairs --seed 0 --model results/model ... --out results/pairs/seed0.parquet`.
"""

import shutil
from pathlib import Path

from nspo.data.tables import Prompts, load_labels
from nspo.errors import UserError
from nspo.files.manifest import (
    MANIFEST_NAME,
    check_made_with,
    fingerprint,
    fingerprint_files,
    make_manifest,
    read_json,
)
from nspo.files.tables import load_table, write_table
from nspo.judges.make import judge_of
from nspo.models.loading import load_config, load_model, load_tokenizer, model_identity
from nspo.models.structure.positions import prompt_room
from nspo.policy.pairs.sources import SIDES, Judges, Row, Sampler, labelled, sampled
from nspo.policy.rollouts.judged import JudgedCost
from nspo.policy.rollouts.prompts import rollout_prompts
from nspo.preference.model import PreferenceModel
from nspo.run.devices import device_of
from nspo.settings.policy.section import PairSettings
from nspo.settings.runtime import RuntimeSettings

KIND = "pairs"


def make_pairs(
    settings: PairSettings,
    seed: int,
    model: Path,
    reward: Path,
    cost: Path,
    prompts: Path,
    labels: Path | None,
    out: Path,
    runtime: RuntimeSettings,
) -> None:
    """Write the file of pairs; interrupted sampling resumes batch by batch.

    Raises:
        UserError: labels missing or not asked for, no prompt short enough, a folder that holds no such model, a judge
            that is missing something, or no pair at all.
    """
    if (labels is not None) != (settings.pairs == "labels"):
        change = "give the file" if labels is None else "leave the file out"
        raise UserError(f"policy.pairs is {settings.pairs!r}: {change} (`--labels`)")
    judge = judge_of("policy.judge", settings.judge, runtime, stay=True) if settings.judge else None
    device = device_of(runtime.device)
    identity = make_manifest(
        KIND,
        seed=seed,
        settings=settings.identity(),
        base=model_identity(model),
        reward=read_json(reward / MANIFEST_NAME),
        cost=read_json(cost / MANIFEST_NAME),
        judge=judge and judge.identity,
        prompts=fingerprint_files([prompts]),
        labels=fingerprint_files([labels]) if labels else None,
    )
    work = Path(runtime.workdir) / f"pairs-seed{seed}-{fingerprint(identity)}"
    work.mkdir(parents=True, exist_ok=True)
    tokenizer = load_tokenizer(model)
    scorer = JudgedCost(judge, work) if judge else PreferenceModel.load(cost, "cost", device)
    judges = Judges(scorer, PreferenceModel.load(reward, "reward", device), settings.margin, settings.refusal_bonus)
    if labels is not None:
        room = prompt_room(load_config(model, f"{model}"), settings.max_new_tokens, "policy.max_new_tokens")
        pairs = labelled(settings, load_labels(labels, "cost", "train"), seed, tokenizer, room, judges)
    else:
        base = load_model(model, device)
        asked = rollout_prompts(settings, Prompts(prompts), tokenizer, base.config, seed).to_list()
        pairs = sampled(Sampler(settings, base, tokenizer, judges), asked, seed, work)
    write_table(pairs, out, manifest={**identity, "pairs": len(pairs)})
    shutil.rmtree(work)


def load_pairs(path: Path, model: Path) -> list[Row]:
    """The rows of a file of pairs, checked against the folder of the model that is to learn from them.

    Raises:
        UserError: a damaged file, another kind of file, or pairs of another model or tokenizer.
    """
    manifest, rows = load_table(path, KIND, ("role", "prompt_ids", *(f"{side}_ids" for side in SIDES)))
    check_made_with(manifest, {"base": model_identity(model)}, path, f"make the pairs of {model}")
    return rows
