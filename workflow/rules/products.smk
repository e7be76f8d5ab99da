# The inputs of the tables and figures of `conceptshare.config.products`, and the arguments of their commands.


# The pairs of members whose correlations a table uses.
TABLE_PAIRS = {
    "matrix": lambda w: STUDY.matrix_pairs(w.name) + STUDY.ceiling_pairs(w.name),
    "averages": lambda w: STUDY.matrix_pairs(w.name),
    "retrieval": lambda w: STUDY.matrix_pairs(w.name),
    "seeds": lambda w: STUDY.matrix_pairs(w.name) + STUDY.ceiling_pairs(w.name),
    "layerwise": lambda w: STUDY.layerwise_pairs(w.name),
    "sharedness": lambda w: STUDY.sharedness_pairs(w.name),
    "samples": lambda w: [STUDY.samples_pair(w.name)],
    "saes": lambda w: [(member, member) for member in STUDY.members()],
}

# The part of the study that a table depends on.
TABLE_KEYS = {
    "matrix": lambda w: STUDY.table_key("matrix", w.name),
    "seeds": lambda w: STUDY.table_key("seeds", w.name),
    "retrieval": lambda w: STUDY.table_key("retrieval", w.name),
    "layerwise": lambda w: STUDY.table_key("layerwise", w.name),
    "sharedness": lambda w: STUDY.table_key("sharedness", w.name),
    "samples": lambda w: STUDY.table_key("samples", w.name),
    "saes": lambda w: STUDY.table_key("saes"),
}


def bound_of(table):
    """The option of the bound of unexplained layers, if a table marks them.

    A parameter of its own: Snakemake does not compare those that depend on input files, as commands do.
    """
    return (lambda w: STUDY.bound_option(w.sae)) if table.marks else ""


def product_inputs(product):
    """The input files of a table or figure, by the names in its `inputs`."""
    pairs = TABLE_PAIRS.get(product.name)
    files = {
        "features": lambda w: features_of(members_of(pairs(w)), w),
        "correlations": lambda w: correlations_of(pairs(w), w),
        "similarity": lambda w: similarity_of(pairs(w), w),
        "seeds": lambda w: correlations_of(STUDY.seed_pairs(), w),
        "rankings": lambda w: [ranking_file(w, name) for name in STUDY.overlapping()],
        "pairs": lambda w: pairs_of(STUDY.matrix_pairs(w.name), w),
        "source": lambda w: features_of([STUDY.sharedness_source(w.name)], w),
        "names": lambda w: names_of(STUDY.sharedness_source(w.name), w),
        "data": DATA,
        "codes": matrices_of_other_codes,
    }
    found = {"table": product_file(products.table(product.table), "parquet")} if product.table else {}
    return found | {name: files[name] for name in product.inputs if name in files}


def product_command(product):
    """The arguments of a table's or figure's command, except its output."""
    options = {
        "study": lambda w, files: f"--study {quote(study_file(w))}",
        "features": lambda w, files: f"--features {folder_of(files.features)}",
        "correlations": lambda w, files: f"--correlations {folder_of(files.correlations)}",
        "similarity": lambda w, files: similarity_option(w, files),
        "seeds": lambda w, files: f"--correlations {folder_of(files.seeds)}" if files.seeds else "",
        "rankings": lambda w, files: " ".join(map(quote, files.rankings)),
        "saes": lambda w, files: f"--saes {saes_folder(w)}",
        "published": lambda w, files: f"--dataset {w.dataset} --size {STUDY.analyses.matrices[w.name].paper}",
        "pairs": lambda w, files: f"--pairs {folder_of(files.pairs)}",
        "source": lambda w, files: f"--features {quote(str(files.source))}",
        "names": lambda w, files: f"--names {quote(files.names)}",
        "data": lambda w, files: f"--data {folder_of(files.data)}",
        "shown": lambda w, files: f"--features-shown {STUDY.analyses.sharedness[w.name].features_shown}",
        "first": lambda w, files: "--features-shown 1 --samples 100",
        "codes": lambda w, files: " ".join(f"--table {quote(path)}" for path in files.codes),
    }
    command = getattr(product, "command", "") or product.name

    def arguments(wildcards, input):
        analysis = [wildcards.name] if "study" in product.inputs and "{name}" in product.file else []
        table = [f"--table {quote(input.table)}"] if product.table else []
        return " ".join([command, *analysis, *table, *(options[name](wildcards, input) for name in product.inputs)])

    return arguments


# Additional outputs of a figure.
FURTHER_FIGURES = {
    "saes": {
        "members": report(
            directory(f"{layout.ANALYSES}/saes"),
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
        )
    }
}
