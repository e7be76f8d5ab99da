# One sparse autoencoder per layer and seed: trained, or imported and measured.
rule sae:
    input:
        tokens=training_tokens,
        pretrained=imported_sae,
        code=code("sae/_*.py", "io/sizes.py"),
    output:
        multiext(
            f"{layout.SAES}/{layout.SAE}/",
            weights="sae_weights.safetensors",
            config="cfg.json",
            metrics="metrics.json",
            losses="loss.csv",
            density="density.csv",
            manifest="manifest.json",
            provenance="provenance.json",
        ),
    log:
        layout.log(f"{layout.SAES}/{layout.SAE}"),
    conda:
        "../../envs/conceptshare.yaml"
    threads: 1
    resources:
        gpu=GPUS,
        mem_mb=grown(8000),
        runtime=grown(720),
        # Not a parameter: bounds of warnings change no SAE.
        settings=lambda w: STUDY.sae_settings(w.sae),
        pretrained=pretrained_option,
    params:
        depends_on=lambda w: STUDY.sae_key(w.sae, *source_of(w)),
        folder=subpath(output.config, parent=True),
    shell:
        "python -m conceptshare sae train --tokens {input.tokens:q} --layer {wildcards.layer}"
        " --seed {wildcards.seed} --settings {resources.settings:q} {resources.pretrained} --threads {threads}"
        " --out {params.folder:q} --gpus {resources.gpu} > {log:q} 2>&1"
