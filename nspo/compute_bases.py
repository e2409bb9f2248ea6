"""From the activation store to the bases file: one basis per site, chosen by the configured rule.

The protected inputs are those of the general tasks (and of the harmless look-alikes, when they were collected), from
the split `basis`; held-out inputs measure what the choice is worth. (The authors' release recomputes dense projectors
at every launch and saves none.)
Command: `nspo bases --activations results/activations --out results/bases/bases.safetensors`.
"""

import statistics
import warnings
from pathlib import Path

from nspo.activation_store import HARMFUL, ActivationStore
from nspo.artifacts import fingerprint, write_json
from nspo.bases import NullSpaceBases, SiteBasis, compute_basis
from nspo.config import BasesSettings
from nspo.progress import say, track

SUMMARY_NAME = "bases.json"


def compute_bases(settings: BasesSettings, activations: Path, out: Path) -> None:
    """Write `out` (safetensors) and beside it `bases.json`, the table of its sites.

    Raises:
        UserError: a damaged store, or a rule that needs inputs the store does not hold.
    """
    store = ActivationStore(activations)
    sites: list[SiteBasis] = []
    with track("bases", len(store.sites), "site") as bar, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for site in store.sites.values():
            gram, tokens = store.gram(site.name, "basis")
            heldout = store.gram(site.name, "heldout")[0] if store.domains("heldout") else None
            harmful = store.gram(site.name, "basis", [HARMFUL])[0] if HARMFUL in store.domains("basis") else None
            sites.append(
                compute_basis(site.name, site.layers, gram, tokens, settings.rule, settings.threshold, heldout, harmful)
            )
            bar.update(1)
    for message in dict.fromkeys(str(warning.message) for warning in caught):
        say(f"warning: {message}")
    manifest = store.manifest
    bases = NullSpaceBases(
        sites,
        manifest["layer_norms"],
        model=manifest["model"],
        activations=fingerprint(manifest),
        settings=settings.dump(),
    )
    bases.save(out)
    rows = bases.summary()
    write_json(out.with_name(SUMMARY_NAME), {"rule": settings.rule, "threshold": settings.threshold, "sites": rows})
    share = statistics.mean(row["null_dim"] / row["width"] for row in rows)
    say(f"bases: rule {settings.rule} {settings.threshold:g}, {len(rows)} sites, {share:.0%} of a site free on average")
