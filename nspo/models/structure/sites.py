"""Sites: the distinct inputs that the weights of a model's blocks read, found by watching one short forward pass.

Layers that read the very same tensor (q, k and v; gate and up) share one second moment and one basis, so they form one
site, whatever the architecture calls them. A site is named after its first listed layer, in the order of the model's
modules. Experts share the site of what their block feeds them all, and each has one more for its own down projection.
Routers have none: they stay frozen, because a router that moves sends general tokens to other experts. Layers that do
not read exactly one vector per token have none either: Mamba multiplies by the weight of its `dt_proj` and never calls
it.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from nspo.errors import UserError
from nspo.models.structure.experts import Experts, find_experts, is_router, unknown_experts
from nspo.models.structure.linears import is_transposed, locate

PROBE_SHAPE = (2, 5)  # sequences and tokens of the forward pass that is watched


@dataclass(frozen=True)
class Site:
    """One input.

    Attributes:
        name: the first of `layers`, for instance "model.layers.0.self_attn.q_proj".
        layers: full names of the weights that read it (see `nspo.models.structure.linears`).
        width: d, the length of one token's input vector.
        share: the share of all tokens that reach it if every expert is asked as often; 1 where each token does.
    """

    name: str
    layers: tuple[str, ...]
    width: int
    share: float = 1.0


Receive = Callable[[Site, Tensor, Tensor | None], None]  # a site, its vectors, of which tokens (n,); None: of each


def find_sites(model: PreTrainedModel, pattern: str = ".*") -> list[Site]:
    """The sites of all linear layers (`Conv1D` too) and experts in the decoder blocks whose name matches `pattern`.

    Experts match by the name of their parameter, such as "model.layers.0.mlp.experts.down_proj", all or none.
    Embeddings and the language-model head lie outside the blocks and are never included. What else is left out, because
    it is not used exactly once per forward pass or does not read one vector per token, `without_site` names.

    Raises:
        UserError: `pattern` is no regular expression or matches nothing that has a site; or a layer that it matches
            holds experts of an unknown form.
    """
    blocks = modules_in_blocks(model)
    experts = find_experts(blocks)
    by_module, own = {one.name: one for one in experts}, {one.own: one for one in experts}
    names: list[str] = []
    for name, module in blocks.items():
        if name in by_module:
            names += [by_module[name].shared, by_module[name].own]
        elif (isinstance(module, nn.Linear) or is_transposed(module)) and not is_router(name, module, experts):
            names.append(name)
    matching = _matching(names, pattern)
    if unknown := [name for name in unknown_experts(blocks) if re.fullmatch(pattern, name)]:
        raise UserError(
            f"{len(unknown)} layers ({', '.join(unknown[:3])}, ...) hold experts in a form whose "
            "inputs cannot be collected",
            expected="linear layers or the experts of transformers' mixtures",
            change="leave them out with `activations.layers`, for instance '.*attn.*'",
        )
    places = locate(model, [name for name in matching if name not in own])
    read = [Site(name, (name,), place.width) for name, place in places.items()]
    inputs, calls = _probe(model, read, [own[name] for name in matching if name in own])
    groups: dict[tuple[int, ...], list[str]] = {}
    for name, (tensor, version) in inputs.items():
        groups.setdefault((tensor.data_ptr(), tensor.numel(), version), []).append(name)
    if not inputs and not calls:
        raise UserError(
            f"activations.layers: none of the {len(matching)} layers that {pattern!r} matches, such as {matching[0]}, "
            "reads one vector per token, once",
            expected="at least one",
        )
    shared = {names[0]: Site(names[0], tuple(names), places[names[0]].width) for names in groups.values()}
    sites: list[Site] = []
    for name in matching:
        if name in shared:
            sites.append(shared[name])
        elif name in own:
            sites += _own_sites(own[name], calls[name])
    return sites


def without_site(model: PreTrainedModel, sites: Iterable[Site]) -> list[str]:
    """The linear layers of the decoder blocks that are in none of `sites`: no basis will protect or move them."""
    covered = {layer for site in sites for layer in site.layers}
    linear = (name for name, m in modules_in_blocks(model).items() if isinstance(m, nn.Linear) or is_transposed(m))
    return [name for name in linear if name not in covered]


@contextmanager
def watch(model: PreTrainedModel, sites: Iterable[Site], receive: Receive) -> Iterator[None]:
    """While open, every forward pass hands each site's input to `receive` once: (..., d), in the model's own dtype.

    With it come None where each token has a vector, in order; for an expert the places of its tokens, (n,) int64.
    """
    modules = dict(model.named_modules())
    experts = find_experts(modules)
    fed = {one.shared: one for one in experts}
    routed = {f"{one.own}.{number}": (one, number) for one in experts for number in range(one.count)}
    wanted: dict[str, list[tuple[Site, int]]] = {}
    hooks = []
    try:
        for site in sites:
            if site.name in routed:
                asked, number = routed[site.name]
                wanted.setdefault(asked.name, []).append((site, number))
                continue
            one = fed.get(site.name)

            def hook(_module: nn.Module, args: Any, kwargs: Any, site: Site = site, one: Experts | None = one) -> None:
                receive(site, (args[0] if one is None else one.fed(one.called(args, kwargs))).detach(), None)

            module = modules[site.name] if one is None else one.module
            hooks.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        for asked in experts:

            def hand_out(_module: nn.Module, args: Any, kwargs: Any, asked: Experts = asked) -> None:
                given = asked.called(args, kwargs)
                for site, number in wanted[asked.name]:
                    vectors, tokens, _ = asked.routed(given, number)
                    receive(site, vectors.detach(), tokens)

            if asked.name in wanted:
                hooks.append(asked.module.register_forward_pre_hook(hand_out, with_kwargs=True))
        yield
    finally:
        for handle in hooks:
            handle.remove()


def modules_in_blocks(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Every module below the list of blocks: the decoder's outermost ModuleList with one entry per hidden layer.

    The decoder's, because the tower that reads images may have a list of the same length.
    """
    config = model.config.get_text_config()
    count = config.num_hidden_layers
    counts = {count, getattr(config, "num_layers", count)}  # LongCat counts both attentions of a block
    modules, decoder = dict(model.named_modules()), model.get_decoder()
    inside = next(name for name, module in modules.items() if module is decoder)
    towers = tuple(  # some models call themselves their decoder
        f"{name}."
        for name, module in modules.items()
        if name.startswith(f"{inside}.")
        and isinstance(module, PreTrainedModel)
        and not isinstance(module.config, type(config))
    )
    for name, module in modules.items():
        if not name.startswith(inside) or name.startswith(towers):
            continue
        if isinstance(module, nn.ModuleList) and len(module) in counts:
            return {n: m for n, m in modules.items() if n.startswith(name + ".")}
    raise UserError(
        f"model.source: {type(model).__name__} has no list of {count} blocks", expected="a decoder-only language model"
    )


