"""What a method makes of the model: which weights train, and how its constraint acts on them.

| constraint | what it does |
|---|---|
| none | nothing: the same with P = I |
| exact | keeps every layer of the bases to its null space |
| gradient | projects gradients only |
| random | as exact, on random directions, equally many of every input |
| mlp | as exact, on MLP layers; all else trains freely |
| after | nothing while it trains; what is saved is projected once (`nspo.policy.methods.adapters`) |
| lora | LoRA on every linear layer, merged where the policy is saved |
| adapter | LoRA that cannot leave the null space (`nspo.constraint.adapter`) |
| ogpsa | gradients lose what general tasks' gradients point along (`nspo.policy.methods.ogpsa`) |

`exact`, `random` and `mlp` project what the optimizer did (mode `anchor`) or its gradient too (`both`). `nspo_paper` is
the paper's text: gradients alone are projected, in the null space of general inputs by the rule `relative` 5e-4.

`random` asks whether it matters which directions are free, `gradient` what the paper's text guarantees: AdamW's moments
and decay carry the weights out of the null space, so nothing is verified and the leakage is logged.

Under `mlp` the biases of MLP layers are frozen, since no basis holds them; later layers' inputs drift all the same,
since attention, embeddings, norms and head are free. docs/release.md compares it with the authors' code.
"""

from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer

from nspo.bases.derived import only_layers, random_like
from nspo.bases.file import NullSpaceBases
from nspo.constraint.adapter import null_space_adapter
from nspo.data.tables import Prompts
from nspo.errors import UserError
from nspo.models.loading import load_model
from nspo.models.structure.linears import is_transposed
from nspo.models.structure.sites import find_sites
from nspo.policy.log import LoggedCallback, LoggedConstraint
from nspo.policy.methods.adapters import lora, merged, project_after
from nspo.policy.methods.ogpsa import OGPSA
from nspo.policy.methods.penalties import L2SP, ReplayKL
from nspo.policy.sharding import whole_weights
from nspo.run.progress import say
from nspo.settings.policy.constraints import (
    Exact,
    GeneralGradients,
    GradientOnly,
    LoRA,
    MLPOnly,
    NullSpaceAdapter,
    ProjectAfter,
    RandomDirections,
)
from nspo.settings.policy.losses import RolloutLoss
from nspo.settings.policy.methods import MethodSettings
from nspo.settings.policy.section import TrainingSettings

MLP = "mlp"  # in the names of MLP layers, as the release tells them


def load_bases(method: MethodSettings, name: str, path: Path | None, model: Path) -> NullSpaceBases | None:
    """The bases of the file `path`, checked against the model folder; None where there is none.

    Raises:
        UserError: when they were made for another model, tokenizer or method.
    """
    if path is None:
        return None
    bases = NullSpaceBases.load(path)
    own, made = method.own_bases, bases.manifest.get("settings")
    if own is not None and made != (wanted := own.model_dump()):
        raise UserError(
            f"{path} was made with {made}",
            expected=f"the bases of method {name!r}, {wanted}",
            change="compute them anew",
        )
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
    """The constraint of the method on `policy`, anchored at the folder `base`; None where none acts on every step.

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
    return None


def trained_part(method: MethodSettings, policy: PreTrainedModel, bases: NullSpaceBases | None) -> Any:
    """What the trainer is given: the policy itself, or the policy in the adapter that is trained in its place.

    Raises:
        UserError: PEFT is missing, or the rank is above the free directions.
    """
    match method.constraint:
        case LoRA(rank=rank, alpha=alpha):
            layers = [name for name, module in policy.named_modules() if _trains(module)]
            return lora(policy, layers, rank, alpha)
        case NullSpaceAdapter(rank=rank):
            assert bases is not None
            return null_space_adapter(policy, bases, rank)
    return policy


def pulls_of(
    method: MethodSettings,
    training: TrainingSettings,
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    base: Path,
    prompts: Prompts,
) -> list[LoggedCallback]:
    """Callbacks that change the gradient before each step: L2-SP, replay-KL, OGPSA; most methods have none."""
    found: list[LoggedCallback] = []
    loss, length = method.loss, training.max_new_tokens
    if isinstance(loss, RolloutLoss) and loss.l2_sp:
        found.append(L2SP(loss.l2_sp, base, policy))
    if isinstance(loss, RolloutLoss) and loss.replay_kl:
        reference, bf16 = load_model(base, policy.device), training.autocast == "bf16"
        asked = prompts, loss.replay_prompts, length
        found.append(ReplayKL(loss.replay_kl, reference, tokenizer, *asked, autocast=bf16))
    if isinstance(method.constraint, GeneralGradients):
        what = method.constraint
        found.append(OGPSA(what.refresh, load_model(base, policy.device), tokenizer, prompts, what.prompts, length))
    return found


def final_weights(
    trainer: Trainer, method: MethodSettings, policy: PreTrainedModel, bases: NullSpaceBases | None, base: Path
) -> dict[str, Tensor]:
    """The float32 weights to save: adapters merged, an update projected where that is done at the end.

    A collective if sharded.
    """
    match method.constraint:
        case LoRA():
            return merged(trainer.model, None)
        case NullSpaceAdapter():
            return merged(trainer.model, bases)
        case ProjectAfter():
            assert bases is not None
            say(f"projected after training: {project_after(policy, bases, base):.1%} of the update's norm is free")
    return whole_weights(trainer)


def _trains(module: nn.Module) -> Any:
    weight = getattr(module, "weight", None)
    return (isinstance(module, nn.Linear) or is_transposed(module)) and weight is not None and weight.requires_grad
