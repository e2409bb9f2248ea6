"""projection.py: the constraint is exact with any optimizer, sharded or not, and refuses what it cannot guarantee."""

import copy
import inspect

import pytest
import torch
from support.constrained import (
    EXACT,
    OPTIMIZERS,
    STEPS,
    ZOO,
    bases_of,
    llama,
    llama_bases,
    llama_step,
    toy,
    toy_bases,
    toy_loss,
)
from torch import nn

from nspo import constrain
from nspo.constraint.constrain import freeze_uncovered
from nspo.errors import UserError

# ------------------------------------------------------------------------------------------- exactness in training


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_exact_after_1000_steps_with_decay_clipping_and_accumulation(name):
    model = toy()
    start = model[0].weight.detach().clone()
    optimizer = OPTIMIZERS[name](model.parameters())
    constraint = constrain(model, optimizer, toy_bases(model))
    for _ in range(1000):
        (toy_loss(model) / 2).backward()
        (toy_loss(model) / 2).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert max(constraint.leakage().values()) <= EXACT
    assert (model[0].weight - start).norm() > 0.1 * start.norm()  # it did learn
    constraint.verify()


@pytest.mark.parametrize(("name", "closure"), STEPS)
def test_every_torch_optimizer_keeps_the_constraint_or_is_refused_by_name(name, closure):
    """With decay and momentum where it has them; what torch adds in a later release is met here at once."""
    model = toy()
    weights = [model[0].weight, model[2].weight]  # matrices only, as Muon wants
    start = [weight.detach().clone() for weight in weights]
    cls = ZOO[name]
    wanted = {"lr": 0.03, "momentum": 0.9, "weight_decay": 0.1}
    optimizer = cls(weights, **{key: wanted[key] for key in wanted.keys() & inspect.signature(cls).parameters.keys()})
    if name == "SparseAdam":
        with pytest.raises(UserError, match="SparseAdam takes sparse gradients, those of linear layers are dense"):
            constrain(model, optimizer, toy_bases(model))
        return
    constraint = constrain(model, optimizer, toy_bases(model))

    inputs, losses = torch.randn(8, 12), []

    def evaluate() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (model[:3](inputs) - 3).square().mean()
        loss.backward()
        losses.append(float(loss.detach()))
        return loss

    for _ in range(50):
        optimizer.step(evaluate) if closure else (evaluate(), optimizer.step())
    leaps = name == "LBFGS"  # so far out within a step that coming back rounds more
    assert max(constraint.leakage().values()) <= (10 * EXACT if leaps else EXACT)
    assert losses[-1] < 0.999 * losses[0]
    assert all((weight - before).norm() > 1e-3 * before.norm() for weight, before in zip(weights, start, strict=True))


@pytest.mark.parametrize("variant", ["foreach", "fused", "amsgrad", "maximize"])
def test_exact_in_the_variants_of_adamw(variant):
    model = toy()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1, **{variant: True})
    constraint = constrain(model, optimizer, toy_bases(model))
    for _ in range(50):
        toy_loss(model).backward()
        optimizer.step()
    assert 0 < max(constraint.leakage().values()) <= EXACT


