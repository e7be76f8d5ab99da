# The concept pages: the index, and the data that it loads on demand.
localrules:
    pages_index,


rule pages_samples:
    input:
        data=DATA,
        code=code("pages/_samples.py", "pages/_script.py"),
    output:
        directory(layout.PAGES_OF_SAMPLES),
    log:
        layout.log(layout.PAGES_OF_SAMPLES),
    conda:
        "../../envs/conceptshare.yaml"
    threads: 1
    resources:
        mem_mb=grown(4000),
        runtime=grown(120),
    params:
        data=lambda w, input: folder_of(input.data),
        place=lambda w: f"samples/{w.dataset}",
    shell:
        "python -m conceptshare pages samples --data {params.data:q} --place {params.place:q} --threads {threads}"
        " --out {output:q} > {log:q} 2>&1"


rule pages_member:
    input:
        features=layout.FEATURES,
        examples=layout.EXAMPLES,
        names=layout.NAMES,
        pairs=lambda w: pairs_of(pairs_with(w.member), w),
        rankings=lambda w: rankings_of(w),
        code=code("pages/_member.py", "pages/_script.py", "io/readers.py"),
    output:
        directory(layout.PAGES_OF_MEMBER),
    log:
        layout.log(layout.PAGES_OF_MEMBER),
    conda:
        "../../envs/conceptshare.yaml"
    threads: 1
    resources:
        mem_mb=grown(8000),
        runtime=grown(120),
    params:
        # Also if a member is compared with none, as in a study of nothing but the fit of samples.
        pairs=lambda w: folder_of([filled(layout.PAIR, w, a="a", b="b")]),
        others=lambda w: compared_with(w.member),
        study=study_file,
        rankings=lambda w, input: " ".join(f"--ranking {quote(path)}" for path in input.rankings),
        place=lambda w: f"data/{w.dataset}/{w.sae}/{w.member}",
    shell:
        "python -m conceptshare pages member --features {input.features:q} --examples {input.examples:q}"
        " --names {input.names:q} --pairs {params.pairs:q} --study {params.study:q} {params.rankings}"
        " --place {params.place:q} --out {output:q} > {log:q} 2>&1"


rule pages_pair:
    input:
        correlations=lambda w: correlations_of([(as_member(w.a), as_member(w.b))], w),
        code=code("pages/_pair.py", "pages/_script.py", "io/readers.py"),
    output:
        directory(layout.PAGES_OF_PAIR),
    log:
        layout.log(layout.PAGES_OF_PAIR),
    conda:
        "../../envs/conceptshare.yaml"
    threads: 1
    resources:
        mem_mb=grown(4000),
        runtime=grown(60),
    params:
        place=lambda w: f"data/{w.dataset}/{w.sae}/pairs/{w.a}__{w.b}",
    shell:
        "python -m conceptshare pages pair --correlations {input.correlations:q} --source {wildcards.a:q}"
        " --target {wildcards.b:q} --place {params.place:q} --out {output:q} > {log:q} 2>&1"


rule pages_index:
    input:
        tables=[
            file
            for place in SHOWN
            for file in products_of(*place, "matrix", "layerwise", "sharedness", "topics", "overlaps", "samples")
        ],
        data=expand(DATA, dataset=STUDY.datasets),
        code=code("pages/_index.py", "pages/_script.py", "pages/assets/*.*", "pages/assets/app/*"),
    output:
        multiext(f"{layout.PAGES}/", "index.html", "style.css", "app.js", "study.js"),
    log:
        layout.log(f"{layout.PAGES}/index"),
    conda:
        "../../envs/conceptshare.yaml"
    threads: 1
    resources:
        mem_mb=grown(4000),
        runtime=grown(30),
    params:
        key=STUDY.table_key("pages"),
        study=study_file,
        out=lambda w: layout.PAGES.format(study=w.study),
    shell:
        "python -m conceptshare pages index --study {params.study:q} --results results --out {params.out:q}"
        " > {log:q} 2>&1"
