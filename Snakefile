# The whole pipeline, stage by stage; every stage is also a command (`nspo --help`).
#
#   snakemake --cores all                                   config/config.yaml
#   snakemake --cores all --configfile config/smoke.yaml    seconds, on a tiny random model
#
# Another Snakefile imports it as a module (`use rule * from nspo as nspo_*`): config/README.md.

import atexit
import sys
from pathlib import Path

# Snakemake looks for libraries beside the Snakefile first, where a user's packaging.py would be taken for one; now last.
sys.path.sort(key=lambda path: path == str(workflow.current_basedir))

from snakemake.utils import min_version

min_version("9.27")

imported = not workflow.modifier.is_main_snakefile()
importers_target = workflow.default_target

# A configuration stands alone: the default is read only when no other is given, and the two are never merged.
if not imported and not workflow.overwrite_configfiles and Path("config/config.yaml").is_file():

    configfile: "config/config.yaml"


report: "workflow/report/workflow.rst"


include: "workflow/rules/common.smk"
include: "workflow/rules/files.smk"


# In a study every stage has a home of its own, which variants share (nspo/workflow/homes.py).
pathvars:
    results=settings.runtime.results,
    home="<results>/stages/{home}" if settings.study else "<results>",
    page="<results>/variants/{variant}" if settings.study else "<results>",
    logs="<home>/logs",
    timings="<home>/timings",


include: "workflow/rules/sources.smk"
include: "workflow/rules/activations.smk"
include: "workflow/rules/preference.smk"
include: "workflow/rules/policy.smk"
include: "workflow/rules/evaluation.smk"
include: "workflow/rules/report.smk"


if settings.study:

    include: "workflow/rules/study.smk"


rule all:
    input:
        rules.study.output if settings.study else [],
        everything(
            made(rules.report.output.page, rules.report.output.summary),
            made(rules.prepare_model.output, rules.train_reward.output, rules.train_cost.output),
            every_policy(rules.train_policy.output),
            every_benchmark,
        ),


if workflow.modifier.modify_rulename("all") != "all":
    workflow.default_target = importers_target  # imported under another name: what to make is the importer's to say


onsuccess:
    # The last line of a run, after Snakemake's own: what was found and where the page is, as the report says it.
    said = Path(settings.runtime.results, "logs", "report.log")
    if not imported and said.is_file():
        atexit.register(print, said.read_text(encoding="utf-8").splitlines()[-1], file=sys.stderr)
