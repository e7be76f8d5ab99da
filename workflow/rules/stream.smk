# With `stream: true`: the SAEs of all layers and seeds of an encoder, trained during its forward pass over a data
# set. They are the same as those of the rules `activations` and `sae`, without stored tokens.
rule stream:
    input:
        data=DATA,
        weights=rules.weights.output.record,
        pretrained=imported_saes,
        code=code("activations/extraction.py", "io/sizes.py", "encoders/_*.py", "sae/_*.py"),
    output:
        saes=directory(layout.STREAMED_SAES),
        activations=directory(layout.STREAMED_ACTIVATIONS),
    log:
        layout.log(layout.STREAMED_SAES),
    conda:
        environment_of
    threads: 1
    resources:
        gpu=GPUS,
        mem_mb=grown(24000),
        runtime=grown(1440),
        # Not a parameter: bounds of warnings change no SAE.
        settings=lambda w: STUDY.sae_settings(w.sae),
        pretrained=pretrained_option,
    params:
        spec=lambda w: STUDY.encoders[w.encoder].activations_key(),
        depends_on=lambda w: STUDY.sae_key(w.sae, *STUDY.pretrained(w.sae, w.encoder).values()),
        # All that the entry lists, needed or not, so that studies with the same entry share a stream.
        seeds=lambda w: " ".join(f"--seed {seed}" for seed in sorted(STUDY.encoders[w.encoder].seeds)),
        data=lambda w, input: folder_of(input.data),
    shell:
        "python -m conceptshare stream --encoder {params.spec:q} --weights {input.weights:q} --data {params.data:q}"
        " --settings {resources.settings:q} {resources.pretrained} {params.seeds} --workers {threads} --saes {output.saes:q}"
        " --activations {output.activations:q} --gpus {resources.gpu} > {log:q} 2>&1"
