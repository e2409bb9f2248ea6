"""OGPSA (arXiv 2602.07892): the safety gradient without what general tasks' gradients point along.

For every trained tensor the gradients of the general loss, one a domain, span a small reference subspace; the safety
gradient loses its part inside it before each step, and the references are taken anew every so often. The general loss
is the likelihood of the base model's own answers (the authors take 200 answers of a general data set). As in the
authors' code the projection is per tensor and upstream of the optimizer, so Adam's step need not be orthogonal.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nspo.data.tables import Prompts
from nspo.policy.log import LoggedCallback
from nspo.policy.methods.replay import IGNORED, Sequence_, encode, general_sequences

BATCH = 16


def orthonormal(references: Sequence[Tensor]) -> Tensor:
    """(R, n) orthonormal rows that span the flattened `references` of one tensor; R is less where some depend."""
    q, r = torch.linalg.qr(torch.stack([reference.reshape(-1) for reference in references]).T)
    scale = r.diagonal().abs()
    return q[:, scale > 1e-6 * scale.max().clamp(min=1e-30)].T.contiguous()


def remove_(gradient: Tensor, basis: Tensor) -> Tensor:
    """g <- g - B^T B g in place, with the orthonormal rows of B (R, n); returns the share of the norm that is left."""
    flat = gradient.view(-1)
    before = flat.norm()
    flat.sub_(basis.T @ (basis @ flat))
    return flat.norm() / before.clamp(min=1e-30)


class OGPSA(LoggedCallback):
    """Projects every gradient before the optimizer's step, after clipping."""

    def __init__(
        self,
        refresh: int,
        base: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Prompts,
        per_domain: int,
        max_new_tokens: int,
    ) -> None:
        """Let the base model answer the reference prompts.

        Args:
            refresh: updates after which the reference gradients are taken anew.
            per_domain: reference prompts of every general domain.
        """
        self.sets = list(general_sequences(prompts, base, tokenizer, per_domain, max_new_tokens).values())
        self.pad_id, self.refresh = int(tokenizer.pad_token_id or 0), refresh
        self.bases: dict[str, Tensor] = {}
        self.kept = 1.0

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take new references when due, then project. A resumed run takes them anew at once."""
        policy = kwargs["model"]
        trained = {name: weight for name, weight in policy.named_parameters() if weight.grad is not None}
        if not self.bases or state.global_step % self.refresh == 0:
            self.bases = self._references(policy, trained)
        shares = [remove_(weight.grad, self.bases[name]) for name, weight in trained.items()]
        self.kept = float(torch.stack(shares).mean())

    def columns(self, step: int) -> dict[str, float]:
        """The share of a tensor's gradient norm that is left, on average."""
        return {"kept": self.kept}

    def _references(self, policy: Any, trained: dict[str, Any]) -> dict[str, Tensor]:
        given = {name: weight.grad for name, weight in trained.items()}
        found: dict[str, list[Tensor]] = {name: [] for name in trained}
        for sequences in self.sets:
            for weight in trained.values():
                weight.grad = None
            for start in range(0, len(sequences), BATCH):
                self._general_loss(policy, sequences[start : start + BATCH]).backward()
            for name, weight in trained.items():
                found[name].append(weight.grad)
        for name, weight in trained.items():
            weight.grad = given[name]
        return {name: orthonormal(references) for name, references in found.items()}

    def _general_loss(self, policy: Any, batch: list[Sequence_]) -> Tensor:
        ids, mask, targets = encode(batch, self.pad_id, policy.device)
        with torch.enable_grad():
            logits = policy(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
            return cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum")
