# The whole pipeline, stage by stage; every stage is also a command (`nspo --help`).
#
#   snakemake --cores all                                   config/config.yaml
#   snakemake --cores all --configfile config/smoke.yaml    seconds, on a tiny random model

from snakemake.utils import min_version

min_version("9.27")

# A configuration stands alone: the default is read only when no other is given, and the two are never merged.
if not workflow.overwrite_configfiles:

    configfile: "config/config.yaml"


report: "workflow/report/workflow.rst"


include: "workflow/rules/common.smk"


pathvars:
    results=settings.runtime.results,
    logs=f"{settings.runtime.results}/logs",
    timings=f"{settings.runtime.results}/timings",


include: "workflow/rules/sources.smk"
include: "workflow/rules/activations.smk"
include: "workflow/rules/preference.smk"
include: "workflow/rules/policy.smk"
include: "workflow/rules/evaluation.smk"
include: "workflow/rules/report.smk"


rule all:
    default_target: True
    input:
        "<results>/report.html",
        "<results>/summary.csv",
        every_benchmark(),
