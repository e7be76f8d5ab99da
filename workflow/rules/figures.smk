# Pictures of the study's tables, as PNG to look at and PDF to print.
localrules:
    figures_matrix,
    figures_averages,
    figures_intervals,
    figures_similarity,
    figures_strength,
    figures_paper,
    figures_layerwise,
    figures_sharedness,
    figures_top_samples,
    figures_scatter,
    figures_saes,


rule figures_matrix:
    input:
        table=rules.metrics_matrix.output.parquet,
        code=code("figures/*.py", "analysis/formats.py"),
    output:
        png=report(
            "results/studies/{study}/{dataset}/{sae}/matrices/{name}.png",
            caption="../report/matrix.rst",
            category="wMPPC matrices",
            subcategory="{dataset}, SAEs {sae}",
            labels={
                "analysis": "{name}",
                "shows": "wMPPC",
                "data set": "{dataset}",
                "SAEs": "{sae}",
                "type": "figure",
            },
        ),
        pdf="results/studies/{study}/{dataset}/{sae}/matrices/{name}.pdf",
    log:
        "results/logs/studies/{study}/{dataset}/{sae}/matrices/{name}.figure.log",
    conda:
        "../../envs/conceptshare.yaml"
    threads: 1
    resources:
        mem_mb=grown(2000),
        runtime=grown(30),
    shell:
        "python -m conceptshare figures matrix --table {input.table:q} --out {output.png:q} > {log:q} 2>&1"


rule figures_averages:
    input:
        table=rules.metrics_averages.output.parquet,
        code=code("figures/*.py", "analysis/formats.py"),
    output:
        png=report(
            "results/studies/{study}/{dataset}/{sae}/matrices/{name}.averages.png",
            caption="../report/averages.rst",
            category="wMPPC matrices",
            subcategory="{dataset}, SAEs {sae}",
            labels={
                "analysis": "{name}",
                "shows": "averages by modality",
                "data set": "{dataset}",
                "SAEs": "{sae}",
                "type": "figure",
            },
        ),
        pdf="results/studies/{study}/{dataset}/{sae}/matrices/{name}.averages.pdf",
    log:
        "results/logs/studies/{study}/{dataset}/{sae}/matrices/{name}.averages.figure.log",
    conda:
        "../../envs/conceptshare.yaml"
    threads: 1
    resources:
        mem_mb=grown(2000),
        runtime=grown(30),
    shell:
        "python -m conceptshare figures averages --table {input.table:q} --out {output.png:q} > {log:q} 2>&1"


rule figures_intervals:
    input:
        table=rules.metrics_matrix.output.parquet,
        code=code("figures/*.py", "analysis/formats.py"),
    output:
        png=report(
            "results/studies/{study}/{dataset}/{sae}/matrices/{name}.intervals.png",
            caption="../report/intervals.rst",
            category="wMPPC matrices",
            subcategory="{dataset}, SAEs {sae}",
            labels={
                "analysis": "{name}",
                "shows": "intervals",
                "data set": "{dataset}",
                "SAEs": "{sae}",
                "type": "figure",
            },
        ),
        pdf="results/studies/{study}/{dataset}/{sae}/matrices/{name}.intervals.pdf",
    log:
        "results/logs/studies/{study}/{dataset}/{sae}/matrices/{name}.intervals.figure.log",
    conda:
        "../../envs/conceptshare.yaml"
    threads: 1
    resources:
        mem_mb=grown(2000),
        runtime=grown(30),
    shell:
        "python -m conceptshare figures intervals --table {input.table:q} --out {output.png:q} > {log:q} 2>&1"


rule figures_similarity:
    input:
        table=rules.metrics_matrix.output.parquet,
        code=code("figures/*.py", "analysis/formats.py"),
    output:
        png=report(
            "results/studies/{study}/{dataset}/{sae}/matrices/{name}.similarity.png",
            caption="../report/similarity.rst",
            category="wMPPC matrices",
            subcategory="{dataset}, SAEs {sae}",
            labels={
                "analysis": "{name}",
                "shows": "similarity",
                "data set": "{dataset}",
                "SAEs": "{sae}",
                "type": "figure",
            },
        ),
        pdf="results/studies/{study}/{dataset}/{sae}/matrices/{name}.similarity.pdf",
    log:
        "results/logs/studies/{study}/{dataset}/{sae}/matrices/{name}.similarity.figure.log",
    conda:
        "../../envs/conceptshare.yaml"
    threads: 1
    resources:
        mem_mb=grown(2000),
        runtime=grown(30),
    shell:
        "python -m conceptshare figures similarity --table {input.table:q} --out {output.png:q} > {log:q} 2>&1"


