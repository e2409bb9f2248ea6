"""What the constraint is worth on a saved model: how much of each layer's answer to general inputs an update changed.

For a layer with base weight W and update dW (both out x d), protected range Q and held-out general inputs K_h,

    leakage_basis   = ||dW Q||_F / ||W Q||_F         what the constraint promises: zero up to rounding
    leakage_heldout = ||dW K_h||_F / ||W K_h||_F     what a general prompt it never saw still feels
                    = sqrt(tr(dW G dW^T) / tr(W G W^T)),  G = K_h K_h^T / N, per domain, in float64

and, for scale, the same of a random update R as large as dW, in closed form and not sampled: with independent entries
the expectation of ||R K_h||^2 is N ||dW||^2 tr(G) / d, and of ||R Q||^2 ||dW||^2 r / d; their roots are taken. The
statement is exact for a layer given its input, and first order for the whole network, whose later layers see changed
inputs: drift on real prompts is measured by the evaluation. (The authors' release measures neither.)

Any two checkpoints of one architecture can be compared, trained by nspo or not: safetensors files are read tensor by
tensor, so two models never lie in memory. Command: `nspo verify --base A --tuned B --bases FILE [--activations DIR]`.
"""

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from nspo.activation_store import HARMFUL, ActivationStore
from nspo.artifacts import fingerprint, fingerprint_model, make_manifest, write_json
from nspo.bases import NullSpaceBases, SiteBasis
from nspo.errors import UserError
from nspo.linears import is_transposed
from nspo.progress import track
from nspo.projection import protected_part

INDEX = "model.safetensors.index.json"


def write_certificate(
    out: Path, base: Path, tuned: Path, bases: NullSpaceBases, store: ActivationStore | None = None, **facts: Any
) -> dict[str, Any]:
    """Certify `tuned`, add `facts` (such as `method` and `constrained`), write it to `out` as JSON, and return it.

    Raises:
        UserError: as `certify`.
    """
    certificate = {**certify(base, tuned, bases, store), **facts}
    write_json(out, certificate)
    return certificate


def certify(base: Path, tuned: Path, bases: NullSpaceBases, store: ActivationStore | None = None) -> dict[str, Any]:
    """Compare two model folders layer by layer; shows progress.

    Args:
        base, tuned: folders with safetensors weights, sharded or not.
        bases: computed on `base`.
        store: activations of `base`, for held-out inputs; without it the figures on held-out inputs are left out.

    Returns:
        JSON-like: identities; `layers`, {layer: site, leakage_basis, leakage_heldout {domain and "all": value},
        update_norm, relative_update, random_basis, random_equal_norm (on all held-out inputs), harmful (the change on
        harmful inputs, where it is meant to be)}; `unconstrained`, {tensor: update_norm, relative_update} of every
        other tensor that changed; `summary`.

    Raises:
        UserError: tensors that differ in name or shape, weights that are not finite, or bases or activations of
            another model.
    """
    identities = {"base": fingerprint_model(base), "tuned": fingerprint_model(tuned)}
    _check_model_of(bases.manifest, "bases", identities["base"], base)
    if store is not None:
        _check_model_of(store.manifest, "activations", identities["base"], base)
    layers: dict[str, dict[str, Any]] = {}
    unconstrained: dict[str, dict[str, float]] = {}
    with _Weights.open(base) as before, _Weights.open(tuned) as after:
        names = _common_tensors(before, after, bases, base)
        transposed = _transposed_layers(base)
        covered = {f"{layer}.weight" for layer in bases.layers}
        with track("certificate", len(names), "tensor") as bar:
            for site in bases.values():
                moments = heldout_moments(store, site.site)
                for layer in site.layers:
                    weight, update = _weight_and_update(before, after, f"{layer}.weight")
                    if layer in transposed:
                        weight, update = weight.T, update.T
                    layers[layer] = layer_report(weight, update, site, moments)
                    bar.update(1)
            for name in names:
                if name not in covered:
                    weight, update = _weight_and_update(before, after, name)
                    if update.any():
                        unconstrained[name] = _sizes(weight, update)
                    bar.update(1)
    return make_manifest(
        "certificate",
        **identities,
        bases=fingerprint(bases.manifest),
        layers=layers,
        unconstrained=unconstrained,
        summary=_summary(layers, unconstrained),
    )


