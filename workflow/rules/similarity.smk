# How alike the global tokens of two encoders are, without any SAE. A job is a pair of encoders, whatever their seeds.
rule similarity:
    input:
        a=lambda w: activations_of(w, "encoder_a"),
        b=lambda w: activations_of(w, "encoder_b"),
        code=code("similarity.py"),
    output:
        csv="results/{dataset}/similarity/{sae}/{encoder_a}__{encoder_b}.csv",
        provenance="results/{dataset}/similarity/{sae}/{encoder_a}__{encoder_b}.provenance.json",
    log:
        "results/logs/{dataset}/similarity/{sae}/{encoder_a}__{encoder_b}.log",
    conda:
        "../../envs/conceptshare.yaml"
    threads: 1
    resources:
        gpu=1,
        mem_mb=grown(4000),
        runtime=grown(120),
    shell:
        "python -m conceptshare similarity {input.a:q} {input.b:q} --threads {threads} --out {output.csv:q}"
        " > {log:q} 2>&1"
