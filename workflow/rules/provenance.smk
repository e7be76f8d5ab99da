# The study of the tables and figures in a folder, with the versions and the machine on which it was started. It is
# written last, so that it never describes results that do not exist yet.
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
        key=lambda w: STUDY.study_key(),  # not expanded: a template has braces
        study=study_file,
    shell:
        "python -m conceptshare provenance --study {params.study:q} --out {output:q} > {log:q} 2>&1"