def layer_report(
    weight: Tensor, update: Tensor, site: SiteBasis, moments: Mapping[str, tuple[Tensor, int]]
) -> dict[str, Any]:
    """The figures of one layer (see the module and `certify`).

    Args:
        weight, update: W and dW, (out, d) float32.
        site: the basis of the layer's input.
        moments: {domain: (G (d, d) float64, tokens)} of held-out inputs; may be empty. "harmful" is no part of "all".
    """
    sizes = _sizes(weight, update)
    base = float(protected_part(weight, site.basis, site.kind).double().norm())
    leaked = float(protected_part(update, site.basis, site.kind).double().norm())
    report = {
        "site": site.site,
        **sizes,
        "leakage_basis": _ratio(leaked, base),
        "random_basis": _ratio(sizes["update_norm"] * math.sqrt(site.rank / site.width), base),
        "leakage_heldout": {},
    }
    if not moments:
        return report
    # tr(A G A^T) = <A^T A, G>: one product per matrix serves every domain.
    inner_weight, inner_update = (matrix.double().T @ matrix.double() for matrix in (weight, update))
    changes = {domain: _change(inner_update, inner_weight, gram) for domain, (gram, _) in moments.items()}
    if HARMFUL in changes:
        report["harmful"] = changes.pop(HARMFUL)
    tokens = sum(moments[domain][1] for domain in changes)
    pooled = torch.stack([moments[domain][0] * (moments[domain][1] / tokens) for domain in changes]).sum(0)
    report["leakage_heldout"] = {**changes, "all": _change(inner_update, inner_weight, pooled)}
    random = sizes["update_norm"] * math.sqrt(float(pooled.trace()) / site.width)
    report["random_equal_norm"] = _ratio(random, _root(inner_weight, pooled))
    return report


def heldout_moments(store: ActivationStore | None, site: str) -> dict[str, tuple[Tensor, int]]:
    """{domain: (G = K_h K_h^T / N (d, d) float64, N)} of a site's held-out inputs; empty without a store."""
    if store is None:
        return {}
    found = {domain: store.gram(site, "heldout", [domain]) for domain in store.domains("heldout")}
    return {domain: (gram.double(), tokens) for domain, (gram, tokens) in found.items()}


def _change(inner_update: Tensor, inner_weight: Tensor, gram: Tensor) -> float:
    return _ratio(_root(inner_update, gram), _root(inner_weight, gram))


def _root(inner: Tensor, gram: Tensor) -> float:
    return math.sqrt(max(float((inner * gram).sum()), 0.0))  # a sum of squares is negative only by rounding


def _sizes(weight: Tensor, update: Tensor) -> dict[str, float]:
    norm = float(update.double().norm())
    return {"update_norm": norm, "relative_update": _ratio(norm, float(weight.double().norm()))}


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
        "leakage_heldout": {name: row["leakage_heldout"].get("all") for name, row in layers.items()},
        "random_basis": {name: row["random_basis"] for name, row in layers.items()},
        "random_equal_norm": {name: row.get("random_equal_norm") for name, row in layers.items()},
        "harmful": {name: row.get("harmful") for name, row in layers.items()},
        "relative_update": {name: row["relative_update"] for name, row in layers.items()},
    }
    summary: dict[str, Any] = {}
    for key, values in series.items():
        if None not in values.values():
            worst = max(values, key=values.__getitem__)
            summary[key] = {"max": values[worst], "mean": sum(values.values()) / len(values), "worst_layer": worst}
    inside, outside = (
        math.sqrt(sum(row["update_norm"] ** 2 for row in rows.values())) for rows in (layers, unconstrained)
    )
    summary["update_norm"] = math.hypot(inside, outside)
    summary["unprotected_share"] = _ratio(outside, summary["update_norm"])
    return summary


