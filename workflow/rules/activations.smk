# Every layer of an encoder, from one forward pass over a data set: the global tokens, and all tokens for its SAEs.
rule activations:
    input:
        data=rules.dataset.output,
        weights=rules.weights.output,
        code=code("activations.py", "encoders/*.py"),
    output:
        activations=directory("results/{dataset}/activations/{encoder}.zarr"),
        tokens=kept_or_temp(directory("results/{dataset}/tokens/{encoder}.zarr")),
    log:
        "results/logs/{dataset}/activations/{encoder}.log",
    conda:
        environment_of
    threads: 1
    resources:
        gpu=1,
        mem_mb=grown(16000),
        runtime=grown(480),
    params:
        spec=lambda w: STUDY.encoders[w.encoder].activations_key(),
        data=lambda w, input: folder_of(input.data),
    shell:
        "python -m conceptshare activations --encoder {params.spec:q} --weights {input.weights:q}"
        " --data {params.data:q} --threads {threads} --out {output.activations:q} --tokens {output.tokens:q}"
        " > {log:q} 2>&1"
