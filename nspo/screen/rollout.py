"""One sample of the base model's answers, their advantages, and the gradient and gain that they define."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nspo.judges.refusal import is_refusal
from nspo.models.chat import chat_ids
from nspo.models.generation import generate
from nspo.models.structure.linears import Weight
from nspo.policy.methods.replay import IGNORED, encode
from nspo.policy.rollouts.reward import Scorer, safety_reward, score_where
from nspo.run.progress import track
from nspo.screen.steps import advantages
from nspo.settings.policy.section import RolloutSettings

SAMPLED = 64  # answers that are sampled at once
BATCH = 16  # answers of one forward pass


@dataclass
class Rollout:
    """Answers in groups, group after group, with what GRPO makes of them."""

    rows: list[tuple[list[int], list[int]]]  # prompt and answer
    advantages: Tensor  # (N,)
    group: int
    temperature: float
    pad_id: int

    @classmethod
    def sample(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        asked: Sequence[Mapping[str, Any]],
        cost: Scorer,
        reward: Scorer,
        settings: RolloutSettings,
        description: str,
    ) -> "Rollout":
        """Let `model` answer every prompt `policy.group_size` times, and score the answers as training does."""
        prompts = [chat_ids(tokenizer, row["prompt"]) for row in asked for _ in range(settings.group_size)]
        limits = settings.max_new_tokens, SAMPLED
        answers = dict(generate(model, tokenizer, prompts, *limits, description, settings.temperature))
        ids = [answers[i] for i in range(len(prompts))]
        texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
        questions = [row["prompt"] for row in asked for _ in range(settings.group_size)]
        harmful = torch.tensor([row["role"] == "harmful" for row in asked for _ in range(settings.group_size)])
        refused = torch.tensor([is_refusal(text) for text in texts])
        earned = safety_reward(
            score_where(cost, questions, texts, harmful).scores,
            score_where(reward, questions, texts, ~harmful).scores,
            harmful,
            settings.margin,
            refused,
            settings.refusal_bonus,
        )
        pad_id = int(tokenizer.pad_token_id or 0)
        rows = list(zip(prompts, ids, strict=True))
        return cls(rows, advantages(earned, settings.group_size), settings.group_size, settings.temperature, pad_id)

    def gradients(
        self, model: PreTrainedModel, layers: Mapping[str, Weight], counts: Sequence[int]
    ) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """(n, {layer: gradient of the loss over the first n answers}) for every n of `counts`, rising.

        The loss is GRPO's at the policy that sampled: -sum_i A_i sum_t ln p(t) / number of tokens. The gradients are
        the ones that are summed up further, so use them before asking for the next.
        """
        done, tokens = 0, 0
        model.zero_grad(set_to_none=True)
        with track("gradients of the screen", max(counts), "answer") as bar:
            for count in sorted(counts):
                for start in range(done, count, BATCH):
                    batch = slice(start, min(start + BATCH, count))
                    logps, mask = self._logps(model, batch)
                    (-(self.advantages[batch].to(logps.device)[:, None] * logps).sum()).backward()
                    tokens += int(mask.sum())
                    bar.update(batch.stop - batch.start)
                done = count
                sums = {name: (weight, weight.parameter.grad) for name, weight in layers.items()}
                yield count, {n: weight.rows(grad) / tokens for n, (weight, grad) in sums.items() if grad is not None}
        model.zero_grad(set_to_none=True)

    @torch.no_grad()
    def known(self, model: PreTrainedModel) -> list[Tensor]:
        """Log-probabilities of every answer's tokens, batch by batch, for `gain`."""
        return [self._logps(model, batch)[0] for batch in self._batches()]

    @torch.no_grad()
    def gain(self, model: PreTrainedModel, known: Sequence[Tensor]) -> tuple[float, float]:
        """sum_i A_i sum_t ln p(t)/p_base(t) per token, and its standard error over the groups."""
        found, tokens = [], 0
        for batch, before in zip(self._batches(), known, strict=True):
            logps, mask = self._logps(model, batch)
            found.append(self.advantages[batch] * (logps - before).sum(1).cpu())
            tokens += int(mask.sum())
        groups = torch.cat(found).double().view(-1, self.group).sum(1)
        spread = float(groups.std()) * len(groups) ** 0.5 if len(groups) > 1 else float("nan")
        return float(groups.sum()) / tokens, spread / tokens

    def _batches(self) -> list[slice]:
        return [slice(start, min(start + BATCH, len(self.rows))) for start in range(0, len(self.rows), BATCH)]

    def _logps(self, model: PreTrainedModel, batch: slice) -> tuple[Tensor, Tensor]:
        """Log-probabilities (B, T - 1) of the answer tokens at the sampling temperature, zero elsewhere; and where."""
        ids, mask, targets = encode(self.rows[batch], self.pad_id, model.device)
        logits: Tensor = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
        at = targets != IGNORED
        found = (logits.float() / self.temperature).log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])
        return found.squeeze(-1) * at, at
