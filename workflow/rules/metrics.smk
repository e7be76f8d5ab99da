# Tidy tables of the study. Seconds each, so they run where the workflow is started.
localrules:
    metrics_matrix,
    metrics_averages,
    metrics_formats,
    metrics_paper,
    metrics_layerwise,
    metrics_pair,
    metrics_sharedness,
    metrics_overlaps,
    metrics_saes,


rule metrics_matrix:
    input:
        features=lambda w: features_of(matrix_members_with_ceilings(w.name), w),
        correlations=lambda w: correlations_of(STUDY.matrix_pairs(w.name) + STUDY.ceiling_pairs(w.name), w),
        similarity=lambda w: similarity_of(STUDY.matrix_pairs(w.name), w),
        code=code("metrics.py", "io/readers.py", "analysis/tables.py"),
    output:
        csv=report(
            "results/studies/{study}/{dataset}/{sae}/matrices/{name}.csv",
            caption="../report/matrix_table.rst",
            category="wMPPC matrices",
            subcategory="{dataset}, SAEs {sae}",
            labels={
                "analysis": "{name}",
                "shows": "wMPPC",
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
        similarity=similarity_option,
    shell:
        "python -m conceptshare metrics matrix --members {params.members:q} --features {params.features:q}"
        " --correlations {params.correlations:q} {params.similarity} --out {output.csv:q} > {log:q} 2>&1"


rule metrics_averages:
    input:
        table=rules.metrics_matrix.output.parquet,
        correlations=lambda w: correlations_of(STUDY.matrix_pairs(w.name), w),
        code=code("metrics.py", "io/readers.py", "analysis/tables.py"),
    output:
        csv=report(
            "results/studies/{study}/{dataset}/{sae}/matrices/{name}.averages.csv",
            caption="../report/averages_table.rst",
            category="wMPPC matrices",
            subcategory="{dataset}, SAEs {sae}",
            labels={
                "analysis": "{name}",
                "shows": "averages by modality",
                "data set": "{dataset}",
                "SAEs": "{sae}",
                "type": "table",
            },
        ),
        parquet="results/studies/{study}/{dataset}/{sae}/matrices/{name}.averages.parquet",
    log:
        "results/logs/studies/{study}/{dataset}/{sae}/matrices/{name}.averages.log",
    conda:
        "../../envs/conceptshare.yaml"
    threads: 1
    resources:
        mem_mb=grown(2000),
        runtime=grown(30),
    params:
        correlations=lambda w, input: folder_of(input.correlations),
    shell:
        "python -m conceptshare metrics averages --table {input.table:q} --correlations {params.correlations:q}"
        " --out {output.csv:q} > {log:q} 2>&1"


# The matrices as people read and print them, a row a source and a column a target.
rule metrics_formats:
    input:
        table=rules.metrics_matrix.output.parquet,
        averages=rules.metrics_averages.output.parquet,
        code=code("analysis/formats.py", "analysis/paper/*.py", "analysis/paper/*.csv"),
    output:
        report(
            directory("results/studies/{study}/{dataset}/{sae}/matrices/{name}"),
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
        "results/logs/studies/{study}/{dataset}/{sae}/matrices/{name}.formats.log",
    conda:
        "../../envs/conceptshare.yaml"
    threads: 1
    resources:
        mem_mb=grown(2000),
        runtime=grown(30),
    params:
        paper=paper_option,
    shell:
        "python -m conceptshare metrics formats --table {input.table:q} --averages {input.averages:q}"
        " {params.paper} --out {output:q} > {log:q} 2>&1"


rule metrics_paper:
    input:
        table=rules.metrics_matrix.output.parquet,
        code=code("analysis/paper/*.py", "analysis/paper/*.csv"),
    output:
        csv=report(
            "results/studies/{study}/{dataset}/{sae}/matrices/{name}.paper.csv",
            caption="../report/paper_table.rst",
            category="wMPPC matrices",
            subcategory="{dataset}, SAEs {sae}",
            labels={
                "analysis": "{name}",
                "shows": "beside the paper",
                "data set": "{dataset}",
                "SAEs": "{sae}",
                "type": "table",
            },
        ),
        parquet="results/studies/{study}/{dataset}/{sae}/matrices/{name}.paper.parquet",
        agreement=report(
            "results/studies/{study}/{dataset}/{sae}/matrices/{name}.paper-agreement.csv",
            caption="../report/agreement_table.rst",
            category="wMPPC matrices",
            subcategory="{dataset}, SAEs {sae}",
            labels={
                "analysis": "{name}",
                "shows": "agreement with the paper",
                "data set": "{dataset}",
                "SAEs": "{sae}",
                "type": "table",
            },
        ),
        agreement_parquet="results/studies/{study}/{dataset}/{sae}/matrices/{name}.paper-agreement.parquet",
    log:
        "results/logs/studies/{study}/{dataset}/{sae}/matrices/{name}.paper.log",
    conda:
        "../../envs/conceptshare.yaml"
    threads: 1
    resources:
        mem_mb=grown(2000),
        runtime=grown(30),
    params:
        size=lambda w: STUDY.analyses.matrices[w.name].paper,
    shell:
        "python -m conceptshare metrics paper --table {input.table:q} --dataset {wildcards.dataset:q}"
        " --size {params.size} --out {output.csv:q} --agreement {output.agreement:q} > {log:q} 2>&1"


rule metrics_layerwise:
    input:
        features=lambda w: features_of({m for pair in STUDY.layerwise_pairs(w.name) for m in pair}, w),
        correlations=lambda w: correlations_of(STUDY.layerwise_pairs(w.name), w),
        similarity=lambda w: similarity_of(STUDY.layerwise_pairs(w.name), w),
        code=code("metrics.py", "io/readers.py", "analysis/tables.py"),
    output:
        csv=report(
            "results/studies/{study}/{dataset}/{sae}/layerwise/{name}.csv",
            caption="../report/layerwise_table.rst",
            category="Layerwise heatmaps",
            subcategory="{dataset}, SAEs {sae}",
            labels={
                "analysis": "{name}",
                "shows": "all cells",
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
        similarity=similarity_option,
    shell:
        "python -m conceptshare metrics layerwise --pairs {params.pairs:q} --features {params.features:q}"
        " --correlations {params.correlations:q} {params.similarity} --out {output.csv:q} > {log:q} 2>&1"


rule metrics_pair:
    input:
        features=[
            "results/{dataset}/features/{sae}/{a}.zarr",
            "results/{dataset}/features/{sae}/{b}.zarr",
        ],
        correlations=rules.correlations.output,
        code=code("metrics.py", "io/readers.py", "analysis/tables.py"),
    output:
        multiext(
            "results/studies/{study}/{dataset}/{sae}/pairs/{a}__{b}",
            csv=".csv",
            parquet=".parquet",
        ),
    log:
        "results/logs/studies/{study}/{dataset}/{sae}/pairs/{a}__{b}.log",
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


rule metrics_sharedness:
    input:
        features=lambda w: features_of({m for pair in STUDY.sharedness_pairs(w.name) for m in pair}, w),
        correlations=lambda w: correlations_of(STUDY.sharedness_pairs(w.name), w),
        code=code("metrics.py", "io/readers.py", "analysis/tables.py"),
    output:
        csv=report(
            "results/studies/{study}/{dataset}/{sae}/sharedness/{name}.csv",
            caption="../report/sharedness_table.rst",
            category="Comparative Sharedness",
            subcategory="{dataset}, SAEs {sae}",
            labels={
                "analysis": "{name}",
                "shows": "ranking",
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


rule metrics_overlaps:
    input:
        rankings=expand(
            "results/studies/{{study}}/{{dataset}}/{{sae}}/sharedness/{name}.parquet",
            name=STUDY.overlapping(),
        ),
        code=code("metrics.py", "io/readers.py", "analysis/tables.py"),
    output:
        csv=report(
            "results/studies/{study}/{dataset}/{sae}/overlaps.csv",
            caption="../report/overlaps_table.rst",
            category="Comparative Sharedness",
            subcategory="{dataset}, SAEs {sae}",
            labels={
                "analysis": "all rankings",
                "shows": "overlaps of rankings",
                "data set": "{dataset}",
                "SAEs": "{sae}",
                "type": "table",
            },
        ),
        parquet="results/studies/{study}/{dataset}/{sae}/overlaps.parquet",
    log:
        "results/logs/studies/{study}/{dataset}/{sae}/overlaps.log",
    conda:
        "../../envs/conceptshare.yaml"
    threads: 1
    resources:
        mem_mb=grown(2000),
        runtime=grown(30),
    shell:
        "python -m conceptshare metrics overlaps {input.rankings:q} --out {output.csv:q} > {log:q} 2>&1"


rule metrics_saes:
    input:
        features=lambda w: features_of(STUDY.members(), w),
        code=code("io/readers.py", "analysis/tables.py"),
    output:
        csv=report(
            "results/studies/{study}/{dataset}/{sae}/saes.csv",
            caption="../report/saes_table.rst",
            category="SAE training",
            subcategory="{dataset}, SAEs {sae}",
            labels={
                "encoder": "all",
                "shows": "quality",
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
