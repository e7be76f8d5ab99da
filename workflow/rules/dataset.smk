# Image-caption pairs, read and shuffled once. Runs on the machine that starts the workflow, because it may need the
# hub.
localrules:
    dataset,


rule dataset:
    input:
        source=lambda w: dataset_inputs(w.dataset)[0],
        code=code(
            "data/dataset.py", "data/download.py", "io/hub.py", "data/images.py", "data/rows.py", "data/sources.py"
        ),
    output:
        samples=f"{layout.DATA}/samples.arrow",
        dropped=f"{layout.DATA}/dropped.jsonl",
        manifest=f"{layout.DATA}/manifest.json",
        provenance=f"{layout.DATA}/provenance.json",
    log:
        layout.log("results/{dataset}/dataset"),
    conda:
        "../../envs/conceptshare.yaml"
    threads: 1
    resources:
        mem_mb=grown(2000),
        runtime=grown(240),
    params:
        spec=lambda w: STUDY.dataset_key(w.dataset),
        images=lambda w: dataset_inputs(w.dataset)[1],
        folder=subpath(output.manifest, parent=True),
    shell:
        "python -m conceptshare dataset --dataset {params.spec:q} --out {params.folder:q} > {log:q} 2>&1"


# The inputs of later rules: without the provenance, which differs between two runs.
DATA = [rules.dataset.output.samples, rules.dataset.output.manifest]
