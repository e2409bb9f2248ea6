"""What cannot be constrained is refused by name: weights, biases, optimizers, modes."""

import pytest
import torch
from support.constrained import (
    OPTIMIZERS,
    toy,
    toy_bases,
)
from torch import nn

from nspo import constrain
from nspo.errors import UserError


def tie(model):
    model.add_module("copy", nn.Linear(12, 16, bias=False))
    model.copy.weight = model[0].weight


def quantise(model):
    model[0].weight = nn.Parameter(torch.zeros(16, 12, dtype=torch.uint8), requires_grad=False)


def experts(model):
    model[0] = nn.Module()
    model[0].gate_up_proj = nn.Parameter(torch.zeros(2, 16, 12))


def lora(model):
    from peft import LoraConfig, get_peft_model

    get_peft_model(model, LoraConfig(target_modules=["0"]))


def fake(name, module, *bases):
    return type(name, bases, {"__module__": module})


def fsdp1(model):
    model[3] = fake("FullyShardedDataParallel", "torch.distributed.fsdp", nn.Module)()


def flat(model):
    parameter = nn.Parameter(torch.zeros(3))
    parameter.__class__ = fake("FlatParameter", "torch.distributed.fsdp", nn.Parameter)
    model.register_parameter("flat", parameter)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.bfloat16(), "layer 0 has bfloat16 weights, expected float32 master weights"),
        (lambda m: m[2].requires_grad_(False), "layer 2 is frozen"),
        (tie, r"layer 0 shares its weight with copy\.weight"),
        (quantise, r"layer 0 has a quantised or flattened weight \(Tensor torch.uint8"),
        (experts, "layer 0 is a Module, expected nn.Linear"),
        (lora, r"layer 0 is wrapped by peft\..*merge or unload the adapter first, or train nspo\.null_space"),
        (lambda m: m.to("meta"), "layer 0 has its weight on the meta device"),
        (
            lambda m: m.__setitem__(0, nn.Linear(12, 16, bias=False)),
            "the optimizer does not hold the weight of layer 0",
        ),
        (lambda m: m.__setitem__(0, nn.Linear(13, 16, bias=False)), "layer 0 reads width 13"),
        (lambda m: m[0].weight.data.mul_(1.1), "layer 0 has weight norm"),
        (fsdp1, "wrapped in FSDP1"),
        (flat, "wrapped in FSDP1"),
    ],
)
def test_refuses_weights_it_cannot_guarantee(change, message):
    model = toy()
    bases, optimizer = toy_bases(model), OPTIMIZERS["sgd"](model.parameters())
    change(model)
    with pytest.raises(UserError, match=message):
        constrain(model, optimizer, bases)


def test_refuses_a_trainable_bias_unless_frozen():
    model = toy(bias=True)
    bases, optimizer = toy_bases(model), OPTIMIZERS["sgd"](model.parameters())
    with pytest.raises(UserError, match="layer 0 has a trainable bias"):
        constrain(model, optimizer, bases, freeze_rest=False)
    constrain(model, optimizer, bases)
    assert not model[0].bias.requires_grad


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: object(), "optimizer is a object, expected a torch.optim.Optimizer"),
        (lambda p: fake("AdaLomo", "lomo_optim", torch.optim.SGD)(p), "AdaLomo does not do all its writing in step"),
        (lambda p: fake("LayerWiseDummyOptimizer", "x", torch.optim.SGD)(p), "LayerWiseDummyOptimizer does not do all"),
        (lambda p: torch.optim.SGD([{"params": p, "train_mode": True}]), "no schedule-free"),
        (
            lambda p: fake("BF16_Optimizer", "deepspeed.runtime.bf16_optimizer", torch.optim.SGD)(p),
            "DeepSpeed steps with BF16_Optimizer, expected ZeRO stage 2 or 3",
        ),
    ],
)
def test_refuses_optimizers_it_cannot_follow(make, message):
    model = toy()
    with pytest.raises(UserError, match=message):
        constrain(model, make(list(model.parameters())), toy_bases(model))


def test_refuses_an_unknown_mode():
    model = toy()
    with pytest.raises(UserError, match="mode 'update', expected 'both', 'anchor' or 'gradient'"):
        constrain(model, OPTIMIZERS["sgd"](model.parameters()), toy_bases(model), mode="update")
