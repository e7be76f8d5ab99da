# Figures of the study, one per line of `products.FIGURES`, as PNG for viewing and PDF for printing.


for figure in products.FIGURES:

    rule:
        name:
            f"figures_{figure.name}"
        input:
            **product_inputs(figure),
            code=code("figures/*.py", "analysis/formats.py"),
        output:
            **FURTHER_FIGURES.get(figure.name, {}),
            png=report(
                product_file(figure, "png"),
                caption=f"../report/{figure.name}.rst",
                **report_entry(figure, "figure"),
            ),
            pdf=product_file(figure, "pdf"),
        log:
            layout.log(product_file(figure, "csv"), "figure"),
        localrule: True
        conda:
            "../../envs/conceptshare.yaml"
        threads: 1
        resources:
            mem_mb=grown(figure.memory_mb),
            runtime=grown(30),
        params:
            key=TABLE_KEYS.get(figure.table, "") if "study" in figure.inputs else "",
            command=product_command(figure),
        shell:
            "python -m conceptshare figures {params.command} --out {output.png:q} > {log:q} 2>&1"
