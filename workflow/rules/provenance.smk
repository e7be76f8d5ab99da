# The study that the tables and figures in a folder are of, with the versions and the machine that it was started with.
localrules:
    provenance,


rule provenance:
    output:
        "results/studies/{study}/provenance.json",
    log:
        "results/logs/studies/{study}/provenance.log",
    conda:
        "../../envs/conceptshare.yaml"
    threads: 1
    resources:
        mem_mb=grown(2000),
        runtime=grown(30),
    params:
        study=STUDY.study_key(),
    shell:
        "python -m conceptshare provenance --out {output:q} <<< {params.study:q} > {log:q} 2>&1"