def _own_sites(one: Experts, chosen: int) -> list[Site]:
    """The sites of the down projections of all experts, of which every token asks `chosen`."""
    names = [f"{one.own}.{number}" for number in range(one.count)]
    return [Site(name, (name,), one.own_width, chosen / one.count) for name in names]


def _matching(names: Sequence[str], pattern: str) -> list[str]:
    try:
        found = [name for name in names if re.fullmatch(pattern, name)]
    except re.error as error:
        raise UserError(f"activations.layers: {pattern!r} is not a regular expression ({error})") from error
    if not found:
        raise UserError(
            f"activations.layers: {pattern!r} matches none of the {len(names)} linear layers",
            expected=f"a pattern for full names such as {', '.join(names[:7])}",
        )
    return found


@torch.no_grad()
def _probe(
    model: PreTrainedModel, sites: Sequence[Site], experts: Sequence[Experts]
) -> tuple[dict[str, tuple[Tensor, int]], dict[str, int]]:
    """One forward pass: what each site reads once per token, with the tensor's version at that moment; and by the name
    of the down projections of `experts`, which are checked, how many of them every token asks.

    The tensors are kept alive together, so an address stands for one tensor; the version tells an in-place change.
    """
    seen: dict[str, list[tuple[Tensor, int]]] = {site.name: [] for site in sites}
    chosen: dict[str, int] = {}
    tokens = math.prod(PROBE_SHAPE)
    ids = (torch.arange(tokens, device=model.device) % model.config.get_text_config().vocab_size).view(PROBE_SHAPE)
    hooks = []
    for one in experts:

        def check(_module: nn.Module, args: Any, kwargs: Any, output: Tensor, one: Experts = one) -> None:
            given = one.called(args, kwargs)
            one.check(given, output)
            chosen[one.own] = one.asked(given)

        hooks.append(one.module.register_forward_hook(check, with_kwargs=True))
    try:
        with watch(model, sites, lambda site, tensor, _: seen[site.name].append((tensor, tensor._version))):
            model.base_model(input_ids=ids, use_cache=False)
    finally:
        for handle in hooks:
            handle.remove()
    read = {site.name: seen[site.name][0] for site in sites if _once_per_token(site, [t for t, _ in seen[site.name]])}
    return read, chosen


def _once_per_token(site: Site, read: Sequence[Tensor]) -> bool:
    """Whether a layer was called once over the probe, with one vector for every token."""
    # Some attention gives its vectors a dimension of one head.
    shapes = [tuple(size for size in tensor.shape[:-1] if size != 1) + tensor.shape[-1:] for tensor in read]
    return shapes in ([(*PROBE_SHAPE, site.width)], [(math.prod(PROBE_SHAPE), site.width)])
