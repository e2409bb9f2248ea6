# A judge that gives no reward, with labels of its own (`second_judge.encoder` decides whether there is one).
rule train_second_judge:
    input:
        labels=made(rules.prepare_labels.output.labels),
        encoder=source_files("second_judge", inputs.encoder_source),
        again=made_again("train_second_judge", "folder"),
    output:
        folder=directory("<home>/second_judge"),
    log:
        "<logs>/train_second_judge.log",
    benchmark:
        "<timings>/train_second_judge.tsv"
    conda:
        "../envs/nspo.yaml"
    threads: HEAVY_THREADS
    resources:
        **resources("train_second_judge"),
        gpu=launch.gpus(settings),
    params:
        **tracked("second_judge", section("second_judge")),
        code=code("nspo.judges.second.stage"),
        flags=flags(section("second_judge")),
        start=start,
        runtime=runtime,
        wheels=wheels,
    shell:
        "{params.start} nspo train-second-judge {params.flags} {params.runtime} --labels {input.labels:q}"
        ' --wheels-dir "$(dirname {output.folder:q})/{params.wheels}" --out {output.folder:q} 2>&1 | tee {log:q}'


# The model, and beside it what its training measured.
rule train_cost:
    input:
        model=made(rules.prepare_model.output.model),
        labels=made(rules.prepare_labels.output.labels),
        backbone=source_files("cost", partial(inputs.backbone_source, target="cost")),
        again=made_again("train_cost", "folder"),
    output:
        folder=directory("<home>/cost"),
        metrics=report(
            "<home>/training/cost/metrics.json",
            caption="../report/preference.rst",
            category="Preference models",
            labels={"model": "cost", "file": "metrics", **AT_HOME},
        ),
    log:
        "<logs>/train_cost.log",
    benchmark:
        "<timings>/train_cost.tsv"
    conda:
        "../envs/nspo.yaml"
    threads: HEAVY_THREADS
    resources:
        **resources("train_cost"),
        gpu=launch.gpus(settings),
    params:
        **tracked("scores", section("cost")),
        code=code("nspo.preference.stage"),
        target="--target cost",
        flags=flags(section("cost")),
        start=start,
        runtime=runtime,
    shell:
        "{params.start} nspo train-preference {params.target} {params.flags} {params.runtime} --model {input.model:q}"
        ' --labels {input.labels:q} --logs "$(dirname {output.metrics:q})" --out {output.folder:q} 2>&1 | tee {log:q}'


# Its parameters have the names of those above, which `with` replaces one by one.
use rule train_cost as train_reward with:
    input:
        model=made(rules.prepare_model.output.model),
        labels=made(rules.prepare_labels.output.labels),
        backbone=source_files("reward", partial(inputs.backbone_source, target="reward")),
        again=made_again("train_reward", "folder"),
    output:
        folder=directory("<home>/reward"),
        metrics=report(
            "<home>/training/reward/metrics.json",
            caption="../report/preference.rst",
            category="Preference models",
            labels={"model": "reward", "file": "metrics", **AT_HOME},
        ),
    log:
        "<logs>/train_reward.log",
    benchmark:
        "<timings>/train_reward.tsv"
    params:
        **tracked("scores", section("reward")),
        code=code("nspo.preference.stage"),
        target="--target reward",
        flags=flags(section("reward")),
        start=start,
        runtime=runtime,
