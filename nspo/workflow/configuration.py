"""The configuration of a run, from what Snakemake was given. Part of workflow/rules/common.smk."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nspo.errors import UserError
from nspo.evaluation.benchmarks.loading import check_benchmarks
from nspo.settings.config import Config
from nspo.settings.reading import check_config, read_yaml, typed
from nspo.settings.study import variants

DEFAULT = "config/config.yaml"


def settings_of(
    config: Mapping[str, Any], files: Sequence[Path] = (), given: Mapping[str, Any] | None = None, where: str = ""
) -> tuple[Config, dict[str, Config]]:
    """The checked settings of `config`, as Snakemake merged it, and those of each variant of its study by name; without
    a study the settings themselves, under "".

    Args:
        files: the `--configfile`s behind it, read once more: Snakemake keeps the last of a key that stands twice.
        given: what `--config` says, merged in a second time with its values typed as a file's are.
        where: what faults are told of; by default these files and options.

    Raises:
        SystemExit: with a line per fault; any other exception Snakemake would wrap in lines about its own file.
    """
    from snakemake.utils import update_config

    try:
        _refuse_lost_files(sys.argv)
        for file in files:
            read_yaml(file)
        merged = dict(config)
        if given:
            update_config(merged, typed(given))
        places = [*(map(str, files) if files else [DEFAULT]), *(["--config"] if given else [])]
        where = where or " + ".join(places)
        settings = check_config(merged, where)
        every = variants(settings, where) or {"": settings}
        for variant in every.values():
            check_benchmarks(variant.benchmarks)
    except UserError as error:
        sys.exit(str(error))
    return settings, every


def _refuse_lost_files(arguments: Sequence[str]) -> None:
    """Refuse `--configfile A --configfile B`, of which Snakemake would silently read B alone.

    Raises:
        UserError: saying how two files are given.
    """
    if sum(argument.partition("=")[0] in ("--configfile", "--configfiles") for argument in arguments) > 1:
        raise UserError(
            "--configfile is given twice, of which Snakemake keeps the last: give both files after one --configfile, "
            "the later overrides the earlier"
        )
