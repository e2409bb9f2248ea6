rule evaluate_base:
    input:
        model=rules.prepare_model.output.manifest,
        policy=rules.prepare_model.output.manifest,
        cost=rules.train_cost.output.manifest,
        prompts=rules.prepare_prompts.output.prompts,
        judges=judge_files(),
    output:
        metrics="<results>/evaluation/base/seed0/metrics.json",
        responses="<results>/evaluation/base/seed0/responses.parquet",
    log:
        "<logs>/evaluate/base-seed0.log",
    benchmark:
        "<timings>/evaluate/base-seed0.tsv"
    conda:
        "../envs/nspo.yaml"
    threads: HEAVY_THREADS
    resources:
        mem=grows(32, "GB"),
        runtime=grows(4, "h"),
    params:
        code=code("nspo.evaluation.stage"),
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
        " --policy {params.policy} --cost {params.cost} --prompts {input.prompts:q} {params.base_evaluation}"
        " --out {params.out:q} 2>&1 | tee {log:q}"


use rule evaluate_base as evaluate_policy with:
    input:
        model=rules.prepare_model.output.manifest,
        policy=rules.train_policy.output.manifest,
        cost=rules.train_cost.output.manifest,
        prompts=rules.prepare_prompts.output.prompts,
        judges=judge_files(),
        base_evaluation=rules.evaluate_base.output.responses,
    output:
        metrics="<results>/evaluation/{method}/seed{seed}/metrics.json",
        responses="<results>/evaluation/{method}/seed{seed}/responses.parquet",
    log:
        "<logs>/evaluate/{method}-seed{seed}.log",
    benchmark:
        "<timings>/evaluate/{method}-seed{seed}.tsv"
    params:
        code=code("nspo.evaluation.stage"),
        flags=flags(settings.evaluation),
        runtime=runtime,
        name="--name {method} --seed {seed}",
        model=folder("model"),
        policy=folder("policy"),
        cost=folder("cost"),
        base_evaluation=optional("--base-evaluation", "base_evaluation"),
        out=subpath(output.metrics, parent=True),


# Published benchmarks (`benchmarks.tasks`), one job per model and benchmark; the base and every policy answer the same.
rule benchmark_base:
    input:
        data=benchmark_files,
        model=rules.prepare_model.output.manifest,
        cost=rules.train_cost.output.manifest,
        training=[
            rules.prepare_prompts.output.prompts,
            rules.prepare_labels.output.labels,
        ],
        judges=judge_files(),
    output:
        metrics="<results>/benchmarks/base/seed0/{task}/metrics.json",
        responses="<results>/benchmarks/base/seed0/{task}/responses.parquet",
    log:
        "<logs>/benchmark/base-seed0-{task}.log",
    benchmark:
        "<timings>/benchmark/base-seed0-{task}.tsv"
    conda:
        "../envs/nspo.yaml"
    threads: HEAVY_THREADS
    resources:
        mem=grows(32, "GB"),
        runtime=grows(8, "h"),
    params:
        code=code("nspo.evaluation.benchmarks.stage"),
        flags=benchmark_flags,
        judging=flags(judge_settings),
        runtime=runtime,
        name="--name base --seed 0",
        model=folder("model"),
        cost=folder("cost"),
        base_answers=optional("--base-answers", "base_answers"),
        out=subpath(output.metrics, ancestor=2),
    shell:
        "python -m nspo benchmark {params.flags} {params.judging} {params.runtime} {params.name} --model {params.model}"
        " --cost {params.cost} --training {input.training:q} {params.base_answers} --out {params.out:q} 2>&1 | tee {log:q}"


use rule benchmark_base as benchmark_policy with:
    input:
        data=benchmark_files,
        model=rules.train_policy.output.manifest,
        cost=rules.train_cost.output.manifest,
        training=[
            rules.prepare_prompts.output.prompts,
            rules.prepare_labels.output.labels,
        ],
        judges=judge_files(),
        base_answers=base_answers,
    output:
        metrics="<results>/benchmarks/{method}/seed{seed}/{task}/metrics.json",
        responses="<results>/benchmarks/{method}/seed{seed}/{task}/responses.parquet",
    log:
        "<logs>/benchmark/{method}-seed{seed}-{task}.log",
    benchmark:
        "<timings>/benchmark/{method}-seed{seed}-{task}.tsv"
    params:
        code=code("nspo.evaluation.benchmarks.stage"),
        flags=benchmark_flags,
        judging=flags(judge_settings),
        runtime=runtime,
        name="--name {method} --seed {seed}",
        model=folder("model"),
        cost=folder("cost"),
        base_answers=optional("--base-answers", "base_answers"),
        out=subpath(output.metrics, ancestor=2),


# Part of the page where there are judges beside the cost model, whose own agreement its training measures.
rule judge_agreement:
    input:
        cost=rules.train_cost.output.manifest,
        labels=rules.prepare_labels.output.labels,
        judges=judge_files(),
    output:
        agreement="<results>/judge_agreement.json",
    log:
        "<logs>/judge_agreement.log",
    benchmark:
        "<timings>/judge_agreement.tsv"
    conda:
        "../envs/nspo.yaml"
    threads: HEAVY_THREADS
    resources:
        mem=grows(32, "GB"),
        runtime=grows(4, "h"),
    params:
        code=code("nspo.evaluation.agreement"),
        flags=flags(judge_settings),
        runtime=runtime,
        cost=folder("cost"),
    shell:
        "python -m nspo judge-agreement {params.flags} {params.runtime} --cost {params.cost} --labels {input.labels:q}"
        " --out {output.agreement:q} 2>&1 | tee {log:q}"


# Where safety lives: `attribution.enabled` decides whether the page asks for it.
rule attribute:
    input:
        model=rules.prepare_model.output.manifest,
        policy=rules.train_policy.output.manifest,
        certificate=rules.certify.output.certificate,
        cost=rules.train_cost.output.manifest,
        evaluation=[
            rules.evaluate_policy.output.metrics,
            rules.evaluate_policy.output.responses,
        ],
        base_evaluation=[
            rules.evaluate_base.output.metrics,
            rules.evaluate_base.output.responses,
        ],
    output:
        attribution="<results>/attribution/{method}/seed{seed}.json",
    log:
        "<logs>/attribute/{method}-seed{seed}.log",
    benchmark:
        "<timings>/attribute/{method}-seed{seed}.tsv"
    conda:
        "../envs/nspo.yaml"
    threads: HEAVY_THREADS
    resources:
        mem=grows(32, "GB"),
        runtime=grows(4, "h"),
    params:
        code=code("nspo.certify.attribution"),
        flags=flags(settings.attribution, ("harmful_prompts", "general_prompts")),
        runtime=runtime,
        model=folder("model"),
        policy=folder("policy"),
        cost=folder("cost"),
        evaluation=folder("evaluation"),
        base_evaluation=folder("base_evaluation"),
    shell:
        "python -m nspo attribute {params.flags} {params.runtime} --base {params.model} --tuned {params.policy}"
        " --certificate {input.certificate:q} --evaluation {params.evaluation}"
        " --base-evaluation {params.base_evaluation} --cost {params.cost} --out {output.attribution:q} 2>&1 | tee {log:q}"
