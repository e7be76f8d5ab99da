# The SAE features of every sample's global token, in all layers.
rule features:
    input:
        activations=rules.activations.output,
        saes=lambda w: [
            f"results/{w.dataset}/saes/{w.sae}/{w.encoder}/{layer_name(layer)}/seed-{w.seed}/sae_weights.safetensors"
            for layer in STUDY.encoders[w.encoder].layer_numbers()
        ],
        code=code("features.py"),
    output:
        directory("results/{dataset}/features/{sae}/{encoder}@{seed}.zarr"),
    log:
        "results/logs/{dataset}/features/{sae}/{encoder}@{seed}.log",
    conda:
        "../../envs/conceptshare.yaml"
    threads: 1
    resources:
        gpu=1,
        mem_mb=grown(8000),
        runtime=grown(120),
    params:
        saes=lambda w, input: str(Path(input.saes[0]).parents[2]),
    shell:
        "python -m conceptshare features --activations {input.activations:q} --saes {params.saes:q}"
        " --seed {wildcards.seed} --threads {threads} --out {output:q} > {log:q} 2>&1"