def test_exact_with_several_parameter_groups():
    model = toy()
    groups = [
        {"params": [model[0].weight], "lr": 1e-2, "weight_decay": 0.5},
        {"params": [*model[2].parameters(), *model[3].parameters()], "lr": 2e-2, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups)
    constraint = constrain(model, optimizer, toy_bases(model))
    for _ in range(20):
        toy_loss(model).backward()
        optimizer.step()
    assert 0 < max(constraint.leakage().values()) <= EXACT


@pytest.mark.parametrize("mode", ["both", "anchor"])
def test_a_step_with_a_closure_equals_a_plain_one(mode):
    """The gradients that a closure makes inside the step are projected and counted like any others."""
    weights, stats = [], []
    for closure in (False, True):
        model = toy()
        optimizer = OPTIMIZERS["sgd"](model.parameters())
        constraint = constrain(model, optimizer, toy_bases(model), mode=mode)

        def evaluate(model: nn.Module = model, optimizer: torch.optim.Optimizer = optimizer) -> torch.Tensor:
            optimizer.zero_grad()
            loss = toy_loss(model)
            loss.backward()
            return loss

        for _ in range(3):
            if closure:
                assert optimizer.step(closure=evaluate) > 0  # the loss comes back
            else:
                evaluate()
                optimizer.step()
        weights.append(model[0].weight.detach())
        stats.append(constraint.step_stats())
    assert torch.equal(*weights)
    assert stats[0] == stats[1]


@pytest.mark.parametrize(("mode", "low", "high"), [("gradient", 1e-3, 10), ("anchor", 0, EXACT), ("both", 0, EXACT)])
def test_gradient_projection_alone_leaks_under_adamw(mode, low, high):
    model = toy()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    constraint = constrain(model, optimizer, toy_bases(model), mode=mode)
    for _ in range(20):
        toy_loss(model).backward()
        optimizer.step()
    assert low <= max(constraint.leakage().values()) <= high


def test_step_stats_price_the_constraint():
    model = toy()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    constraint = constrain(model, optimizer, toy_bases(model), mode="both")
    assert constraint.step_stats() == {}
    toy_loss(model).backward()
    before = [model[i].weight.grad.clone() for i in (0, 2)]
    optimizer.step()
    after = [model[i].weight.grad for i in (0, 2)]
    stats = constraint.step_stats()
    assert stats["gradient_norm"] == pytest.approx(float(torch.cat([g.flatten() for g in before]).norm()), rel=1e-5)
    assert stats["projected_norm"] == pytest.approx(float(torch.cat([g.flatten() for g in after]).norm()), rel=1e-5)
    assert stats["kept"] == pytest.approx(stats["projected_norm"] / stats["gradient_norm"])
    assert 0 < stats["kept"] < 1
    inner = sum((b * a).sum() for b, a in zip(before, after, strict=True))
    assert stats["descent"] == pytest.approx(float(inner), rel=1e-4)


def test_descent_is_taken_from_both_gradients():
    """A P that is no projector turns the gradient uphill, which ||P g||^2 could never show: <g, P g> is negative."""
    model = toy()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    constraint = constrain(model, optimizer, toy_bases(model), mode="gradient")
    for layer in constraint._layers:
        layer.basis = 10 * layer.basis
        layer.kind = "range"
    toy_loss(model).backward()
    optimizer.step()
    assert constraint.step_stats()["descent"] < 0
    assert constraint.step_stats()["kept"] > 1


def test_the_anchor_is_the_default_and_leaves_gradients_alone():
    model = toy()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    constraint = constrain(model, optimizer, toy_bases(model))
    toy_loss(model).backward()
    before = model[0].weight.grad.clone()
    optimizer.step()
    assert constraint.mode == "anchor"
    assert torch.equal(model[0].weight.grad, before)
    assert set(constraint.step_stats()) == {"step_descent"}


@pytest.mark.parametrize("mode", ["anchor", "both", "gradient"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_descent_of_a_step_is_taken_from_what_happened_to_the_weights(name, mode):
    """-<g, W_after - W_before>, g the raw gradient (mode "gradient": the projected), momentum, decay and all."""
    model = toy()
    optimizer = OPTIMIZERS[name](model.parameters())
    constraint = constrain(model, optimizer, toy_bases(model), mode=mode)
    layers = [model[0], model[2]]
    for _ in range(5):
        toy_loss(model).backward()
        raw = [layer.weight.grad.double().clone() for layer in layers]
        before = [layer.weight.detach().double().clone() for layer in layers]
        optimizer.step()
        given = [layer.weight.grad.double() for layer in layers] if mode == "gradient" else raw
        moved = [layer.weight.detach().double() - start for layer, start in zip(layers, before, strict=True)]
        expected = -sum(float((g * d).sum()) for g, d in zip(given, moved, strict=True))
        assert constraint.step_stats()["step_descent"] == pytest.approx(expected, rel=1e-4, abs=1e-7)
        optimizer.zero_grad()


def test_a_step_uphill_shows():
    """Momentum from before can carry a step against its own gradient, which no projected gradient would tell."""
    model = toy()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    constraint = constrain(model, optimizer, toy_bases(model))
    inputs = torch.randn(8, 12)
    for sign in (1, -0.1):
        (sign * (model(inputs) - 3).square().mean()).backward()
        optimizer.step()
        assert (constraint.step_stats()["step_descent"] > 0) == (sign == 1)
        optimizer.zero_grad()


def test_a_fused_step_that_rescales_its_gradient_says_nothing_of_descent():
    """It divides the gradient in place, so that the two ends of the step are measured along different vectors."""
    model = toy()
    optimizer, scaler = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True), torch.amp.GradScaler("cpu")
    constraint = constrain(model, optimizer, toy_bases(model))
    scaler.scale(toy_loss(model)).backward()
    scaler.step(optimizer)
    assert constraint.step_stats() == {}


def test_what_the_anchor_leaves_of_the_first_step():
    """||P D|| / ||D|| of a plain gradient step is that of the gradient; later steps change nothing about it."""
    kept = []
    for mode in ("anchor", "both"):
        model = toy()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        constraint = constrain(model, optimizer, toy_bases(model), mode=mode)
        assert constraint.first_kept() is None
        for _ in range(2):
            toy_loss(model).backward()
            optimizer.step()
            optimizer.zero_grad()
            kept.append(constraint.first_kept() if mode == "anchor" else constraint.step_stats()["kept"])
    assert kept[0] == kept[1] == pytest.approx(kept[2], rel=1e-4)
    assert 0 < kept[0] < 1


def test_exact_inside_autocast_and_with_loss_scaling():
    model = toy()
    optimizer, scaler = OPTIMIZERS["adamw"](model.parameters()), torch.amp.GradScaler("cpu")
    constraint = constrain(model, optimizer, toy_bases(model))
    for _ in range(20):
        with torch.autocast("cpu", torch.bfloat16):
            scaler.scale(toy_loss(model)).backward()
            scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert max(constraint.leakage().values()) <= EXACT
    assert model[0].weight.norm() != toy()[0].weight.norm()


@pytest.mark.parametrize("fused", [False, True])
def test_a_skipped_step_leaves_the_weights(fused):
    """A scaler that finds an infinite gradient skips the step: nothing may move, whoever does the skipping."""
    model = toy()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=fused)  # the fused step looks for itself
    scaler = torch.amp.GradScaler("cpu")
    constraint = constrain(model, optimizer, toy_bases(model))
    for infinite in (False, True, False):
        before = model[0].weight.detach().clone()
        scaler.scale(toy_loss(model)).backward()
        if infinite:
            model[0].weight.grad[0, 0] = float("inf")
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        moved = (model[0].weight - before).norm() / before.norm()
        assert (moved < 1e-7) if infinite else (moved > 1e-3)
    assert 0 < max(constraint.leakage().values()) <= EXACT


def test_exact_with_torch_compile_and_accelerate():
    from accelerate import Accelerator

    model = toy()
    bases = toy_bases(model)
    freeze_uncovered(model, bases)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, optimizer = accelerator.prepare(
        torch.compile(model, backend="eager"), OPTIMIZERS["adamw"](model.parameters())
    )
    constraint = constrain(model, optimizer, bases)
    for _ in range(6):
        with accelerator.accumulate(model):
            accelerator.backward(toy_loss(model))
            optimizer.step()
            optimizer.zero_grad()
    assert 0 < max(constraint.leakage().values()) <= EXACT


def test_conv1d_is_projected_on_its_transpose():
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    model = nn.ModuleDict({"c": Conv1D(6, 6)})  # square: the wrong side would pass unnoticed by shape
    bases = bases_of(model, {"s": (["c"], 6, 2)})
    start = model["c"].weight.detach().clone()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    constraint = constrain(model, optimizer, bases)
    model["c"](torch.randn(5, 6)).square().sum().backward()
    optimizer.step()
    moved = model["c"].weight.detach() - start  # (in, out): y = x W, so protected inputs x give x D = 0
    assert (bases["s"].basis.T @ moved).norm() <= EXACT * start.norm() < moved.norm()
    assert constraint.leakage()["c"] <= EXACT


def test_bf16_rounding_leaks_as_arithmetic_says():
    """With 8 significant bits a weight m 2^e, m in [1/2, 1), errs by 2^(e - 8) / sqrt(12) on average.

    The errors know nothing of Q: relative to the weights, this is the leakage of any bf16 export.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 256, bias=False))
    bases = bases_of(model, {"in": (["0"], 128, 100)})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    constraint = constrain(model, optimizer, bases)
    for _ in range(5):
        model(torch.randn(8, 128)).square().sum().backward()
        optimizer.step()
    exact, weight = constraint.leakage()["0"], model[0].weight.detach()
    expected = torch.exp2(torch.frexp(weight).exponent - 8.0).norm() / 12**0.5 / weight.norm()
    weight.copy_(weight.bfloat16())
    assert exact <= EXACT
    assert 1e-3 < constraint.leakage()["0"] < 2e-3
    assert constraint.leakage()["0"] == pytest.approx(float(expected), rel=0.05)
    with pytest.raises(UserError, match=r"leaves the null space by .*expected at most 1e-05"):
        constraint.verify()


# ------------------------------------------------------------------------------------------- a whole model


def test_llama_moves_only_where_it_may():
    model = llama()
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = OPTIMIZERS["adamw"](model.parameters())  # holds everything, also what is about to be frozen
    model(input_ids=torch.tensor([[1, 2]]), labels=torch.tensor([[1, 2]])).loss.backward()  # leaves stale gradients
    constraint = constrain(model, optimizer, llama_bases(model))
    for seed in range(3):
        llama_step(model, optimizer, seed)
    assert max(constraint.leakage().values()) <= EXACT
    covered = {f"{layer}.weight" for layer in constraint.leakage()}
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, start[name]) == (name not in covered), name
    assert constraint.unprotected_share == 0
    assert len(constraint.frozen_names) == len(start) - len(covered)
    assert "14 layers" in constraint.describe()


def test_free_rest_moves_and_is_counted():
    model = llama()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.endswith("bias"))
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    constraint = constrain(model, optimizer, llama_bases(model), freeze_rest=False)
    embedding = model.model.embed_tokens.weight.detach().clone()
    llama_step(model, optimizer, 0)
    assert not torch.equal(model.model.embed_tokens.weight, embedding)
    rest = 50 * 32 + 5 * 32  # tied embedding once, five norms
    total = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert constraint.unprotected_share == pytest.approx(rest / total)


def test_anchor_in_bf16_only_where_lossless():
    model = toy()
    with torch.no_grad():
        model[0].weight.copy_(model[0].weight.bfloat16())
    constraint = constrain(model, OPTIMIZERS["sgd"](model.parameters()), toy_bases(model))
    assert [layer.anchor.dtype for layer in constraint._layers] == [torch.bfloat16, torch.float32]
    assert set(constraint.leakage().values()) == {0.0}


def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(tmp_path):
    """The checkpoint holds weights and optimizer only; the anchor comes from the base folder, not from the weights."""
    model = llama()
    bases = llama_bases(model)
    model.save_pretrained(tmp_path)
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    constrain(model, optimizer, bases)
    for seed in range(3):
        llama_step(model, optimizer, seed)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "checkpoint.pt")
    for seed in range(3, 6):
        llama_step(model, optimizer, seed)

    checkpoint = torch.load(tmp_path / "checkpoint.pt")
    resumed = llama()
    resumed.load_state_dict(checkpoint["model"])
    optimizer = OPTIMIZERS["adamw"](resumed.parameters())
    constraint = constrain(resumed, optimizer, bases, anchor=tmp_path)
    optimizer.load_state_dict(checkpoint["optimizer"])
    for seed in range(3, 6):
        llama_step(resumed, optimizer, seed)
    assert 0 < max(constraint.leakage().values()) <= EXACT
    for name, weight in model.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], weight), name


def test_loading_an_earlier_state_in_the_middle_keeps_the_constraint():
    model = toy()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    constraint = constrain(model, optimizer, toy_bases(model))
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    for step in range(20):
        toy_loss(model).backward()
        optimizer.step()
        if step == 10:
            model.load_state_dict(saved[0])
            optimizer.load_state_dict(saved[1])
    assert 0 < max(constraint.leakage().values()) <= EXACT


def test_anchor_refusals(tmp_path):
    model = toy()
    bases, optimizer = toy_bases(model), OPTIMIZERS["sgd"](model.parameters())
    with pytest.raises(UserError, match=r"holds no \*\.safetensors"):
        constrain(model, optimizer, bases, anchor=tmp_path)
    from safetensors.torch import save_file

    state = {name: value.clone() for name, value in model.state_dict().items()}
    for change, message in [
        (lambda s: s.pop("2.weight"), r"has no weight 2\.weight"),
        (
            lambda s: s.update({"0.weight": torch.zeros(3, 12)}),
            r"0\.weight of shape \(3, 12\), the model has \(16, 12\)",
        ),
        (lambda s: s.update({"0.weight": 2 * s["0.weight"]}), "layer 0 has weight norm"),
        (lambda s: s.update({"0.weight": s["0.weight"].flip(0).contiguous()}), "away from .* in the protected range"),
    ]:
        changed = dict(state)
        change(changed)
        save_file(changed, tmp_path / "model.safetensors")
        with pytest.raises(UserError, match=message):
            constrain(model, optimizer, bases, anchor=tmp_path)
    assert all(parameter.requires_grad for parameter in model.parameters())  # a refusal changes nothing


def test_remove_lifts_the_constraint():
    model = toy()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    constraint = constrain(model, optimizer, toy_bases(model))
    constraint.remove()
    toy_loss(model).backward()
    optimizer.step()
    assert max(constraint.leakage().values()) > 1e-3


def test_first_step_verifies_that_the_write_landed():
    model = toy()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    constrain(model, optimizer, toy_bases(model))
    model[0].weight = nn.Parameter(model[0].weight.detach().clone())
    toy_loss(model).backward()
    with pytest.raises(UserError, match="layer 0 got a new weight after constrain"):
        optimizer.step()