rule figures_paper:
    input:
        table=rules.metrics_paper.output.parquet,
        code=code("figures/*.py", "analysis/formats.py"),
    output:
        png=report(
            "results/studies/{study}/{dataset}/{sae}/matrices/{name}.paper.png",
            caption="../report/paper.rst",
            category="wMPPC matrices",
            subcategory="{dataset}, SAEs {sae}",
            labels={
                "analysis": "{name}",
                "shows": "beside the paper",
                "data set": "{dataset}",
                "SAEs": "{sae}",
                "type": "figure",
            },
        ),
        pdf="results/studies/{study}/{dataset}/{sae}/matrices/{name}.paper.pdf",
    log:
        "results/logs/studies/{study}/{dataset}/{sae}/matrices/{name}.paper.figure.log",
    conda:
        "../../envs/conceptshare.yaml"
    threads: 1
    resources:
        mem_mb=grown(2000),
        runtime=grown(30),
    shell:
        "python -m conceptshare figures paper --table {input.table:q} --out {output.png:q} > {log:q} 2>&1"


rule figures_strength:
    input:
        table=rules.metrics_matrix.output.parquet,
        pairs=lambda w: pairs_of(STUDY.matrix_pairs(w.name), w),
        code=code("figures/*.py", "analysis/formats.py"),
    output:
        png=report(
            "results/studies/{study}/{dataset}/{sae}/matrices/{name}.strength.png",
            caption="../report/strength.rst",
            category="wMPPC matrices",
            subcategory="{dataset}, SAEs {sae}",
            labels={
                "analysis": "{name}",
                "shows": "strength of features",
                "data set": "{dataset}",
                "SAEs": "{sae}",
                "type": "figure",
            },
        ),
        pdf="results/studies/{study}/{dataset}/{sae}/matrices/{name}.strength.pdf",
    log:
        "results/logs/studies/{study}/{dataset}/{sae}/matrices/{name}.strength.figure.log",
    conda:
        "../../envs/conceptshare.yaml"
    threads: 1
    resources:
        mem_mb=grown(4000),
        runtime=grown(30),
    params:
        pairs=lambda w, input: folder_of(input.pairs),
    shell:
        "python -m conceptshare figures strength --table {input.table:q} --pairs {params.pairs:q} --out {output.png:q} > {log:q} 2>&1"


rule figures_layerwise:
    input:
        table=rules.metrics_layerwise.output.parquet,
        code=code("figures/*.py", "analysis/formats.py"),
    output:
        png=report(
            "results/studies/{study}/{dataset}/{sae}/layerwise/{name}.png",
            caption="../report/layerwise.rst",
            category="Layerwise heatmaps",
            subcategory="{dataset}, SAEs {sae}",
            labels={
                "analysis": "{name}",
                "shows": "heatmaps",
                "data set": "{dataset}",
                "SAEs": "{sae}",
                "type": "figure",
            },
        ),
        pdf="results/studies/{study}/{dataset}/{sae}/layerwise/{name}.pdf",
    log:
        "results/logs/studies/{study}/{dataset}/{sae}/layerwise/{name}.figure.log",
    conda:
        "../../envs/conceptshare.yaml"
    threads: 1
    resources:
        mem_mb=grown(2000),
        runtime=grown(30),
    params:
        pairs=lambda w: STUDY.layerwise_key(w.name),
    shell:
        "python -m conceptshare figures layerwise --table {input.table:q} --pairs {params.pairs:q}"
        " --out {output.png:q} > {log:q} 2>&1"


rule figures_sharedness:
    input:
        table=rules.metrics_sharedness.output.parquet,
        features=lambda w: features_of([STUDY.sharedness_source(w.name)], w),
        names=lambda w: names_of(STUDY.sharedness_source(w.name), w),
        data=DATA,
        code=code("figures/*.py", "analysis/formats.py"),
    output:
        png=report(
            "results/studies/{study}/{dataset}/{sae}/sharedness/{name}.png",
            caption="../report/sharedness.rst",
            category="Comparative Sharedness",
            subcategory="{dataset}, SAEs {sae}",
            labels={
                "analysis": "{name}",
                "shows": "top features",
                "data set": "{dataset}",
                "SAEs": "{sae}",
                "type": "figure",
            },
        ),
        pdf="results/studies/{study}/{dataset}/{sae}/sharedness/{name}.pdf",
    log:
        "results/logs/studies/{study}/{dataset}/{sae}/sharedness/{name}.figure.log",
    conda:
        "../../envs/conceptshare.yaml"
    threads: 1
    resources:
        mem_mb=grown(2000),
        runtime=grown(30),
    params:
        pictured=lambda w: STUDY.analyses.sharedness[w.name].pictured,
        data=lambda w, input: folder_of(input.data),
    shell:
        "python -m conceptshare figures sharedness --table {input.table:q} --features {input.features:q}"
        " --names {input.names:q}"
        " --data {params.data:q} --pictured {params.pictured} --out {output.png:q} > {log:q} 2>&1"


