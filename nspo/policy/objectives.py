"""What a method makes of the model: which weights train, and how its constraint acts on them.

| constraint | what it does |
|---|---|
| none | nothing: the same with P = I |
| exact | keeps every layer of the bases to its null space |
| gradient | projects gradients only |
| random | as exact, on random directions, equally many of every input |
| mlp | as exact, on MLP layers; all else trains freely |

`random` asks whether it matters which directions are free, `gradient` what the paper's text guarantees: AdamW's moments
and decay carry the weights out of the null space, so nothing is verified and the leakage is logged.

Under `mlp` the biases of MLP layers are frozen, since no basis holds them; later layers' inputs drift all the same,
since attention, embeddings, norms and head are free. docs/release.md compares it with the authors' code.
"""

from pathlib import Path

from torch import nn
from transformers import PreTrainedModel

from nspo.bases.derived import only_layers, random_like
from nspo.bases.file import NullSpaceBases
from nspo.errors import UserError
from nspo.models.sites import find_sites
from nspo.policy.log import LoggedConstraint
from nspo.settings.policy.constraints import Exact, GradientOnly, MLPOnly, RandomDirections
from nspo.settings.policy.methods import MethodSettings

MLP = "mlp"  # in the names of MLP layers, as the release tells them


def check_given(name: str, what: str, path: Path | None, needed: bool) -> None:
    """Refuse an input that is missing, or given although the method has no use for it.

    Raises:
        UserError: naming the method and the flag.
    """
    if (path is not None) != needed:
        says = f"needs {what}, found none" if needed else f"takes no {what}, found {path}"
        flag = f"`--{what.replace(' ', '-')}`"
        raise UserError(f"method {name!r} {says}", change=f"give the path ({flag})" if needed else f"leave {flag} out")


def load_bases(method: MethodSettings, name: str, path: Path | None, model: Path) -> NullSpaceBases | None:
    """The bases of the file `path`, checked against the model folder; None for a method without constraint.

    Raises:
        UserError: bases missing or not asked for, or made for another model or tokenizer.
    """
    check_given(name, "bases", path, method.constraint.needs_bases)
    if path is None:
        return None
    bases = NullSpaceBases.load(path)
    bases.check_folder(model)
    return bases


def prepare_layers(policy: PreTrainedModel, method: MethodSettings, layers: str, bases: NullSpaceBases | None) -> None:
    """Make trainable what the method trains, freeze the rest.

    That is the weights of the linear layers in the blocks whose full name matches `layers`, the same in every method;
    under the constraint `mlp`, everything but the biases of MLP layers.

    Raises:
        UserError: when the bases cover other layers than `layers` matches.
    """
    matching = {layer for site in find_sites(policy, layers) for layer in site.layers}
    if bases is not None and (differing := set(bases.layers) ^ matching):
        raise UserError(
            f"the bases cover {len(bases.layers)} layers, `activations.layers` {layers!r} matches {len(matching)} "
            f"(first difference {min(differing)})",
            expected="the same ones",
            change="change `activations.layers`",
        )
    policy.requires_grad_(isinstance(method.constraint, MLPOnly))
    for name in matching:
        module = policy.get_submodule(name)
        module.get_parameter("weight").requires_grad_(True)
        if MLP in name and isinstance(module.bias, nn.Parameter):
            module.bias.requires_grad_(False)


def constraint_of(
    method: MethodSettings, seed: int, bases: NullSpaceBases | None, policy: PreTrainedModel, base: Path
) -> LoggedConstraint | None:
    """The constraint of the method on `policy`, anchored at the folder `base`; None for a method without one.

    Raises:
        UserError: when `mlp` finds no MLP layer in the bases.
    """
    if bases is None:
        return None
    match method.constraint:
        case Exact(mode=mode):
            return LoggedConstraint(policy, bases, anchor=base, mode=mode)
        case GradientOnly():
            return LoggedConstraint(policy, bases, anchor=base, mode="gradient")
        case RandomDirections(mode=mode):
            return LoggedConstraint(policy, random_like(bases, seed), anchor=base, mode=mode)
        case MLPOnly(mode=mode):
            return LoggedConstraint(policy, only_layers(bases, MLP), anchor=base, mode=mode, freeze_rest=False)
    raise AssertionError(method.constraint)
