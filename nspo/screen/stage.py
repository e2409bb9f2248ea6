"""Choose the space, the mode and the batch before training: what a first step costs in drift for what it gains.

One sample of the base model's answers gives GRPO's gradient over the first n of them. Every candidate (rule, threshold,
mode) makes of it the step that Adam would take; no constraint (Adam, and plain gradient descent) and random directions
stand beside them. All steps are scaled to the same gain to first order, taken from validation prompts; then both are
measured by running the model: the gain on those answers, and the KL from the base on general validation prompts. KL
grows with the square of a step, so KL / gain^2 compares steps of any length: lower is better. No policy is trained.

A first step says nothing of later ones, where Adam's second moment is an average, nor of how far a space lets a policy
go; if two candidates are close, train with both.

Command: `nspo screen --model results/model --activations results/activations ... --out results/screen`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from nspo.activations.store import HARMFUL, ActivationStore
from nspo.bases.derived import random_like
from nspo.bases.file import NullSpaceBases
from nspo.bases.stage import compute_basis
from nspo.data.tables import Prompts
from nspo.errors import UserError
from nspo.files.atomic import atomic_path
from nspo.files.manifest import MANIFEST_NAME, fingerprint, fingerprint_files, make_manifest, read_json, write_json
from nspo.models.drift import Remembered, drift, token_weights
from nspo.models.generation import generate
from nspo.models.loading import load_model, load_tokenizer, model_identity
from nspo.models.structure.linears import Weight, find_weights
from nspo.models.structure.positions import fitting
from nspo.policy.rollouts.prompts import rollout_prompts
from nspo.preference.model import PreferenceModel
from nspo.run.devices import device_of
from nspo.run.progress import say, track
from nspo.run.tables import table
from nspo.screen.rollout import Rollout
from nspo.screen.steps import Candidate, cost_of_gain, dot, first_step
from nspo.settings.bases import ScreenSettings, SelectionSettings
from nspo.settings.policy.section import RolloutSettings
from nspo.settings.runtime import RuntimeSettings

SEED = 0
FIRST_TOKENS = 4
BATCH = 32
COLUMNS = ("space", "mode", "answers", "free", "gain", "gain_error", "kl_per_token", "kl_first_tokens", "cost")


def screen(
    settings: ScreenSettings,
    rollouts: RolloutSettings,
    model: Path,
    activations: Path,
    reward: Path,
    cost: Path,
    prompts: Path,
    out: Path,
    runtime: RuntimeSettings,
) -> None:
    """Write the folder `out`: `screen.json` and `screen.csv`, a row for every candidate and batch, lowest cost first.

    Args:
        rollouts: how answers are sampled and what they earn, as in training.

    Raises:
        UserError: a rule whose inputs the store does not hold, a batch of no whole groups, or answers that all earn
            the same, so that there is no gradient.
    """
    for count in settings.answers:
        if count % rollouts.group_size:
            raise UserError(
                f"screen.answers has {count}",
                expected=f"multiples of policy.group_size ({rollouts.group_size})",
                change="mend it",
            )
    store = ActivationStore(activations)
    identity = {
        "model": model_identity(model),
        "activations": fingerprint(store.manifest),
        "reward": read_json(reward / MANIFEST_NAME)["model"],
        "cost": read_json(cost / MANIFEST_NAME)["model"],
        "prompts": fingerprint_files([prompts]),
        "settings": settings.dump(),
        "rollouts": rollouts.dump(),
    }
    set_seed(SEED)
    device = device_of(runtime.device)
    tokenizer, network, prompt_table = load_tokenizer(model), load_model(model, device), Prompts(prompts)
    models = PreferenceModel.load(cost, "cost", device), PreferenceModel.load(reward, "reward", device)
    steps = -(-max(settings.answers) // (rollouts.group_size * rollouts.prompts_per_step))
    asked = rollout_prompts(rollouts.model_copy(update={"steps": steps}), prompt_table, tokenizer, network.config, SEED)
    train = [{"prompt": row["prompt"][-1]["content"], "role": row["role"]} for row in asked.to_list()]
    train = train[: max(settings.answers) // rollouts.group_size]
    learnt = Rollout.sample(network, tokenizer, train, *models, rollouts, "answers to learn from")
    size = rollouts.max_new_tokens, "screen", "policy.max_new_tokens"
    held = fitting(validation(settings, rollouts, prompt_table), tokenizer, network.config, *size)
    judged = Rollout.sample(network, tokenizer, held.rows, *models, rollouts, "answers")
    names = [name for site in store.sites.values() for name in site.layers]
    meter = Meter.load(settings, network, tokenizer, judged, prompt_table, rollouts.max_new_tokens, names)
    spaces = spaces_of(settings, store)
    rows = []
    for count, gradient in learnt.gradients(network, meter.layers, settings.answers):
        if not any(value.any() for value in gradient.values()):
            raise UserError(
                f"the first {count} answers of the screen all earn the same in their groups: raise screen.answers"
            )
        found = [meter.measure(candidate, gradient) for candidate in candidates(settings, spaces)]
        rows += [{"answers": count, **row} for row in found]
    rows.sort(key=lambda row: (row["answers"], row["cost"] is None, row["cost"]))
    say(table([{key: row[key] for key in COLUMNS} for row in rows]))
    with atomic_path(out) as folder:
        folder.mkdir()
        write_json(folder / "screen.json", make_manifest("screen", **identity, rows=rows))
        lines = [",".join(COLUMNS), *(",".join(_cell(row[key]) for key in COLUMNS) for row in rows)]
        (folder / "screen.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")


def validation(settings: ScreenSettings, rollouts: RolloutSettings, prompts: Prompts) -> list[dict[str, Any]]:
    """Validation prompts on which the gain is measured, as many of them benign as in training."""
    benign = round(settings.gain_prompts * rollouts.benign_share)
    counts = {"harmful": settings.gain_prompts - benign, "benign": benign}
    return [
        {"prompt": row["prompt"], "role": role}
        for role, count in counts.items()
        for row in (prompts.of(role, "validation", limit=count) if count else [])
    ]


def spaces_of(settings: ScreenSettings, store: ActivationStore) -> dict[str, NullSpaceBases]:
    """Bases by every rule, and random ones with the first rule's ranks. The store is read once per site."""
    made: dict[str, list[Any]] = {name: [] for name in settings.rules}
    validation = [domain for domain in store.domains("validation") if domain != HARMFUL]
    with track("bases of the screen", len(store.sites), "site") as bar:
        for site in store.sites.values():
            held = store.gram(site.name, "validation", validation)[0] if validation else None
            harmful = store.gram(site.name, "basis", [HARMFUL])[0] if HARMFUL in store.domains("basis") else None
            for name, rule in settings.rules.items():
                gram, tokens = store.gram(site.name, "basis", *_weighed(rule, store))
                made[name].append(
                    compute_basis(site.name, site.layers, gram, tokens, rule.rule, rule.threshold, held, harmful)
                )
            bar.update(1)
    norms = store.manifest["layer_norms"]
    found = {name: NullSpaceBases(sites, norms) for name, sites in made.items()}
    return found | {"random": random_like(next(iter(found.values())), SEED)}


