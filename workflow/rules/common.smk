# The study, read once, and the functions that map it to files. Nothing here imports torch, because each cluster job
# parses the workflow again.
import functools
import hashlib
import json
import os
import re
import sys
import tempfile
from base64 import urlsafe_b64encode
from pathlib import Path
from shlex import quote

import conceptshare
from conceptshare.config.catalog import is_path, local_path
from conceptshare.preflight.differences import differences, in_words
from conceptshare.io.errors import ConceptshareError, system_error_message
from conceptshare.io.files import read_object
from conceptshare.config import products
from conceptshare.config.members import as_member, encoder_pairs, sorted_pair
from conceptshare.config.study import build_study, write_study
from conceptshare.io import layout
from snakemake.exceptions import WorkflowError
from snakemake.io import contains_wildcard

# Rules run `python -m conceptshare`: use this Python and this library, even if no environment is active. If a rule
# has a conda environment, that comes first.
_LIBRARY = Path(conceptshare.__file__).parent
os.environ.update(
    PATH=os.pathsep.join([str(Path(sys.executable).parent), os.getenv("PATH", "")]),
    PYTHONPATH=os.pathsep.join(filter(None, [str(_LIBRARY.parent), os.getenv("PYTHONPATH", "")])),
)

# A rule's command replaces its shell: at a time limit, Slurm would end the shell at once, Snakemake with it, and then
# the command before it has saved its state.
shell.prefix("exec ")

# GPUs that computing rules request: none if the CPU was chosen. On a cluster, a job fails without its GPU; on this
# machine, it uses what is available.
GPUS = 0 if os.getenv("CONCEPTSHARE_DEVICE") == "cpu" else 1
if workflow.remote_exec:
    os.environ.update(CONCEPTSHARE_DEVICE=os.getenv("CONCEPTSHARE_DEVICE") or "cuda")

try:
    STUDY = build_study(config, origin=", ".join(map(str, workflow.configfiles)))
except ConceptshareError as error:
    raise WorkflowError(str(error))


# Computed once: it involves all pairs, and the pages of each member look up theirs.
COMPARISONS = STUDY.comparisons()

# All combinations of a data set, an SAE setting and a code of its features: every analysis is done for each.
SETTINGS = [(dataset, sae) for dataset in STUDY.datasets for sae in STUDY.coded()]

# Those that pages show.
SHOWN = [(dataset, sae) for dataset in STUDY.datasets for sae in STUDY.coded(STUDY.features[0])]


def record_of(kind, file):
    """The file in which Snakemake records the ``metadata`` of an output, or that it is ``incomplete``."""
    name = urlsafe_b64encode(str(file).encode()).decode()
    longest = os.pathconf(".", "PC_NAME_MAX") - 1
    *folders, last = [name[n : n + longest] for n in range(0, len(name), longest)]
    return Path(".snakemake", kind, *(f"@{folder}" for folder in folders), last)


def is_made_again(difference):
    """Whether Snakemake will rerun a result by itself, because it is incomplete or was made with other parameters."""
    if record_of("incomplete", difference.file).exists():
        return True
    params = read_object(record_of("metadata", difference.file)).get("params")
    return params is not None and repr(difference.key) not in params


def check_settings():
    """Reject results of other settings than the study's, except those that Snakemake will rerun by itself."""
    found = differences(STUDY, Path("results"))
    unseen = [one for one in found if not is_made_again(one)]
    if unseen:
        raise WorkflowError(
            "Results were made with other settings than the study's, and Snakemake has no record of how (.snakemake "
            f"was deleted, or they were copied here):\n{in_words(unseen)}"
        )


if workflow.is_main_process:
    check_settings()


def remove_leftovers():
    """Remove files of the study that this workflow wrote and no longer makes, such as those of a removed encoder."""
    jobs = list(workflow.dag.jobs)
    if all(job.rule.name != "all" for job in jobs):
        return
    made = {Path(file) for job in jobs for file in job.output}
    study = layout.path(layout.STUDY_FOLDER, study=STUDY.study)
    files = [path for path in study.rglob("*") if path.is_file() and made.isdisjoint({path, *path.parents})]
    ours = {path for path in files if any(record_of("metadata", place).exists() for place in (path, *path.parents))}
    for path in ours:
        path.unlink()
        print(f"{path}: removed, because it is no longer part of the study", file=sys.stderr)
    for folder in sorted({parent for path in ours for parent in path.parents}, reverse=True):
        if not any(folder.iterdir()):
            folder.rmdir()
    for path in sorted(set(files) - ours):
        if path.suffix in {".csv", ".parquet", ".png", ".pdf", ".js"}:
            print(
                f"{path}: not part of this study, and not known to be from an earlier version; is it still needed?",
                file=sys.stderr,
            )


