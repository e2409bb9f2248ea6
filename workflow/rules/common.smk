"""Checked settings and the helpers that turn them into inputs and flags of rules."""

import json
import os
import re
import shlex
import sys
from pathlib import Path

# Jobs run the package that lies beside this Snakefile, with the Python that runs Snakemake.
sys.path.insert(0, str(workflow.basedir))
os.environ.update(
    PATH=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
    PYTHONPATH=os.pathsep.join([str(workflow.basedir), os.environ.get("PYTHONPATH", "")]),
)

from snakemake.utils import update_config

from nspo.evaluation.benchmarks.loading import check_benchmarks, locate
from nspo.evaluation.benchmarks.registry import TASKS
from nspo.cli.main import RUNTIME_FLAGS, to_flags
from nspo.settings.data import LabelSettings, PromptSettings
from nspo.settings.policy import PairSettings, TrainingSettings
from nspo.errors import UserError
from nspo.settings.judges import JudgeSettings
from nspo.sources import Source, wheel_folder
from nspo.run.stage_code import code_hash
from nspo.settings.reading import check_config, read_yaml, typed
from nspo.settings.types import path_fault
from nspo.run.workflow_lock import PARENT, hold, this_process

os.environ[PARENT] = this_process()
if workflow.is_main_process:
    running = hold(Path(".snakemake"), workflow.local_exec)  # until this process ends

try:
    for file in workflow.overwrite_configfiles:
        read_yaml(file)  # Snakemake would silently keep the last of a key that stands twice
    given = workflow.config_settings.config or {}
    update_config(config, typed(given))
    where = [*workflow.overwrite_configfiles] or ["config/config.yaml"]
    settings = check_config(config, " + ".join([*map(str, where), *(["--config"] if given else [])]))
    check_benchmarks(settings.benchmarks)
except UserError as error:
    sys.exit(str(error))  # a line per fault; a WorkflowError would wrap it in lines about this file

wheels_dir = f"{settings.runtime.results}/wheels"
shared_bases = Source.parse(settings.bases.precomputed or f"{settings.runtime.results}/bases/bases.safetensors")
bases_file = (
    shared_bases.location if shared_bases.kind == "path" else f"{settings.runtime.results}/bases/fetched.safetensors"
)
BASES_FLAGS = ("rule", "threshold", "weights")
HEAVY_THREADS = 8  # capped to the cores there are, so on a small machine heavy stages run one by one


wildcard_constraints:
    wheel="|".join(re.escape(wheel_folder(requirement)) for requirement in settings.data.wheels) or "none",
    method="|".join(map(re.escape, settings.policy.methods)),
    seed="|".join(map(str, settings.policy.seeds)),
    task="|".join(settings.benchmarks.tasks) or "none",
    part=r"\d+",
    parts=r"\d+",


def code(*modules):
    """The code that shapes a stage, as a hash: an edit that may change what it makes reruns it."""
    return code_hash(*modules)


def flags(section, names=None, keep_order=False):
    """A section's settings as one string in a fixed order, so that exactly these keys rerun a rule.

    A function and not the string itself, because Snakemake would take braces in it for wildcards.
    """
    return lambda wildcards: to_flags(section, names, keep_order)


def runtime(wildcards, threads):
    """How to run, not what to make. Naming `threads` makes the value derived: it never causes a rerun."""
    return f"{to_flags(settings.runtime, RUNTIME_FLAGS)} --workdir {shlex.quote(settings.runtime.results)}/.work"


def device(wildcards, threads):
    """The part of `runtime` that names no folder."""
    return to_flags(settings.runtime, ("device",))


def launch(wildcards, threads):
    """What starts a stage that several processes may share: their number does not change what it makes."""
    return _launcher(settings.runtime.processes, threads)


def launch_training(wildcards, threads):
    """What starts the training of a policy; the number of processes is one of its settings."""
    return _launcher(settings.policy.processes, threads, settings.policy.sharding)


def _launcher(count, threads, sharding="none"):
    if count == 1:
        return "python -m"
    how = "--multi_gpu --mixed_precision no --dynamo_backend no"
    if sharding != "none":
        how = f"--config_file {shlex.quote(str(Path(workflow.basedir, 'config', 'accelerate', f'{sharding}.yaml')))}"
    share = f"--num_processes {count} --num_cpu_threads_per_process {max(1, threads // count)}"
    return f"accelerate launch {how} {share} --num_machines 1 --main_process_port 0 -m"  # 0: a free one, for each job


def grows(amount, unit):
    """A resource such as `32GB` or `4h`: twice as much at the second attempt, three times at the third."""
    return lambda wildcards, attempt: f"{amount * attempt}{unit}"


def folder(name):
    """The folder(s) of a stage's manifest or scores, given as the input `name`."""
    return lambda wildcards, input: " ".join(
        shlex.quote(parent) for parent in dict.fromkeys(str(Path(path).parent) for path in _paths(input, name))
    )


def optional(flag, name):
    """`flag` and the input `name`, or nothing where the rule has no such input."""
    return lambda wildcards, input: (
        " ".join([flag, *map(shlex.quote, paths)]) if (paths := _paths(input, name)) else ""
    )


def optional_folder(flag, name):
    """As `optional`, with the folder of the input."""
    return lambda wildcards, input: f"{flag} {folder(name)(wildcards, input)}" if _paths(input, name) else ""


