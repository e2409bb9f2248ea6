rule collect_activations:
    input:
        model=made(rules.prepare_model.output.model),
        prompts=made(rules.prepare_prompts.output.prompts),
        images=source_files("activations", inputs.image_source),
        again=made_again("collect_activations", "activations"),
    output:
        activations=directory("<home>/activations"),
    log:
        "<logs>/collect_activations.log",
    cache: True
    conda:
        "../envs/nspo.yaml"
    threads: HEAVY_THREADS
    resources:
        **resources("collect_activations"),
        gpu=launch.gpus(settings, settings.runtime.processes),
    params:
        **tracked("activations", section("activations")),
        code=code("nspo.activations.stage"),
        versions=versions,
        flags=flags(section("activations")),
        start=start_collecting,
        device=device,
    shell:
        "{params.start} nspo collect {params.flags} {params.device} --model {input.model:q}"
        ' --prompts {input.prompts:q} --workdir "$(dirname {output.activations:q})/.work"'
        " --out {output.activations:q} 2>&1 | tee {log:q}"


rule compute_bases:
    input:
        activations=made(rules.collect_activations.output.activations),
        parts=shares_of_bases,
    output:
        bases="<home>/bases/bases.safetensors",
    log:
        "<logs>/compute_bases.log",
    cache: True
    conda:
        "../envs/nspo.yaml"
    threads: HEAVY_THREADS
    resources:
        **resources("compute_bases"),
    params:
        **tracked("bases", section("bases"), BASES_FLAGS),
        code=code("nspo.bases.stage"),
        versions=versions,
        flags=flags(section("bases"), BASES_FLAGS),
        parts=optional("--parts", "parts"),
    shell:
        "python -m nspo bases {params.flags} --activations {input.activations:q} {params.parts}"
        ' --workdir "$(dirname {output.bases:q})/../.work" --out {output.bases:q} 2>&1 | tee {log:q}'


# Bases of a method's own, from the same activations.
use rule compute_bases as compute_own_bases with:
    input:
        activations=made(rules.collect_activations.output.activations),
    output:
        bases="<home>/bases/own/{selection}.safetensors",
    log:
        "<logs>/compute_bases/{selection}.log",
    params:
        **tracked("bases", own_selection, BASES_FLAGS),
        code=code("nspo.bases.stage"),
        versions=versions,
        flags=flags(own_selection, BASES_FLAGS),
        parts="",


# The shares of `bases.jobs`: on a cluster each is a job of its own.
use rule compute_bases as compute_bases_part with:
    input:
        activations=made(rules.collect_activations.output.activations),
    output:
        bases=temp("<home>/bases/part-{part}-of-{parts}.safetensors"),
    log:
        "<logs>/compute_bases/{part}-of-{parts}.log",
    params:
        **tracked("bases", section("bases"), BASES_FLAGS),
        code=code("nspo.bases.stage"),
        versions=versions,
        flags=flags(section("bases"), BASES_FLAGS),
        parts="--part {part}/{parts}",
