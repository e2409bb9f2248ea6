# The variants of a study side by side; each has a page of its own (rule report), of which this is made.
rule study:
    input:
        configs=everything(made(rules.write_config.output.config)),
        summaries=everything(made(rules.report.output.summary)),
    output:
        page=report("<results>/study.html", caption="../report/study.rst", category="Study", labels={"file": "page"}),
        table=report("<results>/study.csv", caption="../report/study.rst", category="Study", labels={"file": "table"}),
        plots=report(
            directory("<results>/plots"),
            patterns=["{plot}.png"],
            caption="../report/study.rst",
            category="Study",
            labels={"plot": "{plot}"},
        ),
    log:
        "<results>/logs/study.log",
    localrule: True
    conda:
        "../envs/nspo.yaml"
    params:
        code=code("nspo.report.study.stage"),
        templates=inputs.templates_hash("nspo.report.study", "nspo.report"),
        order=lambda wildcards: list(variants),  # the page's rows, which the names of inputs alone would not tell
        variants=folders("configs"),
    shell:
        "python -m nspo study --variants {params.variants} --out {output.page:q} --table {output.table:q}"
        " --plots {output.plots:q} 2>&1 | tee {log:q}"
