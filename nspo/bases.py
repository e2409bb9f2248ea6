"""Null-space bases: from second moments of layer inputs to one small orthonormal basis per site, and the file of them.

A *site* is one input that several linear layers read (q, k and v share one). With its general inputs K (d x N) and
G = K K^T / N, the protected range Q (d x r) is what an update must not touch and the free space U (d x k), k = d - r,
is where it may live. Only the thinner of the two is kept, never a dense d x d projector.
"""

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nspo.artifacts import make_manifest, read_tensor_manifest, save_tensors
from nspo.errors import UserError

Kind = Literal["range", "null"]
RULES = ("relative", "absolute", "energy", "rank", "fraction", "leakage", "contrast")
ORTHONORMALITY_TOLERANCE = 1e-4
NORM_TOLERANCE = 0.01
TOKENS_PER_DIRECTION = 4  # below this many tokens per direction the small eigenvalues are mostly sampling noise
_ROUNDING = 1e-12  # relative to the trace: what float64 cannot tell from zero

# ------------------------------------------------------------------------------------------- spectra and rules


def symmetric_eigh(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues in descending order and their eigenvectors (columns) of a second moment, in float64.

    Args:
        gram: (d, d), any float dtype; symmetrised as (G + G^T)/2 first.

    Returns:
        ((d,), (d, d)) float64. Negative eigenvalues, which a second moment has only by rounding, become 0.

    Raises:
        UserError: when `gram` is not square or holds NaN or Inf.
    """
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1]:
        raise UserError(f"second moment of shape {tuple(gram.shape)}, expected a square matrix: collect it again")
    if not torch.isfinite(gram).all():
        bad = int((~torch.isfinite(gram)).sum())
        raise UserError(f"second moment has {bad} NaN or Inf entries, expected finite values: run the model in float32")
    gram = gram.double()
    eigenvalues, vectors = torch.linalg.eigh((gram + gram.T) / 2)
    return eigenvalues.flip(0).clamp(min=0), vectors.flip(1)


def _tails(values: Tensor) -> Tensor:
    """(d + 1,): tails[r] = sum of values[r:]. Summed from the small end, so that a tiny tail keeps its digits."""
    return torch.cat([values.flip(0).cumsum(0).flip(0), values.new_zeros(1)])


def _first(condition: Tensor) -> int:
    return int(condition.int().argmax())


def check_rule(rule: str, threshold: float) -> None:
    """Refuse an unknown rule or a threshold outside the rule's meaning.

    Raises:
        UserError: naming the rule, the value and the limits.
    """
    if rule not in RULES:
        raise UserError(f"selection rule {rule!r}, expected one of {', '.join(RULES)}: change `bases.rule`")
    upper = math.inf if rule in ("absolute", "rank") else 1.0
    if not 0 <= threshold <= upper or (rule == "rank" and threshold != int(threshold)):
        meaning = "a whole number >= 0" if rule == "rank" else f"a number from 0 to {upper:g}"
        raise UserError(f"threshold {threshold} for rule {rule!r}, expected {meaning}: change `bases.threshold`")


def protected_rank(
    eigenvalues: Tensor,
    rule: str,
    threshold: float,
    *,
    vectors: Tensor | None = None,
    heldout_gram: Tensor | None = None,
) -> int:
    """How many leading directions to protect, 0 to d.

    With eigenvalues e_1 >= ... >= e_d and threshold t:
    `relative` counts e_i >= t e_1; `absolute` counts e_i >= t; `energy` is the smallest r with
    e_1 + ... + e_r >= t * trace; `rank` is t itself (at most d); `fraction` is round(t d); `leakage` is the smallest r
    with ||K_h - Q Q^T K_h||_F / ||K_h||_F <= t on held-out inputs, where the numerator squared is exactly
    sum_{i > r} v_i^T G_h v_i.

    Args:
        eigenvalues: (d,) float64, descending.
        vectors: (d, d) float64 eigenvectors, for `leakage`.
        heldout_gram: (d, d) G_h, for `leakage`.

    Raises:
        UserError: for an unknown rule, a threshold out of range, or `leakage` without held-out inputs.
    """
    check_rule(rule, threshold)
    width = len(eigenvalues)
    if rule == "relative":
        return int((eigenvalues >= threshold * eigenvalues[0]).sum())
    if rule == "absolute":
        return int((eigenvalues >= threshold).sum())
    if rule == "energy":
        tails = _tails(eigenvalues)
        return _first(tails <= (1 - threshold + _ROUNDING) * tails[0])
    if rule == "rank":
        return min(int(threshold), width)
    if rule == "fraction":
        return round(threshold * width)
    if rule == "leakage":
        if vectors is None or heldout_gram is None:
            raise UserError(
                "rule 'leakage' found no held-out inputs, expected some: hold out general tokens or change the rule"
            )
        tails = _tails(_energies(vectors, heldout_gram.double()))
        return _first(tails <= (threshold**2 + _ROUNDING) * tails[0])
    raise UserError("rule 'contrast' picks directions, not a rank: use contrast_split")


def contrast_split(general: Tensor, harmful: Tensor, budget: float) -> tuple[Tensor, Tensor]:
    """The free space that holds the most harmful energy for at most `budget` of the general energy.

    Over orthonormal U (d x k, any k): maximise tr(U^T H U)/tr H subject to tr(U^T G U)/tr G <= budget. Its Lagrangian
    tr U^T (H/tr H - mu G/tr G) U is maximal for U = all eigenvectors with a positive eigenvalue, and the general energy of that U falls
    as mu grows, so mu is found by bisection. Every unit of general energy that is freed brings at least mu of harmful energy.

    Both moments are normalised by their traces, so the scale and the token counts of the two samples do not matter,
    and mu is a ratio of shares (1 = no more harmful than general). The ratio form, eigenvectors of
    H u = lambda G u, optimises det-like ratios instead of energies, spends the budget on directions that
    hold neither, and depends on a ridge on G; on spectra like a language model's it freed about half the harmful energy for the
    same budget. Directions that neither sample uses stay protected.

    Args:
        general: (d, d) G.
        harmful: (d, d) H.
        budget: share of tr G the free space may hold, 0 to 1.

    Returns:
        (protected (d, d - k), free (d, k)), float64, orthonormal together. k = 0 when nothing is selective enough.
    """
    g = general.double() / general.double().trace()
    h = harmful.double() / harmful.double().trace()

    def split(mu: float) -> tuple[Tensor, Tensor, float]:
        difference = h - mu * g
        values, vectors = torch.linalg.eigh((difference + difference.T) / 2)
        free = values > _ROUNDING
        return vectors[:, ~free], vectors[:, free], float(_energies(vectors[:, free], g).sum())

    limit = budget + _ROUNDING
    low, high = 0.0, 1.0
    best = split(high)
    while best[2] > limit:
        low, high = high, 4 * high
        best = split(high)
    if low == 0.0:  # the budget allows less selective directions than mu = 1 does
        low = high
        while low > 1e-3 and (trial := split(low / 4))[2] <= limit:
            low, high, best = low / 4, low / 4, trial
        low = low / 4
    while high / low > 1.01 and best[2] < 0.98 * budget:
        mu = math.sqrt(low * high)
        trial = split(mu)
        if trial[2] <= limit:
            high, best = mu, trial
        else:
            low = mu
    return best[0], best[1]


def _energies(directions: Tensor, gram: Tensor) -> Tensor:
    """diag(X^T G X) for X (d, m): (m,), negatives by rounding become 0."""
    return (directions * (gram @ directions)).sum(0).clamp(min=0)


def _share(directions: Tensor, gram: Tensor) -> float:
    gram = gram.double()
    return float(_energies(directions, gram).sum() / gram.trace())


# ------------------------------------------------------------------------------------------- one site


@dataclass(frozen=True)
class SiteBasis:
    """The basis of one site and how it was chosen.

    Attributes:
        site: name of the input, for instance "model.layers.0.self_attn.qkv".
        layers: module names of the linear layers that read it.
        width: d.
        kind: "range" when `basis` is the protected Q (d x r), "null" when it is the free U (d x k); the thinner one.
        basis: (d, min(r, k)) float32, orthonormal columns.
        eigenvalues: (d,) float32 of the general second moment, descending.
        rank: r, the number of protected directions.
        rule, threshold: the selection rule and its setting.
        tokens: number of general tokens behind the second moment.
        energy_kept: share of the general trace inside the protected range; None for a random basis.
        leakage: ||K_h - Q Q^T K_h||_F / ||K_h||_F on held-out general inputs, None without any.
        harmful_energy: share of the harmful trace inside the free space, None without harmful inputs.
        ratio: `harmful_energy` over the general share in the free space (held-out where given), None when undefined.
    """

    site: str
    layers: tuple[str, ...]
    width: int
    kind: Kind
    basis: Tensor
    eigenvalues: Tensor
    rank: int
    rule: str
    threshold: float
    tokens: int
    energy_kept: float | None = None
    leakage: float | None = None
    harmful_energy: float | None = None
    ratio: float | None = None

    @property
    def null_dim(self) -> int:
        """k = d - r, the number of directions an update may use."""
        return self.width - self.rank

    def row(self) -> dict[str, Any]:
        """Everything but the tensors, JSON-like."""
        row = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("basis", "eigenvalues")}
        return {**row, "layers": list(self.layers), "null_dim": self.null_dim}

    def check(self) -> None:
        """Refuse a basis with wrong shapes, non-finite values, or columns that are not orthonormal to 1e-4.

        Raises:
            UserError: naming the site, what was found and what was expected.
        """
        columns = {"range": self.rank, "null": self.null_dim}.get(self.kind)
        if columns is None or tuple(self.basis.shape) != (self.width, columns) or len(self.eigenvalues) != self.width:
            raise UserError(
                f"bases: site {self.site} holds a {self.kind!r} basis of shape {tuple(self.basis.shape)}, expected "
                f"({self.width}, {columns}) for width {self.width} and rank {self.rank}: rebuild the bases"
            )
        if not (torch.isfinite(self.basis).all() and torch.isfinite(self.eigenvalues).all()):
            raise UserError(f"bases: site {self.site} holds NaN or Inf, expected finite values: rebuild the bases")
        error = _orthonormality_error(self.basis)
        if error > ORTHONORMALITY_TOLERANCE:
            raise UserError(
                f"bases: site {self.site} is not orthonormal (off by {error:.1e}, expected at most "
                f"{ORTHONORMALITY_TOLERANCE:.0e}): rebuild the bases"
            )


def _orthonormality_error(basis: Tensor) -> float:
    basis = basis.double()
    identity = torch.eye(basis.shape[1], dtype=basis.dtype, device=basis.device)
    return float((basis.T @ basis - identity).abs().max()) if basis.numel() else 0.0


def compute_basis(
    site: str,
    layers: Iterable[str],
    gram: Tensor,
    tokens: int,
    rule: str,
    threshold: float,
    heldout_gram: Tensor | None = None,
    harmful_gram: Tensor | None = None,
) -> SiteBasis:
    """Choose the protected range of one site and keep the thinner side of it.

    Args:
        gram: (d, d) second moment of general inputs, accumulated in float32 or better.
        tokens: how many tokens `gram` averages.
        rule, threshold: see `protected_rank` and `contrast_split` (threshold = share of general energy set free).
        heldout_gram: the same of held-out general inputs; needed by `leakage`, otherwise only measured.
        harmful_gram: the same of harmful inputs; needed by `contrast`, otherwise only measured.

    Raises:
        UserError: for a non-square, non-finite or zero Gram, Grams of different shapes, a bad rule or threshold, or a
            rule without the inputs that it needs.

    Warns:
        UserWarning: with fewer than 4 d tokens, or when no free direction is left (the layers then stay as they are).
    """
    check_rule(rule, threshold)
    for name, other in (("general", gram), ("held-out", heldout_gram), ("harmful", harmful_gram)):
        if other is None:
            continue
        if other.shape != gram.shape or not torch.isfinite(other).all() or other.trace() <= 0:
            raise UserError(
                f"{site}: the {name} second moment is {tuple(other.shape)} with trace {float(other.diagonal().sum()):g}, expected "
                f"{tuple(gram.shape)}, finite and with a positive trace: collect the activations again in float32"
            )
    width = gram.shape[0]
    if tokens < TOKENS_PER_DIRECTION * width:
        warnings.warn(
            f"{site}: {tokens} tokens for width {width}, at least {TOKENS_PER_DIRECTION * width} are needed for a basis "
            "that holds on unseen inputs",
            stacklevel=2,
        )
    eigenvalues, vectors = symmetric_eigh(gram)
    if rule == "contrast":
        if harmful_gram is None:
            raise UserError(
                f"{site}: rule 'contrast' found no harmful inputs, expected some: collect them or change the rule"
            )
        protected, free = contrast_split(gram, harmful_gram, threshold)
    else:
        rank = protected_rank(eigenvalues, rule, threshold, vectors=vectors, heldout_gram=heldout_gram)
        protected, free = vectors[:, :rank], vectors[:, rank:]
    rank = protected.shape[1]
    if rank == width:
        warnings.warn(
            f"{site}: rule {rule} {threshold:g} protects all {width} directions, its layers cannot move", stacklevel=2
        )
    thin_range = rank <= width - rank
    freed = _share(free, gram)
    heldout = None if heldout_gram is None else _share(free, heldout_gram)
    harmful = None if harmful_gram is None else _share(free, harmful_gram)
    general = freed if heldout is None else heldout
    return SiteBasis(
        site=site,
        layers=tuple(layers),
        width=width,
        kind="range" if thin_range else "null",
        basis=(protected if thin_range else free).float().contiguous(),
        eigenvalues=eigenvalues.float(),
        rank=rank,
        rule=rule,
        threshold=float(threshold),
        tokens=int(tokens),
        energy_kept=1 - freed,
        leakage=None if heldout is None else math.sqrt(heldout),
        harmful_energy=harmful,
        ratio=None if harmful is None or general == 0 else harmful / general,
    )


# ------------------------------------------------------------------------------------------- all sites, and the model


class NullSpaceBases(Mapping[str, SiteBasis]):
    """The bases of a model: site name -> `SiteBasis`, with the manifest that says which model and data they are of."""

    def __init__(self, sites: Iterable[SiteBasis], layer_norms: Mapping[str, float], **identity: Any):
        """Gather sites under one identity.

        Args:
            sites: one per site.
            layer_norms: Frobenius norm of the base weight of every listed layer (`layer_norms(model, names)`).
            identity: JSON-like fields for the manifest: model, data, settings.

        Raises:
            UserError: for no sites, a broken site, a layer listed twice or without a norm, or no free direction anywhere.
        """
        self._sites = {site.site: site for site in sites}
        self._site_of = {layer: site for site in self._sites.values() for layer in site.layers}
        for site in self._sites.values():
            site.check()
        if len(self._site_of) != sum(len(site.layers) for site in self._sites.values()):
            raise UserError("bases: a layer is listed under two sites, expected one: rebuild the bases")
        if missing := sorted(self._site_of.keys() - layer_norms.keys()):
            raise UserError(
                f"bases: no base weight norm for {_some(missing)}, expected one per layer: rebuild the bases"
            )
        if all(site.null_dim == 0 for site in self._sites.values()):
            raise UserError(
                f"bases: no free direction at any of {len(self._sites)} sites, expected at least one: loosen `bases.threshold`"
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
                f"bases hold no layer {name}, expected one of {_some(sorted(self._site_of))}: check the name"
            )
        return self._site_of[name]

    def summary(self) -> list[dict[str, Any]]:
        """One row per site: rule, rank, null dimension, energies, leakage, tokens."""
        return [site.row() for site in self._sites.values()]

    def save(self, path: Path | str) -> None:
        """Write everything as one safetensors file, atomically; equal bases give equal bytes."""
        tensors = {}
        for name, site in self._sites.items():
            tensors[f"{name}/basis"] = site.basis.cpu()
            tensors[f"{name}/eigenvalues"] = site.eigenvalues.cpu()
        save_tensors(path, tensors, self.manifest)

    @classmethod
    def load(cls, path: Path | str) -> "NullSpaceBases":
        """Read a file that `save` wrote, and check it.

        Raises:
            UserError: when the file is missing, truncated, of another kind or schema, incomplete, has wrong shapes or
                non-finite values, or its columns are not orthonormal to 1e-4.
        """
        from safetensors.torch import load_file

        manifest = read_tensor_manifest(path, "bases")
        tensors = load_file(path)
        keys = {field.name for field in fields(SiteBasis)} - {"basis", "eigenvalues"}
        sites = []
        try:
            for name, row in manifest["sites"].items():
                row = {key: row[key] for key in keys} | {"layers": tuple(row["layers"])}
                sites.append(
                    SiteBasis(basis=tensors[f"{name}/basis"], eigenvalues=tensors[f"{name}/eigenvalues"], **row)
                )
            norms = manifest["layer_norms"]
        except KeyError as error:
            raise UserError(
                f"{path} lacks {error}, expected a complete bases file: rerun the stage that makes it"
            ) from error
        bases = cls(sites, norms)
        bases.manifest = manifest
        return bases

    def check_model(self, model: nn.Module) -> None:
        """Refuse a model that these bases were not computed on.

        Every listed layer must exist, be an `nn.Linear` (or transformers' `Conv1D`) of the site's width, and have a
        weight whose Frobenius norm agrees with the base weight's to 1%.

        Raises:
            UserError: naming the layer and both sides.
        """
        for layer, module in find_linears(model, self.layers).items():
            width = input_width(module)
            if width != self.for_layer(layer).width:
                raise UserError(
                    f"layer {layer} reads width {width}, the bases were computed for width {self.for_layer(layer).width}: "
                    "use the bases of this model"
                )
        self.check_norms(layer_norms(model, self.layers))

    def check_norms(self, norms: Mapping[str, float]) -> None:
        """Refuse base weights whose norms differ by more than 1% from those the bases were computed on.

        Raises:
            UserError: naming the first such layer and both norms.
        """
        for layer, expected in self.manifest["layer_norms"].items():
            if not abs(norms[layer] - expected) <= NORM_TOLERANCE * expected:
                raise UserError(
                    f"layer {layer} has weight norm {norms[layer]:.6g}, the bases were computed on a model where it is "
                    f"{expected:.6g}: use the bases of this model, or the model of these bases"
                )


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
        unknown = dict.fromkeys(("energy_kept", "leakage", "harmful_energy", "ratio"))
        sites.append(SiteBasis(**{**known, **unknown, "basis": torch.linalg.qr(gaussian)[0].float(), "rule": "random"}))
    manifest = bases.manifest
    identity = {
        k: v for k, v in manifest.items() if k not in ("kind", "schema", "nspo_version", "sites", "layer_norms")
    }
    return NullSpaceBases(sites, manifest["layer_norms"], **identity, random_seed=seed)
