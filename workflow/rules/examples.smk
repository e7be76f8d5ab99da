# Examples of a member's features: weaker samples in addition to the strongest, and where each feature fires in them.
rule examples:
    input:
        features=rules.features.output,
        saes=saes_of,
        weights=rules.weights.output.record,
        data=DATA,
        code=code("concepts/examples.py", "io/sizes.py", "encoders/_*.py"),
    output:
        directory(layout.EXAMPLES.replace("{member}", layout.MEMBER)),
    log:
        layout.log(layout.EXAMPLES.replace("{member}", layout.MEMBER)),
    conda:
        environment_of
    threads: 1
    resources:
        gpu=GPUS,
        mem_mb=grown(16000),
        runtime=grown(240),
    params:
        spec=lambda w: STUDY.encoders[w.encoder].activations_key(),
        saes=encoder_saes,
        data=lambda w, input: folder_of(input.data),
    shell:
        "python -m conceptshare examples --encoder {params.spec:q} --weights {input.weights:q} --data {params.data:q}"
        " --features {input.features:q} --saes {params.saes:q} --threads {threads} --out {output:q}"
        " --gpus {resources.gpu} > {log:q} 2>&1"
