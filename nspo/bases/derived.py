"""Bases made from other bases: merged ones that protect what several protect, random ones and parts as ablations.

Command: `nspo bases merge A.safetensors B.safetensors --out MERGED.safetensors`.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from nspo.bases.file import NullSpaceBases
from nspo.errors import UserError
from nspo.files.manifest import check_made_with
from nspo.models.structure.coverage import narrowed
from nspo.nullspace.basis import SiteBasis
from nspo.nullspace.spectra import symmetric_eigh

LEAK_TOLERANCE = 8 * torch.finfo(torch.float32).eps  # about 1e-6
OWN_FIELDS = ("kind", "schema", "nspo_version", "sites", "layer_norms")  # what every bases file writes by itself
UNKNOWN = dict.fromkeys(("energy_kept", "leakage", "harmful_energy", "ratio"))


def random_like(bases: NullSpaceBases, seed: int) -> NullSpaceBases:
    """Bases with the same sites, sides and ranks whose directions are random: the random-projector ablation.

    Uniform over subspaces (QR of a Gaussian matrix), the same for the same seed. Energies are unknown and become None.
    """
    generator = torch.Generator().manual_seed(seed)
    sites = []
    for name in sorted(bases):
        site = bases[name]
        gaussian = torch.randn(site.basis.shape, generator=generator, dtype=torch.float64)
        known = {field.name: getattr(site, field.name) for field in fields(site)}
        sites.append(SiteBasis(**{**known, **UNKNOWN, "basis": torch.linalg.qr(gaussian)[0].float(), "rule": "random"}))
    return NullSpaceBases(sites, bases.manifest["layer_norms"], **_identity(bases), random_seed=seed)


def only_layers(bases: NullSpaceBases, part: str) -> NullSpaceBases:
    """The same bases for the layers alone whose name contains `part`.

    Raises:
        UserError: when there is none.
    """
    kept = {site.site: tuple(layer for layer in site.layers if part in layer) for site in bases.values()}
    if not any(kept.values()):
        raise UserError(
            f"bases: no layer has {part!r} in its name", expected="some", change="compute them on such layers"
        )
    sites = [replace(bases[name], layers=layers) for name, layers in kept.items() if layers]
    return NullSpaceBases(sites, bases.manifest["layer_norms"], **_identity(bases))


def merge(several: Sequence[NullSpaceBases]) -> NullSpaceBases:
    """Bases of one model from several of it, made on other data or by others: protected is what any of them protects.

    The merged protected range of a site spans all of theirs, its free space is the intersection of their free spaces:
    k_1 and k_2 free directions of d leave k_1 + k_2 - d or a few more. Where the activations are at hand, bases
    computed on all domains together leave more room.

    A merge needs no activations. With the projectors P_i on the protected ranges, u^T (sum_i P_i) u adds up what u has
    in each of them, so the free space belongs to the eigenvalues 0 of that sum.

    Stored float32 columns turn a span by about 1e-7, which no eigenvalue can tell from 0. Directions with an
    eigenvalue of at most `LEAK_TOLERANCE`^2 count as free, so ||D Q_i|| <= 1e-6 ||D|| for an update D in the merged
    free space and any of the ranges Q_i. What was measured on the parts (energies, eigenvalues) is unknown for the
    whole; the manifest lists where each came from under `merged`.

    Raises:
        UserError: fewer than two, another model, or a site that they do not all have with the same layers and width:
            where one constrains nothing it promises nothing, and a merge cannot promise it in its name.

    Warns:
        UserWarning: when no free direction is left at some sites (their layers then stay as they are).
    """
    if len(several) < 2:
        raise UserError(f"merge: found {len(several)} bases", expected="at least two", change="name the files to merge")
    first = several[0]
    for number, other in enumerate(several[1:], 2):
        _check_mergeable(first, other, f"merge: bases {number}", "bases 1")
    sites = [_merge_site([bases[name] for bases in several]) for name in first]
    if stuck := [site.site for site in sites if site.null_dim == 0]:
        warnings.warn(
            f"merge: no free direction is left at {len(stuck)} of {len(sites)} sites ({stuck[0]} first), their layers "
            "cannot move: collect all domains into one store and compute the bases on it",
            stacklevel=2,
        )
    identities = [_identity(bases) for bases in several]
    every = [blocks for identity in identities if (blocks := identity.pop("blocks", None))]
    protected = {kind for blocks in every for kind in blocks.get("protected_inputs", ())}
    models = [identity.pop("model", {}) for identity in identities]
    shared = {key: value for key, value in models[0].items() if all(model.get(key) == value for model in models)}
    parts = [part for identity in identities for part in identity.get("merged", [identity])]
    return NullSpaceBases(
        sites,
        first.manifest["layer_norms"],
        model=shared,
        blocks=narrowed(every[0], protected) if every else None,  # of the model, the same for all but the inputs
        merged=parts,
    )


def _check_mergeable(first: NullSpaceBases, other: NullSpaceBases, name: str, of: str) -> None:
    expected, found = (
        {part: bases.manifest.get("model", {}).get(part) for part in ("architecture", "weights", "tokenizer")}
        for bases in (first, other)
    )
    check_made_with(found, expected, name, f"merge bases of one model ({of} are for the one that was expected)")
    for site in sorted(first.keys() ^ other.keys()):
        raise UserError(
            f"{name} and {of} do not both hold the site {site}: compute both with the same `activations.layers`"
        )
    for site in first:
        for key in ("width", "layers"):
            found, expected = getattr(other[site], key), getattr(first[site], key)
            if found != expected:
                raise UserError(
                    f"{name} hold the site {site} with {key} {found}, {of} with {expected}: merge bases of one model"
                )
    first.check_norms(other.manifest["layer_norms"])


def _merge_site(several: Sequence[SiteBasis]) -> SiteBasis:
    first = several[0]
    eigenvalues, vectors = symmetric_eigh(sum(map(_protected_projector, several), torch.zeros(())))
    rank = int((eigenvalues > LEAK_TOLERANCE**2).sum())
    thin_range = rank <= first.width - rank
    return SiteBasis(
        site=first.site,
        layers=first.layers,
        width=first.width,
        kind="range" if thin_range else "null",
        basis=(vectors[:, :rank] if thin_range else vectors[:, rank:]).float().contiguous(),
        eigenvalues=torch.empty(0),
        rank=rank,
        rule="merge",
        threshold=LEAK_TOLERANCE,
        tokens=sum(site.tokens for site in several),
        **UNKNOWN,
    )


def _protected_projector(site: SiteBasis) -> Tensor:
    """P = Q Q^T = I - U U^T, (d, d) float64."""
    # Orthonormal to float64 first: an error e of the stored columns would show as an eigenvalue e of the sum, not e^2.
    basis = torch.linalg.qr(site.basis.double())[0]
    inside = basis @ basis.T
    return inside if site.kind == "range" else torch.eye(site.width, dtype=torch.float64) - inside


def _identity(bases: NullSpaceBases) -> dict[str, Any]:
    """What a manifest says of model, data and settings."""
    manifest: Mapping[str, Any] = bases.manifest
    return {key: value for key, value in manifest.items() if key not in OWN_FIELDS}
