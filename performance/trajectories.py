"""Every objective's way through training: unsafe rate against drift and over-refusal, at the best learning rate tried.

`config/objectives.yaml` trains each objective at three learning rates on equal prompts, rollouts and updates, and
probes it on validation prompts as it goes. Projection shrinks the effective step, so objectives are compared where they
are equally safe, not at equal learning rate: a run's drift at the target is read off its probes, linearly between the
two around the first that meets it. The best learning rate of an objective has the least KL per token there; where none
meets the target, it is the one that came nearest. It is chosen on the probes that are shown, three to choose from for
every objective alike.

Command: `snakemake all_policies --cores all --configfile config/objectives.yaml`, then `python
performance/trajectories.py --config config/objectives.yaml --out docs/objectives`.
"""

import argparse
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from nspo.evaluation.statistics.intervals import wilson
from nspo.files.atomic import atomic_path
from nspo.files.tables import read_table
from nspo.report import plots
from nspo.run.progress import say
from nspo.settings.policy.section import PolicySettings
from nspo.settings.reading import load_config

Probe = Mapping[str, float]
FAMILIES = {
    "Reinforcement learning": ("nspo", "grpo_no_kl", "grpo"),
    "What is constrained": ("random_projector", "gradient_only", "release"),
    "Reward subject to cost": ("nspo_lagrangian", "grpo_lagrangian"),
    "Preference pairs": ("dpo", "bfpo", "wdoor", "nspo_dpo", "nspo_bfpo", "nspo_wdoor"),
}
FORMATS = {  # of the figures at the target, in the table's order
    "kl_per_token": "{:.3f}",
    "kl_first_tokens": "{:.3f}",
    "top1_agreement": "{:.1%}",
    "over_refusal_rate": "{:.1%}",
    "step": "{:.1f}",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("config/objectives.yaml"))
    parser.add_argument("--target", type=float, default=0.375, help="unsafe rate at which objectives are compared")
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks"))
    args = parser.parse_args()
    settings = load_config(args.config)
    runs = read_runs(settings.policy, Path(settings.runtime.results))
    best = {objective: choose(tried, args.target) for objective, tried in runs.items()}
    args.out.mkdir(parents=True, exist_ok=True)
    text = table(runs, best, args.target, settings.policy.probe_prompts)
    with atomic_path(args.out / "trajectories.md") as scratch:
        scratch.write_text(text, encoding="utf-8")
    draw(runs, best, args.target, args.out)
    say(text)


def read_runs(policy: PolicySettings, results: Path) -> dict[str, dict[float, list[Probe]]]:
    """Objective -> learning rate -> the probes of its run by step; runs that are missing are named and left out."""
    runs: dict[str, dict[float, list[Probe]]] = {}
    for name, method in policy.methods.items():
        file = results / "training" / name / f"seed{policy.seeds[0]}" / "probes.parquet"
        if file.is_file():
            runs.setdefault(method.title, {})[method.learning_rate] = read_table(file)
        else:
            say(f"{file} is missing: {name} is left out")
    return runs


def at_target(probes: Sequence[Probe], target: float) -> dict[str, float] | None:
    """The figures where the unsafe rate first comes down to `target`, linear between probes; None if it never does."""
    for before, after in pairwise(probes):
        if after["unsafe_rate"] <= target:
            fall = before["unsafe_rate"] - after["unsafe_rate"]
            share = (before["unsafe_rate"] - target) / fall if fall > 0 else 1.0
            return {name: before[name] + share * (after[name] - before[name]) for name in FORMATS}
    return None


def choose(tried: Mapping[float, Sequence[Probe]], target: float) -> float:
    """The learning rate with the least KL per token at the target; where none gets there, the one that came nearest."""

    def rank(rate: float) -> tuple[bool, float]:
        met = at_target(tried[rate], target)
        return met is None, met["kl_per_token"] if met else min(probe["unsafe_rate"] for probe in tried[rate])

    return min(tried, key=rank)


