"""From the activation store to the bases file: one basis per site, chosen by the configured rule.

The protected inputs are those of the general tasks (and of the harmless look-alikes, when they were collected), from
the split `basis`; validation inputs measure what the choice is worth. Sites do not depend on each other: a finished one
is kept, so that an interrupted run goes on after it, and on a cluster several jobs can share them out (`bases.jobs`,
the file is the same for any number).
Memory: one site at a time; see `compute_basis`.
Command: `nspo bases --activations results/activations --out results/bases/bases.safetensors`.
"""

import math
import re
import shutil
import statistics
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nspo.activations.store import HARMFUL, ActivationStore
from nspo.bases.file import NullSpaceBases
from nspo.errors import UserError
from nspo.files.manifest import check_made_with, fingerprint, make_manifest
from nspo.models.structure.coverage import coverage_of, in_words, narrowed
from nspo.models.structure.sites import Site
from nspo.nullspace.basis import Kind, SiteBasis
from nspo.nullspace.spectra import (
    ROUNDING,
    check_rule,
    complement,
    contrast_free,
    protected_rank,
    share,
    spectrum,
    symmetric_eigh,
)
from nspo.run.progress import say, track
from nspo.settings.bases import BasesSettings
from nspo.settings.runtime import RuntimeSettings

TOKENS_PER_DIRECTION = 4  # below this many tokens per direction the small eigenvalues are mostly sampling noise
FROZEN = "frozen"  # rule of an expert that saw fewer: all its directions are protected


def compute_bases(
    settings: BasesSettings,
    activations: Path,
    out: Path,
    runtime: RuntimeSettings,
    part: str | None = None,
    parts: Iterable[Path] | None = None,
) -> None:
    """Write `out` (safetensors); `nspo bases info` shows what it holds.

    Args:
        part: "2/8": only the second of eight shares of the sites.
        parts: files of such shares; their sites are taken as they are.

    Raises:
        UserError: a damaged store, a rule that needs inputs the store does not hold, a part of other bases, or no free
            direction at any site.
    """
    store = ActivationStore(activations)
    identity = {
        "model": store.manifest["model"],
        "activations": fingerprint(store.manifest),
        "settings": {key: getattr(settings, key) for key in ("rule", "threshold", "weights")},
    }
    _check_inputs(store, settings)
    norms = store.manifest["layer_norms"]
    work = Path(runtime.workdir) / f"bases-{fingerprint(make_manifest('bases', **identity, part=part))}"
    wanted = share_of(list(store.sites.values()), part)
    kept = _sites_of(sorted(work.glob("*.safetensors")), identity)
    if kept:
        say(f"bases: resuming in {work}: {len(kept)} of {len(wanted)} sites are there already")
    ready = kept | _sites_of(parts or (), identity)
    waiting = [site for site in wanted if site.name not in ready]
    with (
        track("bases", len(wanted), "site", start=len(wanted) - len(waiting)) as bar,
        warnings.catch_warnings(record=True) as caught,
    ):
        warnings.simplefilter("always")
        for site in waiting:
            ready[site.name] = _compute_site(store, site, settings)
            NullSpaceBases([ready[site.name]], norms, **identity).save(work / f"{site.name}.safetensors")
            bar.update(1)
    for message in dict.fromkeys(str(warning.message) for warning in caught):
        say(f"warning: {message}")
    if idle := [site for site in wanted if ready[site.name].rule == FROZEN]:
        names = ", ".join(f"{site.name} with {ready[site.name].tokens} tokens" for site in idle[:3])
        say(
            f"bases: {len(idle)} of {sum(site.share < 1 for site in wanted)} experts saw fewer than "
            f"{TOKENS_PER_DIRECTION} tokens per direction and stay frozen ({names}{', ...' * (len(idle) > 3)}; "
            "`nspo bases info` names all)"
        )
    blocks = store.manifest.get("blocks")
    facts = {"domains": _domains(store), "blocks": blocks and narrowed(blocks, _counted(store, settings, "basis"))}
    bases = NullSpaceBases([ready[site.name] for site in wanted], norms, **identity, **facts)
    if part is None:
        bases.check_free()
    bases.save(out)
    shutil.rmtree(work, ignore_errors=True)
    free = statistics.mean(site.null_dim / site.width for site in bases.values())
    rule = f"{settings.rule} {settings.threshold:g}"
    say(f"bases: rule {rule}, {len(bases)} sites, {free:.0%} of a site free on average")
    say(f"bases: {in_words(coverage_of(bases.manifest))}")


