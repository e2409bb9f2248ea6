"""Which rule should choose the protected range? The study behind the default, on a real model and its collected inputs.

For every rule and threshold, per kind of site and over all: the share of free directions, the general energy kept, what
held-out general inputs of every domain and harmful inputs still have in the free space, and the ratio of the two. The
harmful figures come from held-out prompts too, because those that chose the space of `contrast` flatter it.

End to end: every constrained layer gets a random Gaussian update, projected into its free space and scaled to a fixed
share of its weight's norm (the same random numbers for every rule). How far do the model's answers to held-out prompts
then move, in KL(base || updated) per token? Low on general and high on harmful prompts is what the method needs; their
ratio is what is bought per unit of drift. Controls: the same update without a projection, and with the projector of
random directions of the default rule's ranks.

    python performance/rules.py --model results/model --activations results/activations \\
        --prompts results/prompts.parquet --out results/benchmarks [--blocks 2 --prompts-per-domain 4 --seeds 1]
"""

import argparse
import copy
import csv
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import torch
from common import conclude
from labels import place_labels
from matplotlib.figure import Figure
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nspo.activations.store import HARMFUL, ActivationStore
from nspo.bases.derived import random_like
from nspo.bases.file import NullSpaceBases
from nspo.bases.table import block_of, kind_of
from nspo.data.tables import Prompts
from nspo.files.atomic import atomic_path
from nspo.models.chat import chat_ids
from nspo.models.drift import FIGURES, Remembered, drift, token_weights
from nspo.models.generation import generate
from nspo.models.loading import load_model, load_tokenizer
from nspo.models.structure.linears import find_weights
from nspo.nullspace.basis import Kind, SiteBasis
from nspo.nullspace.projection import project_
from nspo.nullspace.spectra import contrast_free, energies, protected_rank, share, symmetric_eigh
from nspo.report import plots
from nspo.run.progress import track
from nspo.settings.bases import BasesSettings

GRID = {  # around the values in use: 5e-4 is the paper's, 5e-5 the release's, 0.9 to 0.99 continual learning's
    "contrast": (2.0, 3.0, 5.0),
    "energy": (0.9, 0.95, 0.99),
    "leakage": (0.1, 0.2),
    "relative": (5e-4, 5e-5),
    "absolute": (3e-3, 3e-2),
    "fraction": (0.5, 0.9),
    "rank": (128, 448),
}
DEFAULT = (BasesSettings().rule, BasesSettings().threshold)
NONE, RANDOM = ("no constraint", 0.0), ("random", DEFAULT[1])
FIRST_TOKENS = 4  # of an answer: where a refusal is decided
BATCH = 4  # prompts of one forward pass: few, so that short ones are not padded to long ones


Point = tuple[str, float]
Space = tuple[Tensor, Kind]


@dataclass(frozen=True)
class Choice:
    """What one rule makes of one site: the thinner side (d, m) float32, and the share of each sample left free."""

    basis: Tensor
    kind: Kind
    rank: int
    free: Mapping[str, float]


# ------------------------------------------------------------------------------------------- what a rule frees


def choices_of(store: ActivationStore, site: str) -> dict[Point, Choice]:
    """Every rule's choice at one site, from one eigendecomposition of its general second moment.

    Samples: `chosen on` (the general inputs behind the choice), `harmful chosen on`, and, held out, `general`, every
    domain, and `harmful`.
    """
    general, harmful = store.gram(site, "basis")[0], store.gram(site, "basis", [HARMFUL])[0]
    samples = {"chosen on": general, "harmful chosen on": harmful, "general": store.gram(site, "validation")[0]}
    samples |= {domain: store.gram(site, "validation", [domain])[0] for domain in store.domains("validation")}
    values, vectors = symmetric_eigh(general)
    profiles = {name: energies(vectors, gram) / gram.trace() for name, gram in samples.items()}
    stored = vectors.float()
    choices: dict[Point, Choice] = {}
    for rule, thresholds in GRID.items():
        for threshold in thresholds:
            if rule == "contrast":
                free = contrast_free(general, harmful, threshold)
                shares = {name: share(free, gram) for name, gram in samples.items()}
                choices[rule, threshold] = Choice(free.float(), "null", len(free) - free.shape[1], shares)
                continue
            rank = protected_rank(values, rule, threshold, vectors=vectors, validation_gram=samples["general"])
            shares = {name: float(profile[rank:].sum()) for name, profile in profiles.items()}
            thin = stored[:, :rank] if 2 * rank <= len(values) else stored[:, rank:]
            choices[rule, threshold] = Choice(thin, "range" if 2 * rank <= len(values) else "null", rank, shares)
    return choices


