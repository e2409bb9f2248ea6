"""What the constraint is worth on a saved model: how much of each layer's answer to general inputs an update changed.

For a layer with base weight W and update dW (both out x d), protected range Q and validation general inputs K_h,

    leakage_basis   = ||dW Q||_F / ||W Q||_F         what the constraint promises: zero up to rounding
    leakage_validation = ||dW K_h||_F / ||W K_h||_F     what a general prompt it never saw still feels
                    = sqrt(tr(dW G dW^T) / tr(W G W^T)),  G = K_h K_h^T / N, per domain, in float64

and, for scale, the same of a random update R as large as dW, in closed form and not sampled: with independent entries
the expectation of ||R K_h||^2 is N ||dW||^2 tr(G) / d, and of ||R Q||^2 ||dW||^2 r / d; their roots are taken. The
statement is exact for a layer given its input, and first order for the whole network, whose later layers see changed
inputs: drift on real prompts is measured by the evaluation.

Any two checkpoints of one architecture can be compared, trained by nspo or not. They are read in slices of rows, and
one Gram at a time, so that a 70B pair with validation activations fits in 24 GB of memory: what is largest there is G
and one product A^T A of a down projection, 28672 x 28672 float64 (6.6 GB) each. Measured by `performance/verify.py`.
Command: `nspo verify --base A --tuned B --bases FILE [--activations DIR]`.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nspo.activations.store import HARMFUL, ActivationStore
from nspo.bases.file import NullSpaceBases
from nspo.certify.checkpoints import CheckpointPair
from nspo.errors import UserError
from nspo.files.journal import JsonLines
from nspo.files.manifest import check_made_with, fingerprint, make_manifest
from nspo.models.loading import load_config, model_identity
from nspo.models.structure.coverage import block_weights, coverage, inputs_beside_text
from nspo.nullspace.basis import SiteBasis
from nspo.nullspace.moments import add_second_moment
from nspo.nullspace.projection import protected_part
from nspo.run.progress import say, track

PRODUCT_BYTES = 7e9  # of A^T A in memory at a time: one at width 28672, all of a site's at 8192
BLOCK = 256  # rows of G and A^T A multiplied at a time
Slices = Callable[[], Iterator[tuple[Tensor, Tensor]]]  # starts over W and dW, (n, d) float32 rows at a time


@dataclass(frozen=True)
class Answers:
    """What a layer answers to N validation inputs of second moment G = K_h K_h^T / N.

    Attributes:
        tokens: N.
        trace: tr(G).
        weight, update: tr(W G W^T) and tr(dW G dW^T).
    """

    tokens: int
    trace: float
    weight: float
    update: float

    @property
    def change(self) -> float:
        """||dW K_h|| / ||W K_h||."""
        return _ratio(math.sqrt(self.update), math.sqrt(self.weight))


def verify(
    base: Path | str,
    tuned: Path | str,
    bases: NullSpaceBases | Path | str,
    store: ActivationStore | None = None,
    workdir: Path | None = None,
) -> dict[str, Any]:
    """Compare two model folders layer by layer; shows progress.

    Args:
        base: folder with safetensors weights, sharded or not.
        tuned: another, of the same architecture.
        bases: computed on `base`, or their file.
        store: activations of `base`, for validation inputs; without it the figures on validation inputs are left out.
        workdir: folder in which the layers that are done are kept until all are, so that an interrupted call goes on.

    Returns:
        JSON-like: identities; `never_loaded`, stored tensors that no class here loads; `layers`, {layer: site, tensor
        (the parameter it lies in), leakage_basis, leakage_validation {domain and "all": value}, update_norm,
        relative_update, random_basis, random_equal_norm (on all validation inputs), harmful (the change on harmful
        inputs, where it is meant to be)}; `unconstrained`, {tensor: update_norm, relative_update} of every other tensor
        that changed; `coverage` of the blocks, and what the model reads beside text; `summary`.

    Raises:
        UserError: another architecture, tensors that differ in name or shape, weights that are not finite, or bases or
            activations of a model with other weights or another tokenizer.

    Example:
        >>> certificate = verify("base", "tuned", "bases.safetensors")
        >>> max(layer["leakage_basis"] for layer in certificate["layers"].values()) < 1e-6
        True
    """
    base, tuned = Path(base), Path(tuned)
    bases = bases if isinstance(bases, NullSpaceBases) else NullSpaceBases.load(bases)
    pair = CheckpointPair(base, tuned)
    places = pair.places(bases.layers)
    if lacking := [place.key for place in places.values() if place.key not in pair.names]:
        raise UserError(f"the models have no tensor {lacking[0]}, the bases expect it: use the bases of this model")
    found = model_identity(base)
    _check_made_with(bases.manifest, "bases", found, base)
    if store is not None:
        _check_made_with(store.manifest, "activations", found, base)
    layers: dict[str, dict[str, Any]] = {}
    unconstrained: dict[str, dict[str, float]] = {}
    after = model_identity(tuned)
    kept = _Kept(workdir, [found, after, bases.manifest, store and store.manifest])
    keys = {place.key for place in places.values()}
    with track("certificate", len(places) + len(set(pair.names) - keys), "tensor") as bar:
        for site in bases.values():
            if known := kept.sites.get(site.site):
                layers |= known
                bar.update(len(known))
                continue
            weights = {layer: partial(pair.slices, places[layer].key, places[layer]) for layer in site.layers}
            validation = (
                validation_answers(list(weights.values()), site, store) if store is not None else [{}] * len(weights)
            )
            for (layer, slices), answers in zip(weights.items(), validation, strict=True):
                layers[layer] = {"tensor": places[layer].key, **layer_report(slices, site, answers)}
                bar.update(1)
            kept.add(site.site, {layer: layers[layer] for layer in weights})
        for name in pair.names:
            if name not in keys:
                sizes = _sizes(*_norms(pair.slices(name)))
                if sizes["update_norm"]:
                    unconstrained[name] = sizes
                bar.update(1)
    moving = sum(place.size for layer, place in places.items() if bases.for_layer(layer).null_dim)
    covered = coverage(block_weights(pair.sizes(), places), moving, unconstrained)
    protected = (bases.manifest.get("blocks") or {}).get("protected_inputs", ())
    kept.remove()
    return make_manifest(
        "certificate",
        base=found,
        tuned=after,
        bases=fingerprint(bases.manifest),
        never_loaded=pair.ignored,
        layers=layers,
        unconstrained=unconstrained,
        coverage={**covered, **inputs_beside_text(pair.other_inputs(), protected)},
        summary=_summary(layers, unconstrained),
    )


class _Kept:
    """The layers of finished sites in a file, where there is a folder for it."""

    def __init__(self, workdir: Path | None, identity: Any) -> None:
        self.sites: dict[str, dict[str, Any]] = {}
        self.file = None
        if workdir is not None:
            workdir.mkdir(parents=True, exist_ok=True)
            self.file = JsonLines(workdir / f"certificate-{fingerprint(identity)}.jsonl")
            self.sites = {row["site"]: row["layers"] for row in self.file.rows()}
        if self.sites:
            say(f"certificate: continuing after {len(self.sites)} sites")

    def add(self, site: str, layers: dict[str, Any]) -> None:
        """Keep a finished site."""
        if self.file is not None:
            self.file.append([{"site": site, "layers": layers}])

    def remove(self) -> None:
        """Everything is done: nothing is left behind."""
        if self.file is not None:
            self.file.path.unlink(missing_ok=True)


def layer_report(slices: Slices, site: SiteBasis, validation: Mapping[str, Answers]) -> dict[str, Any]:
    """The figures of one layer (see the module and `verify`).

    Args:
        slices: W and dW.
        site: the basis of the layer's input.
        validation: the layer's answers by domain; may be empty. "harmful" is no part of "all".
    """
    protected = partial(protected_part, basis=site.basis, kind=site.kind)
    weight, update, base, leaked = _norms((w, d, protected(w), protected(d)) for w, d in slices())
    report = {
        "site": site.site,
        **_sizes(weight, update),
        "leakage_basis": _ratio(leaked, base),
        "random_basis": _ratio(update * math.sqrt(site.rank / site.width), base),
        "leakage_validation": {},
    }
    if not validation:
        return report
    seen = {domain: answers for domain, answers in validation.items() if answers.tokens}  # an expert may have seen none
    general = {domain: answers for domain, answers in seen.items() if domain != HARMFUL}
    if HARMFUL in seen:
        report["harmful"] = seen[HARMFUL].change
    if not general:
        return report
    pooled = _pool(general.values())
    report["leakage_validation"] = {**{name: answers.change for name, answers in general.items()}, "all": pooled.change}
    random = update * math.sqrt(pooled.trace / site.width)
    report["random_equal_norm"] = _ratio(random, math.sqrt(pooled.weight))
    return report


def validation_answers(layers: Sequence[Slices], site: SiteBasis, store: ActivationStore) -> list[dict[str, Answers]]:
    """What each of a site's `layers` answers to its validation inputs, by domain.

    tr(A G A^T) = <A^T A, G>: one product per matrix serves every domain, and one Gram every product in memory.
    """
    at_once = max(1, int(PRODUCT_BYTES / (8 * site.width**2)))
    matrices = [(slices, part) for slices in layers for part in (0, 1)]  # W and dW of every layer
    moments: dict[str, tuple[int, float]] = {}
    energies: dict[str, list[float]] = {domain: [] for domain in store.domains("validation")}
    for start in range(0, len(matrices), at_once):
        products = [_product(slices, part, site.width) for slices, part in matrices[start : start + at_once]]
        for domain, values in energies.items():
            gram, tokens = store.gram(site.site, "validation", [domain])
            moments[domain] = tokens, float(gram.trace())
            values += [max(_inner(product, gram), 0.0) for product in products]  # below zero only by rounding
            del gram  # before the next is read
        products.clear()
    return [
        {domain: Answers(*moments[domain], *values[i : i + 2]) for domain, values in energies.items()}
        for i in range(0, len(matrices), 2)
    ]


def _product(slices: Slices, part: int, width: int) -> Tensor:
    """A^T A on and above the diagonal, zero below: (width, width) float64; A is W (`part` 0) or dW (1)."""
    total = torch.zeros(width, width, dtype=torch.float64)
    for pair in slices():
        add_second_moment(total, pair[part].double().contiguous())
    return total.triu_()


def _inner(upper: Tensor, gram: Tensor) -> float:
    """<A^T A, G> of two symmetric matrices, the first given by its upper triangle."""
    blocks = zip(upper.split(BLOCK), gram.split(BLOCK), strict=True)
    return 2 * sum(float((a * b).sum()) for a, b in blocks) - float(upper.diagonal() @ gram.diagonal())


def _pool(answers: Iterable[Answers]) -> Answers:
    """All inputs of several domains as one: every token counts the same."""
    several = list(answers)
    tokens = sum(one.tokens for one in several)
    trace, weight, update = (
        sum(one.tokens * getattr(one, key) for one in several) / tokens for key in ("trace", "weight", "update")
    )
    return Answers(tokens, trace, weight, update)


def _norms(slices: Iterable[Sequence[Tensor]]) -> list[float]:
    """Frobenius norms of matrices whose slices of rows come side by side, summed in float64."""
    squares = [[float(part.double().square().sum()) for part in parts] for parts in slices]
    return [math.sqrt(sum(column)) for column in zip(*squares, strict=True)]


def _sizes(weight: float, update: float) -> dict[str, float]:
    return {"update_norm": update, "relative_update": _ratio(update, weight)}


def _ratio(part: float, whole: float) -> float:
    """part / whole, where 0 / 0 is 0: nothing of nothing has changed."""
    if part == 0:
        return 0.0
    if whole == 0:
        raise UserError(
            "a weight or its part in the protected range is zero in the base model: no relative change exists"
        )
    return part / whole


def _summary(layers: Mapping[str, Any], unconstrained: Mapping[str, Any]) -> dict[str, Any]:
    """Worst layer, mean over layers, and the share of the norm of all change that lies outside the layers."""
    series = {
        "leakage_basis": {name: row["leakage_basis"] for name, row in layers.items()},
        "leakage_validation": {name: row["leakage_validation"].get("all") for name, row in layers.items()},
        "random_basis": {name: row["random_basis"] for name, row in layers.items()},
        "random_equal_norm": {name: row.get("random_equal_norm") for name, row in layers.items()},
        "harmful": {name: row.get("harmful") for name, row in layers.items()},
        "relative_update": {name: row["relative_update"] for name, row in layers.items()},
    }
    summary: dict[str, Any] = {}
    for key, found in series.items():
        if values := {name: value for name, value in found.items() if value is not None}:
            worst = max(values, key=values.__getitem__)
            summary[key] = {"max": values[worst], "mean": sum(values.values()) / len(values), "worst_layer": worst}
    inside, outside = (
        math.sqrt(sum(row["update_norm"] ** 2 for row in rows.values())) for rows in (layers, unconstrained)
    )
    summary["update_norm"] = math.hypot(inside, outside)
    summary["unprotected_share"] = _ratio(outside, summary["update_norm"])
    return summary


def _check_made_with(manifest: Mapping[str, Any], kind: str, found: Mapping[str, Any], folder: Path) -> None:
    """Refuse an artifact of another model than the one in `folder`, naming what differs."""
    made_with = {"weights": None, **(manifest.get("model") or {})}
    if made_with.get("architecture") in (load_config(folder, f"{folder}").architectures or ()):
        made_with["architecture"] = found["architecture"]  # an older file has what config.json says
    expected = {part: found[part] for part in ("architecture", "weights", "tokenizer") if part in made_with}
    check_made_with(made_with, expected, f"{kind} for the base {folder}", f"use the {kind} of this base model")
