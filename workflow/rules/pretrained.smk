# An SAE of another library, converted, for `saes.NAME.pretrained`. Runs on the machine that starts the workflow, as it may
# need the hub, and first, so that an SAE that does not fit its encoder is rejected early.
localrules:
    pretrained,


rule pretrained:
    input:
        sae=files_of_source,
        code=code("sae/exchange.py", "config/pretrained.py", "io/hub.py"),
    output:
        multiext(
            f"{layout.PRETRAINED}/{layout.SAE}/",
            weights="sae_weights.safetensors",
            config="cfg.json",
            manifest="manifest.json",
            provenance="provenance.json",
        ),
    log:
        layout.log(f"{layout.PRETRAINED}/{layout.SAE}"),
    priority: 1
    conda:
        "../../envs/conceptshare.yaml"
    threads: 1
    resources:
        mem_mb=grown(4000),
        runtime=grown(120),
    params:
        source=source_of,
        width=lambda w: STUDY.encoders[w.encoder].width_of(int(w.layer)),
        folder=subpath(output.config, parent=True),
    shell:
        "python -m conceptshare sae import {params.source:q} --width {params.width} --layer {wildcards.layer}"
        " --out {params.folder:q} > {log:q} 2>&1"