def spaces(name: Point, sites: Iterable[Mapping[Point, Choice]]) -> dict[str, float]:
    """Means over `sites` of what the point `name` leaves free there."""
    chosen = [site[name] for site in sites]
    samples = [sample for sample in chosen[0].free if sample not in ("chosen on", "harmful chosen on")]
    means = {sample: statistics.mean(choice.free[sample] for choice in chosen) for sample in chosen[0].free}
    return {
        "free_directions": statistics.mean(1 - choice.rank / len(choice.basis) for choice in chosen),
        "energy_kept": 1 - means["chosen on"],
        **{f"free_{sample}": means[sample] for sample in samples},
        "free_harmful_chosen_on": means["harmful chosen on"],
        "ratio": means[HARMFUL] / means["general"] if means["general"] > 1e-12 else 0.0,
    }


# ------------------------------------------------------------------------------------------- what an update does there


class Trial:
    """A model whose answers to held-out prompts are compared with those of its updated self."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, options: Any):
        self.tokenizer, self.model, self.tuned = tokenizer, model, copy.deepcopy(model)
        self.base = Remembered(model)  # it is asked the same for every rule
        table = Prompts(options.prompts)
        asked = {
            domain: rows
            for role in ("general", "benign", HARMFUL)
            for domain, rows in table.by_domain(role, "heldout", options.prompts_per_domain).items()
        }
        self.harmful = list(table.by_domain(HARMFUL, "heldout"))
        self.domains = [domain for domain, rows in asked.items() for _ in rows]
        self.prompts = [chat_ids(tokenizer, row["prompt"]) for rows in asked.values() for row in rows]
        answers = dict(generate(model, tokenizer, self.prompts, options.answer_tokens, BATCH, "base answers"))
        self.answers = [answers[index] for index in range(len(self.prompts))]

    def update(self, bases: Mapping[str, Space | None], size: float, seed: int) -> int:
        """Give every layer of `bases` its base weight and a random update inside its free space (None: anywhere).

        Returns:
            How many layers could move.
        """
        generator = torch.Generator().manual_seed(seed)
        before, after = find_weights(self.model, bases), find_weights(self.tuned, bases)
        moved = 0
        for layer, basis in bases.items():
            place = before[layer]
            weight = place.parameter.detach()
            delta = torch.randn(weight.shape, generator=generator)
            rows = place.rows(delta)
            if basis is not None:
                project_(rows, *basis)
            norm = float(delta.norm())
            moved += norm > 0
            after[layer].parameter.data.copy_(weight).add_(delta, alpha=size * float(weight.norm()) / (norm or 1.0))
        return moved

    def measure(self, description: str) -> dict[str, float]:
        """KL per token of every domain, and of all general and all harmful ones, there over the first tokens too.

        Harmless look-alikes count as general, as they do among the protected inputs.
        """
        lengths = [len(answer) for answer in self.answers]
        weights = token_weights(lengths, FIRST_TOKENS)
        found = drift(
            self.base, self.tuned, self.tokenizer, self.prompts, self.answers, FIRST_TOKENS, BATCH, description
        )
        members = {name: [i for i, domain in enumerate(self.domains) if domain == name] for name in set(self.domains)}
        members["general"] = [i for i, domain in enumerate(self.domains) if domain not in self.harmful]
        members[HARMFUL] = [i for i, domain in enumerate(self.domains) if domain in self.harmful]

        def mean(figure: str, indices: Sequence[int]) -> float:
            total = sum(weights[figure][i] for i in indices)
            return sum(found[figure][i] * weights[figure][i] for i in indices) / total

        measured = {f"kl_{name}": mean(FIGURES[0], indices) for name, indices in sorted(members.items())}
        return measured | {f"kl_first_{name}": mean(FIGURES[1], members[name]) for name in ("general", HARMFUL)}


def end_to_end(trial: Trial, bases: Mapping[str, Space | None], size: float, seeds: int, name: str) -> dict[str, Any]:
    """Means over seeds of what a random update in these free spaces does, and every seed's own ratio."""
    runs = []
    for seed in range(seeds):
        moved = trial.update(bases, size, seed)
        runs.append(trial.measure(name))
    means: dict[str, Any] = {key: statistics.mean(run[key] for run in runs) for key in runs[0]}
    ratios = [run[f"kl_{HARMFUL}"] / run["kl_general"] if run["kl_general"] > 0 else 0.0 for run in runs]
    return means | {"kl_ratio": statistics.mean(ratios), "kl_ratio_by_seed": ratios, "moved_layers": moved}


# ------------------------------------------------------------------------------------------- the study


def study(options: argparse.Namespace) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """One row per rule, threshold and control over all sites; and one per kind of site, rule and threshold."""
    store = ActivationStore(options.activations)
    names = [name for name in store.sites if not options.blocks or block_of(name) < options.blocks]
    sites: dict[str, dict[Point, Choice]] = {}
    with track("spaces", len(names), "site") as bar:
        for name in names:
            sites[name] = choices_of(store, name)
            bar.update(1)
    kinds: dict[str, list[Mapping[Point, Choice]]] = {}
    for name, choices in sites.items():
        kinds.setdefault(kind_of(store.sites[name].layers), []).append(choices)
    points = [(rule, threshold) for rule, thresholds in GRID.items() for threshold in thresholds]
    known = {point: spaces(point, sites.values()) for point in points}
    unknown = dict.fromkeys(known[DEFAULT])
    known[RANDOM] = unknown | {"free_directions": known[DEFAULT]["free_directions"]}
    known[NONE] = unknown | {"free_directions": 1.0}

    trial = Trial(load_model(options.model), load_tokenizer(options.model), options)
    updates = updates_of(store, sites, points)
    rows = [
        {"rule": rule, "threshold": threshold, **known[rule, threshold]}
        | end_to_end(trial, spaces_of_layers, options.size, options.seeds, f"{rule} {threshold:g}")
        for (rule, threshold), spaces_of_layers in updates.items()
    ]
    by_kind = [
        {"kind": kind, "rule": rule, "threshold": threshold, **spaces((rule, threshold), members)}
        for kind, members in kinds.items()
        for rule, threshold in points
    ]
    return rows, by_kind


