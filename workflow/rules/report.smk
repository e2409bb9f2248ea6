rule write_config:
    output:
        config="<results>/config.yaml",
    log:
        "<logs>/write_config.log",
    localrule: True
    conda:
        "../envs/nspo.yaml"
    params:
        **tracked("config", settings, SHOWN, keep_order=True),
        flags=flags(settings, SHOWN, keep_order=True),
    shell:
        "python -m nspo config write {params.flags} --out {output.config:q} 2>&1 | tee {log:q}"


rule report:
    input:
        config=rules.write_config.output.config,
        evaluations=[
            *expand(rules.evaluate.output, method=inputs.BASE, seed=0),
            *every_policy(rules.evaluate.output),
        ],
        certificates=every_policy(rules.certify.output),
        training=every_policy(
            [
                rules.train_policy.output.settings,
                rules.train_policy.output.training,
                rules.train_policy.output.probes,
            ]
        ),
        matches=every_policy(rules.match_safety.output.match),
        bases=bases_file,
        reward=rules.train_reward.output.metrics,
        cost=rules.train_cost.output.metrics,
        attributions=every_policy(rules.attribute.output) if settings.attribution.enabled else [],
        benchmarks=every_benchmark(),
        screen=rules.screen.output.screen if settings.screen.enabled and not precomputed else [],
        agreement=rules.judge_agreement.output.agreement if judge_settings.judges else [],
    output:
        page=report("<results>/report.html", caption="../report/page.rst", category="Results", labels={"file": "page"}),
        summary=report(
            "<results>/summary.csv", caption="../report/summary.rst", category="Results", labels={"file": "table"}
        ),
        latex="<results>/summary.tex",
        cards=directory("<results>/cards"),
        plots=report(
            directory("<results>/plots"),
            patterns=["{plot}.png"],
            caption="../report/plots.rst",
            category="Plots",
            labels={"plot": "{plot}"},
        ),
    log:
        "<logs>/report.log",
    localrule: True
    conda:
        "../envs/nspo.yaml"
    params:
        code=code("nspo.report.stage"),
        templates=inputs.templates_hash("nspo.report", "nspo.report.sections"),
        evaluations=folders("evaluations"),
        training=folders("training"),
        reward=folders("reward"),
        cost=folders("cost"),
        agreement=optional("--agreement", "agreement"),
        attributions=optional("--attributions", "attributions"),
        benchmarks=optional("--benchmarks", "benchmarks"),
        screen=optional("--screen", "screen"),
        matches=optional("--matches", "matches"),
    shell:
        "python -m nspo report --config {input.config:q} --evaluations {params.evaluations}"
        " --certificates {input.certificates:q} --policies {params.training} --bases {input.bases:q}"
        " --reward {params.reward} --cost {params.cost} {params.agreement} {params.attributions} {params.benchmarks} {params.screen}"
        " {params.matches}"
        " --out {output.page:q} --summary {output.summary:q} --latex {output.latex:q} --cards {output.cards:q}"
        " --plots {output.plots:q} 2>&1 | tee {log:q}"