# ------------------------------------------------------------------------------------------- reading two checkpoints


class _Weights:
    """The tensors of a model folder by name, each read when asked for."""

    def __init__(self, files: Mapping[str, Any]) -> None:
        self._files = files  # tensor name -> open file

    @classmethod
    @contextmanager
    def open(cls, folder: Path) -> Iterator["_Weights"]:
        """All safetensors of the folder, or those that its index names.

        Raises:
            UserError: when a tensor or a file that the index names is missing.
        """
        index = folder / INDEX
        listed = json.loads(index.read_text())["weight_map"] if index.is_file() else None
        with ExitStack() as stack:
            files: dict[str, Any] = {}
            for path in (
                [folder / n for n in sorted(set(listed.values()))] if listed else sorted(folder.glob("*.safetensors"))
            ):
                if not path.is_file():
                    raise UserError(f"{path} does not exist, {INDEX} expects it: copy the whole checkpoint")
                file = stack.enter_context(safe_open(path, framework="pt"))
                files.update(dict.fromkeys(file.keys(), file))
            if missing := sorted(set(listed or ()) - files.keys()):
                raise UserError(
                    f"{folder} lacks the tensor {missing[0]}, {INDEX} expects it: copy the whole checkpoint"
                )
            yield cls(files)

    def names(self) -> set[str]:
        return set(self._files)

    def shape(self, name: str) -> list[int]:
        return self._files[name].get_slice(name).get_shape()

    def __getitem__(self, name: str) -> Tensor:
        return self._files[name].get_tensor(name)


def _weight_and_update(before: _Weights, after: _Weights, name: str) -> tuple[Tensor, Tensor]:
    """W and dW in float32; the difference is taken before anything else, so equal weights give exact zeros."""
    weight, tuned = before[name].float(), after[name].float()
    for side, tensor in (("base", weight), ("tuned", tuned)):
        if not torch.isfinite(tensor).all():
            raise UserError(f"tensor {name} of the {side} model holds NaN or Inf, expected finite weights: train again")
    return weight, tuned - weight


def _common_tensors(before: _Weights, after: _Weights, bases: NullSpaceBases, base: Path) -> list[str]:
    """Sorted names of the tensors of both models, which must agree in name and shape.

    A tied head may be stored or not: it is the embedding again, so one that only one side stores is left out.
    """
    config = AutoConfig.from_pretrained(base).get_text_config()
    differing = before.names() ^ after.names()
    if config.tie_word_embeddings:
        differing -= {name for name in differing if name.endswith("lm_head.weight")}
    if differing:
        name = min(differing)
        side = "base" if name in before.names() else "tuned"
        raise UserError(
            f"{len(differing)} tensors are in one model only, first {name} (in the {side} model): expected two "
            "checkpoints of one architecture (merge adapters first)"
        )
    names = sorted(before.names() & after.names())
    for name in names:
        if before.shape(name) != after.shape(name):
            raise UserError(
                f"tensor {name} is {before.shape(name)} in the base model and {after.shape(name)} in the tuned one: "
                "expected two checkpoints of one architecture"
            )
    if lacking := [layer for layer in bases.layers if f"{layer}.weight" not in names]:
        raise UserError(
            f"the models have no tensor {lacking[0]}.weight, the bases expect it: use the bases of this model"
        )
    return names


def _transposed_layers(folder: Path) -> set[str]:
    """Names of the modules that store their weight as (input, output); no weight is loaded."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    return {name for name, module in model.named_modules() if is_transposed(module)}


def _check_model_of(manifest: Mapping[str, Any], kind: str, found: Mapping[str, str], folder: Path) -> None:
    """Refuse an artifact that was made with other weights than those of `folder`."""
    made_with = (manifest.get("model") or {}).get("weights")
    if made_with != found["weights"]:
        raise UserError(
            f"the {kind} were made for weights {made_with}, the base {folder} has {found['weights']}: use the {kind} "
            "of this base model"
        )