# The first feature of a ranking, as the paper's Figure 4 shows one.
rule figures_top_samples:
    input:
        table=rules.metrics_sharedness.output.parquet,
        features=lambda w: features_of([STUDY.sharedness_source(w.name)], w),
        names=lambda w: names_of(STUDY.sharedness_source(w.name), w),
        data=DATA,
        code=code("figures/*.py", "analysis/formats.py"),
    output:
        png=report(
            "results/studies/{study}/{dataset}/{sae}/sharedness/{name}.top.png",
            caption="../report/top_samples.rst",
            category="Comparative Sharedness",
            subcategory="{dataset}, SAEs {sae}",
            labels={
                "analysis": "{name}",
                "shows": "first feature",
                "data set": "{dataset}",
                "SAEs": "{sae}",
                "type": "figure",
            },
        ),
        pdf="results/studies/{study}/{dataset}/{sae}/sharedness/{name}.top.pdf",
    log:
        "results/logs/studies/{study}/{dataset}/{sae}/sharedness/{name}.top.log",
    conda:
        "../../envs/conceptshare.yaml"
    threads: 1
    resources:
        mem_mb=grown(2000),
        runtime=grown(30),
    params:
        data=lambda w, input: folder_of(input.data),
    shell:
        "python -m conceptshare figures sharedness --table {input.table:q} --features {input.features:q}"
        " --names {input.names:q}"
        " --data {params.data:q} --pictured 1 --samples 100 --out {output.png:q} > {log:q} 2>&1"


rule figures_scatter:
    input:
        table=rules.metrics_sharedness.output.parquet,
        code=code("figures/*.py", "analysis/formats.py"),
    output:
        png=report(
            "results/studies/{study}/{dataset}/{sae}/sharedness/{name}.scatter.png",
            caption="../report/scatter.rst",
            category="Comparative Sharedness",
            subcategory="{dataset}, SAEs {sae}",
            labels={
                "analysis": "{name}",
                "shows": "all features",
                "data set": "{dataset}",
                "SAEs": "{sae}",
                "type": "figure",
            },
        ),
        pdf="results/studies/{study}/{dataset}/{sae}/sharedness/{name}.scatter.pdf",
    log:
        "results/logs/studies/{study}/{dataset}/{sae}/sharedness/{name}.scatter.log",
    conda:
        "../../envs/conceptshare.yaml"
    threads: 1
    resources:
        mem_mb=grown(2000),
        runtime=grown(30),
    shell:
        "python -m conceptshare figures scatter --table {input.table:q} --out {output.png:q} > {log:q} 2>&1"


rule figures_saes:
    input:
        table=rules.metrics_saes.output.parquet,
        code=code("figures/*.py", "analysis/formats.py"),
    output:
        png=report(
            "results/studies/{study}/{dataset}/{sae}/saes.png",
            caption="../report/saes.rst",
            category="SAE training",
            subcategory="{dataset}, SAEs {sae}",
            labels={
                "encoder": "all",
                "shows": "training and quality",
                "data set": "{dataset}",
                "SAEs": "{sae}",
                "type": "figure",
            },
        ),
        pdf="results/studies/{study}/{dataset}/{sae}/saes.pdf",
        members=report(
            directory("results/studies/{study}/{dataset}/{sae}/saes"),
            patterns=["{member}.png"],
            caption="../report/saes_member.rst",
            category="SAE training",
            subcategory="{dataset}, SAEs {sae}",
            labels={
                "encoder": "{member}",
                "shows": "each layer",
                "data set": "{dataset}",
                "SAEs": "{sae}",
                "type": "figure",
            },
        ),
    log:
        "results/logs/studies/{study}/{dataset}/{sae}/saes.figure.log",
    conda:
        "../../envs/conceptshare.yaml"
    threads: 1
    resources:
        mem_mb=grown(2000),
        runtime=grown(30),
    params:
        saes=saes_folder,
    shell:
        "python -m conceptshare figures saes --table {input.table:q} --saes {params.saes:q}"
        " --out {output.png:q} > {log:q} 2>&1"
