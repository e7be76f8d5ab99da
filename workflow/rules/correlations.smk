# Best matches between the features of two members, in both directions. A job is a pair of members, never a pair
# of layers: thousands of jobs plan in seconds, and each loads its stores once.
rule correlations:
    input:
        a="results/{dataset}/features/{sae}/{a}.zarr",
        b="results/{dataset}/features/{sae}/{b}.zarr",
        code=code("correlations/*.py"),
    output:
        directory("results/{dataset}/correlations/{sae}/{a}__{b}.zarr"),
    log:
        "results/logs/{dataset}/correlations/{sae}/{a}__{b}.log",
    conda:
        "../../envs/conceptshare.yaml"
    threads: 1
    resources:
        gpu=GPUS,
        mem_mb=grown((STUDY.correlations.memory_mb or 1000) + 8000),
        runtime=grown(720),
        bound=correlations_memory,
    params:
        settings=correlations_key,
    shell:
        "python -m conceptshare correlations {input.a:q} {input.b:q} --settings {params.settings:q}"
        " {resources.bound} --threads {threads} --out {output:q} --gpus {resources.gpu} > {log:q} 2>&1"
