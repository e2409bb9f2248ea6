"""The losses of the preference objectives, on log-probabilities alone: DPO, BFPO and W-DOOR.

Every pair has a chosen and a rejected answer to one prompt. `margin` is how far the policy has moved between them,

    margin = ln p(chosen)/p_base(chosen) - ln p(rejected)/p_base(rejected).

**DPO** (arXiv 2305.18290, eq. 7): -ln sigmoid(beta margin).

**BFPO** (arXiv 2408.15313, and its code): (margin' - g / beta)^2, where margin' is that of the *more helpful* answer
over the less helpful one, and g = 3/2 [the more helpful one is safe] - 1/2 [the other is safe] - 1/2. So g is 1, 1/2,
-1/2, -1 where the more helpful answer alone, both, neither, or the other answer alone is safe: safety decides where the
answers differ in it, helpfulness where both are safe, and where neither is, the more helpful one is the worse.

**W-DOOR** (arXiv 2503.03710): answer a harmful prompt safely even after the beginning of a harmful answer, and unlearn
the harmful answer (NPO, arXiv 2404.05868),

    - sum_t w_t ln p(chosen_t) - 2/beta ln sigmoid(-beta ln p(rejected)/p_base(rejected)),

while harmless prompts keep their good answers by plain likelihood. The weights w_t = exp(r_t / tau) raise the tokens
that decide a refusal: r_t = ln p_guide/p_base is the reward of a token that a policy trained by DPO implies. (In the
authors' code the exponent has the opposite sign, so such tokens count less, and the unlearning term is divided by the
length and knows no base. Here both are as the paper describes them.)
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

BFPO_ALPHA = 0.5  # the authors' value, at which two safe answers are as far apart as two unsafe ones


def dpo_loss(margin: Tensor, beta: float) -> Tensor:
    """(B,) from the margins (B,)."""
    return -logsigmoid(beta * margin)


def bfpo_label(chosen_safe: Tensor, rejected_safe: Tensor, chosen_more_helpful: Tensor) -> Tensor:
    """The label g (B,) float32, as the distance that `margin` (chosen over rejected) shall have, in units of 1/beta.

    Args:
        chosen_safe, rejected_safe, chosen_more_helpful: (B,) bool.
    """
    more = torch.where(chosen_more_helpful, chosen_safe, rejected_safe).float()
    less = torch.where(chosen_more_helpful, rejected_safe, chosen_safe).float()
    label = 1.5 * more - 0.5 * less - BFPO_ALPHA
    return torch.where(chosen_more_helpful, label, -label)


def bfpo_loss(margin: Tensor, label: Tensor, beta: float) -> Tensor:
    """(B,) from margins (B,) and the labels (B,) of `bfpo_label`."""
    return (margin - label / beta) ** 2


def npo_loss(ratio: Tensor, beta: float) -> Tensor:
    """(B,) from ln p(rejected)/p_base(rejected) (B,): unlearning that slows down as the answer becomes unlikely."""
    return -2 / beta * logsigmoid(-beta * ratio)


def wdoor_loss(chosen: Tensor, weights: Tensor, rejected_ratio: Tensor, harmful: Tensor, beta: float) -> Tensor:
    """(B,): weighted likelihood of the chosen answer, and for harmful prompts unlearning of the rejected one.

    Args:
        chosen: (B, T) log-probabilities of the tokens of the chosen answers, zero elsewhere.
        weights: (B, T), see `token_weights`; one for harmless prompts.
        rejected_ratio: (B,) ln p(rejected)/p_base(rejected).
        harmful: (B,) bool.
    """
    return -(weights * chosen).sum(1) + torch.where(harmful, npo_loss(rejected_ratio, beta), 0.0)


def token_weights(guide: Tensor, base: Tensor, temperature: float) -> Tensor:
    """exp(r / temperature) of the token rewards r = guide - base, log-probabilities of any one shape."""
    return ((guide - base) / temperature).exp()


def role_weights(harmful: Tensor, share: float) -> Tensor:
    """(N,) float32 that turn a mean over pairs into `share` x that of harmful ones + (1 - `share`) x that of the rest.

    All ones where only one kind is there.
    """
    found = harmful.float().mean()
    if found in (0, 1):
        return torch.ones_like(harmful, dtype=torch.float32)
    return torch.where(harmful, share / found, (1 - share) / (1 - found))
