# Names of a member's features, from the captions of the samples on which they are strongest.
rule names:
    input:
        features=rules.features.output,
        data=DATA,
        code=code("concepts/names.py", "io/sizes.py"),
    output:
        table=layout.NAMES.replace("{member}", layout.MEMBER),
        clearest=report(
            layout.NAMES.replace("{member}", layout.MEMBER).replace(".parquet", ".clearest.csv"),
            caption="../report/names_table.rst",
            category="Names of features",
            subcategory="{dataset}, SAEs {sae}",
            labels={
                "encoder": "{encoder}@{seed}",
                "shows": "clearest names",
                "data set": "{dataset}",
                "SAEs": "{sae}",
                "type": "table",
            },
        ),
        provenance=layout.NAMES.replace("{member}", layout.MEMBER).replace(".parquet", ".provenance.json"),
    log:
        layout.log(layout.NAMES.replace("{member}", layout.MEMBER)),
    conda:
        "../../envs/conceptshare.yaml"
    threads: 1
    resources:
        mem_mb=grown(8000 if STUDY.keep_features else 12000),
        runtime=grown(120),
    params:
        data=lambda w, input: folder_of(input.data),
        command=names_command,
    shell:
        "python -m conceptshare names --features {input.features:q} --data {params.data:q} {params.command}"
        " --out {output.table:q} > {log:q} 2>&1"
