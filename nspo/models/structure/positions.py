"""How long a text a model can read: prompts that leave no room for their answer are left out, counted and told.

Beyond its last position a model with learned positions ends in an IndexError, and one with rotary positions answers
without warning, outside the range that it was trained on. Every stage that asks a model prompts checks here first, so
that all models that are compared leave out the same ones.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from nspo.errors import UserError
from nspo.models.chat import chat_ids
from nspo.models.generation import refuse_unknown
from nspo.run.progress import say

COUNTED_FROM_PAD = (
    "roberta",
    "camembert",
    "xmod",
    "mpnet",
    "longformer",
    "data2vec-text",
)  # the first position is pad + 1


class Fitting(NamedTuple):
    """The prompts that a model has room for."""

    rows: list[dict[str, Any]]
    ids: list[list[int]]  # of each row's prompt, in the chat format
    left_out: dict[str, int]  # how many others, by domain


def positions_of(config: PreTrainedConfig) -> int | None:
    """How many tokens a model with this configuration can read; None where nothing bounds them (Mamba, ALiBi).

    A rotary embedding that is stretched (YaRN) counts with its stretch, whichever of the two lengths is stated.
    """
    own: Any = config.get_text_config(decoder=True)
    stated = getattr(own, "max_position_embeddings", None) or getattr(own, "max_seq_len", None)  # MPT has the latter
    if not isinstance(stated, int):
        return None
    if any(name in own.model_type for name in COUNTED_FROM_PAD):
        return stated - 1 - (own.pad_token_id or 0)
    rope = getattr(own, "rope_parameters", None) or {}
    original, factor = rope.get("original_max_position_embeddings"), rope.get("factor")
    return max(stated, int(original * factor)) if original and factor else stated


def prompt_room(config: PreTrainedConfig, max_new_tokens: int, key: str) -> float:
    """The most tokens of a prompt that an answer of `max_new_tokens` can follow; infinity where nothing bounds them.

    Args:
        key: the setting that `max_new_tokens` is from.

    Raises:
        UserError: when an answer alone is longer than the model can read.
    """
    positions = positions_of(config)
    if positions is None:
        return math.inf
    if max_new_tokens >= positions:
        raise UserError(f"{key} is {max_new_tokens}, but the model has {positions} positions in all: lower it")
    return positions - max_new_tokens


def check_room(base: PreTrainedConfig, tuned: PreTrainedConfig, named: str) -> None:
    """Refuse a tuned model, called `named`, that can read less than its base: both are asked the same prompts.

    Raises:
        UserError: with both numbers.
    """
    ours, theirs = positions_of(tuned) or math.inf, positions_of(base) or math.inf
    if ours < theirs:
        raise UserError(
            f"{named} has {ours:g} positions, its base {theirs:g}",
            expected="as many, so that both are asked the same prompts",
            change="mend max_position_embeddings in its config.json",
        )


def fitting(
    rows: Iterable[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    config: PreTrainedConfig,
    max_new_tokens: int,
    what: str,
    key: str = "max_new_tokens",
) -> Fitting:
    """Those `rows` (`prompt`, and `domain` or `role`) whose answers fit behind them; says how many do not.

    Args:
        config: of the base model, so that every model that is compared with it is asked the same.
        what: what asks, such as "evaluation".
        key: the setting that `max_new_tokens` is from.

    Raises:
        UserError: when a domain has no prompt that fits.
    """
    room = prompt_room(config, max_new_tokens, key)
    every, kept, ids = [dict(row) for row in rows], [], []
    for row in every:
        asked = chat_ids(tokenizer, row["prompt"])
        refuse_unknown(asked, tokenizer, config, what)
        if len(asked) <= room:
            kept.append(row)
            ids.append(asked)
    reason = f"answered in {max_new_tokens} tokens within the model's {positions_of(config)} positions"
    return Fitting(kept, ids, count_left_out(every, kept, what, reason, f"lower {key}"))


def count_left_out(
    every: Sequence[Mapping[str, Any]], kept: Sequence[Mapping[str, Any]], what: str, reason: str, change: str
) -> dict[str, int]:
    """How many of `every` row are not `kept`, by domain; says so.

    Args:
        reason: what they are too long to be.
        change: what can be changed about it.

    Raises:
        UserError: when nothing of a domain is kept.
    """
    asked, fit = (Counter(row.get("domain") or row["role"] for row in rows) for rows in (every, kept))
    left_out = dict(sorted((asked - fit).items()))
    for domain, count in left_out.items():
        if not fit[domain]:
            raise UserError(f"{what}: all {count} prompts of {domain} are too long to be {reason}: {change}")
    if left_out:
        counts = ", ".join(f"{domain} {count}" for domain, count in left_out.items())
        say(f"{what}: {sum(left_out.values())} prompts are too long to be {reason}, and left out: {counts}")
    return left_out
