"""policy/preference_losses.py: every loss and its gradient against numbers worked out by hand."""

import math
from itertools import product

import pytest
import torch
from torch import Tensor

from nspo.policy.pairs.losses import bfpo_label, bfpo_loss, dpo_loss, npo_loss, role_weights, token_weights, wdoor_loss


def close(found: Tensor, expected: list[float]) -> None:
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-6, atol=1e-7)


def test_dpo_by_hand():
    """-ln sigmoid(x) is ln(1 + e^-x): at 0.1 times 2, 0 and -5."""
    close(dpo_loss(torch.tensor([2.0, 0.0, -5.0]), 0.1), [0.5981388694, math.log(2), 0.9740769842])


def test_bfpo_labels_by_hand():
    """1, 1/2, -1/2, -1 for the more helpful answer, by what is safe; seen from the other side the sign turns."""
    cases = [  # chosen safe, rejected safe, chosen more helpful, distance of chosen over rejected
        (True, False, True, 1.0),
        (True, True, True, 0.5),
        (False, False, True, -0.5),
        (False, True, True, -1.0),
        (True, False, False, 1.0),  # the rejected one is more helpful and unsafe
        (True, True, False, -0.5),
        (False, False, False, 0.5),
        (False, True, False, -1.0),
    ]
    columns = [torch.tensor(column) for column in zip(*cases, strict=True)]
    close(bfpo_label(*columns[:3]), columns[3].tolist())


def test_bfpo_by_hand():
    """(3 - 1/0.5)^2 = 1, (-1 + 0.5/0.5)^2 = 0, (0 - 1/0.1)^2 = 100."""
    assert bfpo_loss(torch.tensor([3.0, -1.0]), torch.tensor([1.0, -0.5]), 0.5).tolist() == [1.0, 0.0]
    close(bfpo_loss(torch.tensor([0.0]), torch.tensor([1.0]), 0.1), [100.0])


@pytest.mark.parametrize(("safe_more", "safe_less", "swapped"), product([0, 1], [0, 1], [False, True]))
def test_bfpo_is_the_authors_formula(safe_more, safe_less, swapped):
    """With y_w the more helpful answer: (h(y_w) - h(y_l) - (B1 B3 s_w - B3 s_l - alpha)/tau)^2, B1 = 3, B3 = 1/2."""
    more, less, tau = 0.7, -0.4, 0.3
    expected = (more - less - (3 * 0.5 * safe_more - 0.5 * safe_less - 0.5) / tau) ** 2
    chosen, rejected = (safe_less, safe_more) if swapped else (safe_more, safe_less)
    label = bfpo_label(*(torch.tensor([bool(flag)]) for flag in (chosen, rejected, not swapped)))
    margin = torch.tensor([less - more if swapped else more - less])
    assert bfpo_loss(margin, label, tau).item() == pytest.approx(expected, rel=1e-5)


def test_npo_by_hand():
    """2/beta ln(1 + e^(beta x)) at beta = 1/2: 4 ln 2, 4 ln(1 + e), 4 ln(1 + 1/e)."""
    close(npo_loss(torch.tensor([0.0, 2.0, -2.0]), 0.5), [2.7725887222, 5.2530467501, 1.2530467501])


def test_token_weights_by_hand():
    """e^r, at temperature 1/2 e^2r: a token that the guide raised counts more, one that it lowered less."""
    guide, base = torch.tensor([-1.0, -3.0, -2.0]), torch.tensor([-2.0, -2.0, -2.0])
    close(token_weights(guide, base, 1.0), [math.e, 1 / math.e, 1.0])
    close(token_weights(guide, base, 0.5), [math.e**2, math.e**-2, 1.0])


CHOSEN = torch.tensor([[-1.0, -2.0, 0.0], [-0.5, -0.25, -1.0]])
WEIGHTS = torch.tensor([[2.0, 0.5, 9.0], [1.0, 1.0, 1.0]])


def test_wdoor_by_hand():
    """2 x 1 + 0.5 x 2 + 4 ln 2 on a harmful prompt; on a benign one the negative log-likelihood alone."""
    losses = wdoor_loss(CHOSEN, WEIGHTS, torch.tensor([0.0, 7.0]), torch.tensor([True, False]), 0.5)
    close(losses, [3 + 2.7725887222, 1.75])


def test_role_weights_by_hand():
    """Three harmful pairs and a benign one: 0.2/0.75 and 0.8/0.25, so that the mean is 0.2 h + 0.8 b; else all ones."""
    harmful = torch.tensor([True, True, True, False])
    weights = role_weights(harmful, 0.2)
    close(weights, [0.2 / 0.75] * 3 + [3.2])
    losses = torch.tensor([1.0, 2.0, 6.0, 5.0])
    assert (weights * losses).mean().item() == pytest.approx(0.2 * 3 + 0.8 * 5)
    assert role_weights(harmful[:3], 0.2).tolist() == [1.0] * 3
    assert role_weights(harmful[3:], 0.2).tolist() == [1.0]


@pytest.mark.parametrize("name", ["dpo", "bfpo"])
def test_the_safer_answer_goes_up(name):
    """At the base model the slope is -beta/2 for DPO and -2/beta for BFPO, and its negative for the rejected answer."""
    beta = 0.2
    chosen, rejected = torch.zeros(1, requires_grad=True), torch.zeros(1, requires_grad=True)
    margin = chosen - rejected
    loss = dpo_loss(margin, beta) if name == "dpo" else bfpo_loss(margin, torch.tensor([1.0]), beta)
    loss.sum().backward()
    slope = {"dpo": -beta / 2, "bfpo": -2 / beta}[name]
    assert (chosen.grad.item(), rejected.grad.item()) == (pytest.approx(slope), pytest.approx(-slope))


def test_wdoor_raises_what_the_guide_raised_and_unlearns():
    """Tokens rise by their weights; the rejected answer sinks at rate 2 sigmoid(beta x), on harmful prompts only."""
    chosen, rejected = CHOSEN.clone().requires_grad_(), torch.tensor([0.0, 0.0], requires_grad=True)
    wdoor_loss(chosen, WEIGHTS, rejected, torch.tensor([True, False]), 0.5).sum().backward()
    torch.testing.assert_close(chosen.grad, -WEIGHTS)
    close(rejected.grad, [1.0, 0.0])
