rule collect_activations:
    input:
        model=rules.prepare_model.output.manifest,
        prompts=rules.prepare_prompts.output.prompts,
    output:
        activations=directory("<results>/activations"),
    log:
        "<logs>/collect_activations.log",
    cache: True
    conda:
        "../envs/nspo.yaml"
    threads: HEAVY_THREADS
    resources:
        mem=grows(32, "GB"),
        runtime=grows(4, "h"),
    params:
        code=code("nspo.activations.stage"),
        flags=flags(settings.activations),
        launch=launch,
        device=device,
    shell:
        '{params.launch} nspo collect {params.flags} {params.device} --model "$(dirname {input.model:q})"'
        ' --prompts {input.prompts:q} --workdir "$(dirname {output.activations:q})/.work"'
        " --out {output.activations:q} 2>&1 | tee {log:q}"


rule compute_bases:
    input:
        activations=rules.collect_activations.output.activations,
        parts=bases_parts,
    output:
        bases="<results>/bases/bases.safetensors",
    log:
        "<logs>/compute_bases.log",
    cache: True
    conda:
        "../envs/nspo.yaml"
    threads: HEAVY_THREADS
    resources:
        mem=grows(64, "GB"),
        runtime=grows(8, "h"),
    params:
        code=code("nspo.bases.stage"),
        flags=flags(settings.bases, BASES_FLAGS),
        parts=optional("--parts", "parts"),
    shell:
        "python -m nspo bases {params.flags} --activations {input.activations:q} {params.parts}"
        ' --workdir "$(dirname {output.bases:q})/../.work" --out {output.bases:q} 2>&1 | tee {log:q}'


# The shares of `bases.jobs`: on a cluster each is a job of its own.
use rule compute_bases as compute_bases_part with:
    input:
        activations=rules.collect_activations.output.activations,
    output:
        bases=temp("<results>/bases/part-{part}-of-{parts}.safetensors"),
    log:
        "<logs>/compute_bases/{part}-of-{parts}.log",
    params:
        code=code("nspo.bases.stage"),
        flags=flags(settings.bases, BASES_FLAGS),
        parts="--part {part}/{parts}",
