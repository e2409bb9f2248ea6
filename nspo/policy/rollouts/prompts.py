"""Which prompts are answered in training, and in which order: one order for every method of a seed."""

import random
from collections.abc import Iterator

from datasets import Dataset
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from nspo.data.tables import Prompts
from nspo.errors import UserError
from nspo.models.chat import chat_ids
from nspo.models.structure.positions import fitting
from nspo.settings.policy.section import RolloutSettings


def rollout_prompts(
    rollouts: RolloutSettings, prompts: Prompts, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig, seed: int
) -> Dataset:
    """Conversational prompts in the order they are used: each step holds the same share of benign ones.

    Prompts over `policy.max_prompt_tokens`, or too long for a model of this `config`, are left out.

    Raises:
        UserError: when no prompt is left.
    """
    benign_per_step = round(rollouts.prompts_per_step * rollouts.benign_share)
    order = random.Random(seed)

    def stream(role: str) -> Iterator[str]:
        """Training prompts of a role without end, reshuffled after each pass; read when the first is asked for."""
        texts = _texts(role, rollouts, prompts, tokenizer, config)
        while True:
            order.shuffle(texts)
            yield from texts

    streams = {role: stream(role) for role in ("harmful", "benign")}
    roles = ["benign"] * benign_per_step + ["harmful"] * (rollouts.prompts_per_step - benign_per_step)
    rows = [{"prompt": next(streams[role]), "role": role} for _ in range(rollouts.steps) for role in roles]
    return Dataset.from_list(
        [{"prompt": [{"role": "user", "content": row["prompt"]}], "role": row["role"]} for row in rows]
    )


def _texts(
    role: str, rollouts: RolloutSettings, prompts: Prompts, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig
) -> list[str]:
    """The training prompts of a role that are short enough."""
    limit, rows = rollouts.max_prompt_tokens, prompts.of(role, "train")
    rows = [row for row in rows if len(chat_ids(tokenizer, row["prompt"])) <= limit]
    if not rows:
        raise UserError(f"no {role} training prompt has at most {limit} tokens: raise policy.max_prompt_tokens")
    fits = fitting(rows, tokenizer, config, rollouts.max_new_tokens, "training", "policy.max_new_tokens")
    return [row["prompt"] for row in fits.rows]