def report_warnings():
    """Repeat the warnings of this run's jobs, a line per job with its log."""
    logs = sorted(Path(log) for job in workflow.dag.finished_jobs for log in job.log)
    for log in filter(Path.is_file, logs):
        with log.open(encoding="utf-8", errors="replace") as lines:
            warnings = [line.rstrip() for line in lines if line.startswith("warning: ")]
        if warnings:
            more = f" (and {len(warnings) - 1} more)" if warnings[1:] else ""
            print(f"{warnings[0]}{more} [{log}]", file=sys.stderr)


def report_unwritable_results():
    """Report why results cannot be written, for jobs that could not even write to their logs."""
    try:
        with tempfile.NamedTemporaryFile(dir="results") as file:
            file.write(bytes(2**20))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        print(f"error: results: {system_error_message(error) or error}", file=sys.stderr)


def write_study_file():
    """Write the study for the commands that read it."""
    try:
        write_study(STUDY, layout.path(layout.STUDY, study=STUDY.study))
    except OSError as error:
        report_unwritable_results()
        raise WorkflowError(f"{layout.STUDY.format(study=STUDY.study)}: {system_error_message(error) or error}")


def code(*names):
    """The source files of a stage: inputs this small are compared by content, so a touch reruns nothing."""
    paths = [path for name in names for path in sorted(_LIBRARY.glob(name))]
    return [os.path.relpath(path) for path in paths]


def local_files(text):
    """The files of a model on this machine; none if it is on a hub."""
    path = local_path(text)
    if path is None:
        return []
    return as_inputs(sorted(str(file) for file in path.rglob("*") if file.is_file()) if path.is_dir() else [str(path)])


@functools.cache
def dataset_inputs(name):
    """The files of a data set on this machine, and a digest of its images if there are very many.

    Jobs parse the workflow too. They use what the main process found, so that they do not check a million images each,
    and an image that changes during a run does not make a job read the data set again.
    """
    spec = STUDY.datasets[name]
    if not is_path(spec.source):
        return [], ""
    key = hashlib.sha256(STUDY.dataset_key(name).encode()).hexdigest()
    found = Path(".snakemake/datasets") / f"{key}.json"
    if not workflow.is_main_process and found.is_file():
        files, digest = json.loads(found.read_text())
        return [ancient(file) for file in files], digest
    from conceptshare.data.rows import inputs  # which reads tables: only those who plan this job need that

    try:
        files, digest = inputs(spec)
    except ConceptshareError as error:
        raise WorkflowError(str(error))
    if workflow.is_main_process and not workflow.dryrun:
        found.parent.mkdir(parents=True, exist_ok=True)
        found.write_text(json.dumps([as_inputs(files), digest]))
    return as_inputs(files), digest


def as_inputs(files):
    """The files, after checking that Snakemake can handle their names."""
    for file in files:
        if contains_wildcard(file):
            raise WorkflowError(f"{file}: Snakemake treats text in braces as a wildcard; rename the file")
        if file != file.encode(errors="replace").decode():
            raise WorkflowError(
                f"{ascii(file)}: Snakemake cannot handle this name, which is not UTF-8; rename the file"
            )
    return files


def study_file(wildcards):
    """The study file that commands read, written when a run starts.

    It is not an input of their rules, because then any change of the study would rerun all of them. Instead, each rule
    has the part of the study that it depends on as a parameter.
    """
    return filled(layout.STUDY, wildcards)


def grown(megabytes_or_minutes):
    """A resource that grows with each attempt."""
    return lambda wildcards, attempt: megabytes_or_minutes * attempt


def data_of_arrays(wildcards):
    """The data set whose ids those of arrays are compared with; none for an encoder that reads samples."""
    return expand(DATA, dataset=STUDY.datasets) if STUDY.encoders[wildcards.encoder].library == "arrays" else []


def environment_of(wildcards):
    """The conda environment of rules that run an encoder."""
    own = STUDY.encoders[wildcards.encoder].remote_code
    return "../../envs/mambavision.yaml" if own else "../../envs/conceptshare.yaml"


def filled(pattern, wildcards, **others):
    """A pattern of `layout` with its wildcards filled in."""
    return pattern.format(**{**wildcards, **others})


def setting_of(wildcards):
    """The SAE setting that a wildcard names, with or without a code of its features."""
    return layout.uncoded(wildcards.sae)[0]


def encoder_saes(wildcards, **others):
    """The folder of an encoder's SAEs, trained from stored tokens or in a stream."""
    sae = setting_of(wildcards)
    return filled(layout.STREAMED_SAES if STUDY.stream else layout.SAES, wildcards, sae=sae, **others)


def source_of(wildcards):
    """The source of an imported SAE, as a list; empty if it is trained."""
    sources = STUDY.pretrained(wildcards.sae, wildcards.encoder)
    return [sources[int(wildcards.layer), int(wildcards.seed)]] if sources else []