def share_of(sites: list[Site], part: str | None) -> list[Site]:
    """The sites of share "i/n" in model order (all for None): dealt out widest first, so that shares cost alike.

    Raises:
        UserError: for anything but two whole numbers with 1 <= i <= n.
    """
    if part is None:
        return sites
    match = re.fullmatch(r"(\d+)/(\d+)", part)
    if not match or not 1 <= int(match[1]) <= int(match[2]) <= len(sites):
        raise UserError(
            f"--part {part}", expected=f"I/N with 1 <= I <= N <= {len(sites)} sites", change="lower `bases.jobs`"
        )
    mine = sorted(sites, key=lambda site: -site.width)[int(match[1]) - 1 :: int(match[2])]
    return [site for site in sites if site in mine]


def _sites_of(files: Iterable[Path], identity: Mapping[str, Any]) -> dict[str, SiteBasis]:
    """The sites of finished parts.

    Raises:
        UserError: when a part was made from other activations or with other settings.
    """
    ready: dict[str, SiteBasis] = {}
    for file in files:
        bases = NullSpaceBases.load(file)
        check_made_with(bases.manifest, identity, file, "delete it and rerun")
        ready.update(bases)
    return ready


def _check_inputs(store: ActivationStore, settings: BasesSettings) -> None:
    """Refuse a rule or weights that cannot serve.

    Raises:
        UserError: naming the rule or the weight.
    """
    check_rule(settings.rule, settings.threshold)
    protected = [domain for domain in store.domains("basis") if domain != HARMFUL]
    for domain, weight in settings.weights.items():
        if domain not in protected:
            raise UserError(
                f"bases.weights names {domain!r}", expected=f"some of {', '.join(protected)}", change="mend the name"
            )
        if not 0 <= weight < math.inf:
            raise UserError(f"bases.weights.{domain} is {weight}", expected="a finite number >= 0", change="mend it")
    if not _counted(store, settings, "basis"):
        raise UserError(
            f"bases.weights is 0 for all of {', '.join(protected)}", expected="one above 0", change="raise one"
        )


def _counted(store: ActivationStore, settings: BasesSettings, split: str) -> dict[str, float]:
    """{domain: weight of its tokens} of the domains to protect that count at all."""
    weights = {domain: settings.weights.get(domain, 1.0) for domain in store.domains(split) if domain != HARMFUL}
    return {domain: weight for domain, weight in weights.items() if weight > 0}


def _domains(store: ActivationStore) -> dict[str, dict[str, int]]:
    """{domain: {split: tokens}} of all that was collected."""
    splits = {split: store.domains(split) for split in ("basis", "validation")}
    names = dict.fromkeys(domain for listed in splits.values() for domain in listed)
    return {
        name: {split: store.tokens(name, split) for split, listed in splits.items() if name in listed} for name in names
    }


def _compute_site(store: ActivationStore, site: Site, settings: BasesSettings) -> SiteBasis:
    def protected(split: str) -> tuple[Tensor, int]:
        weights = _counted(store, settings, split)
        return store.gram(site.name, split, weights, weights)

    def seen(gram: Tensor) -> Tensor | None:
        return gram if site.share == 1 or gram.trace() > 0 else None  # an expert may have had no such token

    gram, tokens = protected("basis")
    validation = seen(protected("validation")[0]) if _counted(store, settings, "validation") else None
    harmful = seen(store.gram(site.name, "basis", [HARMFUL])[0]) if HARMFUL in store.domains("basis") else None
    needed = {"leakage": validation, "contrast": harmful}.get(settings.rule, gram)
    if site.share < 1 and (tokens < TOKENS_PER_DIRECTION * site.width or needed is None or seen(gram) is None):
        return frozen_basis(site.name, site.layers, site.width, tokens)
    return compute_basis(site.name, site.layers, gram, tokens, settings.rule, settings.threshold, validation, harmful)


def frozen_basis(site: str, layers: Iterable[str], width: int, tokens: int) -> SiteBasis:
    """The basis that leaves nothing free, for an expert that saw too few tokens to tell what it reads."""
    return SiteBasis(
        site=site,
        layers=tuple(layers),
        width=width,
        kind="null",
        basis=torch.empty(width, 0),
        eigenvalues=torch.empty(0),
        rank=width,
        rule=FROZEN,
        threshold=float(TOKENS_PER_DIRECTION),
        tokens=tokens,
    )


