# What a member's features are called, from the captions of the samples that they are strongest on.
rule names:
    input:
        features=rules.features.output,
        data=DATA,
        code=code("concepts/names.py"),
    output:
        table="results/{dataset}/names/{sae}/{encoder}@{seed}.parquet",
        clearest=report(
            "results/{dataset}/names/{sae}/{encoder}@{seed}.clearest.csv",
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
        provenance="results/{dataset}/names/{sae}/{encoder}@{seed}.provenance.json",
    log:
        "results/logs/{dataset}/names/{sae}/{encoder}@{seed}.log",
    conda:
        "../../envs/conceptshare.yaml"
    threads: 1
    resources:
        mem_mb=grown(8000),
        runtime=grown(120),
    params:
        data=lambda w, input: folder_of(input.data),
        command=names_command,
    shell:
        "python -m conceptshare names --features {input.features:q} --data {params.data:q} {params.command}"
        " --out {output.table:q} > {log:q} 2>&1"
