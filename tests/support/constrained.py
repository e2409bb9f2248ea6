"""Small models with bases, and steps of every kind of optimizer."""

import inspect
import os

import torch
from torch import nn

from nspo import NullSpaceBases
from nspo.bases.stage import compute_basis
from nspo.models.structure.linears import layer_norms

EXACT = 1e-6


def orthonormal(d: int, m: int, seed: int = 0) -> torch.Tensor:
    gaussian = torch.randn(d, m, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.linalg.qr(gaussian)[0].float()


def gram(d: int, seed: int) -> torch.Tensor:
    q = orthonormal(d, d, seed).double()
    return q @ torch.diag(torch.linspace(1, 0.01, d, dtype=torch.float64)) @ q.T


def bases_of(model: nn.Module, sites: dict[str, tuple[list[str], int, int]]) -> NullSpaceBases:
    """{site: (layers, width, protected rank)} to bases of `model`."""
    made = [
        compute_basis(site, layers, gram(width, seed), 10_000, "rank", rank)
        for seed, (site, (layers, width, rank)) in enumerate(sites.items())
    ]
    return NullSpaceBases(made, layer_norms(model, [layer for layers, _, _ in sites.values() for layer in layers]))


def toy(bias: bool = False) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16, bias=bias), nn.Tanh(), nn.Linear(16, 4, bias=bias), nn.LayerNorm(4))


def toy_bases(model: nn.Module) -> NullSpaceBases:
    return bases_of(model, {"in": (["0"], 12, 4), "mid": (["2"], 16, 11)})  # one range basis, one null basis


def toy_loss(model: nn.Module) -> torch.Tensor:
    return (model(torch.randn(8, 12)) - 3).square().mean()


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(**shape, num_key_value_heads=2, vocab_size=50, attention_bias=True, tie_word_embeddings=True)
    return LlamaForCausalLM(config).float()


def llama_bases(model: nn.Module) -> NullSpaceBases:
    sites = {}
    for block in (f"model.layers.{i}" for i in range(2)):
        sites[f"{block}.qkv"] = ([f"{block}.self_attn.{name}_proj" for name in "qkv"], 32, 8)
        sites[f"{block}.o"] = ([f"{block}.self_attn.o_proj"], 32, 16)
        sites[f"{block}.gate_up"] = ([f"{block}.mlp.{name}_proj" for name in ("gate", "up")], 32, 24)
        sites[f"{block}.down"] = ([f"{block}.mlp.down_proj"], 64, 48)
    return bases_of(model, sites)


def llama_loss(model: nn.Module, seed: int, part: slice = slice(None)) -> torch.Tensor:
    ids = torch.randint(0, 50, (2, 6), generator=torch.Generator().manual_seed(seed))[part]
    return model(input_ids=ids, labels=ids).loss


def llama_step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int, part: slice = slice(None)) -> None:
    llama_loss(model, seed, part).backward()
    optimizer.step()
    optimizer.zero_grad()


class Lion(torch.optim.Optimizer):
    """Sign of momentum with decoupled decay: as far from linear in the gradient as optimizers get."""

    def __init__(self, params, lr=1e-3, beta=0.9, weight_decay=0.1):
        super().__init__(params, {"lr": lr, "beta": beta, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                momentum = self.state[p].setdefault("m", torch.zeros_like(p))
                momentum.lerp_(p.grad, 1 - group["beta"])
                p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(momentum.sign(), alpha=group["lr"])


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "fused": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, weight_decay=0.1),
    "lion": Lion,
}


ZOO = {
    name: cls
    for name, cls in sorted(vars(torch.optim).items())
    if inspect.isclass(cls) and issubclass(cls, torch.optim.Optimizer) and cls is not torch.optim.Optimizer
}


STEPS = [
    (name, closure)
    for name, cls in ZOO.items()
    for closure in (False, True)
    if closure or inspect.signature(cls.step).parameters["closure"].default is None  # LBFGS cannot do without
]


def deepspeed_on_cpu() -> None:
    """Have DeepSpeed run without a GPU, and without compiling its own collectives, which takes minutes."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__ = {}
