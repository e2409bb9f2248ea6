"""Pairs of answers for the preference objectives, from the same data and as many answers as the rollouts of the others.

The base model answers the training prompts that a GRPO run of this seed would roll out, in that order, each
`policy.group_size` times at `policy.temperature`, and the same models score the answers. Of every group the best is
chosen and the worst rejected; a group of equal scores says nothing (GRPO has no advantage there) and is dropped. So a
method that trains on pairs differs from one that trains on rollouts in its loss and in whose answers it sees: the base
model's, not its own. (The authors' baselines train on PKU-SafeRLHF's pairs, which other models wrote.)

Answers are kept as token ids, so an answer that was cut at `policy.max_new_tokens` teaches nobody to stop there.

The file has one row per pair: prompt, role, `safe` and scores of both answers, text to read, ids to train on. Command:
`nspo sample-pairs --seed 0 --model results/model ... --out results/pairs/seed0.parquet`.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from nspo.artifacts import (
    MANIFEST_NAME,
    atomic_path,
    check_manifest,
    dumps,
    fingerprint,
    fingerprint_files,
    make_manifest,
    read_json,
    read_table,
)
from nspo.config import RuntimeSettings
from nspo.errors import UserError
from nspo.json_lines import JsonLines
from nspo.models import chat_ids, device_of, generate, has_bf16, load_model, load_tokenizer, model_identity
from nspo.policy.rewards import safety_reward
from nspo.policy.rollouts import rollout_prompts
from nspo.policy_settings import RolloutSettings
from nspo.preference import PreferenceModel
from nspo.progress import say, track

KIND = "pairs"
SIDES = ("chosen", "rejected")
BATCH = 64  # answers that are sampled at once


def sample_pairs(
    rollouts: RolloutSettings,
    seed: int,
    model: Path,
    reward: Path,
    cost: Path,
    prompts: Path,
    out: Path,
    runtime: RuntimeSettings,
) -> None:
    """Sample groups of answers and write the best and the worst of each; interrupted work resumes batch by batch.

    Raises:
        UserError: no prompt short enough, a folder that holds no such model, or no group with a best and a worst.
    """
    device = device_of(runtime.device)
    identity = make_manifest(
        KIND,
        seed=seed,
        settings=rollouts.dump(),
        base=model_identity(model),
        reward=read_json(reward / MANIFEST_NAME),
        cost=read_json(cost / MANIFEST_NAME),
        prompts=fingerprint_files([prompts]),
    )
    sampler = Sampler(
        rollouts,
        load_model(model, device),
        load_tokenizer(model),
        PreferenceModel.load(cost, "cost", device),
        PreferenceModel.load(reward, "reward", device),
    )
    asked = rollout_prompts(rollouts, prompts, sampler.tokenizer, seed).to_list()
    groups = max(1, BATCH // rollouts.group_size)
    batches = [asked[first : first + groups] for first in range(0, len(asked), groups)]

    work = Path(runtime.workdir) / f"pairs-seed{seed}-{fingerprint(identity)}"
    work.mkdir(parents=True, exist_ok=True)
    log = JsonLines(work / "batches.jsonl")
    log.rewind(len(batches))
    done = len(log.rows())
    if done:
        say(f"pairs of seed {seed}: continuing after {done} of {len(batches)} batches, kept in {work}")
    with track("sample pairs", len(batches), "batch", start=done) as bar:
        for index in range(done, len(batches)):
            set_seed(seed + 1_000_003 * (index + 1))  # of its own, so that a resumed run draws the same answers
            log.append([{"step": index, "pairs": sampler.pairs(batches[index])}])
            bar.update(1)

    pairs = [pair for row in log.rows() for pair in row["pairs"]]
    if not pairs:
        raise UserError(
            f"none of {len(asked)} groups has a best and a worst answer: raise `policy.margin`, `policy.temperature` "
            "or `policy.group_size`"
        )
    say(f"{len(pairs)} pairs; {len(asked) - len(pairs)} of {len(asked)} groups dropped, all answers scored alike")
    write_pairs(pairs, {**identity, "pairs": len(pairs), "groups": len(asked)}, out)
    shutil.rmtree(work)


@dataclass(frozen=True)
class Sampler:
    """The base model and the two models that score it."""

    rollouts: RolloutSettings
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    cost: PreferenceModel
    reward: PreferenceModel

    def pairs(self, batch: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """The pairs of a batch of prompts, with the order of its groups."""
        size = self.rollouts.group_size
        asked = [row["prompt"][-1]["content"] for row in batch for _ in range(size)]
        ids = [chat_ids(self.tokenizer, prompt) for prompt in asked]
        answer_ids = self._answers(ids)
        answers = self.tokenizer.batch_decode(answer_ids, skip_special_tokens=True)
        harmful = torch.tensor([row["role"] == "harmful" for row in batch for _ in range(size)])
        cost, helpfulness = self.cost.score(asked, answers).cpu(), self.reward.score(asked, answers).cpu()
        score = safety_reward(cost, helpfulness, harmful, self.rollouts.margin)
        found = []
        for group, best, worst in best_and_worst(score.view(-1, size)):
            row: dict[str, Any] = {
                "role": batch[group]["role"],
                "prompt": asked[group * size],
                "prompt_ids": ids[group * size],
            }
            for side, index in zip(SIDES, (group * size + best, group * size + worst), strict=True):
                row |= {
                    side: answers[index],
                    f"{side}_ids": answer_ids[index],
                    f"{side}_score": score[index].item(),
                    f"{side}_helpfulness": helpfulness[index].item(),
                    f"{side}_safe": bool(cost[index] <= 0 or not harmful[index]),
                }
            found.append(row)
        return found

    def _answers(self, ids: list[list[int]]) -> list[list[int]]:
        """A sampled answer to every prompt, in order; in bf16 where the device multiplies it in hardware."""
        device, rollouts = self.model.device, self.rollouts
        with torch.autocast(device.type, torch.bfloat16, enabled=has_bf16(device)):
            answers = dict(
                generate(
                    self.model, self.tokenizer, ids, rollouts.max_new_tokens, BATCH, "answers", rollouts.temperature
                )
            )
        return [answers[index] for index in range(len(ids))]


def best_and_worst(scores: Tensor) -> list[tuple[int, int, int]]:
    """(group, best, worst) for the groups (G, n) whose scores differ; of equal scores the first counts."""
    best, worst = scores.argmax(1).tolist(), scores.argmin(1).tolist()
    differ = (scores.max(1).values > scores.min(1).values).tolist()
    return [(group, best[group], worst[group]) for group in range(len(scores)) if differ[group]]


def load_pairs(path: Path, model: Path) -> list[dict[str, Any]]:
    """The rows of a file of pairs, checked against the folder of the model that is to learn from them.

    Raises:
        UserError: a damaged file, another kind of file, or pairs of another model or tokenizer.
    """
    import pyarrow.parquet as pq

    rows = read_table(path, ("role", "prompt_ids", *(f"{side}_ids" for side in SIDES)))
    manifest = json.loads((pq.read_schema(path).metadata or {}).get(b"nspo", b"null"))
    check_manifest(manifest, KIND, path)
    if manifest["base"] != (found := model_identity(model)):
        raise UserError(
            f"{path} holds answers of the model {fingerprint(manifest['base'])}, but {model} is {fingerprint(found)}: "
            "sample the pairs again"
        )
    return rows


def write_pairs(pairs: Sequence[dict[str, Any]], manifest: dict[str, Any], out: Path) -> None:
    """Write the file of pairs, its manifest inside."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.Table.from_pylist(list(pairs)).replace_schema_metadata({"nspo": dumps(manifest)})
    with atomic_path(out) as scratch:
        pq.write_table(table, scratch, write_page_checksum=True)