def _weighed(rule: SelectionSettings, store: ActivationStore) -> tuple[list[str], dict[str, float]]:
    """The protected domains that count for a rule, and their weights."""
    known = [domain for domain in store.domains("basis") if domain != HARMFUL]
    if unknown := sorted(rule.weights.keys() - set(known)):
        raise UserError(
            f"screen.rules names the domain {unknown[0]!r}", expected=f"some of {', '.join(known)}", change="mend it"
        )
    weights = {domain: rule.weights.get(domain, 1.0) for domain in known}
    return [domain for domain in known if weights[domain]], {d: w for d, w in weights.items() if w}


def candidates(settings: ScreenSettings, spaces: Mapping[str, NullSpaceBases]) -> list[Candidate]:
    """No constraint, and every space in every mode; random directions in the first mode."""
    found = [Candidate("none", "sign", {}), Candidate("none", "plain", {})]
    for name, bases in spaces.items():
        sites = {layer: bases.for_layer(layer) for layer in bases.layers}
        modes: Sequence[str] = settings.modes[:1] if name == "random" else settings.modes
        found += [Candidate(name, mode, sites) for mode in modes]
    return found


class Meter:
    """Takes a step, measures gain and drift, and takes it back."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        layers: Mapping[str, Weight],
        judged: Rollout,
        general: tuple[list[list[int]], list[list[int]]],
        step: float,
    ) -> None:
        self.model, self.tokenizer, self.layers, self.judged, self.general = model, tokenizer, layers, judged, general
        self.base = Remembered(model)
        self.rows = {name: weight.rows(weight.parameter.detach()) for name, weight in layers.items()}
        self.anchors = {name: rows.clone() for name, rows in self.rows.items()}
        self.known = judged.known(model)
        ((_, gradient),) = judged.gradients(model, layers, [len(judged.rows)])
        self.uphill = {name: -value for name, value in gradient.items()}  # of the gain
        self.step, self.wanted = step, 0.0
        self._drift()  # while the model is the base

    @classmethod
    def load(
        cls,
        settings: ScreenSettings,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        judged: Rollout,
        prompts: Prompts,
        max_new_tokens: int,
        names: Sequence[str],
    ) -> "Meter":
        """Let the base model answer the general validation prompts; `names`: the layers that step."""
        rows = prompts.of_each_domain("general", "validation", settings.general_prompts)
        ids = fitting(rows, tokenizer, model.config, max_new_tokens, "screen", "policy.max_new_tokens").ids
        answers = dict(generate(model, tokenizer, ids, max_new_tokens, BATCH, "base answers to general prompts"))
        general = ids, [answers[i] for i in range(len(ids))]
        model.requires_grad_(False)
        layers = find_weights(model, names)
        for weight in layers.values():
            weight.parameter.requires_grad_(True)
        return cls(model, tokenizer, layers, judged, general, settings.step)

    @torch.no_grad()
    def measure(self, candidate: Candidate, gradient: Mapping[str, Tensor]) -> dict[str, Any]:
        """The row of a candidate. The first that is asked, no constraint, sets the gain that all are scaled to."""
        moves = {name: -first_step(candidate, name, gradient[name]) for name in self.layers}
        slope = dot(self.uphill, moves)
        if candidate.name == "none, sign":
            self.wanted = abs(self.step * slope)  # also where it loses: a size that suits the model
        row: dict[str, Any] = {"space": candidate.space, "mode": candidate.mode, "free": free_share(candidate)}
        empty = dict.fromkeys(("scale", "gain", "gain_error", "kl_per_token", "kl_first_tokens", "cost"))
        if slope <= 0 or self.wanted == 0:
            return row | empty
        scale = self.wanted / slope
        for name, rows in self.rows.items():
            rows.add_(moves[name], alpha=scale)
        gain, error = self.judged.gain(self.model, self.known)
        kl, first = self._drift()
        for name, rows in self.rows.items():
            rows.copy_(self.anchors[name])
        row |= {"scale": scale, "gain": gain, "gain_error": error, "kl_per_token": kl, "kl_first_tokens": first}
        return row | {"cost": cost_of_gain(kl, gain)}

    def _drift(self) -> tuple[float, float]:
        """KL per token from the base, and that of the first answer tokens."""
        ids, answers = self.general
        moved = drift(self.base, self.model, self.tokenizer, ids, answers, FIRST_TOKENS, BATCH, "drift of a step")
        weights = token_weights([len(answer) for answer in answers], FIRST_TOKENS)
        kl, first = (
            sum(v * w for v, w in zip(moved[name], weights[name], strict=True)) / sum(weights[name])
            for name in ("kl_per_token", "kl_first_tokens")
        )
        return kl, first


def free_share(candidate: Candidate) -> float:
    """Free directions over all, on average over sites; 1 without constraint."""
    sites = {site.site: site for site in candidate.sites.values()}
    return sum(site.null_dim / site.width for site in sites.values()) / len(sites) if sites else 1.0


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)