def files_of_source(wildcards):
    """The files of an imported SAE on this machine; none if it is on a hub."""
    return [file for source in source_of(wildcards) for file in local_files(source)]


def imported_sae(wildcards):
    """The weights of an imported SAE; none if it is trained."""
    place = filled(f"{layout.PRETRAINED}/{layout.SAE}/sae_weights.safetensors", wildcards)
    return [place for _ in source_of(wildcards)]


def imported_saes(wildcards):
    """The weights of all imported SAEs of an encoder; none if they are trained."""
    folder = filled(layout.PRETRAINED, wildcards)
    places = [layout.sae_place(*place) for place in STUDY.pretrained(wildcards.sae, wildcards.encoder)]
    return [f"{folder}/{place}/sae_weights.safetensors" for place in places]


def pretrained_option(wildcards):
    """The option for an encoder's imported SAEs; a resource, as their sources are what SAEs depend on."""
    own = STUDY.pretrained(wildcards.sae, wildcards.encoder)
    return f"--pretrained {quote(filled(layout.PRETRAINED, wildcards))}" if own else ""


def saes_folder(wildcards):
    """The folder of all SAEs of an SAE setting."""
    return str(Path(encoder_saes(wildcards, encoder="encoder")).parent)


def saes_of(wildcards):
    """The SAEs of a member: the files of all its layers, or the folder that a stream writes."""
    folder = encoder_saes(wildcards)
    if STUDY.stream:
        return [folder]
    layers = STUDY.encoders[wildcards.encoder].layer_numbers()
    return [f"{folder}/{layout.sae_place(layer, wildcards.seed)}/sae_weights.safetensors" for layer in layers]


def activations_of(wildcards, encoder="encoder"):
    """The store with the global tokens of the encoder that a wildcard names.

    Streams for several SAE settings each write these tokens; without a setting, they are those of the first.
    """
    sae = setting_of(wildcards) if "sae" in wildcards.keys() else next(iter(STUDY.saes))
    pattern = layout.STREAMED_ACTIVATIONS if STUDY.stream else layout.ACTIVATIONS
    return filled(pattern, wildcards, sae=sae, encoder=wildcards[encoder])


def one_of(names):
    """The constraint of a wildcard that is one of some names."""
    return "|".join(re.escape(name) for name in sorted(names)) or "-"


def parts_of(wildcards):
    """The parts of an encoder's forward pass."""
    parts = STUDY.encoders[wildcards.encoder].parts
    return [filled(layout.PARTS, wildcards, part=part, parts=parts) for part in range(1, parts + 1)]


def stored_tokens():
    """All tokens of an encoder, if SAEs are trained on them; deleted afterwards unless the study keeps them."""
    tokens = directory(layout.TOKENS)
    return {"tokens": tokens if STUDY.keep_tokens else temp(tokens)} if STUDY.stores_tokens() else {}


def tokens_option(wildcards):
    """The option that stores all tokens.

    A resource, as it does not change the global tokens: as a parameter, another value would recompute them.
    """
    return f"--tokens {quote(filled(layout.TOKENS, wildcards))}" if STUDY.stores_tokens() else ""


def training_tokens(wildcards):
    """The store that SAEs are trained on."""
    return filled(layout.TOKENS if STUDY.saes[wildcards.sae].train_on == "all" else layout.ACTIVATIONS, wildcards)


def folder_of(files):
    """The folder of stores of one kind."""
    return str(Path(files[0]).parent)


def features_of(members, wildcards):
    """The feature stores of members."""
    return [filled(layout.FEATURES, wildcards, member=member) for member in sorted(members)]


def names_of(member, wildcards):
    """A member's table of names."""
    return filled(layout.NAMES, wildcards, member=member)


def correlations_of(pairs, wildcards):
    """The correlation stores of pairs of members."""
    return [filled(layout.CORRELATIONS, wildcards, a=a, b=b) for a, b in (sorted_pair(*pair) for pair in pairs)]


def correlations_memory(wildcards):
    """The option that limits the working memory, if the study sets it.

    It changes no result, so it is a resource: as a parameter, another value would rerun the job.
    """
    return f"--memory-mb {STUDY.correlations.memory_mb}" if STUDY.correlations.memory_mb else ""


def pairs_of(pairs, wildcards):
    """The tables of the features of pairs of members."""
    return [filled(layout.PAIR, wildcards, a=a, b=b) for a, b in (sorted_pair(*pair) for pair in pairs)]


# Streams for several SAE settings each write global tokens; those of the first are compared.
SIMILARITY = layout.SIMILARITY
if STUDY.stream:
    SIMILARITY = layout.STREAMED_SIMILARITY.replace("{sae}", next(iter(STUDY.saes)))


