"""Sites: the distinct inputs that the linear layers of a model's blocks read, found by watching one short forward pass.

Layers that read the very same tensor (q, k and v; gate and up) share one second moment and one basis, so they form one
site, whatever the architecture calls them. A site is named after its first listed layer, in the order of the model's
modules.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from nspo.errors import UserError
from nspo.models.linears import input_width, is_transposed

PROBE_SHAPE = (2, 5)  # sequences and tokens of the forward pass that is watched


@dataclass(frozen=True)
class Site:
    """One input.

    Attributes:
        name: the first of `layers`, for instance "model.layers.0.self_attn.q_proj".
        layers: full names of the linear layers that read it.
        width: d, the length of one token's input vector.
    """

    name: str
    layers: tuple[str, ...]
    width: int


def find_sites(model: PreTrainedModel, pattern: str = ".*") -> list[Site]:
    """The sites of all `nn.Linear` and `Conv1D` layers inside the decoder blocks whose full name matches `pattern`.

    Embeddings and the language-model head lie outside the blocks and are never included.

    Raises:
        UserError: `pattern` is no regular expression or matches nothing; or a layer it matches holds fused experts, is
            not used exactly once per forward pass, or does not read one vector per token.
    """
    blocks = _modules_in_blocks(model)
    linears = {n: m for n, m in blocks.items() if isinstance(m, nn.Linear) or is_transposed(m)}
    layers = _matching(linears, pattern)
    if fused := [name for name, module in blocks.items() if _is_fused(module) and re.fullmatch(pattern, name)]:
        raise UserError(
            f"{len(fused)} layers ({', '.join(fused[:3])}, ...) hold fused 3-D experts, "
            "expected nn.Linear, because inputs that are routed cannot be collected: leave them out with "
            "`activations.layers`, for instance '.*attn.*'"
        )
    groups: dict[tuple[int, ...], list[str]] = {}
    for name, (tensor, version) in _inputs(model, layers).items():
        groups.setdefault((tensor.data_ptr(), tensor.numel(), version), []).append(name)
    return [Site(names[0], tuple(names), input_width(layers[names[0]])) for names in groups.values()]


@contextmanager
def watch(model: PreTrainedModel, sites: Iterable[Site], receive: Callable[[Site, Tensor], None]) -> Iterator[None]:
    """While open, every forward pass hands each site's input to `receive` once: (..., d), in the model's own dtype."""
    hooks = []
    try:
        for site in sites:

            def hook(_module: nn.Module, inputs: tuple[Tensor, ...], site: Site = site) -> None:
                receive(site, inputs[0].detach())

            hooks.append(model.get_submodule(site.name).register_forward_pre_hook(hook))
        yield
    finally:
        for handle in hooks:
            handle.remove()


def _modules_in_blocks(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Every module below the list of blocks: the decoder's outermost ModuleList with one entry per hidden layer.

    The decoder's, because the tower that reads images may have a list of the same length.
    """
    count = model.config.get_text_config().num_hidden_layers
    modules, decoder = dict(model.named_modules()), model.get_decoder()
    inside = next(name for name, module in modules.items() if module is decoder)
    for name, module in modules.items():
        if name.startswith(inside) and isinstance(module, nn.ModuleList) and len(module) == count:
            return {n: m for n, m in modules.items() if n.startswith(name + ".")}
    raise UserError(
        f"model.source: {type(model).__name__} has no list of {count} blocks, expected a decoder-only language model"
    )


def _is_fused(module: nn.Module) -> bool:
    """Whether `module` keeps the weights of several experts in one 3-D parameter, as transformers 5 does."""
    return any(p.ndim == 3 for p in module.parameters(recurse=False)) and not isinstance(module, nn.Conv1d)


def _matching(linears: dict[str, Any], pattern: str) -> dict[str, nn.Linear]:
    try:
        found = {name: module for name, module in linears.items() if re.fullmatch(pattern, name)}
    except re.error as error:
        raise UserError(f"activations.layers: {pattern!r} is not a regular expression ({error})") from error
    if not found:
        raise UserError(
            f"activations.layers: {pattern!r} matches none of the {len(linears)} linear layers, expected a pattern "
            f"for full names such as {', '.join(list(linears)[:7])}"
        )
    return found


@torch.no_grad()
def _inputs(model: PreTrainedModel, layers: dict[str, nn.Linear]) -> dict[str, tuple[Tensor, int]]:
    """What each layer reads in one forward pass, with the tensor's version at that moment.

    The tensors are kept alive together, so an address stands for one tensor; the version tells an in-place change.
    """
    seen: dict[str, list[tuple[Tensor, int]]] = {name: [] for name in layers}
    sites = [Site(name, (name,), input_width(module)) for name, module in layers.items()]
    tokens = PROBE_SHAPE[0] * PROBE_SHAPE[1]
    ids = (torch.arange(tokens, device=model.device) % model.config.get_text_config().vocab_size).view(PROBE_SHAPE)
    with watch(model, sites, lambda site, tensor: seen[site.name].append((tensor, tensor._version))):
        model.base_model(input_ids=ids, use_cache=False)
    for site in sites:
        shapes = [tuple(tensor.shape) for tensor, _ in seen[site.name]]
        if shapes not in ([(*PROBE_SHAPE, site.width)], [(tokens, site.width)]):
            raise UserError(
                f"layer {site.name} read inputs of shapes {shapes} in a forward pass over {PROBE_SHAPE} tokens, "
                f"expected one of width {site.width} per token, once (routed experts are not supported): leave it out "
                "with `activations.layers`"
            )
    return {name: calls[0] for name, calls in seen.items()}
