# Similarity of the global tokens of two encoders, without any SAE. A job is a pair of encoders, whatever their seeds.
rule similarity:
    input:
        a=lambda w: activations_of(w, "encoder_a"),
        b=lambda w: activations_of(w, "encoder_b"),
        code=code("analysis/similarity.py", "io/sizes.py"),
    output:
        csv=report(
            SIMILARITY.replace(".parquet", ".csv"),
            caption="../report/similarity_table.rst",
            category="Similarity of activations",
            subcategory="{dataset}",
            labels={
                "encoders": "{encoder_a} and {encoder_b}",
                "shows": "CKA and mutual nearest neighbours",
                "data set": "{dataset}",
                "type": "table",
            },
        ),
        parquet=SIMILARITY,
        provenance=SIMILARITY.replace(".parquet", ".provenance.json"),
    log:
        layout.log(SIMILARITY),
    conda:
        "../../envs/conceptshare.yaml"
    threads: 1
    resources:
        gpu=GPUS,
        mem_mb=grown(4000),
        runtime=grown(120),
    shell:
        "python -m conceptshare similarity {input.a:q} {input.b:q} --threads {threads} --out {output.csv:q}"
        " --gpus {resources.gpu} > {log:q} 2>&1"