def _paths(input, name):
    found = input.get(name) or []
    return [found] if isinstance(found, str) else list(found)


def source_files(section, sources):
    """The files behind the sources of a section, by key: the manifest of a wheel, a file on disk, one of ours."""
    files = set()
    for key, source in ((key, source) for key, several in sources.items() for source in several):
        if source.kind == "wheel":
            files.add(f"{wheels_dir}/{wheel_folder(source.wheel)}/manifest.json")
        elif source.kind in {"builtin", "path"}:
            path = Path(workflow.basedir, "nspo", "data", "builtin") if source.kind == "builtin" else Path()
            path = Path(os.path.relpath(path / source.location))
            if not path.exists():
                sys.exit(
                    f"{section}.{key}: {path} does not exist: expected a file or folder, or builtin:, wheel:, hub:"
                )
            for file in (p for p in (path.iterdir() if path.is_dir() else [path]) if p.is_file()):
                if fault := path_fault(str(file)):
                    sys.exit(f"{section}.{key}: {fault}")
                files.add(str(file))
    return sorted(files)


def wheels_of(section):
    """The same settings with only the wheels that their own sources name, so that other pins rerun nothing."""
    named = {source.wheel for several in section.sources().values() for source in several}
    return section.model_copy(update={"wheels": {k: v for k, v in section.wheels.items() if k in named}})


def part_of(section, kind):
    """The part of a section that is a `kind` of its own."""
    return kind.model_validate({name: getattr(section, name) for name in kind.model_fields})


def every_policy(patterns):
    """The files of a rule for every method and seed."""
    return expand(patterns, method=settings.policy.methods, seed=settings.policy.seeds)


def package_files(*folders):
    """Files of the package that are no Python, such as templates."""
    found = (path for name in folders for path in Path(workflow.basedir, "nspo", name).iterdir())
    return sorted(os.path.relpath(path) for path in found if path.is_file())


prompt_settings = wheels_of(part_of(settings.data, PromptSettings))
judge_settings = part_of(settings.evaluation, JudgeSettings)
label_settings = wheels_of(part_of(settings.data, LabelSettings))


def judge_files(section="evaluation.judges", judges=judge_settings.judges):
    """The files of the judges that are models on disk."""
    models = {name: [Source.parse(judge.source)] for name, judge in judges.items() if judge.kind != "endpoint"}
    return source_files(section, models)


reward_judge = {"judge": settings.policy.judge} if settings.policy.judge else {}


def benchmark_files(wildcards):
    """The user's own copy of a benchmark, where it is one."""
    place = locate(wildcards.task, settings.benchmarks)
    return [] if isinstance(place, Source) else [os.path.relpath(path) for path in place]


def benchmark_flags(wildcards):
    """The settings of one benchmark alone, so that another reruns nothing."""
    task, section = wildcards.task, settings.benchmarks
    sources = {name: source for name, source in section.sources.items() if name == task}
    comparison = section.comparison if TASKS[task].compared else None
    return to_flags(section.model_copy(update={"tasks": [task], "sources": sources, "comparison": comparison}))


def base_answers(wildcards):
    """The base model's answers to a benchmark, where those of the others are compared with them."""
    comparison = settings.benchmarks.comparison
    if not comparison or comparison.against != "base" or not TASKS[wildcards.task].compared:
        return []
    return expand(rules.benchmark_base.output.responses, task=wildcards.task)


def every_benchmark():
    """The scores of every model on every benchmark that the configuration names."""
    tasks = settings.benchmarks.tasks
    return [
        *expand(rules.benchmark_base.output.metrics, task=tasks),
        *every_policy(expand(rules.benchmark_policy.output.metrics, task=tasks, allow_missing=True)),
    ]


def backbone_files(target):
    """The files of the model that the reward or the cost model builds on, where it is not the policy's own."""
    backbone = getattr(settings, target).backbone
    return source_files(target, {"backbone": [Source.parse(backbone)]} if backbone else {})


def is_constrained(wildcards):
    """Whether this method keeps to the null space."""
    return settings.policy.methods[wildcards.method].constrained


def bases_parts(wildcards):
    """The shares of the bases, where several jobs compute them."""
    jobs = settings.bases.jobs
    return [f"{settings.runtime.results}/bases/part-{i}-of-{jobs}.safetensors" for i in range(1, jobs + 1) if jobs > 1]


def bases_of_method(wildcards):
    """The bases, for a method that trains with them."""
    return bases_file if settings.policy.methods[wildcards.method].needs_bases else []


def pairs_of_method(wildcards):
    """The pairs of answers, for a method that learns from them."""
    if settings.policy.methods[wildcards.method].preference is None:
        return []
    return f"{settings.runtime.results}/pairs/seed{wildcards.seed}.parquet"


def guide_of_method(wildcards):
    """The manifest of the policy whose token rewards a method takes, of the same seed."""
    method = settings.policy.methods[wildcards.method]
    if method.preference != "wdoor":
        return []
    return f"{settings.runtime.results}/policy/{method.guide}/seed{wildcards.seed}/manifest.json"


def heldout_activations(wildcards):
    """The held-out inputs of a certificate; precomputed bases come without any."""
    return [] if settings.bases.precomputed else rules.collect_activations.output.activations
