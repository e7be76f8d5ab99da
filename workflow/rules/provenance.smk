# The study that the tables and figures in a folder are of, with the versions and the machine that it was started with.
# It is written last, so that it never tells of results that are still to be made.
localrules:
    provenance,


rule provenance:
    input:
        study_results(),
    output:
        json=report(
            "results/studies/{study}/provenance.json",
            caption="../report/provenance.rst",
            category="The study",
            labels={
                "study": "{study}",
                "shows": "versions and parameters, for programs",
                "type": "JSON",
            },
        ),
        page=report(
            "results/studies/{study}/provenance.html",
            caption="../report/provenance.rst",
            category="The study",
            labels={
                "study": "{study}",
                "shows": "versions and parameters",
                "type": "page",
            },
        ),
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
        "python -m conceptshare provenance --out {output.json:q} <<< {params.study:q} > {log:q} 2>&1"