def updates_of(
    store: ActivationStore, sites: Mapping[str, Mapping[Point, Choice]], points: Iterable[Point]
) -> dict[Point, dict[str, Space | None]]:
    """The free space of every constrained layer, for every point and control."""
    layers = {layer: name for name in sites for layer in store.sites[name].layers}
    updates: dict[Point, dict[str, Space | None]] = {
        point: {layer: (sites[name][point].basis, sites[name][point].kind) for layer, name in layers.items()}
        for point in points
    }
    random = random_bases(store, sites)
    updates[RANDOM] = {layer: (random.for_layer(layer).basis, random.for_layer(layer).kind) for layer in layers}
    updates[NONE] = dict.fromkeys(layers)
    return updates


def random_bases(store: ActivationStore, sites: Mapping[str, Mapping[Point, Choice]]) -> NullSpaceBases:
    """Random directions of the default rule's ranks."""
    made = []
    for name, choices in sites.items():
        choice, site = choices[DEFAULT], store.sites[name]
        rule = {"rank": choice.rank, "rule": DEFAULT[0], "threshold": DEFAULT[1], "tokens": 0}
        like = {"site": name, "layers": site.layers, "width": site.width, "eigenvalues": torch.ones(site.width)}
        made.append(SiteBasis(**like, **rule, kind=choice.kind, basis=choice.basis))
    return random_like(NullSpaceBases(made, store.manifest["layer_norms"]), seed=0)


def draw(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """KL on harmful prompts over KL on general ones, a line per rule through its thresholds.

    On the dashed line through the unconstrained update harmful and general answers move in its proportion; above it,
    harmful ones move more.
    """
    moved = [row for row in rows if row["kl_general"] > 0 and row[f"kl_{HARMFUL}"] > 0]
    palette = dict(zip(GRID, (*plots.SITES, plots.SPARE[3]), strict=True))
    with matplotlib.rc_context(plots.STYLE):
        figure = Figure(figsize=(7.2, 5.0))
        axes = figure.add_subplot()
    axes.set(xscale="log", yscale="log", xlabel="KL per token, general prompts", ylabel="KL per token, harmful prompts")
    labels = []
    for index, rule in enumerate(dict.fromkeys(row["rule"] for row in moved)):
        mine = [row for row in moved if row["rule"] == rule]
        points = [(row["kl_general"], row[f"kl_{HARMFUL}"]) for row in mine]
        look = {"color": palette.get(rule, plots.BASE), "marker": plots.MARKERS[index % len(plots.MARKERS)]}
        axes.plot(*zip(*points, strict=True), **look, markersize=6, markeredgecolor="white", linewidth=1)
        names = [f"{rule} {row['threshold']:g}" if rule in GRID else rule for row in mine]
        labels += [(name, look["color"], point) for name, point in zip(names, points, strict=True)]
    axes.margins(0.14)
    axes.set(xlim=axes.get_xlim(), ylim=axes.get_ylim())  # the dashed line must not stretch them
    place_labels(figure, axes, labels)
    x, y = labels[-1][2]
    axes.axline((x, y), (x / 10, y / 10), color=plots.MUTED, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    return figure


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """One line per row, atomically."""
    with atomic_path(path) as scratch, scratch.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of the base model")
    parser.add_argument("--activations", type=Path, required=True, help="its store, with harmful and held-out inputs")
    parser.add_argument("--prompts", type=Path, required=True, help="prompts.parquet")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--blocks", type=int, default=0, help="constrain and move the first blocks only; 0: all")
    parser.add_argument("--prompts-per-domain", type=int, default=8, help="held-out prompts of every domain")
    parser.add_argument("--answer-tokens", type=int, default=16, help="tokens of the base model's answers")
    parser.add_argument("--seeds", type=int, default=2, help="random updates per rule")
    parser.add_argument("--size", type=float, default=0.02, help="norm of an update, over that of its weight")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    rows, by_kind = study(options)
    write_csv(options.out / "rules.csv", rows)
    write_csv(options.out / "rules_by_kind.csv", by_kind)
    settings = {key: value for key, value in vars(options).items() if not isinstance(value, Path)}
    conclude("rules", options.out, rows, settings=settings)
    plots.save(draw(rows), options.out, "rules")


if __name__ == "__main__":
    main()
