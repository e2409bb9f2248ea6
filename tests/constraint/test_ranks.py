"""Several processes: DDP and FSDP2 train what a single process trains."""

import pytest
import torch
from support.constrained import (
    EXACT,
    llama,
    llama_bases,
    llama_loss,
    llama_step,
)
from support.processes import join, spawn
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

from nspo import constrain
from nspo.constraint.constrain import freeze_uncovered
from nspo.errors import UserError


def train(model, inner, anchor=None, part=slice(None)) -> dict[str, torch.Tensor]:
    """Four AdamW steps, on `part` of every batch; returns the full constrained weights of `inner`."""
    bases = llama_bases(llama())
    # A large eps keeps Adam smooth: otherwise rounding in the order of sums decides the sign of tiny gradients.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3, weight_decay=0.1)
    constraint = constrain(model, optimizer, bases, anchor=anchor)
    for seed in range(3):
        llama_step(model, optimizer, seed, part)
    assert max(constraint.leakage().values()) <= EXACT
    assert 0 < constraint.first_kept() < 1
    llama_loss(model, 3, part).backward()
    with CommDebugMode() as stepping:
        optimizer.step()
    with CommDebugMode() as measuring:
        constraint.leakage()
    assert stepping.get_total_counts() == 0  # rows stay local
    assert (measuring.get_total_counts() > 0) == isinstance(next(inner.parameters()), DTensor)
    weights = {layer: inner.get_submodule(layer).weight.detach() for layer in bases.layers}
    return {layer: getattr(weight, "full_tensor", lambda w=weight: w)() for layer, weight in weights.items()}


def two_ranks(rank: int, port: int, folder: str) -> None:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard

    mesh = join(rank, port)
    expected = torch.load(f"{folder}/single.pt")
    own = slice(rank, rank + 1)  # half of every batch: the two means of equal size have the whole batch's mean

    def close(weights):
        for layer, weight in weights.items():
            torch.testing.assert_close(weight, expected[layer], atol=1e-6, rtol=0, msg=layer)

    for anchor in (None, folder):
        sharded = llama()
        for block in sharded.model.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(sharded, mesh=mesh)
        # FSDP2 sets itself up in the first forward; what constrain() freezes after it must stay where it is, too.
        ids = torch.tensor([[1, 2, 3]])
        sharded(input_ids=ids, labels=ids).loss.backward()
        sharded.zero_grad()
        embedding = sharded.model.embed_tokens.weight.full_tensor().clone()
        close(train(sharded, sharded, anchor, own))
        assert torch.equal(sharded.model.embed_tokens.weight.full_tensor(), embedding)
        weight = sharded.model.layers[0].mlp.down_proj.weight
        assert isinstance(weight, DTensor)
        assert weight.to_local().shape == (16, 64)

    replica = llama()
    with pytest.raises(UserError, match=r"trainable under DDP.*freeze_uncovered"):
        train(nn.parallel.DistributedDataParallel(replica), replica)
    freeze_uncovered(replica, llama_bases(replica))
    close(train(nn.parallel.DistributedDataParallel(replica), replica, part=own))

    columns = llama()
    fully_shard(columns, mesh=mesh, shard_placement_fn=lambda p: Shard(p.ndim - 1))
    with pytest.raises(UserError, match=r"q_proj is sharded as S\(1\)|q_proj is sharded as Shard\(dim=1\)"):
        train(columns, columns)
    torch.distributed.destroy_process_group()


def test_fsdp2_and_ddp_equal_a_single_process(tmp_path):
    model = llama()
    model.save_pretrained(tmp_path)
    torch.save(train(model, model), tmp_path / "single.pt")
    spawn(two_ranks, str(tmp_path))
