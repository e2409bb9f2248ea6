"""constrain() under DeepSpeed: ZeRO-2 and ZeRO-3 in two processes equal one without it; all else is refused by name."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import is_deepspeed_available
from safetensors.torch import save_file
from support.constrained import EXACT, bases_of, deepspeed_on_cpu
from support.processes import join, spawn
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from nspo import NullSpaceBases, constrain
from nspo.constraint.zero import whole
from nspo.errors import UserError

pytestmark = pytest.mark.skipif(not is_deepspeed_available(), reason="deepspeed is not installed (nspo[deepspeed])")

ZERO2 = {"stage": 2}
# Weights are kept whole below the threshold; of the groups, which ZeRO-3 steps one by one, none holds two weights.
ZERO3 = {"stage": 3, "stage3_param_persistence_threshold": 0, "sub_group_size": 1}
STEPS, CLIP = 4, 0.5


def net() -> nn.Module:
    """Odd sizes, so that partitions cut rows and are padded, a transposed layer, and a norm that trains freely."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(12, 15, bias=False), nn.Tanh(), Conv1D(9, 15), nn.LayerNorm(9), nn.Linear(9, 1, False)
    )
    nn.init.normal_(model[2].weight)
    model[2].bias.requires_grad_(False)
    return model


def net_bases(model: nn.Module) -> NullSpaceBases:
    """Two range bases and a null basis."""
    return bases_of(model, {"in": (["0"], 12, 4), "mid": (["2"], 15, 11), "end": (["4"], 9, 3)})


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW with two groups, which ZeRO-2 steps one by one; a large eps keeps it smooth."""
    norm = {"params": list(model[3].parameters()), "weight_decay": 0.0}
    return torch.optim.AdamW(
        [{"params": [model[i].weight for i in (0, 2, 4)]}, norm], lr=1e-2, eps=1e-3, weight_decay=0.1
    )


def loss_of(model: Any, step: int, part: slice = slice(None)) -> Tensor:
    """A loss on this part of the batch of a step."""
    batch = torch.randn(8, 12, generator=torch.Generator().manual_seed(step))
    loss: Tensor = (model(batch[part]) - 3).square().mean()
    return loss


def engine_of(zero: dict[str, Any], **more: Any) -> Any:
    """A fresh net under DeepSpeed."""
    import deepspeed

    model = net()
    config = {"train_micro_batch_size_per_gpu": 4, "gradient_clipping": CLIP, "zero_optimization": deepcopy(zero)}
    return deepspeed.initialize(model=model, optimizer=optimizer_of(model), config=config | more)[0]


def assert_equals_one_process(zero: dict[str, Any], rank: int, anchor: Path | None) -> None:
    """The weights, statistics and leakage of training with and without DeepSpeed agree."""
    alone = net()
    optimizer = optimizer_of(alone)
    expected = constrain(alone, optimizer, net_bases(net()), freeze_rest=False)
    for step in range(STEPS):
        loss_of(alone, step).backward()
        nn.utils.clip_grad_norm_(alone.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()

    engine = engine_of(zero)
    constraint = constrain(engine, engine.optimizer, net_bases(net()), anchor=anchor, freeze_rest=False)
    for step in range(STEPS):
        engine.backward(loss_of(engine, step, slice(4 * rank, 4 * rank + 4)))
        engine.step()
    base = dict(net().named_parameters())
    for (name, parameter), value in zip(engine.module.named_parameters(), alone.parameters(), strict=True):
        with whole(parameter):
            moved = (value - base[name]).norm()
            assert (moved > 0) == parameter.requires_grad
            assert (parameter - value).norm() <= 1e-5 * moved, f"{name}: {(parameter - value).norm() / moved:.1e}"
    assert max(constraint.leakage().values()) <= EXACT
    constraint.verify()
    assert constraint.step_stats() == pytest.approx(expected.step_stats(), rel=1e-4)
    assert constraint.unprotected_share == expected.unprotected_share


def refuse(message: str, engine: Any, optimizer: Any = None, freeze_rest: bool = False) -> None:
    """constrain() says so."""
    with pytest.raises(UserError, match=message):
        constrain(engine, optimizer or engine.optimizer, net_bases(net()), freeze_rest=freeze_rest)


def two_ranks(rank: int, port: int, folder: Path) -> None:
    join(rank, port)
    deepspeed_on_cpu()
    for zero in (ZERO2, ZERO3):
        for anchor in (None, folder):
            assert_equals_one_process(zero, rank, anchor)

    refuse("runs ZeRO stage 1, expected stage 2 or 3", engine_of({"stage": 1}))
    refuse("deepspeed.initialize .* returned, with zero_stage 2 or 3", engine_of({"stage": 0}))
    for zero in (ZERO2, ZERO3):
        refuse("rounds its masters to bfloat16", engine_of(zero, bf16={"enabled": True}))
        offload = {"offload_optimizer": {"device": "cpu"}}
        refuse("offloads weights or optimizer", engine_of(zero | offload, zero_force_ds_cpu_optimizer=False))
        engine = engine_of(zero)
        refuse("trainable under DeepSpeed", engine, freeze_rest=True)
        refuse("deepspeed.initialize .* returned", engine, engine.optimizer.optimizer)
    refuse("ZeRO\\+\\+", engine_of(ZERO3 | {"zero_hpz_partition_size": 2}))
    engine.optimizer.parameter_offload.zero_quantized_weights = True  # asking for it takes a GPU
    refuse("ZeRO\\+\\+", engine)
    torch.distributed.destroy_process_group()


def test_zero_equals_one_process_or_is_refused(tmp_path):
    """Masters cut into flat partitions are stepped in the null space, and the model's weights follow them."""
    save_file({f"{name}": value.detach() for name, value in net().named_parameters()}, tmp_path / "model.safetensors")
    spawn(two_ranks, tmp_path)