def similarity_of(pairs, wildcards):
    """The tables of similarity of the encoders in pairs of members; two seeds of one encoder have none."""
    return [filled(SIMILARITY, wildcards, encoder_a=a, encoder_b=b) for a, b in encoder_pairs(pairs)]


def similarity_option(wildcards, input):
    """The option for the folder of these tables, if there are any."""
    return f"--similarity {folder_of(input.similarity)}" if input.similarity else ""


def members_of(pairs):
    """The members of pairs."""
    return {member for pair in pairs for member in pair}


def product_file(product, ending):
    """The file of a table or figure, with wildcards."""
    return f"{layout.ANALYSES}/{product.file}.{ending}"


def report_entry(product, kind):
    """The category and labels of a table or figure in the report."""
    category, label, named = {
        "matrices": ("wMPPC matrices", "analysis", "{name}"),
        "layerwise": ("Layerwise heatmaps", "analysis", "{name}"),
        "sharedness": ("Comparative Sharedness", "analysis", "{name}"),
        "samples": ("Fit of samples", "analysis", "{name}"),
        "overlaps": ("Comparative Sharedness", "analysis", "all rankings"),
        "saes": ("SAE training", "encoder", "all"),
    }[product.file.partition("/")[0]]
    labels = {label: named, "shows": product.shows, "data set": "{dataset}", "SAEs": "{sae}", "type": kind}
    return {"category": category, "subcategory": "{dataset}, SAEs {sae}", "labels": labels}


def paper_option(wildcards):
    """The options that add the comparison with Table 3, if the matrix is compared with the paper."""
    if wildcards.dataset not in STUDY.paper_datasets(wildcards.name):
        return ""
    return f"--dataset {wildcards.dataset} --size {STUDY.analyses.matrices[wildcards.name].paper}"


def names_command(wildcards):
    """The option for the program that names features, if the study has one."""
    return f"--command {quote(STUDY.names.command)}" if STUDY.names.command else ""


def pairs_with(member):
    """The pairs that a member is compared in."""
    return [sorted_pair(as_member(member), other) for other in COMPARISONS[as_member(member)]]


def compared_with(member):
    """The members that a member is compared with."""
    return ", ".join(map(str, COMPARISONS[as_member(member)]))


def matrices_of_other_codes(wildcards):
    """The same matrix of features of the study's other codes, which the figure of the first shows too."""
    sae, code = layout.uncoded(wildcards.sae)
    others = [layout.coded(sae, other) for other in STUDY.features[1:] if code == STUDY.features[0]]
    table = product_file(products.table("matrix"), "parquet")
    return [filled(table, wildcards, sae=other) for other in others]


def ranking_file(wildcards, name):
    """A ranking, as Parquet."""
    return filled(product_file(products.table("sharedness"), "parquet"), wildcards, name=name)


def rankings_of(wildcards):
    """The rankings of a member's features."""
    return [ranking_file(wildcards, name) for name in STUDY.rankings_of(as_member(wildcards.member))]


def products_of(dataset, sae, *tables):
    """The tables and figures for a data set and an SAE setting: paths without an ending, or of the tables named."""
    folder = layout.ANALYSES.format(study=STUDY.study, dataset=dataset, sae=sae)
    made = [(product, f"{folder}/{file}") for product, file in STUDY.products(dataset)]
    if tables:
        return [f"{path}.parquet" for product, path in made if product in map(products.table, tables)]
    return [f"{path}.{'csv' if isinstance(product, products.Table) else 'png'}" for product, path in made]


def pages():
    """Everything that the site of the study's features is made of."""
    study = {"study": STUDY.study}
    found = [f"{layout.PAGES}/index.html".format(**study)]
    found += [layout.PAGES_OF_SAMPLES.format(**study, dataset=dataset) for dataset in STUDY.datasets]
    for dataset, sae in SHOWN:
        place = study | {"dataset": dataset, "sae": sae}
        found += [layout.PAGES_OF_MEMBER.format(**place, member=member) for member in STUDY.members()]
        found += [layout.PAGES_OF_PAIR.format(**place, a=a, b=b) for a, b in STUDY.directed_pairs()]
    return found


def analysis_names():
    """What a wildcard that names an analysis can be: its names, as their files have more dots than these."""
    return one_of({name for _, named in STUDY.analyses for name in named})


def study_results():
    """Every table, figure and page of the study."""
    results = pages() if STUDY.members() else []
    for dataset, sae in SETTINGS:
        place = {"study": STUDY.study, "dataset": dataset, "sae": sae}
        results += products_of(dataset, sae)
        results += [f"{layout.ANALYSES.format(**place)}/matrices/{name}" for name in STUDY.analyses.matrices]
        results += [layout.PAIR.format(**place, a=a, b=b) for a, b in STUDY.pairs()]
    return results
