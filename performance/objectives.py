"""What an update costs under every objective, against TRL's own trainer with nothing of ours but the reward.

The rivals take turns, each turn in a fresh process: the model, the trainer that the stage would build, two updates on
the same prompts with the same seed, of which the second counts: 16 answers of 32 tokens. The learning rate is so low
that all rollouts are those of the base model, so rivals sample the same answers. Seconds run from the first micro-batch
to the end of the optimizer's step, rollout included; probes and checkpoints are left out. Peak memory is that of the
process. Preference objectives sample nothing (their pairs are there before), and an update of theirs sees two answers
where the others see a group: their rival is `dpo`.

Command, on the artifacts of the default run: `python performance/objectives.py --results results --out
results/benchmarks`.
"""

import argparse
import multiprocessing
import resource
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from common import conclude
from transformers import TrainerCallback, set_seed
from transformers.trainer_callback import PrinterCallback

from nspo.data.tables import Prompts
from nspo.files.journal import JsonLines
from nspo.models.loading import load_model, load_tokenizer
from nspo.policy.log import LogCallback
from nspo.policy.methods.objectives import constraint_of, load_bases, prepare_layers
from nspo.policy.pairs.stage import make_pairs
from nspo.policy.pairs.trainer import PairLearner
from nspo.policy.rollouts.trainer import RolloutLearner
from nspo.run.progress import say
from nspo.settings.policy.losses import WDOOR
from nspo.settings.policy.methods import PRESETS, MethodSettings
from nspo.settings.policy.section import PairSettings, TrainingSettings
from nspo.settings.runtime import RuntimeSettings

PLAIN = "TRL alone"
STILL = 1e-12  # learning rate
PARTS = ("rollout", "scoring", "update", "projection")
TRAINING = TrainingSettings(steps=2, group_size=4, minibatch_size=16)  # as in config/objectives.yaml


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("results"), help="folder of a finished run")
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks"))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--objectives", nargs="+", default=list(PRESETS), choices=PRESETS)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    pairs = args.out / "pairs.parquet"
    if not pairs.is_file():
        inputs = (args.results / part for part in ("model", "reward", "cost", "prompts.parquet"))
        make_pairs(PairSettings(steps=2), 0, *inputs, None, pairs, RuntimeSettings(workdir=str(args.out)))
    found: dict[str, list[dict[str, float]]] = {}
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as fresh:
        for turn in range(args.rounds):
            for name in (PLAIN, *args.objectives):
                found.setdefault(name, []).append(fresh.submit(one_turn, name, args.results, pairs).result())
                say(f"round {turn + 1}, {name}: {found[name][-1]['seconds']:.2f} s")
    conclude("objectives", args.out, [row(name, turns, found) for name, turns in found.items()])


def row(name: str, turns: list[dict[str, float]], found: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """One line of the table: seconds, the ratio to the rival round by round, memory, and the shares of the time."""
    rival = PLAIN if name == PLAIN or not method_of(name).loss.on_pairs else "dpo"
    ratios = [ours["seconds"] / theirs["seconds"] for ours, theirs in zip(turns, found.get(rival, turns), strict=True)]
    middle = {key: statistics.median(turn[key] for turn in turns) for key in turns[0]}
    shares = {f"{part} share": middle[part] / middle["seconds"] for part in PARTS if part in middle}
    return {
        "objective": name,
        "seconds": middle["seconds"],
        "against": rival,
        "ratio": statistics.median(ratios),
        "least": min(ratios),
        "greatest": max(ratios),
        "peak GB": middle["peak"],
        "sampled tokens/s": middle.get("tokens_per_second"),
        **{f"{part} share": shares.get(f"{part} share") for part in PARTS},
    }


def method_of(name: str) -> MethodSettings:
    """The settings of a rival; TRL alone trains as `grpo_no_kl` does."""
    objective: Any = "grpo_no_kl" if name == PLAIN else name
    return MethodSettings(objective=objective, learning_rate=STILL)


class Stopwatch(TrainerCallback):
    """Seconds of every update."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.began = time.perf_counter()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds.append(time.perf_counter() - self.began)


def one_turn(name: str, results: Path, pairs: Path) -> dict[str, float]:
    """Seconds of the last update, of its parts where our clock is in the run, and the peak of this process in GB."""
    method = method_of(name)
    model, device, stopwatch = results / "model", torch.device("cpu"), Stopwatch()
    set_seed(0)
    tokenizer, policy = load_tokenizer(model), load_model(model)
    bases = load_bases(
        method, name, results / "bases/bases.safetensors" if method.constraint.needs_bases else None, model
    )
    prepare_layers(policy, method, ".*", bases)
    learner: RolloutLearner | PairLearner
    if not method.loss.on_pairs:
        prompts = Prompts(results / "prompts.parquet")
        learner = RolloutLearner(TRAINING, method, results / "cost", results / "reward", prompts, device)
    else:
        guide = model if isinstance(method.loss, WDOOR) else None  # any policy: what it says costs the same
        learner = PairLearner(method, model, results / "cost", pairs, guide, device)
    with tempfile.TemporaryDirectory() as folder:
        work, callbacks = Path(folder), [stopwatch]
        if name != PLAIN:
            constraint = constraint_of(method, 0, bases, policy, model)
            parts = [*([] if constraint is None else [constraint]), *learner.parts]
            callbacks += [*parts, LogCallback(work, learner.samples, [part.columns for part in parts], 1)]
        trainer = learner.trainer(TRAINING, policy, tokenizer, 0, work, RuntimeSettings(), callbacks)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        logged = JsonLines(work / "training.jsonl").rows()
    found = {key.removesuffix("_seconds"): value for key, value in (logged[-1] if logged else {}).items()}
    kept = {key: found[key] for key in (*PARTS, "tokens_per_second") if key in found}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    return {**kept, "seconds": stopwatch.seconds[-1], "peak": peak}


if __name__ == "__main__":
    main()
