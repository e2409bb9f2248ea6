# What the preference objectives learn from; all of a seed share it.
rule make_pairs:
    input:
        model=made(rules.prepare_model.output.model),
        reward=made(rules.train_reward.output.folder),
        cost=made(rules.train_cost.output.folder),
        prompts=made(rules.prepare_prompts.output.prompts),
        labels=where(lambda settings: settings.policy.pairs == "labels", made(rules.prepare_labels.output.labels)),
        judge=reward_judge_files,
    output:
        pairs="<home>/pairs/seed{seed}.parquet",
    log:
        "<logs>/make_pairs/seed{seed}.log",
    benchmark:
        "<timings>/make_pairs/seed{seed}.tsv"
    conda:
        "../envs/nspo.yaml"
    threads: HEAVY_THREADS
    resources:
        **resources("make_pairs"),
        gpu=launch.gpus(settings),
    params:
        **tracked("policy", section("policy", PairSettings)),
        code=code("nspo.policy.pairs.stage"),
        flags=flags(section("policy", PairSettings)),
        start=start,
        runtime=runtime,
        labels=optional("--labels", "labels"),
    shell:
        "{params.start} nspo make-pairs {params.flags} {params.runtime} --seed {wildcards.seed} --model {input.model:q}"
        " --reward {input.reward:q} --cost {input.cost:q} --prompts {input.prompts:q} {params.labels}"
        " --out {output.pairs:q} 2>&1 | tee {log:q}"


# Before any training: which space, mode and batch drift least for what they gain.
rule screen:
    input:
        model=made(rules.prepare_model.output.model),
        reward=made(rules.train_reward.output.folder),
        cost=made(rules.train_cost.output.folder),
        prompts=made(rules.prepare_prompts.output.prompts),
        activations=made(rules.collect_activations.output.activations),
    output:
        screen="<home>/screen/screen.json",
        table="<home>/screen/screen.csv",
    log:
        "<logs>/screen.log",
    conda:
        "../envs/nspo.yaml"
    threads: HEAVY_THREADS
    resources:
        **resources("screen"),
        gpu=launch.gpus(settings, 1),
    params:
        **tracked("screen", section("screen"), SCREEN_FLAGS),
        **tracked("policy", section("policy"), SAMPLING),
        code=code("nspo.screen.stage"),
        flags=flags(section("screen"), SCREEN_FLAGS),
        rollouts=flags(section("policy"), SAMPLING),
        device=device,
    shell:
        "python -m nspo screen {params.flags} {params.rollouts} {params.device} --model {input.model:q}"
        " --reward {input.reward:q} --cost {input.cost:q} --prompts {input.prompts:q} --activations {input.activations:q}"
        ' --out "$(dirname {output.screen:q})" 2>&1 | tee {log:q}'


# The model, and beside it the log of its training.
rule train_policy:
    input:
        model=made(rules.prepare_model.output.model),
        reward=made(rules.train_reward.output.folder),
        cost=made(rules.train_cost.output.folder),
        prompts=made(rules.prepare_prompts.output.prompts),
        bases=bases_of_method,
        pairs=pairs_of_method,
        guide=guide_of_method,
        judge=reward_judge_files,
        again=made_again("train_policy", "policy"),
    output:
        policy=directory("<home>/policy/{method}/seed{seed}"),
        settings="<home>/training/{method}/seed{seed}/settings.json",
        training="<home>/training/{method}/seed{seed}/training.parquet",
        probes="<home>/training/{method}/seed{seed}/probes.parquet",
        samples="<home>/training/{method}/seed{seed}/samples.parquet",
    log:
        "<logs>/train_policy/{method}-seed{seed}.log",
    benchmark:
        "<timings>/train_policy/{method}-seed{seed}.tsv"
    wildcard_constraints:
        method=any_of(lambda settings: settings.policy.methods),
    # Before evaluations that are ready too: everything else of a method waits for its policy.
    priority: 1
    conda:
        "../envs/nspo.yaml"
    threads: HEAVY_THREADS
    resources:
        **resources("train_policy"),
        gpu=gpus_of_training,
    params:
        **tracked("policy", section("policy", TrainingSettings)),
        **tracked("method", method_of),
        **tracked("activations", section("activations"), ["layers"]),
        code=code("nspo.policy.stage"),
        flags=flags(section("policy", TrainingSettings)),
        method=flags(method_of),
        layers=flags(section("activations"), ["layers"]),
        start=start_training,
        runtime=runtime,
        bases=optional("--bases", "bases"),
        pairs=optional("--pairs", "pairs"),
        guide=optional("--guide-policy", "guide"),
    shell:
        "{params.start} nspo train-policy {params.flags} {params.method} {params.layers} {params.runtime}"
        " --name {wildcards.method} --seed {wildcards.seed} --model {input.model:q} {params.bases} {params.pairs}"
        " {params.guide} --reward {input.reward:q} --cost {input.cost:q} --prompts {input.prompts:q}"
        ' --logs "$(dirname {output.training:q})" --out {output.policy:q} 2>&1 | tee {log:q}'


