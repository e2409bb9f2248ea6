"""The constraint on mixtures of experts: exact for every expert of every family, on one process and on two."""

import pytest
import torch
from support.mixtures import EXPERTS, MIXTURES, mixture, mixture_bases
from support.processes import join, spawn
from torch.distributed.tensor import DTensor

from nspo import NullSpaceCallback, constrain, null_space_adapter
from nspo.constraint.anchors import copied_weights
from nspo.constraint.refusals import refuse_weights
from nspo.errors import UserError
from nspo.models.structure.linears import locate

EXACT = 1e-6
IDLE = "layers.1.mlp.experts.down_proj.2"  # an expert that no basis lets move


def step(model, optimizer, seed, part=slice(None)):
    ids = torch.randint(3, 300, (4, 8), generator=torch.Generator().manual_seed(seed))[part]
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=3e-3, eps=1e-3, weight_decay=0.1)


@pytest.mark.parametrize("mode", ["both", "anchor"])
@pytest.mark.parametrize("family", MIXTURES)
def test_every_expert_stays_in_its_null_space_and_moves_inside_it(family, mode):
    """Recomputed from the weights: no update has a part in its protected range; all that has a site moved."""
    model = mixture(family).train()
    bases, start = mixture_bases(model), {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = adamw(model)
    constraint = constrain(model, optimizer, bases, mode=mode)
    for seed in range(3):
        step(model, optimizer, seed)
    assert max(constraint.leakage().values()) <= EXACT
    covered = set()
    for name, weight in locate(model, bases.layers).items():
        before = weight.rows(start[weight.key])
        moved = (weight.rows(weight.parameter) - before).double()
        site = bases.for_layer(name)
        basis = site.basis.double()
        leaked = moved @ basis if site.kind == "range" else moved - moved @ basis @ basis.T
        assert float(leaked.norm()) <= EXACT * float(before.norm()), name
        assert float(moved.norm()) > 0, name
        covered.add(weight.key)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, start[name]) == (name not in covered), name


def test_a_frozen_expert_does_not_move_by_a_bit_while_the_others_of_its_parameter_do():
    """All its directions are protected: decay and momentum included, its weights stay as they were."""
    model = mixture("Qwen3Moe").train()
    bases, down = mixture_bases(model, frozen=IDLE), model.model.layers[1].mlp.experts.down_proj
    start, optimizer = down.detach().clone(), adamw(model)
    constrain(model, optimizer, bases)
    for seed in range(3):
        step(model, optimizer, seed)
    assert [torch.equal(down[number], start[number]) for number in range(EXPERTS)] == [False, False, True, False]


def test_a_resumed_run_takes_its_anchor_from_the_copies_of_the_base():
    """From copies by parameter, as the callback keeps them, a moved model goes back to the same anchor."""
    base = mixture("GptOss")
    bases, copies = mixture_bases(base), copied_weights(base, mixture_bases(base).layers)
    model = mixture("GptOss").train()
    optimizer = adamw(model)
    constrain(model, optimizer, bases)
    step(model, optimizer, 0)
    again = constrain(model, adamw(model), bases, anchor=copies)
    assert 0 < max(again.leakage().values()) <= EXACT
    assert set(copies) == {weight.holder for weight in locate(base, bases.layers).values()}
    with torch.no_grad():
        copies["model.layers.0.mlp.experts.down_proj"][1] *= 1.1
    with pytest.raises(UserError, match=r"layer model\.layers\.0\.mlp\.experts\.down_proj\.1 has weight norm"):
        constrain(model, adamw(model), bases, anchor=copies)


def test_what_cannot_hold_experts_says_so_in_one_line():
    """No LoRA of ours, no DeepSpeed, no half precision, no trainable bias: each is refused by the weight's name."""
    model = mixture("GptOss")
    bases, weights = mixture_bases(model), locate(model, mixture_bases(model).layers)
    held = {id(parameter) for parameter in model.parameters()}
    with pytest.raises(UserError, match=r"experts of 3-D parameters, which no LoRA adapter of ours can hold"):
        null_space_adapter(model, bases)
    of_experts = {name: weight for name, weight in weights.items() if weight.experts}
    with pytest.raises(UserError, match=r"gate_up_proj is in a 3-D parameter of 4 experts, which DeepSpeed"):
        refuse_weights(model, of_experts, held, True, zero=object())
    with pytest.raises(UserError, match=r"gate_up_proj has a trainable bias"):
        refuse_weights(model, of_experts, held, freeze_rest=False)
    with pytest.raises(UserError, match=r"has bfloat16 weights, expected float32"):
        refuse_weights(model.bfloat16(), of_experts, held, True)


def test_the_callback_freezes_routers_and_says_so():
    """What trains is what has a basis: routers, norms and biases do not."""
    model = mixture("GptOss")
    NullSpaceCallback(model, mixture_bases(model))
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name.rpartition(".")[2] for name in trainable} == {"weight", "gate_up_proj", "down_proj"}
    assert not [name for name in trainable if "router" in name or "norm" in name]


# ------------------------------------------------------------------------------------------- two processes


def train(model, inner, bases, part=slice(None)) -> dict[str, torch.Tensor]:
    optimizer = adamw(model)
    constraint = constrain(model, optimizer, bases)
    for seed in range(3):
        step(model, optimizer, seed, part)
    assert max(constraint.leakage().values()) <= EXACT
    weights = {weight.key: weight.parameter.detach() for weight in locate(inner, bases.layers).values()}
    return {key: getattr(weight, "full_tensor", lambda w=weight: w)() for key, weight in weights.items()}


def two_ranks(rank: int, port: int, folder: str) -> None:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard

    mesh = join(rank, port)
    for family, number in (("Qwen3Moe", 3), ("GptOss", 4)):  # three experts on two ranks: two and one
        changed = {"num_experts" if family == "Qwen3Moe" else "num_local_experts": number}
        bases = mixture_bases(mixture(family, **changed), frozen="layers.1.mlp.experts.down_proj.2")
        sharded = mixture(family, **changed).train()
        for block in sharded.model.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(sharded, mesh=mesh)
        found = train(sharded, sharded, bases, slice(2 * rank, 2 * rank + 2))
        assert isinstance(sharded.model.layers[0].mlp.experts.down_proj, DTensor)
        assert len(sharded.model.layers[0].mlp.experts.down_proj.to_local()) < number
        for key, value in torch.load(f"{folder}/{family}.pt").items():
            torch.testing.assert_close(found[key], value, atol=2e-6, rtol=0, msg=key)
    columns = mixture("Qwen3Moe")
    fully_shard(columns, mesh=mesh, shard_placement_fn=lambda p: Shard(1) if p.ndim == 3 else None)
    bases = mixture_bases(mixture("Qwen3Moe"))
    with pytest.raises(UserError, match=r"through its experts, expected whole experts per rank"):
        constrain(columns, adamw(columns), bases)
    torch.distributed.destroy_process_group()


def test_experts_sharded_by_fsdp2_equal_a_single_process(tmp_path):
    """Whole experts per rank, unevenly too, one of them frozen: the same weights as on one process."""
    for family, number in (("Qwen3Moe", 3), ("GptOss", 4)):
        changed = {"num_experts" if family == "Qwen3Moe" else "num_local_experts": number}
        model = mixture(family, **changed).train()
        bases = mixture_bases(model, frozen="layers.1.mlp.experts.down_proj.2")
        torch.save(train(model, model, bases), tmp_path / f"{family}.pt")
    spawn(two_ranks, str(tmp_path))
