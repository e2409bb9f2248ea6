rule train_cost:
    input:
        model=rules.prepare_model.output.manifest,
        labels=rules.prepare_labels.output.labels,
        backbone=backbone_files("cost"),
    output:
        manifest="<results>/cost/manifest.json",
        metrics=report(
            "<results>/cost/metrics.json",
            caption="../report/preference.rst",
            category="Preference models",
        ),
    log:
        "<logs>/train_cost.log",
    benchmark:
        "<timings>/train_cost.tsv"
    conda:
        "../envs/nspo.yaml"
    threads: HEAVY_THREADS
    resources:
        mem=grows(32, "GB"),
        runtime=grows(4, "h"),
    params:
        code=code("nspo.preference.stage"),
        target="cost",
        flags=flags(settings.cost),
        runtime=runtime,
        model=folder("model"),
        out=subpath(output.manifest, parent=True),
    shell:
        "python -m nspo train-preference --target {params.target} {params.flags} {params.runtime} --model {params.model}"
        " --labels {input.labels:q} --out {params.out:q} 2>&1 | tee {log:q}"


use rule train_cost as train_reward with:
    input:
        model=rules.prepare_model.output.manifest,
        labels=rules.prepare_labels.output.labels,
        backbone=backbone_files("reward"),
    output:
        manifest="<results>/reward/manifest.json",
        metrics=report(
            "<results>/reward/metrics.json",
            caption="../report/preference.rst",
            category="Preference models",
        ),
    log:
        "<logs>/train_reward.log",
    benchmark:
        "<timings>/train_reward.tsv"
    params:
        code=code("nspo.preference.stage"),
        target="reward",
        flags=flags(settings.reward),
        runtime=runtime,
        model=folder("model"),
        out=subpath(output.manifest, parent=True),