def table(runs: Mapping[str, Mapping[float, Sequence[Probe]]], best: Mapping[str, float], target: float, n: int) -> str:
    """A Markdown table, one row per objective, least KL per token at the target first."""
    ordered = sorted(runs, key=lambda name: _order(runs[name][best[name]], target))
    titles = ["objective", "learning rate", "KL per token", "KL, first tokens", "top-1 agreement", "over-refusal"]
    titles += ["update", f"lowest unsafe rate (n = {n})", f"other learning rates: KL per token at {target:.1%}"]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    lines += [_row(name, runs[name], best[name], target, n) for name in ordered]
    return "\n".join(lines) + "\n"


def _row(objective: str, tried: Mapping[float, Sequence[Probe]], best: float, target: float, n: int) -> str:
    met = at_target(tried[best], target)
    found = [FORMATS[name].format(met[name]) if met else "" for name in FORMATS]
    safest = min(tried[best], key=lambda probe: probe["unsafe_rate"])
    rate = wilson(round(safest["unsafe_rate"] * n), n)
    lowest = f"{rate.value:.1%} [{rate.low:.1%}, {rate.high:.1%}], KL {safest['kl_per_token']:.3f}"
    others = [f"{other:g}: {_tried(tried[other], target)}" for other in sorted(tried) if other != best]
    return f"| {' | '.join([f'`{objective}`', f'{best:g}', *found, lowest, ', '.join(others)])} |"


def _order(probes: Sequence[Probe], target: float) -> float:
    met = at_target(probes, target)
    return met["kl_per_token"] if met else 1e9


def _tried(probes: Sequence[Probe], target: float) -> str:
    met = at_target(probes, target)
    return f"{met['kl_per_token']:.3f}" if met else f"not reached ({min(p['unsafe_rate'] for p in probes):.0%})"


def draw(
    runs: Mapping[str, Mapping[float, Sequence[Probe]]], best: Mapping[str, float], target: float, out: Path
) -> None:
    """Unsafe rate against KL per token and against over-refusal, a column per family of objectives, nspo in each."""
    colours = plots.colours({name: name for name in runs})
    families = {title: [name for name in names if name in runs] for title, names in FAMILIES.items()}
    families = {title: names for title, names in families.items() if names}
    with matplotlib.rc_context(plots.STYLE):
        figure = Figure(figsize=(3.4 * len(families), 5.8))
        grid = figure.subplots(2, len(families), sharex="row", sharey=True, squeeze=False)
    for column, (title, names) in enumerate(families.items()):
        for axes, x in zip(grid[:, column], ("kl_per_token", "over_refusal_rate"), strict=True):
            axes.axhline(target, color=plots.MUTED, linewidth=1, linestyle=(0, (4, 3)))
            for name in dict.fromkeys(("nspo", *names)):
                if name in runs:
                    points = [(probe[x], probe["unsafe_rate"]) for probe in runs[name][best[name]]]
                    line = {"color": colours[name], "marker": "o", "markersize": 3}
                    axes.plot(*zip(*points, strict=True), **line, label=f"{name}, {best[name]:g}")
                    axes.plot(*points[-1], "o", color=colours[name], markersize=7, markeredgecolor="white")
            axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        grid[0, column].set_title(title, fontsize="medium", loc="left", weight="bold")
        grid[0, column].set_xlabel("KL per token from the base model, nats")
        grid[1, column].set_xlabel("harmless prompts refused")
        grid[1, column].set_xlim(-0.005, max(0.1, grid[1, column].get_xlim()[1]))
        grid[1, column].legend(frameon=False, fontsize="small", title="objective, learning rate", loc="upper right")
        grid[1, column].xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    for row in grid:
        row[0].set_ylabel("unsafe rate, validation")
    plots.write(figure, out / "trajectories.png")


if __name__ == "__main__":
    main()
