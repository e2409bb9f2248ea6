rule evaluate_base:
    input:
        code=code("nspo.evaluation"),
        model=rules.prepare_model.output.manifest,
        policy=rules.prepare_model.output.manifest,
        cost=rules.train_cost.output.manifest,
        prompts=rules.prepare_prompts.output.prompts,
    output:
        metrics="<results>/evaluation/base/seed0/metrics.json",
        responses="<results>/evaluation/base/seed0/responses.parquet",
    log:
        "<logs>/evaluate/base-seed0.log",
    benchmark:
        "<benchmarks>/evaluate/base-seed0.tsv"
    conda:
        "../envs/nspo.yaml"
    threads: HEAVY_THREADS
    resources:
        mem="32GB",
        runtime="4h",
    params:
        flags=flags(settings.evaluation),
        runtime=runtime,
        name="--name base --seed 0",
        model=folder("model"),
        policy=folder("policy"),
        cost=folder("cost"),
        base_evaluation=optional("--base-evaluation", "base_evaluation"),
        out=subpath(output.metrics, parent=True),
    shell:
        "python -m nspo evaluate {params.flags} {params.runtime} {params.name} --base {params.model}"
        " --policy {params.policy} --cost {params.cost} --prompts {input.prompts} {params.base_evaluation}"
        " --out {params.out} 2>&1 | tee {log}"


use rule evaluate_base as evaluate_policy with:
    input:
        code=code("nspo.evaluation"),
        model=rules.prepare_model.output.manifest,
        policy=rules.train_policy.output.manifest,
        cost=rules.train_cost.output.manifest,
        prompts=rules.prepare_prompts.output.prompts,
        base_evaluation=rules.evaluate_base.output.responses,
    output:
        metrics="<results>/evaluation/{method}/seed{seed}/metrics.json",
        responses="<results>/evaluation/{method}/seed{seed}/responses.parquet",
    log:
        "<logs>/evaluate/{method}-seed{seed}.log",
    benchmark:
        "<benchmarks>/evaluate/{method}-seed{seed}.tsv"
    params:
        flags=flags(settings.evaluation),
        runtime=runtime,
        name="--name {method} --seed {seed}",
        model=folder("model"),
        policy=folder("policy"),
        cost=folder("cost"),
        base_evaluation=optional("--base-evaluation", "base_evaluation"),
        out=subpath(output.metrics, parent=True),
