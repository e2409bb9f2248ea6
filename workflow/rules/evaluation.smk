# Of the base model (`base/seed0`) and of every policy alike; its answers are what the policies' are compared with.
rule evaluate:
    input:
        model=made(rules.prepare_model.output.model),
        policy=model_of,
        cost=made(rules.train_cost.output.folder),
        second_judge=second_judge,
        prompts=made(rules.prepare_prompts.output.prompts),
        labels=made(rules.prepare_labels.output.labels),
        judges=judge_files,
        base_evaluation=answers_of_base("evaluate"),
    output:
        metrics="<home>/evaluation/{method}/seed{seed}/metrics.json",
        responses="<home>/evaluation/{method}/seed{seed}/responses.parquet",
    log:
        "<logs>/evaluate/{method}-seed{seed}.log",
    benchmark:
        "<timings>/evaluate/{method}-seed{seed}.tsv"
    conda:
        "../envs/nspo.yaml"
    threads: HEAVY_THREADS
    resources:
        **resources("evaluate"),
        gpu=launch.gpus(settings),
    params:
        **tracked("evaluation", section("evaluation")),
        code=code("nspo.evaluation.stage"),
        flags=flags(section("evaluation")),
        start=start,
        runtime=runtime,
        base_evaluation=optional("--base-evaluation", "base_evaluation"),
        second_judge=optional("--second-judge", "second_judge"),
    shell:
        "{params.start} nspo evaluate {params.flags} {params.runtime} --name {wildcards.method}"
        " --seed {wildcards.seed} --base {input.model:q} --policy {input.policy:q} --cost {input.cost:q}"
        " {params.second_judge} --prompts {input.prompts:q} --labels {input.labels:q} {params.base_evaluation}"
        ' --out "$(dirname {output.metrics:q})" 2>&1 | tee {log:q}'


# Published benchmarks (`benchmarks.tasks`), one job per model and benchmark; the base and every policy answer the same.
rule benchmark:
    input:
        data=data_of_task,
        model=model_of,
        cost=made(rules.train_cost.output.folder),
        training=made(rules.prepare_prompts.output.prompts, rules.prepare_labels.output.labels),
        judges=judge_files,
        base_answers=answers_of_base("benchmark"),
    output:
        metrics="<home>/benchmarks/{method}/seed{seed}/{task}/metrics.json",
        responses="<home>/benchmarks/{method}/seed{seed}/{task}/responses.parquet",
    log:
        "<logs>/benchmark/{method}-seed{seed}-{task}.log",
    benchmark:
        "<timings>/benchmark/{method}-seed{seed}-{task}.tsv"
    conda:
        "../envs/nspo.yaml"
    threads: HEAVY_THREADS
    resources:
        **resources("benchmark"),
        gpu=launch.gpus(settings),
    params:
        **tracked("benchmarks", task_of),
        **tracked("evaluation", judge_settings),
        code=code("nspo.evaluation.benchmarks.stage"),
        flags=flags(task_of),
        judging=flags(judge_settings),
        start=start,
        runtime=runtime,
        base_answers=optional("--base-answers", "base_answers"),
    shell:
        "{params.start} nspo benchmark {params.flags} {params.judging} {params.runtime} --name {wildcards.method}"
        " --seed {wildcards.seed} --model {input.model:q} --cost {input.cost:q} --training {input.training:q}"
        ' {params.base_answers} --out "$(dirname "$(dirname {output.metrics:q})")" 2>&1 | tee {log:q}'


# Part of the page where there are judges beside the cost model, whose own agreement its training measures.
rule judge_agreement:
    input:
        cost=made(rules.train_cost.output.folder),
        second_judge=second_judge,
        labels=made(rules.prepare_labels.output.labels),
        judges=judge_files,
    output:
        agreement="<home>/judge_agreement.json",
    log:
        "<logs>/judge_agreement.log",
    benchmark:
        "<timings>/judge_agreement.tsv"
    conda:
        "../envs/nspo.yaml"
    threads: HEAVY_THREADS
    resources:
        **resources("judge_agreement"),
        gpu=launch.gpus(settings),
    params:
        **tracked("evaluation", judge_settings),
        code=code("nspo.evaluation.agreement"),
        flags=flags(judge_settings),
        start=start,
        runtime=runtime,
        second_judge=optional("--second-judge", "second_judge"),
        refusals=refusal_labels,
    shell:
        "{params.start} nspo judge-agreement {params.flags} {params.runtime} --cost {input.cost:q}"
        " {params.second_judge} {params.refusals} --labels {input.labels:q} --out {output.agreement:q} 2>&1 | tee {log:q}"


# Where safety lives: `attribution.enabled` decides whether the page asks for it.
rule attribute:
    input:
        model=made(rules.prepare_model.output.model),
        policy=made(rules.match_safety.output.policy),
        certificate=made(rules.certify.output.certificate),
        cost=made(rules.train_cost.output.folder),
        evaluation=made(rules.evaluate.output),
        base_evaluation=made(rules.evaluate.output, **BASE_RUN),
    output:
        attribution="<home>/attribution/{method}/seed{seed}.json",
    log:
        "<logs>/attribute/{method}-seed{seed}.log",
    benchmark:
        "<timings>/attribute/{method}-seed{seed}.tsv"
    conda:
        "../envs/nspo.yaml"
    threads: HEAVY_THREADS
    resources:
        **resources("attribute"),
        gpu=launch.gpus(settings),
    params:
        **tracked("attribution", section("attribution"), ["harmful_prompts", "general_prompts"]),
        code=code("nspo.certify.attribution"),
        flags=flags(section("attribution"), ["harmful_prompts", "general_prompts"]),
        start=start,
        runtime=runtime,
        evaluation=folders("evaluation"),
        base_evaluation=folders("base_evaluation"),
    shell:
        "{params.start} nspo attribute {params.flags} {params.runtime} --base {input.model:q} --tuned {input.policy:q}"
        " --certificate {input.certificate:q} --evaluation {params.evaluation}"
        " --base-evaluation {params.base_evaluation} --cost {input.cost:q} --out {output.attribution:q} 2>&1 | tee {log:q}"
