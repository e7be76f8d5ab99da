# The exact files of an encoder, after it has been loaded and has read two samples. Runs on the machine that starts the
# workflow: it may need the hub, and an entry that does not match its model is rejected before any job is queued.
localrules:
    weights,


rule weights:
    input:
        model=lambda w: local_files(STUDY.encoders[w.encoder].model),
        checkpoint=lambda w: local_files(STUDY.encoders[w.encoder].weights or ""),
        data=data_of_arrays,
        code=code("encoders/weights.py", "encoders/untrained.py", "io/hub.py"),
    output:
        record=layout.WEIGHTS,
        provenance=layout.WEIGHTS.replace(".json", ".provenance.json"),
    log:
        layout.log(layout.WEIGHTS),
    conda:
        environment_of
    threads: 1
    resources:
        mem_mb=grown(2000),
        runtime=grown(120),
    params:
        spec=lambda w: STUDY.encoders[w.encoder].activations_key(),
        data=lambda w, input: f"--data {quote(folder_of(input.data))}" if input.data else "",
    shell:
        "python -m conceptshare weights --encoder {params.spec:q} {params.data} --out {output.record:q} > {log:q} 2>&1"
