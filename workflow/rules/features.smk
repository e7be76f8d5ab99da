# The SAE features of every sample's global token, in all layers.
rule features:
    input:
        activations=activations_of,
        saes=saes_of,
        code=code("sae/features.py", "io/sizes.py"),
    output:
        directory(layout.FEATURES.replace("{member}", layout.MEMBER)),
    log:
        layout.log(layout.FEATURES.replace("{member}", layout.MEMBER)),
    conda:
        "../../envs/conceptshare.yaml"
    threads: 1
    resources:
        gpu=GPUS,
        mem_mb=grown(8000),
        runtime=grown(120),
    params:
        saes=encoder_saes,
        stored=lambda w: STUDY.features_options(w.sae),
    shell:
        "python -m conceptshare features --activations {input.activations:q} --saes {params.saes:q}"
        " --seed {wildcards.seed} {params.stored} --threads {threads} --out {output:q} --gpus {resources.gpu} > {log:q} 2>&1"
