# Tidy tables of the study, one per line of `products.TABLES`. They take seconds and run on the machine that starts
# the workflow, except those that compute like a stage.
for table in products.TABLES:

    rule:
        name:
            f"metrics_{table.name}"
        input:
            **product_inputs(table),
            code=code("metrics.py", "io/readers.py", "analysis/tables.py", "analysis/paper/*", *table.code),
        output:
            csv=report(
                product_file(table, "csv"),
                caption=f"../report/{table.name}_table.rst",
                **report_entry(table, "table"),
            ),
            parquet=product_file(table, "parquet"),
        log:
            layout.log(product_file(table, "csv")),
        localrule: not table.gpu
        conda:
            "../../envs/conceptshare.yaml"
        threads: 1
        resources:
            **({"gpu": GPUS} if table.gpu else {}),
            mem_mb=grown(table.memory_mb),
            runtime=grown(120 if table.gpu else 30),
        params:
            key=TABLE_KEYS.get(table.name, ""),
            bound=bound_of(table),
            command=product_command(table),
        shell:
            "python -m conceptshare metrics {params.command} {params.bound} --out {output.csv:q}"
            + (" --gpus {resources.gpu} --threads {threads}" if table.gpu else "")
            + " > {log:q} 2>&1"


# The matrices for reading and printing, one row per source and one column per target.
rule metrics_formats:
    input:
        table=product_file(products.table("matrix"), "parquet"),
        code=code("analysis/formats.py", "analysis/tables.py", "analysis/paper/*"),
    output:
        report(
            directory(f"{layout.ANALYSES}/matrices/{{name}}"),
            patterns=["{part}.{ending}"],
            caption="../report/formats.rst",
            category="wMPPC matrices",
            subcategory="{dataset}, SAEs {sae}",
            labels={
                "analysis": "{name}",
                "shows": "{part}, as {ending}",
                "data set": "{dataset}",
                "SAEs": "{sae}",
                "type": "table",
            },
        ),
    log:
        layout.log(f"{layout.ANALYSES}/matrices/{{name}}", "formats"),
    localrule: True
    conda:
        "../../envs/conceptshare.yaml"
    threads: 1
    resources:
        mem_mb=grown(2000),
        runtime=grown(30),
    params:
        paper=paper_option,
    shell:
        "python -m conceptshare metrics formats --table {input.table:q} {params.paper} --out {output:q} > {log:q} 2>&1"


# Every feature of two members with its best match. The pages show them; there are too many for a report.
rule metrics_pair:
    input:
        features=[layout.FEATURES.format(member=member, dataset="{dataset}", sae="{sae}") for member in ("{a}", "{b}")],
        correlations=[layout.CORRELATIONS],
        code=code("metrics.py", "io/readers.py", "analysis/tables.py"),
    output:
        multiext(layout.PAIR.removesuffix(".parquet"), csv=".csv", parquet=".parquet"),
    log:
        layout.log(layout.PAIR),
    localrule: True
    conda:
        "../../envs/conceptshare.yaml"
    threads: 1
    resources:
        mem_mb=grown(2000),
        runtime=grown(30),
    params:
        features=lambda w, input: folder_of(input.features),
        correlations=lambda w, input: folder_of(input.correlations),
    shell:
        "python -m conceptshare metrics pair {wildcards.a:q} {wildcards.b:q} --features {params.features:q}"
        " --correlations {params.correlations:q} --out {output.csv:q} > {log:q} 2>&1"
