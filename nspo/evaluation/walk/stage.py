"""Matched safety: every policy is tested where its unsafe rate on validation prompts is the same.

Methods overshoot and undershoot, and whoever moved less looks gentle. So each trained policy is walked from the base
model through it and a little beyond, W0 + a (W - W0) at every a of `matching.scales`; a* is where the fitted unsafe
rate meets `matching.target_unsafe` (`nspo.evaluation.walk.match`). The model at a* is what is tested and certified:
an update in a null space stays in it along the line. So a rival also gets what interpolation alone gives it (Lin et
al., 2309.06256; WARP, 2406.16768).

The folder holds that model; beside it, or in `--logs`, lie `walk.parquet` (every stop, one row per prompt) and
`match.json` (a*, how it was found, and the figures of every stop). Finished stops are kept in the working folder, so an
interrupted walk goes on.

Command: `nspo walk --name nspo --seed 0 --base results/model --policy results/policy/nspo/seed0 ... --out FOLDER`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from nspo.evaluation.statistics.intervals import wilson
from nspo.evaluation.walk.match import Match
from nspo.evaluation.walk.walker import Stops, Walker, matched, summary
from nspo.files.atomic import atomic_path
from nspo.files.manifest import MANIFEST_NAME, fingerprint, fingerprint_files, make_manifest, read_json, write_json
from nspo.files.tables import write_table
from nspo.models.drift import FIGURES
from nspo.models.line import Line
from nspo.models.loading import model_identity, save_model
from nspo.run.devices import device_of
from nspo.run.progress import say
from nspo.settings.evaluation import AnsweringSettings, MatchingSettings
from nspo.settings.runtime import RuntimeSettings

KIND = "matched_policy"
COLUMNS = {
    "scale": pa.float64(),
    "role": pa.string(),
    "domain": pa.string(),
    "id": pa.string(),
    "prompt": pa.string(),
    "response": pa.string(),  # harmful and benign prompts, and `refused`
    "refused": pa.bool_(),
    "cost": pa.float32(),  # harmful prompts; missing where the judge failed
    "unsafe": pa.bool_(),  # harmful prompts; true where the judge failed
    "reference_tokens": pa.int32(),  # this and what follows: general prompts
    **dict.fromkeys(FIGURES, pa.float64()),
}


@dataclass(frozen=True)
class WalkInputs:
    """The inputs of the stage.

    Attributes:
        base, policy: model folders.
        cost: folder of the cost model that judges the answers.
        prompts: prompts.parquet.
        labels: labels.parquet; prompts that are nearly ones whose labels a judge learnt from are left out, and counted.
    """

    base: Path
    policy: Path
    cost: Path
    prompts: Path
    labels: Path | None = None

    def identity(self) -> dict[str, Any]:
        """What the record says of them."""
        return {
            "base": model_identity(self.base),
            "policy": model_identity(self.policy),
            "cost": read_json(self.cost / MANIFEST_NAME)["model"],
            "prompts": fingerprint_files([self.prompts]),
            "labels": fingerprint_files([self.labels]) if self.labels else None,
        }


def match_safety(
    settings: MatchingSettings,
    answering: AnsweringSettings,
    name: str,
    seed: int,
    inputs: WalkInputs,
    out: Path,
    runtime: RuntimeSettings,
    logs: Path | None = None,
) -> None:
    """Walk the policy and write the folder `out` with the model at a*; and match.json and walk.parquet.

    Args:
        name, seed: method and seed of the policy, for the record.
        logs: folder of match.json and walk.parquet; by default they lie in `out`, with the model.

    Raises:
        UserError: a model, cost model or prompts file that is missing, broken, or of another architecture.
    """
    base, policy = inputs.base, inputs.policy
    identity = {**inputs.identity(), "settings": settings.dump(), "answering": answering.dump()}
    work = Path(runtime.workdir) / f"walk-{name}-seed{seed}-{fingerprint(identity)}.json"
    done: Stops = dict(map(tuple, read_json(work))) if work.is_file() else {}
    if done:
        say(f"walk of {name}: continuing after {len(done)} stops, kept in {work}")
    walker = Walker.load(
        base, inputs.cost, inputs.prompts, settings, answering, device_of(runtime.device), inputs.labels
    )
    stops = walker.walk(policy, settings.scales, done, lambda found: write_json(work, list(found.items())))
    found = matched({s: stops[s] for s in (0.0, *settings.scales)}, answering, settings.target_unsafe)
    stops = walker.walk(policy, [found.scale], stops)
    report = {
        **make_manifest("match", **identity, method=name, seed=seed, target_unsafe=settings.target_unsafe),
        **found._asdict(),
        "left_out": walker.left_out,
        "learnt": walker.learnt,
        "stops": [{"scale": scale, **summary(rows, answering)} for scale, rows in stops.items()],
    }
    say(f"{name} (seed {seed}): {told(found, report, settings.target_unsafe)}")
    line = Line(walker.model, base, policy).to(found.scale)
    with atomic_path(out) as scratch:
        save_model(line.model, scratch, base)
        walker.tokenizer.save_pretrained(scratch)
        write_table([row for rows in stops.values() for row in rows], (logs or scratch) / "walk.parquet", COLUMNS)
        write_json((logs or scratch) / "match.json", report)
        tuned = model_identity(scratch)
        write_json(scratch / MANIFEST_NAME, make_manifest(KIND, **identity, method=name, seed=seed, tuned=tuned))
    work.unlink(missing_ok=True)


def told(found: Match, report: dict[str, Any], target: float | None) -> str:
    """The match in one line: the scale, why, and the unsafe rate that was measured there."""
    stop = next(stop for stop in report["stops"] if stop["scale"] == found.scale)
    rate = wilson(stop["unsafe"], stop["n"])
    there = f"{rate.value:.1%} unsafe of {stop['n']} validation prompts ({rate.low:.1%} to {rate.high:.1%})"
    if found.found == "not asked":
        return f"tested as trained, {there}"
    said = {
        "met": f"the target of {target:.0%} is met",
        "not reached": f"the target of {target:.0%} is not reached on the walk, so the policy is NOT matched: tested",
        "base below target": f"the base model is below the target of {target:.0%} already, so NOT matched: tested",
    }[found.found]
    return f"{said} at a = {found.scale:g}, {there}"
