"""Null-space bases: one small orthonormal basis per site (`nspo.nullspace.basis`), and the file of them.

The file is safetensors: two tensors a site, and a manifest that says which model and data they are of. It can be shared
on the hub (`nspo.bases.hub`), and refuses a model that it was not computed on. Command: `nspo bases info FILE`.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nspo.errors import UserError
from nspo.files.manifest import check_made_with, fingerprint_model, make_manifest
from nspo.files.tensors import load_tensors, save_tensors
from nspo.models.structure.linears import Weight, canonical_name, find_weights, layer_norms
from nspo.nullspace.basis import Kind, SiteBasis, orthonormal

__all__ = ["Kind", "NullSpaceBases", "SiteBasis"]

NORM_TOLERANCE = 0.01


class NullSpaceBases(Mapping[str, SiteBasis]):
    """The bases of a model: site name -> `SiteBasis`, with the manifest that says which model and data they are of.

    Example:
        >>> bases = NullSpaceBases.load("bases.safetensors")
        >>> bases.check_model(model)
        >>> sum(site.null_dim for site in bases.values()) > 0
        True
    """

    def __init__(self, sites: Iterable[SiteBasis], layer_norms: Mapping[str, float], **identity: Any):
        """Gather sites under one identity.

        Args:
            sites: one per site.
            layer_norms: Frobenius norm of the base weight of every listed layer (`layer_norms(model, names)`).
            identity: JSON-like fields for the manifest: model, data, settings.

        Raises:
            UserError: for a broken site, or a layer listed twice or without a norm.
        """
        self._sites = {site.site: site for site in sites}
        self._site_of = {layer: site for site in self._sites.values() for layer in site.layers}
        for site in self._sites.values():
            site.check()
        if len(self._site_of) != sum(len(site.layers) for site in self._sites.values()):
            raise UserError("bases: a layer is listed under two sites", expected="one", change="rebuild the bases")
        if missing := sorted(self._site_of.keys() - layer_norms.keys()):
            raise UserError(
                f"bases: no base weight norm for {_some(missing)}", expected="one per layer", change="rebuild the bases"
            )
        self.manifest = make_manifest(
            "bases",
            **identity,
            sites={name: site.row() for name, site in self._sites.items()},
            layer_norms={layer: float(layer_norms[layer]) for layer in self._site_of},
        )

    def __getitem__(self, site: str) -> SiteBasis:
        return self._sites[site]

    def __iter__(self) -> Iterator[str]:
        return iter(self._sites)

    def __len__(self) -> int:
        return len(self._sites)

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of all constrained layers."""
        return tuple(self._site_of)

    def for_layer(self, name: str) -> SiteBasis:
        """The basis of the input that the linear layer `name` reads.

        Raises:
            UserError: when no site lists the layer.
        """
        name = canonical_name(name)
        if name not in self._site_of:
            raise UserError(
                f"bases hold no layer {name}",
                expected=f"one of {_some(sorted(self._site_of))}",
                change="check the name",
            )
        return self._site_of[name]

    def save(self, path: Path | str, half: bool = False) -> None:
        """Write everything as one safetensors file, atomically; equal bases give equal bytes.

        Args:
            half: in float16, half the bytes. `load` makes the columns orthonormal again: bases of their own, turned
                from these by up to 3e-4 rad and held as exactly.
        """
        tensors = {}
        for name, site in self._sites.items():
            tensors[f"{name}/basis"] = site.basis.cpu().half() if half else site.basis.cpu()
            tensors[f"{name}/eigenvalues"] = site.eigenvalues.cpu()
        save_tensors(path, tensors, {**self.manifest, **({"rounded": "float16"} if half else {})})

    @classmethod
    def load(cls, path: Path | str) -> "NullSpaceBases":
        """Read a file that `save` wrote, and check it.

        Raises:
            UserError: when the file is missing, truncated, damaged, of another kind or schema, incomplete, has wrong
                shapes or non-finite values, or its columns are not orthonormal to 1e-4.
        """
        manifest, tensors = load_tensors(path, "bases")
        keys = {field.name for field in fields(SiteBasis)} - {"basis", "eigenvalues"}
        sites = []
        try:
            for name, row in manifest["sites"].items():
                row = {key: row[key] for key in keys} | {"layers": tuple(row["layers"])}
                basis = tensors[f"{name}/basis"]
                basis = orthonormal(basis) if basis.dtype == torch.float16 else basis
                sites.append(SiteBasis(basis=basis, eigenvalues=tensors[f"{name}/eigenvalues"], **row))
            norms = manifest["layer_norms"]
        except KeyError as error:
            raise UserError(
                f"{path} lacks {error}", expected="a complete bases file", change="rerun the stage that makes it"
            ) from error
        bases = cls(sites, norms)
        bases.manifest = manifest
        return bases

    @classmethod
    def from_hub(cls, repo: str, revision: str | None = None) -> "NullSpaceBases":
        """Bases that someone pushed to the hub repository `repo` ("org/name"), as of `revision`, checked like a file.

        Raises:
            UserError: as `load`, or when the hub cannot be reached or does not hold them.
        """
        from nspo.bases.hub import download

        return cls.load(download(repo, revision))

    def check_free(self) -> None:
        """Refuse bases that leave nothing to train.

        Raises:
            UserError: when no site has a free direction.
        """
        if all(site.null_dim == 0 for site in self._sites.values()):
            raise UserError(
                f"bases: no free direction at any of {len(self._sites)} sites",
                expected="at least one",
                change="loosen `bases.threshold`",
            )

    def check_model(self, model: nn.Module) -> None:
        """Refuse a model that these bases were not computed on.

        Its class must be the architecture that the bases name. Every listed layer must exist, be an `nn.Linear` (or
        `Conv1D`, or experts of a 3-D parameter) of the site's width, and have a weight whose Frobenius norm agrees with
        the base weight's to 1%.

        Raises:
            UserError: naming the layer and both sides.
        """
        self.check_layers(model)
        self.check_norms(layer_norms(model, self.layers))

    def check_layers(self, model: nn.Module) -> dict[str, Weight]:
        """The part of `check_model` that needs no weights' values; returns the weights by layer name.

        Raises:
            UserError: naming the layer or the architecture, and both sides.
        """
        made_for = self.manifest.get("model", {}).get("architecture")
        classes = _architecture(model)
        if made_for and classes and made_for not in classes:
            raise UserError(f"the bases are of a {made_for}, the model is a {classes[0]}: use the bases of this model")
        weights = find_weights(model, self.layers)
        for layer, weight in weights.items():
            found, expected = weight.width, self.for_layer(layer).width
            if found != expected:
                raise UserError(
                    f"layer {layer} reads width {found}, the bases were computed for width {expected}: "
                    "use the bases of this model"
                )
        return weights

    def check_folder(self, folder: Path | str) -> None:
        """Refuse a model folder with other weights, or another tokenizer or chat template, than the bases' model.

        Reads every weight file once, for its fingerprint.

        Raises:
            UserError: naming what differs and both fingerprints.
        """
        found = fingerprint_model(folder)
        check_made_with(
            self.manifest.get("model", {}),
            found,
            f"bases for the model {folder}",
            "use the bases of this model (its tokenizer and chat template too), or the model of these bases",
        )

    def check_norms(self, norms: Mapping[str, float]) -> None:
        """Refuse base weights whose norms differ by more than 1% from those the bases were computed on.

        Raises:
            UserError: naming the first such layer and both norms.
        """
        for layer, expected in self.manifest["layer_norms"].items():
            if expected == 0:
                raise UserError(f"layer {layer} has a weight of zeros, of which no share can be kept: leave it out")
            if not abs(norms[layer] - expected) <= NORM_TOLERANCE * expected:
                raise UserError(
                    f"layer {layer} has weight norm {norms[layer]:.6g}, the bases were computed on a model where it is "
                    f"{expected:.6g}: use the bases of this model, or the model of these bases"
                )


def _architecture(model: nn.Module) -> list[str]:
    """The class names of the transformers model inside any wrappers, its own first; empty when there is none."""
    for module in model.modules():  # outermost first
        # By name, so that bases load without transformers; all bases, because FSDP2 puts a class of its own in front.
        names = [kind.__name__ for kind in type(module).__mro__]
        if "PreTrainedModel" in names:
            return [name for name in names if not name.startswith("FSDP")]
    return []


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
