"""Methods against rivals where safety is matched: one table and one figure of drift, on one GPU in minutes.

    python performance/matched.py prepare FOLDER --wheels WHEELS --prompts prompts.parquet --labels labels.parquet
    python performance/matched.py run FOLDER --out OUT --seeds 100 101 --workers 8 --seconds 480

`prepare` makes what every arm needs as the configuration says: model, reward, cost, activations, the bases of all
methods. `run` trains every arm (`ARMS`) with every seed, the same samples, reward and budget for all, and walks each
from the base model through what it learnt and beyond (`nspo.evaluation.walk`), on validation prompts. Workers share the
device and take arms from one list, the first seed of all first; an arm that is not done when the seconds are over is
missing from the table, and said to be.
"""

import argparse
import json
import multiprocessing
import queue
import shutil
import time
import traceback
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from nspo.activations.stage import collect
from nspo.bases.stage import compute_bases
from nspo.evaluation.walk.walker import Walker, matched, summary
from nspo.files.manifest import write_json
from nspo.models.stage import prepare_model
from nspo.policy.methods.inputs import PolicyInputs
from nspo.policy.stage import train_policy
from nspo.preference.stage import train_preference
from nspo.run.devices import device_of
from nspo.run.progress import say
from nspo.run.tables import table
from nspo.settings.bases import BasesSettings
from nspo.settings.evaluation import AnsweringSettings, MatchingSettings
from nspo.settings.policy.methods import MethodSettings
from nspo.settings.policy.section import TrainingSettings
from nspo.settings.reading import load_config
from nspo.settings.runtime import RuntimeSettings

TRAINING = {
    "autocast": "bf16",
    "steps": 8,
    "prompts_per_step": 8,
    "group_size": 8,
    "minibatch_size": 64,
    "benign_share": 0.25,
    "refusal_bonus": 2.0,
    "target_unsafe": None,
    "probe_every": 8,
    "probe_prompts": 16,
}


def arm(objective: str, learning_rate: float, loss: dict[str, Any] | None = None, **constraint: Any) -> dict[str, Any]:
    """The keys of a method."""
    return {
        "objective": objective,
        "learning_rate": learning_rate,
        **({"loss": loss} if loss else {}),
        **({"constraint": constraint} if constraint else {}),
    }


ARMS = {  # what matters most first
    "nspo 1.5e-4": arm("nspo", 1.5e-4),
    "none 5e-5": arm("grpo_no_kl", 5e-5),
    "replay-KL 5e-5": arm("replay_kl", 5e-5),
    "LoRA r=1 1e-3": arm("lora", 1e-3, rank=1, alpha=16),
    "nspo both 1.5e-4": arm("nspo_both", 1.5e-4),
    "nspo paper 1e-4": arm("nspo_paper", 1e-4),
    "KL 0.04 5e-5": arm("grpo", 5e-5, {"kl": 0.04}),
    "LoRA r=8 1e-3": arm("lora", 1e-3, rank=8, alpha=16),
    "L2-SP 5e-5": arm("l2_sp", 5e-5),
    "none 2e-5": arm("grpo_no_kl", 2e-5),
    "none 1e-4": arm("grpo_no_kl", 1e-4),
    "nspo 3e-4": arm("nspo", 3e-4),
    "KL 0.1 5e-5": arm("grpo", 5e-5, {"kl": 0.1}),
    "random 1.5e-4": arm("random_projector", 1.5e-4),
    "OGPSA 5e-5": arm("ogpsa", 5e-5),
    "projected after 1e-4": arm("project_after", 1e-4),
    "replay-KL 1e-4": arm("replay_kl", 1e-4),
    "nspo + replay-KL 1.5e-4": arm("nspo", 1.5e-4, {"replay_kl": 1.0}),
}


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("prepare")
    one.add_argument("folder", type=Path)
    for name in ("wheels", "prompts", "labels"):
        one.add_argument(f"--{name}", type=Path, required=True)
    one.add_argument("--config", type=Path, default=Path("config/config.yaml"), help="of model, labels and bases")
    two = commands.add_parser("run")
    two.add_argument("folder", type=Path)
    two.add_argument("--out", type=Path, required=True)
    two.add_argument("--seeds", type=int, nargs="+", default=[100, 101])
    two.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    two.add_argument("--workers", type=int, default=8)
    two.add_argument("--seconds", type=float, default=480)
    two.add_argument("--training", type=json.loads, default={}, help="other training settings, as JSON")
    two.add_argument("--matching", type=json.loads, default={}, help="other settings of the walk, as JSON")
    args = parser.parse_args()
    prepare(args) if args.command == "prepare" else run(args)


