"""Rivals that add to the gradient what pulls an unconstrained policy back to its base, after clipping.

**L2-SP** (arXiv 1802.01483): the loss gets a/2 ||W - W0||^2, so the gradient of every trained weight gets a (W - W0).
**Replay-KL** (the best of arXiv 2512.10150's methods): the loss gets b KL(base || policy), the mean over the answer
tokens of a batch of the very prompts that built the bases: the figure by which drift is reported.

Both act on the gradient that clipping has left, so that a strong pull is not clipped with the safety gradient.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nspo.constraint.anchors import narrow
from nspo.data.tables import Prompts
from nspo.models.folders.weights import open_weights
from nspo.policy.log import LoggedCallback
from nspo.policy.methods.replay import IGNORED, Sequence_, encode, endless, general_sequences

BATCH = 16  # sequences that an update replays


def pull_(gradient: Tensor, weight: Tensor, anchor: Tensor, strength: float) -> None:
    """gradient += strength (W - W0), in place: the gradient of strength/2 ||W - W0||^2."""
    gradient.add_(weight - anchor, alpha=strength)


class L2SP(LoggedCallback):
    """Adds the gradient of the squared distance from the base."""

    def __init__(self, strength: float, base: Path, policy: nn.Module) -> None:
        """Read from the folder `base` the weights that `policy` trains."""
        saved = open_weights(base, policy)
        self.strength = strength
        self.trained = {name: weight for name, weight in policy.named_parameters() if weight.requires_grad}
        self.anchors = {name: narrow(saved.read(name).to(weight.device)) for name, weight in self.trained.items()}
        self.distance = 0.0

    @torch.no_grad()
    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add it."""
        squares = []
        for name, weight in self.trained.items():
            squares.append((weight - self.anchors[name]).square().sum())
            if weight.grad is not None:
                pull_(weight.grad, weight, self.anchors[name], self.strength)
        self.distance = float(torch.stack(squares).sum().sqrt())

    def columns(self, step: int) -> dict[str, float]:
        """||W - W0|| before the update."""
        return {"distance": self.distance}


def kl_to_base(base: Tensor, policy: Tensor, targets: Tensor) -> Tensor:
    """Mean over answer tokens of KL(base || policy) in nats, ().

    Args:
        base, policy: logits (B, T, V), any float dtype.
        targets: (B, T) int64, `IGNORED` where there is no answer token.
    """
    ours, theirs = policy.float().log_softmax(-1), base.float().log_softmax(-1)
    kl = (theirs.exp() * (theirs - ours)).sum(-1)
    return kl[targets != IGNORED].mean()


class ReplayKL(LoggedCallback):
    """Adds the gradient of the KL from the base on general answers, a batch an update."""

    def __init__(
        self,
        strength: float,
        base: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Prompts,
        per_domain: int,
        max_new_tokens: int,
        autocast: bool,
    ) -> None:
        """Let the base model answer; it stays in memory.

        Args:
            per_domain: prompts of every general domain, as many as the bases had.
            autocast: whether the policy's forward pass runs in bf16; then the base's does too.
        """
        found = general_sequences(prompts, base, tokenizer, per_domain, max_new_tokens)
        self.strength, self.base, self.autocast = strength, base, autocast
        self.pad_id = int(tokenizer.pad_token_id or 0)
        longest = max(map(len, found.values()))
        mixed = [rows[i] for i in range(longest) for rows in found.values() if i < len(rows)]  # domains in turn
        self.batches: Iterator[list[Sequence_]] = endless(mixed, min(BATCH, len(mixed)))
        self.begun, self.last = 0, 0.0

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add it. A resumed run first passes over the batches that it has seen."""
        while self.begun < state.global_step:
            next(self.batches)
            self.begun += 1
        self.begun += 1
        policy = kwargs["model"]
        ids, mask, targets = encode(next(self.batches), self.pad_id, policy.device)
        with torch.no_grad(), torch.autocast(policy.device.type, torch.bfloat16, enabled=self.autocast):
            known = self.base(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
        with torch.enable_grad():
            logits = policy(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
            kl = kl_to_base(known, logits, targets)
            (self.strength * kl).backward()
        self.last = float(kl.detach())

    def columns(self, step: int) -> dict[str, float]:
        """The KL on the replayed batch before the update."""
        return {"replay_kl": self.last}
