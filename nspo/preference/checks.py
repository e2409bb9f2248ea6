"""Does a reward or cost model say what people judged? Its held-out metrics, and refusing labels that are upside down.

A sign that is wrong in the data trains every policy in the wrong direction, so such labels are refused: before any work
where refusals are judged the worse answers, and after training where a set's held-out answers are ordered worse than
chance. The first needs no model, so it finds the sign of a set that stands alone; the second finds a set that
contradicts another.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from nspo.errors import UserError
from nspo.judges.refusal import is_refusal
from nspo.models.structure.positions import positions_of
from nspo.preference import metrics as metrics
from nspo.preference.model import LENGTHS, Target, Text, count_cut, opened
from nspo.preference.objective import Judgements
from nspo.run.progress import say
from nspo.settings.model import PreferenceSettings

Rows = list[dict[str, Any]]
ENOUGH = 20  # judgements of a set from which its sign can be doubted
KEYS = "(`inverted`, `grades`, chosen and rejected)"


def check_length(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig, max_tokens: int, target: Target) -> None:
    """Refuse texts that are longer than the backbone can read, or a chat format that leaves the prompt no place.

    Raises:
        UserError: with both numbers.
    """
    positions = positions_of(config)
    if positions is not None and max_tokens > positions:
        raise UserError(
            f"{target}.max_tokens is {max_tokens}, but the backbone has {positions} positions: lower it to that"
        )
    taken = len(opened(tokenizer, ""))
    if taken >= max_tokens // 2:
        raise UserError(
            f"{target}.max_tokens is {max_tokens}, of which a prompt may take half, but the chat format alone takes "
            f"{taken} tokens (system prompt included)",
            expected=f"more than {2 * taken + 1}",
        )


def tell_cut(encoded: Mapping[str, Sequence[Text]], max_tokens: int, target: Target) -> dict[str, dict[str, int]]:
    """How many texts of every split are longer than the model reads; says so."""
    found = {split: count_cut(texts) for split, texts in encoded.items()}
    for split, count in found.items():
        if count["prompts"] or count["answers"]:
            say(
                f"{target} model: of {count['texts']} {split} labels, {count['answers']} answers and "
                f"{count['prompts']} prompts are longer than {target}.max_tokens ({max_tokens}, of which a prompt may "
                "take half), and lose their ends"
            )
    return found


def heldout_metrics(scores: metrics.Floats, rows: Rows, judged: Judgements, lengths: Any) -> dict[str, Any]:
    """What metrics.json says of held-out judgements: of answers judged alone, of pairs, and of every set.

    Args:
        scores: (N, L), the last column for whole answers, the others for their first `LENGTHS` tokens.
        lengths: (N,) answer lengths in tokens.
    """
    whole = scores[:, -1]
    refused = np.array([is_refusal(row["response"]) for row in rows])
    prompts, categories = ([row[key] for row in rows] for key in ("prompt", "category"))
    found: dict[str, Any] = {"n": len(rows), "positives": 0, "prompts": len(set(prompts)), "by_set": {}}
    graded = np.flatnonzero(judged.signs.numpy())
    positive = judged.signs.numpy() > 0
    pairs = judged.pairs.numpy()
    if len(graded):
        found |= metrics.describe(
            whole[graded],
            positive[graded],
            [prompts[i] for i in graded],
            [categories[i] for i in graded],
            lengths[graded],
            refused[graded],
            seed=0,
        )
        found["first_tokens_auroc"] = {
            str(n): metrics.auroc(scores[graded, i], positive[graded])
            for i, n in enumerate(LENGTHS[: scores.shape[1] - 1])
        }
    if len(pairs):
        gaps, longer, complied = (
            values[pairs[:, 0]] - values[pairs[:, 1]] for values in (whole, lengths, (~refused).astype(float))
        )
        found["pairs"] = metrics.describe_pairs(
            gaps,
            longer,
            complied,
            [prompts[i] for i in pairs[:, 0]],
            [categories[i] for i in pairs[:, 0]],
            seed=0,
        )
    for name, inside in _by_set(rows, judged).items():
        found["by_set"][name] = _agreement(whole, rows, inside)
    return found


def refuse_upside_down(found: dict[str, Any], target: Target) -> None:
    """Refuse a model that orders the held-out judgements of a set worse than chance, by more than luck explains."""
    for name, kinds in found["by_set"].items():
        for kind, value in kinds.items():
            if value["n"] >= ENOUGH and value["high"] < 0.5:
                raise UserError(
                    f"data.labels.{name}: the {target} model orders its held-out answers worse than chance ({kind} "
                    f"{_shown(value)}): is the sign of this set, or of another, upside down {KEYS}?"
                )


def refuse_worse_refusals(rows: Rows, target: Target, settings: PreferenceSettings) -> None:
    """Refuse labels whose refusals are judged more harmful, or more to the point, than the answers that comply.

    In pairs for the reward model people may well prefer refusals (harmlessness data): that is said, not refused.
    """
    complied = np.array([float(not is_refusal(row["response"])) for row in rows])
    judged = Judgements.of(rows, target, settings.positive_above)
    for name, inside in _by_set(rows, judged).items():
        for kind, value in _agreement(complied, rows, inside).items():
            if value["n"] < ENOUGH or value["high"] >= 0.5:
                continue
            worse = "more harmful" if target == "cost" else "better"
            fault = (
                f"data.labels.{name}: refusals are judged {worse} than answers that comply ({kind} of the refusal "
                f"phrases {_shown(value)})"
            )
            if target == "reward" and kind == "pairs":
                say(f"{fault}: a policy learns to refuse from it")
            else:
                raise UserError(f"{fault}: is its sign upside down {KEYS}?")


def refuse_one_class(path: Path, target: Target, split: str, judged: Judgements, settings: PreferenceSettings) -> None:
    """Refuse labels of one kind alone: a cost model needs both for its zero; a reward model needs both, or pairs."""
    graded, positive = int((judged.signs != 0).sum()), int((judged.signs > 0).sum())
    if 0 < positive < graded or (target == "reward" and len(judged.pairs)):
        return
    raise UserError(
        f"{path}: {positive} of {graded} {split} labels of the {target} model are graded "
        f"{settings.positive_above} or more",
        expected="some of both kinds",
        change=f"change {target}.positive_above or data.labels",
    )


def _by_set(rows: Rows, judged: Judgements) -> dict[str, Judgements]:
    """The judgements of every set; places stay those in `rows`."""
    names = np.array([row["set"] for row in rows])
    return {
        name: Judgements(
            torch.where(torch.from_numpy(names == name), judged.signs, 0),
            judged.pairs[torch.from_numpy(names[judged.pairs[:, 0].numpy()] == name)],
        )
        for name in sorted(set(names.tolist()))
    }


def _agreement(scores: metrics.Floats, rows: Rows, judged: Judgements) -> dict[str, dict[str, Any]]:
    """AUROC over the answers judged alone and the share of pairs in order, with intervals; whichever there is."""
    found = {}
    graded, pairs = np.flatnonzero(judged.signs.numpy()), judged.pairs.numpy()
    positive = judged.signs.numpy()[graded] > 0
    if 0 < positive.sum() < len(graded):
        prompts = [rows[i]["prompt"] for i in graded]
        found["auroc"] = metrics.interval(metrics.auroc, scores[graded], positive, prompts, seed=0)
    if len(pairs):
        gaps, prompts = scores[pairs[:, 0]] - scores[pairs[:, 1]], [rows[i]["prompt"] for i in pairs[:, 0]]
        found["pairs"] = metrics.interval(metrics.in_order, gaps, gaps > 0, prompts, seed=0)
    return found


def _shown(value: dict[str, Any]) -> str:
    return f"{value['value']:.2f}, 95% {value['low']:.2f} to {value['high']:.2f}, n={value['n']}"
