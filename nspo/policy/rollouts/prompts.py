"""Which prompts are answered in training, and in which order: one order for every method of a seed."""

import random
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from nspo.data.tables import load_prompts
from nspo.errors import UserError
from nspo.models.chat import chat_ids
from nspo.settings.policy.section import RolloutSettings


def rollout_prompts(rollouts: RolloutSettings, prompts: Path, tokenizer: PreTrainedTokenizerBase, seed: int) -> Dataset:
    """Conversational prompts in the order they are used: each step holds the same share of benign ones.

    Raises:
        UserError: when no prompt is within `policy.max_prompt_tokens`.
    """
    benign_per_step = round(rollouts.prompts_per_step * rollouts.benign_share)
    order = random.Random(seed)
    streams = {
        role: _stream(role, rollouts.max_prompt_tokens, prompts, tokenizer, order) for role in ("harmful", "benign")
    }
    roles = ["benign"] * benign_per_step + ["harmful"] * (rollouts.prompts_per_step - benign_per_step)
    rows = [{"prompt": next(streams[role]), "role": role} for _ in range(rollouts.steps) for role in roles]
    return Dataset.from_list(
        [{"prompt": [{"role": "user", "content": row["prompt"]}], "role": row["role"]} for row in rows]
    )


def _stream(role: str, limit: int, prompts: Path, tokenizer: PreTrainedTokenizerBase, order: random.Random) -> Any:
    """Endless training prompts of a role, reshuffled after each pass."""
    texts = [row["prompt"] for row in load_prompts(prompts, role, "train")]
    texts = [text for text in texts if len(chat_ids(tokenizer, text)) <= limit]
    if not texts:
        raise UserError(f"no {role} training prompt has at most {limit} tokens: raise policy.max_prompt_tokens")
    while True:
        order.shuffle(texts)
        yield from texts
