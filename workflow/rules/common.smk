"""The checked settings, and what rules make parameters and resources of; which files they read stands in files.smk."""

import os
import re
import shlex
import shutil
import signal
import sys
from functools import cache
from pathlib import Path

# Jobs run the package that lies beside the Snakefile, or else the one installed for the Python that runs Snakemake. A
# file such as random.py in the working directory, or beside the package, is taken for no library.
os.environ.update(
    PATH=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]), PYTHONSAFEPATH="1"
)
beside = Path(str(workflow.current_basedir)).parents[1]
if (beside / "nspo" / "workflow").is_dir():
    alone = Path(".snakemake", "package").absolute()  # a folder of this package alone
    link = alone / "nspo"
    alone.mkdir(parents=True, exist_ok=True)
    if not link.exists() or not link.samefile(beside / "nspo"):
        if link.is_dir() and not link.is_symlink():
            shutil.rmtree(link)  # a copy of the run that followed the link
        link.unlink(missing_ok=True)
        link.symlink_to(beside / "nspo")
    sys.path.insert(0, str(alone))
    paths = filter(None, [str(alone), os.environ.get("PYTHONPATH")])  # an empty one would be the working directory
    os.environ.update(PYTHONPATH=os.pathsep.join(paths))

from importlib.metadata import version

from nspo.cli.main import RUNTIME_FLAGS, to_flags
from nspo.run import workflow_lock
from nspo.run.gpus import devices
from nspo.run.stage_code import code_hash as code
from nspo.settings.bases import ScreenSettings, SelectionSettings
from nspo.settings.config import Config
from nspo.settings.data import LabelSettings, PromptSettings
from nspo.settings.evaluation import AnsweringSettings, BenchmarkSettings
from nspo.settings.judges import JudgeSettings
from nspo.settings.policy.methods import MethodSettings
from nspo.settings.policy.section import PairSettings, RolloutSettings, TrainingSettings
from nspo.files.sources import repository_of, wheel_folder
from nspo.workflow import inputs, launch
from nspo.workflow.configuration import settings_of
from nspo.workflow.copied import warn_if_copied
from nspo.workflow.homes import HOME, Homes
from nspo.workflow.parameters import Chosen, benchmark_of, flags, folders, optional, part_of, tracked, with_own_wheels
from nspo.workflow.resources import requests

local_package = (beside / "pyproject.toml").is_file() and (beside / "nspo" / "workflow").is_dir()
os.environ.update(NSPO_PACKAGE=str(beside) if local_package else f"nspo=={version('nspo')}")  # for --sdm conda
signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # a cluster's warning is for the stages, which save and end
os.environ[workflow_lock.PARENT] = workflow_lock.this_process()
if workflow.is_main_process and not imported:
    running = workflow_lock.hold(Path(".snakemake"), workflow.local_exec)  # until this process ends

settings, variants = (
    settings_of(config, where=f"the configuration of module {__name__}")
    if imported
    else settings_of(config, workflow.overwrite_configfiles, workflow.config_settings.config)
)
if workflow.is_main_process and not imported and not {"--touch", "-t"} & set(sys.argv):
    warn_if_copied(Path(settings.runtime.results), Path(".snakemake"))
homes = Homes(variants)
settings_at = homes.settings  # of a job, by its wildcards
claimed = workflow.is_main_process and workflow.local_exec and bool(devices())
BASES_FLAGS = ("rule", "threshold", "weights")
SAMPLING = [name for name in RolloutSettings.model_fields if name not in ("steps", "judge")]
SCREEN_FLAGS = [name for name in ScreenSettings.model_fields if name != "enabled"]
SHOWN = [name for name in Config.model_fields if name not in ("runtime", "study")]
SPLITS = {"none": ""} | {
    name: str(workflow.source_path(f"../../config/accelerate/{name}.yaml"))
    for name in sorted({variant.policy.sharding for variant in variants.values()} - {"none"})
}
OF_VARIANT, AT_HOME = ({key: f"{{{key}}}"} if settings.study else {} for key in ("variant", "home"))  # labels
pins = {wheel_folder(wheel): (wheel, pin) for it in variants.values() for wheel, pin in it.data.wheels.items()}
HEAVY_THREADS = 8  # capped to the cores there are, so on a small machine heavy stages run one by one