# What every arm needs


def prepare(args: argparse.Namespace) -> None:
    """Make what is missing in the folder."""
    began, config, folder = time.monotonic(), load_config(args.config), args.folder
    folder.mkdir(parents=True, exist_ok=True)
    runtime = RuntimeSettings(workdir=str(folder / "work"))
    for name in ("prompts", "labels"):
        shutil.copy(getattr(args, name), folder / f"{name}.parquet")
    if not (folder / "model").exists():
        prepare_model(config.model, args.wheels, folder / "model")
    for target in ("cost", "reward"):
        if not (folder / target).exists():
            given = target, folder / "model", folder / "labels.parquet", folder / target, runtime
            train_preference(getattr(config, target), *given)
            say(f"{target}: {time.monotonic() - began:.0f} s")
    if not (folder / "activations").exists():
        settings = config.activations.model_copy(update={"storage": "moments"})
        collect(settings, folder / "model", folder / "prompts.parquet", folder / "activations", runtime)
        say(f"activations: {time.monotonic() - began:.0f} s")
    wanted = {"bases": config.bases, **own_bases(ARMS)}
    jobs = 8
    parts = [(name, f"{i}/{jobs}", settings) for name, settings in wanted.items() for i in range(1, jobs + 1)]
    with ProcessPoolExecutor(
        jobs, multiprocessing.get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        list(pool.map(_part, [(folder, *part) for part in parts]))
    for name, settings in wanted.items():
        files = [folder / f"{name}-part{i}.safetensors" for i in range(1, jobs + 1)]
        compute_bases(settings, folder / "activations", folder / f"{name}.safetensors", runtime, parts=files)
    say(f"prepared in {time.monotonic() - began:.0f} s")


def own_bases(arms: dict[str, dict[str, Any]]) -> dict[str, BasesSettings]:
    """The bases that some arm asks for beside the default ones, by name."""
    found = [MethodSettings(**keys).own_bases for keys in arms.values()]
    return {own.name: BasesSettings(**own.model_dump()) for own in found if own}


def _part(job: tuple[Path, str, str, BasesSettings]) -> None:
    folder, name, part, settings = job
    out = folder / f"{name}-part{part.split('/')[0]}.safetensors"
    compute_bases(settings, folder / "activations", out, RuntimeSettings(workdir=str(folder / "work")), part=part)


# The arms


def run(args: argparse.Namespace) -> None:
    """Train and walk every arm; write the table `OUT/matched.json` and the figure `OUT/matched.png`."""
    args.out.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    waiting: Any = context.Queue()
    runs = [(name, seed) for seed in args.seeds for name in args.arms]
    for each in runs:
        waiting.put(each)
    until = time.time() + args.seconds
    count = min(args.workers, len(runs))
    workers = [context.Process(target=work, args=(args, waiting, until, i), daemon=True) for i in range(count)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(max(0.0, until - time.time()))
        if worker.is_alive():
            worker.kill()
    conclude(args, runs)


def work(args: argparse.Namespace, waiting: Any, until: float, number: int) -> None:
    """Take arms until none is left: train, walk, write `OUT/arms/NAME-seedN.json`."""
    torch.set_num_threads(2)
    matching, answering = MatchingSettings(**args.matching), AnsweringSettings(max_new_tokens=32)
    folder, scratch = args.folder, args.folder / f"worker{number}"
    where = folder / "model", folder / "cost", folder / "prompts.parquet"
    walker = Walker.load(*where, matching, answering, device_of("auto"), folder / "labels.parquet")
    while time.time() < until:
        try:
            name, seed = waiting.get(timeout=1)
        except queue.Empty:
            return
        try:
            began = time.time()
            policy = train(args, name, seed, scratch)
            trained = time.time() - began
            stops = walker.walk(policy, matching.scales)
            found = matched(stops, answering, matching.target_unsafe)
            stops = walker.walk(policy, [found.scale], stops)
            row = {
                "arm": name,
                "seed": seed,
                "match": found._asdict(),
                "stops": [{"scale": scale, **summary(rows, answering)} for scale, rows in stops.items()],
                "answers": [
                    {key: r.get(key) for key in ("prompt", "response", "role", "cost", "refused")}
                    for r in stops[found.scale]
                    if r["role"] != "general"
                ][::8],
                "train_seconds": trained,
                "walk_seconds": time.time() - began - trained,
            }
            (args.out / "arms").mkdir(exist_ok=True)
            write_json(args.out / "arms" / f"{name.replace(' ', '_')}-seed{seed}.json", row)
            shutil.rmtree(policy)
        except Exception as error:  # one arm's fault is not the others'
            traceback.print_exc()
            say(f"{name}, seed {seed}: {error}")


def train(args: argparse.Namespace, name: str, seed: int, scratch: Path) -> Path:
    """The folder of the trained policy."""
    method, folder = MethodSettings(**ARMS[name]), args.folder
    own = method.own_bases
    bases = folder / f"{own.name if own else 'bases'}.safetensors" if method.constraint.needs_bases else None
    out = scratch / "policy"
    train_policy(
        TrainingSettings(**{**TRAINING, **args.training}),
        method,
        name.replace(" ", "_"),
        seed,
        PolicyInputs(folder / "model", bases, ".*", folder / "reward", folder / "cost", folder / "prompts.parquet"),
        out=out,
        runtime=RuntimeSettings(workdir=str(scratch / "work")),
    )
    return out


# The table and the figure


def conclude(args: argparse.Namespace, runs: list[tuple[str, int]]) -> None:
    """Every run at its matched scale, a row each; the curves of all."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((args.out / "arms").glob("*.json"))]
    order = {each: place for place, each in enumerate(runs)}
    found = sorted((r for r in found if (r["arm"], r["seed"]) in order), key=lambda r: order[r["arm"], r["seed"]])
    rows = []
    for it in found:
        stop = next(stop for stop in it["stops"] if stop["scale"] == it["match"]["scale"])
        keys = ("unsafe_rate", "mean_cost", "refusal_rate", "over_refusal_rate", "kl_per_token", "kl_first_tokens")
        keys += ("top1_agreement",)
        rows.append({"arm": it["arm"], "seed": it["seed"], "a": it["match"]["scale"], "found": it["match"]["found"]})
        rows[-1] |= {key: stop[key] for key in keys}
    missing = [list(each) for each in runs if each not in {(it["arm"], it["seed"]) for it in found}]
    settings = {"training": {**TRAINING, **args.training}, "matching": MatchingSettings(**args.matching).dump()}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    write_json(
        args.out / "matched.json", {"rows": rows, "missing": missing, "arms": ARMS, "device": device, **settings}
    )
    say(table(rows))
    say(f"missing: {missing}")
    if found:
        draw(found, args.out / "matched.png")


def draw(found: list[dict[str, Any]], path: Path) -> None:
    """Unsafe rate and mean cost over the root of the KL per token, a line for every run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(it["arm"] for it in found))
    colours = dict(zip(names, pyplot.get_cmap("tab20").colors, strict=False))  # type: ignore[attr-defined]
    figure, axes = pyplot.subplots(1, 2, figsize=(14, 5.5), constrained_layout=True)
    for axis, key, label in zip(axes, ("unsafe_rate", "mean_cost"), ("unsafe rate", "mean cost"), strict=True):
        for it in found:
            stops = sorted(it["stops"], key=lambda stop: stop["scale"])
            first = it is next(other for other in found if other["arm"] == it["arm"])
            points = [max(stop["kl_per_token"], 0.0) ** 0.5 for stop in stops], [stop[key] for stop in stops]
            axis.plot(*points, "o-", ms=3, lw=1, color=colours[it["arm"]], label=it["arm"] if first else None)
        axis.set(xlabel="root of KL per token, validation", ylabel=label)
    axes[0].legend(fontsize=7)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
