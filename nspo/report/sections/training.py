"""The training section: what was set, and the curves that the runs logged."""

from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.figure import Figure

from nspo.report import plots
from nspo.report.plots import Figures
from nspo.report.runs import Run, series, trained_runs

# Key: title, unit, points of a run, whether they are shares.
CURVES: dict[str, tuple[str, str, Callable[[Run], list[tuple[float, float]]], bool]] = {
    "reward": ("Reward of sampled answers", "reward", lambda run: series(run.training, "reward"), False),
    "cost": ("Cost of sampled answers (above 0 is harmful)", "cost", lambda run: series(run.training, "cost"), False),
    "unsafe": ("Unsafe answers, validation probes", "share", lambda run: series(run.probes, "unsafe_rate"), True),
    "refused": ("Over-refusal, validation probes", "share", lambda run: series(run.probes, "over_refusal_rate"), True),
    "kl": ("KL per token, validation probes", "nats", lambda run: series(run.probes, "kl_per_token"), False),
    "kept": ("Gradient norm that the projection keeps", "share", lambda run: series(run.training, "kept"), True),
    "multiplier": ("Multiplier of the cost", "multiplier", lambda run: series(run.training, "multiplier"), False),
    "length": ("Length of sampled answers", "tokens", lambda run: series(run.training, "completion_length"), False),
}
ONLY_SOME_HAVE = {"multiplier"}  # curves that most methods have no use for: not missed where there are none


def training(runs: Sequence[Run], figures: Figures) -> dict[str, Any]:
    """Training curves, one row of facts per run, and the curves nobody logged."""
    found, missing = [], []
    for key, (title, *_) in CURVES.items():
        if figure := draw(runs, key):
            found.append(figures.add(f"training_{key}", figure, title))
        elif key not in ONLY_SOME_HAVE:
            missing.append(title)
    rows = [
        {
            "run": run,
            "settings": run.settings.get("nspo", {}),
            "idle": sum(row.get("zero_variance_groups") == 1 for row in run.training),
            "unread": sum(bool(row.get("unread_ends")) for row in run.training),
            "updates": max((row["step"] for row in run.training), default=None),
        }
        for run in trained_runs(runs)
    ]
    return {"figures": found, "missing": missing, "rows": rows}


def draw(runs: Sequence[Run], key: str) -> Figure | None:
    """One curve of `CURVES`, a line a run; None where nobody logged it."""
    _, unit, points, percent = CURVES[key]
    lines = [(run.label, run.colour, points(run)) for run in runs if points(run)]
    return plots.curves(lines, "update", unit, percent) if lines else None