# Methods meet at equal safety: what is tested and certified is the model on the line from the base through the policy
# where validation prompts are answered as safely as `matching.target_unsafe` says.
rule match_safety:
    input:
        model=made(rules.prepare_model.output.model),
        policy=made(rules.train_policy.output.policy),
        cost=made(rules.train_cost.output.folder),
        prompts=made(rules.prepare_prompts.output.prompts),
        labels=made(rules.prepare_labels.output.labels),
        again=made_again("match_safety", "policy"),
    output:
        policy=directory("<home>/matched/{method}/seed{seed}"),
        match="<home>/walks/{method}/seed{seed}/match.json",
        walk="<home>/walks/{method}/seed{seed}/walk.parquet",
    log:
        "<logs>/match_safety/{method}-seed{seed}.log",
    benchmark:
        "<timings>/match_safety/{method}-seed{seed}.tsv"
    wildcard_constraints:
        method=any_of(lambda settings: settings.policy.methods),
    conda:
        "../envs/nspo.yaml"
    threads: HEAVY_THREADS
    resources:
        **resources("match_safety"),
        gpu=launch.gpus(settings),
    params:
        **tracked("matching", section("matching")),
        **tracked("evaluation", section("evaluation", AnsweringSettings)),
        code=code("nspo.evaluation.walk.stage"),
        flags=flags(section("matching")),
        answering=flags(section("evaluation", AnsweringSettings)),
        start=start,
        runtime=runtime,
    shell:
        "{params.start} nspo walk {params.flags} {params.answering} {params.runtime} --name {wildcards.method}"
        " --seed {wildcards.seed} --base {input.model:q} --policy {input.policy:q} --cost {input.cost:q}"
        " --prompts {input.prompts:q} --labels {input.labels:q}"
        ' --logs "$(dirname {output.match:q})" --out {output.policy:q} 2>&1 | tee {log:q}'


# Apart from training, so that new bases measure an unconstrained policy again without training it again.
rule certify:
    input:
        model=made(rules.prepare_model.output.model),
        policy=made(rules.match_safety.output.policy),
        bases=certified_bases,
        activations=where(
            lambda settings: not settings.bases.precomputed, made(rules.collect_activations.output.activations)
        ),
    output:
        certificate="<home>/certificates/{method}/seed{seed}.json",
    log:
        "<logs>/certify/{method}-seed{seed}.log",
    conda:
        "../envs/nspo.yaml"
    resources:
        **resources("certify"),
    params:
        code=code("nspo.certify.stage"),
        facts=facts_of,
        activations=optional("--activations", "activations"),
        scratch=scratch,
    shell:
        "python -m nspo verify --facts {params.facts} --base {input.model:q} --tuned {input.policy:q}"
        " --bases {input.bases:q} {params.activations} {params.scratch} --out {output.certificate:q} 2>&1 | tee {log:q}"


# Training alone, as `performance/trajectories.py` wants it: `snakemake all_policies --cores all`.
rule all_policies:
    input:
        everything(every_policy(rules.train_policy.output.policy)),
