# The study that the tables and figures in a folder are of, with the versions and the machine that it was started with.
# It is written last, so that it never tells of results that are still to be made.
rule provenance:
    input:
        study_results(),
    output:
        report(
            layout.PROVENANCE,
            caption="../report/provenance.rst",
            category="The study",
            labels={"study": "{study}", "shows": "versions and parameters", "type": "JSON"},
        ),
    log:
        layout.log(layout.PROVENANCE),
    localrule: True
    conda:
        "../../envs/conceptshare.yaml"
    threads: 1
    resources:
        mem_mb=grown(2000),
        runtime=grown(30),
    params:
        key=STUDY.study_key(),
        study=study_file,
    shell:
        "python -m conceptshare provenance --study {params.study:q} --out {output:q} > {log:q} 2>&1"