def section(name, kind=None, reduced=lambda part: part):
    """A section of the settings of a job, or the part of it that is a `kind` of its own."""

    @cache
    def of(variant):
        found = getattr(variants[variant], name)
        return reduced(part_of(found, kind) if kind else found)

    return Chosen(kind or Config.model_fields[name].annotation, lambda wildcards: of(homes.variant(wildcards)))


prompt_settings = section("data", PromptSettings, with_own_wheels)
label_settings = section("data", LabelSettings, with_own_wheels)
judge_settings = section("evaluation", JudgeSettings)
method_of = Chosen(MethodSettings, lambda wildcards: settings_at(wildcards).policy.methods[wildcards.method])
own_selection = Chosen(SelectionSettings, lambda wildcards: own_bases(settings_at(wildcards))[wildcards.selection])
task_of = Chosen(BenchmarkSettings, lambda wildcards: benchmark_of(settings_at(wildcards).benchmarks, wildcards.task))
whole_of = Chosen(Config, settings_at)


def own_bases(settings):
    """How bases that methods have of their own are chosen, by name."""
    return {it.name: it for it in (method.own_bases for method in settings.policy.methods.values()) if it}


def any_of(names):
    """A pattern for what some variant's settings name."""
    return (
        "|".join(sorted({re.escape(str(name)) for variant in variants.values() for name in names(variant)})) or "none"
    )


wildcard_constraints:
    home=HOME,
    variant="|".join(map(re.escape, variants)),
    wheel="|".join(map(re.escape, pins)) or "none",
    method=any_of(lambda settings: [inputs.BASE, *settings.policy.methods]),
    seed=any_of(lambda settings: {0, *settings.policy.seeds}),
    task=any_of(lambda settings: settings.benchmarks.tasks),
    of=any_of(lambda settings: ["model", "data", *settings.benchmarks.tasks]),
    repository="[^/]+--[^/]+",
    part=r"\d+",
    selection=any_of(own_bases),
    parts=r"\d+",


@cache
def asked(variant):
    """What rules ask for, of the settings of a variant."""
    return requests(variants[variant])


def resources(rule):
    """Memory and minutes of a rule's job."""
    ask = lambda key: lambda wildcards, attempt: asked(homes.variant(wildcards))(rule)[key](wildcards, attempt)
    return {key: ask(key) for key in ("mem_mb", "runtime")}


def scratch(wildcards, threads):
    """Where an interrupted stage goes on from. Naming `threads` makes the value derived: it never causes a rerun."""
    return f"--workdir {shlex.quote(str(Path(rules.prepare_model.output.model.format(**wildcards)).parent / '.work'))}"


def wheels(wildcards, threads):
    """Where the wheels are from a job's home, which is the folder of all results where there is no study."""
    return "../../wheels" if settings.study else "wheels"


def runtime(wildcards, threads):
    """How to run, not what to make."""
    return f"{to_flags(settings.runtime, RUNTIME_FLAGS)} {scratch(wildcards, threads)}"


def device(wildcards, threads):
    """The part of `runtime` that names no folder."""
    return to_flags(settings.runtime, ["device"])


libraries = " ".join(f"{name}=={version(name)}" for name in ("numpy", "safetensors", "scipy", "torch", "transformers"))


def versions(wildcards, threads):
    """The libraries behind an artifact: a part of the key under which `--cache` shares it, and no reason to run again."""
    return libraries


def start(wildcards, threads, resources, processes=1, sharding="none"):
    """What starts a stage that runs a model, in one process or several."""
    nodes, mpi = resources.get("nodes", 1), resources.get("mpi", "srun")
    return launch.launcher(processes, threads, SPLITS[sharding], resources.gpu if claimed else 0, nodes, mpi)


def start_collecting(wildcards, threads, resources):
    """What starts `nspo collect`."""
    return start(wildcards, threads, resources, settings.runtime.processes)


def start_training(wildcards, threads, resources):
    """What starts the training of a policy."""
    policy = settings_at(wildcards).policy
    return start(wildcards, threads, resources, policy.processes, policy.sharding)


def gpus_of_training(wildcards):
    """GPUs of the training of a policy."""
    return launch.gpus(settings, settings_at(wildcards).policy.processes)
