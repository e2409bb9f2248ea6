"""Small commands that are no stage of the workflow: certify, show, check and write what the stages made."""

import shlex
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nspo.files.sources import Source
from nspo.run.tables import table
from nspo.settings.config import Config
from nspo.settings.reading import load_config
from nspo.settings.study import variants


def verify(
    base: Path,
    tuned: Path,
    bases: Path,
    activations: Path | None,
    facts: Mapping[str, Any] | None,
    out: Path,
    workdir: Path | None = None,
) -> None:
    """Write the certificate of `tuned` (see `nspo.certify.certificate`)."""
    from nspo.activations.store import ActivationStore
    from nspo.bases.file import NullSpaceBases
    from nspo.certify.stage import write_certificate

    store = ActivationStore(activations) if activations else None
    write_certificate(out, base, tuned, NullSpaceBases.load(bases), store, workdir, **(facts or {}))


def write_config(config: Config, out: Path | None) -> None:
    """Write `config` to `out`, or the default configuration and the schema below the working directory."""
    from nspo.cli.config_files import commented_yaml, write_files
    from nspo.files.atomic import atomic_path

    if out is None:
        write_files(Path())
        return
    with atomic_path(out) as scratch:
        scratch.write_text(commented_yaml(config), encoding="utf-8")


def check_files(files: list[Path]) -> None:
    """Say that a configuration, of one file or of several that override each other, is valid, or raise its faults."""
    from nspo.evaluation.benchmarks.loading import task_of
    from nspo.run.progress import say

    where = " + ".join(map(str, files))
    config = load_config(*files)
    study = variants(config, where)
    for checked in (config, *study.values()):
        for name in (*checked.benchmarks.tasks, *checked.benchmarks.sources):
            task_of(name)
    say(f"{where}: valid{f', {len(study)} variants' if study else ''}")


def fetch_hub(source: Source, of: str, out: Path) -> None:
    """Fetch what a `hub:` source names into the hub's cache, where jobs without a network find it, and say so in `out`.

    Args:
        of: `model`, `data`, or the name of a benchmark, each of which is read in a way of its own.

    Raises:
        UserError: when it cannot be fetched, or there is no such benchmark.
    """
    from nspo.data.readers import hub_rows
    from nspo.evaluation.benchmarks.loading import raw_rows, task_of
    from nspo.files.manifest import make_manifest, write_json
    from nspo.models.loading import hub_folder

    found: dict[str, Any]
    if of == "model":
        folder = hub_folder(str(source), source)
        found = {"commit": folder.name, "files": sorted(path.name for path in folder.iterdir())}
    elif of == "data":
        found = {"rows": len(hub_rows(source))}
    else:
        found = {"rows": sum(1 for _ in raw_rows(of, task_of(of), source))}
    about = {"source": source.published, "revision": source.revision}
    write_json(out, make_manifest("hub", of=of, **about, **found))


def show_bases(file: Path, plot: Path | None) -> None:
    """Print what a bases file holds, per site and per kind of site; draw spectra and free directions to `plot`.

    Raises:
        UserError: no bases file, or a plot that is neither PNG nor SVG.
    """
    from nspo.bases.file import NullSpaceBases
    from nspo.bases.table import by_kind, facts, kind_rows, memory, site_rows
    from nspo.report import plots

    if plot:
        plots.check_suffix(plot)
    bases = NullSpaceBases.load(file)
    header = [f"{name:11}{text}" for name, text in {**facts(bases), **memory(bases, file)}.items()]
    sections = ["\n".join(header), table(site_rows(bases)), table(kind_rows(bases))]
    sys.stdout.write("\n\n".join(sections) + "\n")
    if plot:
        plots.write(plots.bases_overview(by_kind(bases)), plot)


def merge_bases(files: Sequence[Path], out: Path) -> None:
    """Merge bases of one model (see `nspo.bases.derived.merge`)."""
    from nspo.bases.derived import merge
    from nspo.bases.file import NullSpaceBases
    from nspo.run.progress import say

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        merged = merge([NullSpaceBases.load(file) for file in files])
    for warning in caught:
        say(f"warning: {warning.message}")
    merged.save(out)


def halve_bases(file: Path, out: Path) -> None:
    """Write bases in half the bytes (see `NullSpaceBases.save`)."""
    from nspo.bases.file import NullSpaceBases

    NullSpaceBases.load(file).save(out, half=True)


def beside_server(model: str, gpus: int | None, wait: float | None, serve: str | None, command: Sequence[str]) -> None:
    """Run a command beside a model server (see `nspo.run.server`), and end with its exit code."""
    from nspo.run.server import with_server

    started = shlex.split(serve) if serve else ("vllm", "serve")
    sys.exit(with_server(command, model, gpus or 0, started, 1800.0 if wait is None else wait))
