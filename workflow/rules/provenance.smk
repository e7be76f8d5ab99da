# The study, completed from the catalog, as commands read it. Each names the part of it that it depends on among its
# parameters, so that the file is made again with any change, and what is made from it only with its own.
rule study:
    output:
        layout.STUDY,
    log:
        layout.log(layout.STUDY),
    localrule: True
    conda:
        "../../envs/conceptshare.yaml"
    threads: 1
    resources:
        mem_mb=grown(2000),
        runtime=grown(30),
    params:
        study=STUDY.study_key(),
    run:
        write_study(STUDY, Path(output[0]))


# The study that the tables and figures in a folder are of, with the versions and the machine that it was started with.
# It is written last, so that it never tells of results that are still to be made.
rule provenance:
    input:
        study_results(),
        study=STUDY_JSON,
    output:
        json=report(
            layout.PROVENANCE,
            caption="../report/provenance.rst",
            category="The study",
            labels={
                "study": "{study}",
                "shows": "versions and parameters, for programs",
                "type": "JSON",
            },
        ),
        page=report(
            layout.PROVENANCE.replace(".json", ".html"),
            caption="../report/provenance.rst",
            category="The study",
            labels={
                "study": "{study}",
                "shows": "versions and parameters",
                "type": "page",
            },
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
        study=STUDY.study_key(),
    shell:
        "python -m conceptshare provenance --study {input.study:q} --out {output.json:q} > {log:q} 2>&1"
