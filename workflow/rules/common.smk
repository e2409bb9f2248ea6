"""The checked settings, and the helpers that need Snakemake's own objects; the others stand in `nspo.workflow`."""

import json
import os
import re
import shlex
import signal
import sys
from pathlib import Path

# Jobs run the package that lies beside the Snakefile, or else the one installed for the Python that runs Snakemake.
os.environ.update(PATH=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
beside = Path(str(workflow.current_basedir)).parents[1]
if (beside / "nspo" / "workflow").is_dir():
    sys.path.insert(0, str(beside))
    os.environ.update(PYTHONPATH=os.pathsep.join([str(beside), os.environ.get("PYTHONPATH", "")]))

from importlib.metadata import version

from nspo.cli.main import RUNTIME_FLAGS, to_flags
from nspo.evaluation.benchmarks.loading import locate
from nspo.evaluation.benchmarks.registry import TASKS
from nspo.run import workflow_lock
from nspo.run.gpus import devices
from nspo.run.stage_code import code_hash as code
from nspo.settings.bases import ScreenSettings, SelectionSettings
from nspo.settings.data import LabelSettings, PromptSettings
from nspo.settings.evaluation import AnsweringSettings, BenchmarkSettings
from nspo.settings.judges import JudgeSettings
from nspo.settings.policy.losses import WDOOR
from nspo.settings.policy.methods import MethodSettings
from nspo.settings.policy.section import PairSettings, RolloutSettings, TrainingSettings
from nspo.sources import Source, wheel_folder
from nspo.workflow import inputs, launch
from nspo.workflow.configuration import settings_of
from nspo.workflow.copied import warn_if_copied
from nspo.workflow.parameters import benchmark_of, flags, folders, optional, part_of, tracked, with_own_wheels
from nspo.workflow.resources import requests
from nspo.workflow.whole import lacking

local_package = (beside / "pyproject.toml").is_file() and (beside / "nspo" / "workflow").is_dir()
os.environ.update(NSPO_PACKAGE=str(beside) if local_package else f"nspo=={version('nspo')}")  # for --sdm conda
signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # a cluster's warning is for the stages, which save and end
os.environ[workflow_lock.PARENT] = workflow_lock.this_process()
if workflow.is_main_process and not imported:
    running = workflow_lock.hold(Path(".snakemake"), workflow.local_exec)  # until this process ends

settings = (
    settings_of(config, where=f"the configuration of module {__name__}")
    if imported
    else settings_of(config, workflow.overwrite_configfiles, workflow.config_settings.config)
)
if workflow.is_main_process and not imported and not {"--touch", "-t"} & set(sys.argv):
    warn_if_copied(Path(settings.runtime.results), Path(".snakemake"))
prompt_settings = with_own_wheels(part_of(settings.data, PromptSettings))
label_settings = with_own_wheels(part_of(settings.data, LabelSettings))
judge_settings = part_of(settings.evaluation, JudgeSettings)
reward_judge = {"judge": settings.policy.judge} if settings.policy.judge else {}
resources = requests(settings)
precomputed = Source.parse(settings.bases.precomputed) if settings.bases.precomputed else None
claimed = workflow.is_main_process and workflow.local_exec and bool(devices())
BASES_FLAGS = ("rule", "threshold", "weights")
SAMPLING = [name for name in RolloutSettings.model_fields if name not in ("steps", "judge")]
SCREEN_FLAGS = [name for name in ScreenSettings.model_fields if name != "enabled"]
SHOWN = [name for name in type(settings).model_fields if name != "runtime"]
own_bases = {it.name: it for it in (method.own_bases for method in settings.policy.methods.values()) if it}
HEAVY_THREADS = 8  # capped to the cores there are, so on a small machine heavy stages run one by one


wildcard_constraints:
    wheel="|".join(map(re.escape, map(wheel_folder, settings.data.wheels))) or "none",
    method="|".join(map(re.escape, [inputs.BASE, *settings.policy.methods])),
    seed="|".join(map(str, {0, *settings.policy.seeds})),
    task="|".join(settings.benchmarks.tasks) or "none",
    part=r"\d+",
    selection="|".join(map(re.escape, own_bases)) or "none",
    parts=r"\d+",


def scratch(wildcards, threads):
    """Where an interrupted stage goes on from. Naming `threads` makes the value derived: it never causes a rerun."""
    return f"--workdir {shlex.quote(str(Path(rules.write_config.output.config).parent / '.work'))}"


def runtime(wildcards, threads):
    """How to run, not what to make."""
    return f"{to_flags(settings.runtime, RUNTIME_FLAGS)} {scratch(wildcards, threads)}"


def device(wildcards, threads):
    """The part of `runtime` that names no folder."""
    return to_flags(settings.runtime, ["device"])


def versions(wildcards, threads):
    """The libraries behind an artifact: a part of the key under which `--cache` shares it, and no reason to run again."""
    return " ".join(f"{name}=={version(name)}" for name in ("numpy", "safetensors", "scipy", "torch", "transformers"))


def start(processes=1, sharding="none"):
    """What starts a stage that runs a model."""
    sharded = str(workflow.source_path(f"../../config/accelerate/{sharding}.yaml")) if sharding != "none" else ""

    def text(wildcards, threads, resources):
        nodes, mpi = resources.get("nodes", 1), resources.get("mpi", "srun")
        return launch.launcher(processes, threads, sharded, resources.gpu if claimed else 0, nodes, mpi)

    return text


def source_files(section, sources):
    """The files behind the sources of a section, by key: files on disk, and the wheels that are fetched."""
    on_disk = inputs.files_on_disk(section, sources)
    fetched = expand("<results>/wheels/{wheel}/manifest.json", wheel=inputs.wheels(sources))
    return [*(map(local, on_disk) if imported else on_disk), *fetched]  # a module's prefix is for what it makes


def judge_files(section="evaluation.judges", judges=judge_settings.judges):
    """The files of the judges that are models on disk."""
    return source_files(section, inputs.judge_sources(judges))


def made_again(rule, output):
    """No input, but a look at a folder that was made before; where a file of it was lost, it is made again."""

    def look(wildcards):
        folder = str(getattr(getattr(rules, rule).output, output)).format(**wildcards)
        if workflow.is_main_process and (name := lacking(Path(folder))):
            print(f"{folder} lacks a whole {name}: it is made again", file=sys.stderr)
            workflow.dag.forcefiles.add(folder)
        return []

    return look


def every_policy(patterns):
    """The files of a rule for every method and seed."""
    return expand(patterns, method=settings.policy.methods, seed=settings.policy.seeds)


def model_of(wildcards):
    """The model that a method and a seed name; `base` is the one before training."""
    if wildcards.method == inputs.BASE:
        return rules.prepare_model.output.model
    return expand(rules.match_safety.output.policy, **wildcards)


def method_of(wildcards):
    """The settings of the method that a job is for."""
    return settings.policy.methods[wildcards.method]


def given_bases():
    """The bases that `bases.precomputed` names: a file on disk, or one that a storage plugin fetches; else None."""
    if precomputed is None or precomputed.kind == "hub":
        return None
    if precomputed.kind == "storage":
        return storage(precomputed.location)
    (file,) = source_files("bases", inputs.bases_source(precomputed))
    return file


bases_given = given_bases()  # now, so that a file which is not there is told before any work


def bases_file(wildcards):
    """The run's own bases, or those of `bases.precomputed`."""
    if precomputed is None:
        return rules.compute_bases.output.bases
    return bases_given or rules.fetch_bases.output.bases


def bases_of_method(wildcards):
    """The bases that a method trains with: its own, or those of all."""
    method = method_of(wildcards)
    if method.own_bases:
        return expand(rules.compute_own_bases.output.bases, selection=method.own_bases.name)
    return bases_file(wildcards) if method.constraint.needs_bases else []


def own_selection(wildcards):
    """The rule, threshold and weights of bases that methods have of their own."""
    return own_bases[wildcards.selection]


def certified_bases(wildcards):
    """The bases that a certificate measures on: the method's, or those of all for a method without."""
    return bases_of_method(wildcards) or bases_file(wildcards)


def pairs_of_method(wildcards):
    """The pairs of answers, for a method that learns from them."""
    return rules.make_pairs.output.pairs if method_of(wildcards).loss.on_pairs else []


def guide_of_method(wildcards):
    """The policy whose token rewards a method takes, of the same seed."""
    loss = method_of(wildcards).loss
    if not isinstance(loss, WDOOR):
        return []
    return expand(rules.train_policy.output.policy, method=loss.guide, seed=wildcards.seed)


def facts_of(wildcards):
    """What a certificate says of a policy beside its figures."""
    constrained = method_of(wildcards).constraint.exact
    facts = {"method": wildcards.method, "seed": int(wildcards.seed), "constrained": constrained}
    return shlex.quote(json.dumps(facts))


def answers_of_base(rule):
    """The base model's answers that those of a policy are compared with."""

    def files(wildcards):
        if wildcards.method == inputs.BASE or not compared(rule, wildcards):
            return []
        return expand(getattr(rules, rule).output.responses, **{**wildcards, "method": inputs.BASE, "seed": 0})

    return files


def compared(stage, wildcards):
    """Whether this evaluation, or this benchmark, compares a policy's answers with the base model's."""
    if stage == "evaluate":
        return True
    comparison = settings.benchmarks.comparison
    return bool(comparison and comparison.against == "base" and TASKS[wildcards.task].compared)


def own_copy(wildcards):
    """The user's own copy of a benchmark, where it is one."""
    place = locate(wildcards.task, settings.benchmarks)
    return [] if isinstance(place, Source) else [local(str(path)) if imported else str(path) for path in place]


def task_of(wildcards):
    """The settings of the benchmark that a job is for."""
    return benchmark_of(settings.benchmarks, wildcards.task)


def every_benchmark():
    """The scores of every model on every benchmark that the configuration names."""
    patterns = expand(rules.benchmark.output.metrics, task=settings.benchmarks.tasks, allow_missing=True)
    return [*expand(patterns, method=inputs.BASE, seed=0), *every_policy(patterns)]
