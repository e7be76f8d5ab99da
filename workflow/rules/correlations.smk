# Best matches between the features of two members, in both directions. A job is a pair of members, never of layers,
# so that thousands of jobs are planned in seconds, and each job loads its stores once.
rule correlations:
    input:
        a=layout.FEATURES.replace("{member}", "{a}"),
        b=layout.FEATURES.replace("{member}", "{b}"),
        code=code("correlations/*.py", "io/sizes.py"),
    output:
        directory(layout.CORRELATIONS),
    log:
        layout.log(layout.CORRELATIONS),
    conda:
        "../../envs/conceptshare.yaml"
    threads: 1
    resources:
        gpu=GPUS,
        mem_mb=grown((STUDY.correlations.memory_mb or 1000) + 15000),
        runtime=grown(720),
        bound=correlations_memory,
    params:
        precision=STUDY.correlations.precision,
        unexplained=lambda w: STUDY.unexplained_options(w.sae),
    shell:
        "python -m conceptshare correlations {input.a:q} {input.b:q} --precision {params.precision}"
        " {params.unexplained} {resources.bound} --threads {threads} --out {output:q} --gpus {resources.gpu} > {log:q} 2>&1"
