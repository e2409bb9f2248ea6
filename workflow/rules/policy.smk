# What the preference objectives learn from; all of a seed share it.
rule make_pairs:
    input:
        model=rules.prepare_model.output.manifest,
        reward=rules.train_reward.output.manifest,
        cost=rules.train_cost.output.manifest,
        prompts=rules.prepare_prompts.output.prompts,
        labels=rules.prepare_labels.output.labels if settings.policy.pairs == "labels" else [],
        judge=judge_files("policy", reward_judge),
    output:
        pairs="<results>/pairs/seed{seed}.parquet",
    log:
        "<logs>/make_pairs/seed{seed}.log",
    benchmark:
        "<timings>/make_pairs/seed{seed}.tsv"
    conda:
        "../envs/nspo.yaml"
    threads: HEAVY_THREADS
    resources:
        mem=grows(64, "GB"),
        runtime=grows(12, "h"),
    params:
        code=code("nspo.policy.pairs.stage"),
        settings=flags(settings.policy, PairSettings.model_fields),
        runtime=runtime,
        model=folder("model"),
        reward=folder("reward"),
        cost=folder("cost"),
        labels=optional("--labels", "labels"),
    shell:
        "python -m nspo make-pairs {params.settings} {params.runtime} --seed {wildcards.seed} --model {params.model}"
        " --reward {params.reward} --cost {params.cost} --prompts {input.prompts:q} {params.labels} --out {output.pairs:q} 2>&1 | tee {log:q}"


rule train_policy:
    input:
        model=rules.prepare_model.output.manifest,
        reward=rules.train_reward.output.manifest,
        cost=rules.train_cost.output.manifest,
        prompts=rules.prepare_prompts.output.prompts,
        bases=bases_of_method,
        pairs=pairs_of_method,
        guide=guide_of_method,
        judge=judge_files("policy", reward_judge),
    output:
        manifest="<results>/policy/{method}/seed{seed}/manifest.json",
        settings="<results>/policy/{method}/seed{seed}/settings.json",
        training="<results>/policy/{method}/seed{seed}/training.parquet",
        probes="<results>/policy/{method}/seed{seed}/probes.parquet",
        samples="<results>/policy/{method}/seed{seed}/samples.parquet",
    log:
        "<logs>/train_policy/{method}-seed{seed}.log",
    benchmark:
        "<timings>/train_policy/{method}-seed{seed}.tsv"
    conda:
        "../envs/nspo.yaml"
    threads: HEAVY_THREADS
    resources:
        mem=grows(64, "GB"),
        runtime=grows(24, "h"),
    params:
        code=code("nspo.policy.stage"),
        training=flags(settings.policy, TrainingSettings.model_fields),
        method=lambda wildcards: to_flags(settings.policy.methods[wildcards.method]),
        layers=flags(settings.activations, ("layers",)),
        runtime=runtime,
        launch=launch_training,
        model=folder("model"),
        reward=folder("reward"),
        cost=folder("cost"),
        bases=optional("--bases", "bases"),
        pairs=optional("--pairs", "pairs"),
        guide=optional_folder("--guide-policy", "guide"),
        out=subpath(output.manifest, parent=True),
    shell:
        "{params.launch} nspo train-policy {params.training} {params.method} {params.layers} {params.runtime}"
        " --name {wildcards.method} --seed {wildcards.seed} --model {params.model} {params.bases} {params.pairs} {params.guide} --reward {params.reward} --cost {params.cost}"
        " --prompts {input.prompts:q} --out {params.out:q} 2>&1 | tee {log:q}"


# Apart from training, so that new bases measure an unconstrained policy again without training it again.
rule certify:
    input:
        model=rules.prepare_model.output.manifest,
        policy=rules.train_policy.output.manifest,
        bases=bases_file,
        activations=heldout_activations,
    output:
        certificate="<results>/certificates/{method}/seed{seed}.json",
    log:
        "<logs>/certify/{method}-seed{seed}.log",
    conda:
        "../envs/nspo.yaml"
    resources:
        mem=grows(24, "GB"),
        runtime=grows(1, "h"),
    params:
        code=code("nspo.certify.stage"),
        facts=lambda wildcards: shlex.quote(
            json.dumps(
                {
                    "method": wildcards.method,
                    "seed": int(wildcards.seed),
                    "constrained": is_constrained(wildcards),
                }
            )
        ),
        model=folder("model"),
        policy=folder("policy"),
        activations=optional("--activations", "activations"),
    shell:
        "python -m nspo verify --facts {params.facts} --base {params.model} --tuned {params.policy}"
        " --bases {input.bases:q} {params.activations} --out {output.certificate:q} 2>&1 | tee {log:q}"


# Training alone, as `performance/trajectories.py` wants it: `snakemake all_policies --cores all`.
rule all_policies:
    input:
        every_policy("<results>/policy/{method}/seed{seed}/probes.parquet"),
