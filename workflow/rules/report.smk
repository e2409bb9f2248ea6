rule write_config:
    output:
        config="<results>/config.yaml",
    log:
        "<logs>/write_config.log",
    localrule: True
    conda:
        "../envs/nspo.yaml"
    params:
        flags=flags(settings, set(type(settings).model_fields) - {"runtime"}, keep_order=True),
    shell:
        "python -m nspo config write {params.flags} --out {output.config:q} 2>&1 | tee {log:q}"


rule report:
    input:
        templates=package_files("report/templates", "report/sections/templates"),
        config=rules.write_config.output.config,
        base_evaluation=[
            rules.evaluate_base.output.metrics,
            rules.evaluate_base.output.responses,
        ],
        evaluations=every_policy(rules.evaluate_policy.output),
        certificates=every_policy(rules.certify.output),
        policies=every_policy(rules.train_policy.output),
        bases=bases_file,
        reward=rules.train_reward.output,
        cost=rules.train_cost.output,
        attributions=(every_policy(rules.attribute.output) if settings.attribution.enabled else []),
        benchmarks=every_benchmark(),
        agreement=(rules.judge_agreement.output.agreement if judge_settings.judges else []),
    output:
        page=report("<results>/report.html", caption="../report/page.rst", category="Results"),
        summary=report(
            "<results>/summary.csv",
            caption="../report/summary.rst",
            category="Results",
        ),
        latex="<results>/summary.tex",
        cards=directory("<results>/cards"),
        plots=report(
            directory("<results>/plots"),
            patterns=["{plot}.png"],
            caption="../report/plots.rst",
            category="Plots",
        ),
    log:
        "<logs>/report.log",
    localrule: True
    conda:
        "../envs/nspo.yaml"
    params:
        code=code("nspo.report.stage"),
        base_evaluation=folder("base_evaluation"),
        evaluations=folder("evaluations"),
        policies=folder("policies"),
        reward=folder("reward"),
        cost=folder("cost"),
        agreement=optional("--agreement", "agreement"),
        attributions=optional("--attributions", "attributions"),
        benchmarks=optional("--benchmarks", "benchmarks"),
    shell:
        "python -m nspo report --config {input.config:q} --evaluations {params.base_evaluation} {params.evaluations}"
        " --certificates {input.certificates:q} --policies {params.policies} --bases {input.bases:q}"
        " --reward {params.reward} --cost {params.cost} {params.agreement} {params.attributions} {params.benchmarks}"
        " --out {output.page:q} --summary {output.summary:q} --latex {output.latex:q} --cards {output.cards:q} --plots {output.plots:q} 2>&1 | tee {log:q}"