def compute_basis(
    site: str,
    layers: Iterable[str],
    gram: Tensor,
    tokens: int,
    rule: str,
    threshold: float,
    validation_gram: Tensor | None = None,
    harmful_gram: Tensor | None = None,
) -> SiteBasis:
    """Choose the protected range of one site and keep the thinner side of it.

    Memory: at its peak five float64 matrices of width d, 40 d^2 bytes: the (at most three) second moments, the one that
    the solver works in, and the one it writes vectors to.

    Args:
        gram: (d, d) second moment of general inputs, accumulated in float32 or better.
        tokens: how many tokens `gram` averages.
        rule, threshold: see `protected_rank`, and `contrast_free` for its selectivity.
        validation_gram: the same of validation general inputs; needed by `leakage`, otherwise only measured.
        harmful_gram: the same of harmful inputs; needed by `contrast`, otherwise only measured.

    Raises:
        UserError: for a non-square, non-finite or zero Gram, Grams of different shapes, a bad rule or threshold, or a
            rule without the inputs that it needs.

    Warns:
        UserWarning: with fewer than 4 d tokens, or when no free direction is left (the layers then stay as they are).
    """
    check_rule(rule, threshold)
    _check_moments(site, rule, gram, validation_gram, harmful_gram)
    width = gram.shape[0]
    if tokens < TOKENS_PER_DIRECTION * width:
        warnings.warn(
            f"{site}: {tokens} tokens for width {width}, at least {TOKENS_PER_DIRECTION * width} are needed for a "
            "basis that holds on unseen inputs",
            stacklevel=2,
        )
    if rule == "contrast" and harmful_gram is not None:
        eigenvalues, free = spectrum(gram), contrast_free(gram, harmful_gram, threshold)
        rank = width - free.shape[1]
        thin = complement(free) if rank <= width - rank else free
    else:
        eigenvalues, vectors = symmetric_eigh(gram)
        rank = protected_rank(eigenvalues, rule, threshold, vectors=vectors, validation_gram=validation_gram)
        thin = vectors[:, :rank] if rank <= width - rank else vectors[:, rank:]
    if rank == width:
        warnings.warn(
            f"{site}: rule {rule} {threshold:g} protects all {width} directions, its layers cannot move", stacklevel=2
        )
    kind: Kind = "range" if rank <= width - rank else "null"
    freed = _free_share(thin, kind, gram)
    validation = None if validation_gram is None else _free_share(thin, kind, validation_gram)
    harmful = None if harmful_gram is None else _free_share(thin, kind, harmful_gram)
    general = freed if validation is None else validation
    return SiteBasis(
        site=site,
        layers=tuple(layers),
        width=width,
        kind=kind,
        basis=thin.float().contiguous(),
        eigenvalues=eigenvalues.float(),
        rank=rank,
        rule=rule,
        threshold=float(threshold),
        tokens=int(tokens),
        energy_kept=1 - freed,
        leakage=None if validation is None else math.sqrt(validation),
        harmful_energy=harmful,
        ratio=None if harmful is None or general < ROUNDING else harmful / general,
    )


def _check_moments(site: str, rule: str, gram: Tensor, validation: Tensor | None, harmful: Tensor | None) -> None:
    for name, moment in (("general", gram), ("validation", validation), ("harmful", harmful)):
        if moment is None:
            if (rule, name) in (("leakage", "validation"), ("contrast", "harmful")):
                raise UserError(
                    f"{site}: rule {rule!r} found no {name} inputs",
                    expected="some",
                    change="collect them or change the rule",
                )
            continue
        if moment.shape != gram.shape or not torch.isfinite(moment).all() or moment.trace() <= 0:
            raise UserError(
                f"{site}: the {name} second moment is {tuple(moment.shape)} with trace "
                f"{float(moment.diagonal().sum()):g}",
                expected=f"{tuple(gram.shape)}, finite and with a positive trace",
                change="collect the activations again in float32",
            )


def _free_share(thin: Tensor, kind: Kind, gram: Tensor) -> float:
    """Share of the trace of `gram` in the free space, from its thinner side (d, m) float64.

    1 - x is off by some 1e-16, and the basis is stored in float32, so nothing is lost by it.
    """
    inside = share(thin, gram)
    return inside if kind == "null" else max(1 - inside, 0.0)
