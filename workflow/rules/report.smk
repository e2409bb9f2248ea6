rule write_config:
    output:
        config="<page>/config.yaml",
    log:
        "<page>/logs/write_config.log",
    localrule: True
    conda:
        "../envs/nspo.yaml"
    params:
        **tracked("config", whole_of, SHOWN, keep_order=True),
        flags=flags(whole_of, SHOWN, keep_order=True),
    shell:
        "python -m nspo config write {params.flags} --out {output.config:q} 2>&1 | tee {log:q}"


rule report:
    input:
        config=made(rules.write_config.output.config),
        evaluations=every_model(rules.evaluate.output),
        certificates=every_policy(rules.certify.output),
        training=every_policy(
            rules.train_policy.output.settings,
            rules.train_policy.output.training,
            rules.train_policy.output.probes,
        ),
        matches=every_policy(rules.match_safety.output.match),
        bases=bases_file,
        reward=made(rules.train_reward.output.metrics),
        cost=made(rules.train_cost.output.metrics),
        attributions=where(lambda settings: settings.attribution.enabled, every_policy(rules.attribute.output)),
        benchmarks=every_benchmark,
        screen=where(lambda it: it.screen.enabled and not it.bases.precomputed, made(rules.screen.output.screen)),
        agreement=where(
            lambda it: it.evaluation.judges or it.second_judge.encoder, made(rules.judge_agreement.output.agreement)
        ),
    output:
        page=report(
            "<page>/report.html",
            caption="../report/page.rst",
            category="Results",
            labels={"file": "page", **OF_VARIANT},
        ),
        summary=report(
            "<page>/summary.csv",
            caption="../report/summary.rst",
            category="Results",
            labels={"file": "table", **OF_VARIANT},
        ),
        latex="<page>/summary.tex",
        cards=directory("<page>/cards"),
        plots=report(
            directory("<page>/plots"),
            patterns=["{plot}.png"],
            caption="../report/plots.rst",
            category="Plots",
            labels={"plot": "{plot}", **OF_VARIANT},
        ),
    log:
        "<page>/logs/report.log",
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
