# Every layer of an encoder, from one forward pass over a data set: the global tokens, and all tokens if SAEs are trained
# on them. With `parts`, that many jobs share the forward pass, and another job joins their shards.
rule activations:
    input:
        data=DATA,
        weights=rules.weights.output.record,
        code=code("activations/extraction.py", "io/sizes.py", "encoders/_*.py"),
    output:
        **stored_tokens(),
        activations=directory(layout.ACTIVATIONS),
    log:
        layout.log(layout.ACTIVATIONS),
    wildcard_constraints:
        encoder=one_of(STUDY.encoders.keys() - STUDY.parted_encoders()),
    conda:
        environment_of
    threads: 1
    resources:
        gpu=lambda w: 0 if STUDY.encoders[w.encoder].library == "arrays" else GPUS,
        mem_mb=grown(16000),
        runtime=grown(480),
        tokens=tokens_option,
    params:
        spec=lambda w: STUDY.encoders[w.encoder].activations_key(),
        data=lambda w, input: folder_of(input.data),
    shell:
        "python -m conceptshare activations --encoder {params.spec:q} --weights {input.weights:q}"
        " --data {params.data:q} --threads {threads} --out {output.activations:q} {resources.tokens}"
        " --gpus {resources.gpu} > {log:q} 2>&1"


rule activations_part:
    input:
        data=DATA,
        weights=rules.weights.output.record,
        code=code("activations/extraction.py", "io/sizes.py", "activations/parts.py", "encoders/_*.py"),
    output:
        temp(directory(layout.PARTS)),
    log:
        layout.log(layout.PARTS),
    wildcard_constraints:
        part=r"\d+",
        parts=r"\d+",
    conda:
        environment_of
    threads: 1
    resources:
        gpu=GPUS,
        mem_mb=grown(16000),
        runtime=grown(480),
        # Not a parameter, as for `activations`.
        tokens="" if STUDY.stores_tokens() else "--global-only",
    params:
        spec=lambda w: STUDY.encoders[w.encoder].activations_key(),
        data=lambda w, input: folder_of(input.data),
    shell:
        "python -m conceptshare activations --encoder {params.spec:q} --weights {input.weights:q}"
        " --data {params.data:q} --threads {threads} --part {wildcards.part}/{wildcards.parts} {resources.tokens}"
        " --out {output:q} --gpus {resources.gpu} > {log:q} 2>&1"


rule activations_join:
    input:
        parts=parts_of,
        code=code("activations/extraction.py", "io/sizes.py", "activations/parts.py"),
    output:
        **stored_tokens(),
        activations=directory(layout.ACTIVATIONS),
    log:
        layout.log(layout.ACTIVATIONS),
    wildcard_constraints:
        encoder=one_of(STUDY.parted_encoders()),
    conda:
        environment_of
    threads: 1
    resources:
        mem_mb=grown(4000),
        runtime=grown(60),
        tokens=tokens_option,
    shell:
        "python -m conceptshare join {input.parts:q} --out {output.activations:q} {resources.tokens} > {log:q} 2>&1"
