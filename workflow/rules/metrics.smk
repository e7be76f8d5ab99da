# Tidy tables of the study. Seconds each, so they run where the workflow is started.
localrules:
    metrics_matrix,
    metrics_layerwise,
    metrics_sharedness,
    metrics_saes,


rule metrics_matrix:
    input:
        features=lambda w: features_of(STUDY.matrix_members(w.name), w),
        correlations=lambda w: correlations_of(STUDY.matrix_pairs(w.name), w),
        code=code("metrics.py", "tables.py"),
    output:
        csv=report(
            "results/studies/{study}/{dataset}/{sae}/matrices/{name}.csv",
            caption="../report/matrix_table.rst",
            category="wMPPC matrices",
            labels={
                "analysis": "{name}",
                "data set": "{dataset}",
                "SAEs": "{sae}",
                "type": "table",
            },
        ),
        parquet="results/studies/{study}/{dataset}/{sae}/matrices/{name}.parquet",
    log:
        "results/logs/studies/{study}/{dataset}/{sae}/matrices/{name}.log",
    conda:
        "../../envs/conceptshare.yaml"
    threads: 1
    resources:
        mem_mb=grown(2000),
        runtime=grown(30),
    params:
        members=lambda w: STUDY.matrix_key(w.name),
        features=lambda w, input: folder_of(input.features),
        correlations=lambda w, input: folder_of(input.correlations),
    shell:
        "python -m conceptshare metrics matrix --members {params.members:q} --features {params.features:q}"
        " --correlations {params.correlations:q} --out {output.csv:q} > {log:q} 2>&1"


rule metrics_layerwise:
    input:
        features=lambda w: features_of({m for pair in STUDY.layerwise_pairs(w.name) for m in pair}, w),
        correlations=lambda w: correlations_of(STUDY.layerwise_pairs(w.name), w),
        code=code("metrics.py", "tables.py"),
    output:
        csv=report(
            "results/studies/{study}/{dataset}/{sae}/layerwise/{name}.csv",
            caption="../report/layerwise_table.rst",
            category="Layerwise heatmaps",
            labels={
                "analysis": "{name}",
                "data set": "{dataset}",
                "SAEs": "{sae}",
                "type": "table",
            },
        ),
        parquet="results/studies/{study}/{dataset}/{sae}/layerwise/{name}.parquet",
    log:
        "results/logs/studies/{study}/{dataset}/{sae}/layerwise/{name}.log",
    conda:
        "../../envs/conceptshare.yaml"
    threads: 1
    resources:
        mem_mb=grown(2000),
        runtime=grown(30),
    params:
        pairs=lambda w: STUDY.layerwise_key(w.name),
        features=lambda w, input: folder_of(input.features),
        correlations=lambda w, input: folder_of(input.correlations),
    shell:
        "python -m conceptshare metrics layerwise --pairs {params.pairs:q} --features {params.features:q}"
        " --correlations {params.correlations:q} --out {output.csv:q} > {log:q} 2>&1"


rule metrics_sharedness:
    input:
        features=lambda w: features_of([STUDY.sharedness_source(w.name)], w),
        correlations=lambda w: correlations_of(STUDY.sharedness_pairs(w.name), w),
        code=code("metrics.py", "tables.py"),
    output:
        csv=report(
            "results/studies/{study}/{dataset}/{sae}/sharedness/{name}.csv",
            caption="../report/sharedness_table.rst",
            category="Comparative Sharedness",
            labels={
                "analysis": "{name}",
                "data set": "{dataset}",
                "SAEs": "{sae}",
                "type": "table",
            },
        ),
        parquet="results/studies/{study}/{dataset}/{sae}/sharedness/{name}.parquet",
    log:
        "results/logs/studies/{study}/{dataset}/{sae}/sharedness/{name}.log",
    conda:
        "../../envs/conceptshare.yaml"
    threads: 1
    resources:
        mem_mb=grown(2000),
        runtime=grown(30),
    params:
        analysis=lambda w: STUDY.sharedness_key(w.name),
        features=lambda w, input: folder_of(input.features),
        correlations=lambda w, input: folder_of(input.correlations),
    shell:
        "python -m conceptshare metrics sharedness --analysis {params.analysis:q} --features {params.features:q}"
        " --correlations {params.correlations:q} --out {output.csv:q} > {log:q} 2>&1"


rule metrics_saes:
    input:
        features=lambda w: features_of(STUDY.members(), w),
        code=code("tables.py"),
    output:
        csv=report(
            "results/studies/{study}/{dataset}/{sae}/saes.csv",
            caption="../report/saes_table.rst",
            category="SAE training",
            labels={
                "analysis": "all SAEs",
                "data set": "{dataset}",
                "SAEs": "{sae}",
                "type": "table",
            },
        ),
        parquet="results/studies/{study}/{dataset}/{sae}/saes.parquet",
    log:
        "results/logs/studies/{study}/{dataset}/{sae}/saes.log",
    conda:
        "../../envs/conceptshare.yaml"
    threads: 1
    resources:
        mem_mb=grown(2000),
        runtime=grown(30),
    params:
        members=STUDY.members_key(),
        saes=saes_folder,
        features=lambda w, input: folder_of(input.features),
    shell:
        "python -m conceptshare metrics saes --members {params.members:q} --saes {params.saes:q}"
        " --features {params.features:q} --out {output.csv:q} > {log:q} 2>&1"
