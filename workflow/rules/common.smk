# The study, read once, and the functions that turn it into files. Nothing here imports torch: each cluster job
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
from conceptshare.config.members import Member, as_member, encoder_pairs, sorted_pair
from conceptshare.config.study import build_study, write_study
from conceptshare.io import layout
from snakemake.exceptions import WorkflowError
from snakemake.io import contains_wildcard

# Rules run `python -m conceptshare`: let that be this very Python and library, also where no environment is active. A
# rule's conda environment, where one is used, comes before them.
_LIBRARY = Path(conceptshare.__file__).parent
os.environ.update(
    PATH=os.pathsep.join([str(Path(sys.executable).parent), os.getenv("PATH", "")]),
    PYTHONPATH=os.pathsep.join(filter(None, [str(_LIBRARY.parent), os.getenv("PYTHONPATH", "")])),
)

# GPUs that computing rules ask for: none where the CPU was chosen. On a cluster, its job fails without them; on
# this machine, it computes on what there is.
GPUS = 0 if os.getenv("CONCEPTSHARE_DEVICE") == "cpu" else 1
if workflow.remote_exec:
    os.environ.update(CONCEPTSHARE_DEVICE=os.getenv("CONCEPTSHARE_DEVICE") or "cuda")

try:
    STUDY = build_study(config, origin=", ".join(map(str, workflow.configfiles)))
except ConceptshareError as error:
    raise WorkflowError(str(error))


# Worked out once: it takes all pairs, and each member's pages ask for theirs.
COMPARISONS = STUDY.comparisons()

# Each data set with each SAE setting: every analysis is done for all of them.
SETTINGS = [(dataset, sae) for dataset in STUDY.datasets for sae in STUDY.saes]

# The SAEs of an encoder, whether stored tokens or a stream trains them.
SAES = layout.STREAMED_SAES if STUDY.stream else layout.SAES


def record_of(kind, file):
    """The file in which Snakemake notes something of an output: its ``metadata``, or that it is ``incomplete``."""
    name = urlsafe_b64encode(str(file).encode()).decode()
    longest = os.pathconf(".", "PC_NAME_MAX") - 1
    *folders, last = [name[n : n + longest] for n in range(0, len(name), longest)]
    return Path(".snakemake", kind, *(f"@{folder}" for folder in folders), last)


def is_made_again(difference):
    """Whether Snakemake is going to make a result again: it did not see it completed, or noted other parameters."""
    if record_of("incomplete", difference.file).exists():
        return True
    params = read_object(record_of("metadata", difference.file)).get("params")
    return params is not None and repr(difference.key) not in params


def check_settings():
    """Refuse results of other settings than the study's, but for those that Snakemake is going to make again."""
    found = differences(STUDY, Path("results"))
    unseen = [one for one in found if not is_made_again(one)]
    if unseen:
        raise WorkflowError(
            "Results were made with other settings than the study's, and Snakemake has no record that tells (.snakemake "
            f"was deleted, or they were copied here):\n{in_words(unseen)}"
        )


if workflow.is_main_process:
    check_settings()


def remove_left_over():
    """Remove what this workflow wrote into the study's folder and no longer makes, as of an encoder that was removed."""
    jobs = list(workflow.dag.jobs)
    if all(job.rule.name != "all" for job in jobs):
        return
    made = {Path(file) for job in jobs for file in job.output}
    study = layout.path(layout.STUDY_FOLDER, study=STUDY.study)
    files = [path for path in study.rglob("*") if path.is_file() and made.isdisjoint({path, *path.parents})]
    ours = {path for path in files if any(record_of("metadata", place).exists() for place in (path, *path.parents))}
    for path in ours:
        path.unlink()
        print(f"{path}: removed, as the study no longer makes it", file=sys.stderr)
    for folder in sorted({parent for path in ours for parent in path.parents}, reverse=True):
        if not any(folder.iterdir()):
            folder.rmdir()
    for path in sorted(set(files) - ours):
        if path.suffix in {".csv", ".parquet", ".png", ".pdf", ".js"}:
            print(
                f"{path}: not of this study, and not known to be of a former one; is it still needed?", file=sys.stderr
            )


def say_what_refuses_to_be_written():
    """Say why a job may have failed that could not even write to its log."""
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
        say_what_refuses_to_be_written()
        raise WorkflowError(f"{layout.STUDY.format(study=STUDY.study)}: {system_error_message(error) or error}")


def code(*names):
    """The source files of a stage: inputs this small are compared by content, so a touch reruns nothing."""
    paths = [path for name in names for path in sorted(_LIBRARY.glob(name))]
    return [os.path.relpath(path) for path in paths]


def local_files(text):
    """The files that a model is made of, where it is on this machine."""
    path = local_path(text)
    if path is None:
        return []
    return as_inputs(sorted(str(file) for file in path.rglob("*") if file.is_file()) if path.is_dir() else [str(path)])


@functools.cache
def dataset_inputs(name):
    """The files of a data set that is on this machine, and a digest of its images where they are very many.

    Jobs parse the workflow too. They take what the main process found: a million images are not looked at in each job,
    and one that changes during a run makes no job read the data set again.
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
    """Files by names that Snakemake can hold."""
    for file in files:
        if contains_wildcard(file):
            raise WorkflowError(f"{file}: Snakemake takes what is in braces for a wildcard; give it another name")
        if file != file.encode(errors="replace").decode():
            raise WorkflowError(f"{ascii(file)}: Snakemake cannot hold this name, which is not UTF-8; give it another")
    return files


def study_file(wildcards):
    """The study as commands read it, written when a run starts.

    It is no input of theirs, as any change of the study would make all of them again. The part of the study that one
    depends on is a parameter of its rule.
    """
    return filled(layout.STUDY, wildcards)


def grown(megabytes_or_minutes):
    """A resource that grows with each attempt."""
    return lambda wildcards, attempt: megabytes_or_minutes * attempt


def environment_of(wildcards):
    """The conda environment of rules that run an encoder."""
    own = STUDY.encoders[wildcards.encoder].remote_code
    return "../../envs/mambavision.yaml" if own else "../../envs/conceptshare.yaml"


def filled(pattern, wildcards, **others):
    """A path of a layout's pattern."""
    return pattern.format(**{**wildcards, **others})


def saes_folder(wildcards):
    """The folder that an SAE setting's encoders lie in."""
    return str(Path(filled(SAES, wildcards, encoder="encoder")).parent)


def saes_of(wildcards):
    """The SAEs of a member: of all its layers, or the folder that a stream makes of them."""
    folder = filled(SAES, wildcards)
    if STUDY.stream:
        return [folder]
    layers = STUDY.encoders[wildcards.encoder].layer_numbers()
    return [f"{folder}/{layout.sae_place(layer, wildcards.seed)}/sae_weights.safetensors" for layer in layers]


def activations_of(wildcards, encoder="encoder"):
    """The store with the global tokens of the encoder that a wildcard names."""
    pattern = layout.STREAMED_ACTIVATIONS if STUDY.stream else layout.ACTIVATIONS
    return filled(pattern, wildcards, encoder=wildcards[encoder])


def one_of(names):
    """What a wildcard can be that is one of some names."""
    return "|".join(re.escape(name) for name in sorted(names)) or "-"


def parts_of(wildcards):
    """The parts of an encoder's forward pass."""
    parts = STUDY.encoders[wildcards.encoder].parts
    return [filled(layout.PARTS, wildcards, part=part, parts=parts) for part in range(1, parts + 1)]


def kept_or_temp(tokens):
    """All tokens of an encoder, deleted once its SAEs are trained where the study does not keep them."""
    return tokens if STUDY.keep_tokens else temp(tokens)


def folder_of(files):
    """The folder that stores of one kind lie in."""
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


def correlations_key(wildcards):
    """What the correlations of a pair depend on beside its features."""
    members = (text.rpartition("@") for text in (wildcards.a, wildcards.b))
    return STUDY.correlations_key(*(Member(encoder, int(seed)) for encoder, _, seed in members))


def correlations_memory(wildcards):
    """The option that bounds the working memory, where the study does.

    It changes no result, so it is a resource: another value of a rule's params would make the results again.
    """
    return f"--memory-mb {STUDY.correlations.memory_mb}" if STUDY.correlations.memory_mb else ""


def pairs_of(pairs, wildcards):
    """The tables of the features of pairs of members."""
    return [filled(layout.PAIR, wildcards, a=a, b=b) for a, b in (sorted_pair(*pair) for pair in pairs)]


def similarity_of(pairs, wildcards):
    """The tables of similarity of the encoders in pairs of members; two seeds of one encoder have none."""
    return [filled(layout.SIMILARITY, wildcards, encoder_a=a, encoder_b=b) for a, b in encoder_pairs(pairs)]


def similarity_option(wildcards, input):
    """The option that names the folder of such tables, where there are any."""
    return f"--similarity {folder_of(input.similarity)}" if input.similarity else ""


def members_of(pairs):
    """The members of pairs."""
    return {member for pair in pairs for member in pair}


def product_file(product, ending):
    """The file of a table or figure, with wildcards."""
    return f"{layout.ANALYSES}/{product.file}.{ending}"


def report_entry(product, kind):
    """Where a table or figure stands in the report."""
    category, label, named = {
        "matrices": ("wMPPC matrices", "analysis", "{name}"),
        "layerwise": ("Layerwise heatmaps", "analysis", "{name}"),
        "sharedness": ("Comparative Sharedness", "analysis", "{name}"),
        "overlaps": ("Comparative Sharedness", "analysis", "all rankings"),
        "saes": ("SAE training", "encoder", "all"),
    }[product.file.partition("/")[0]]
    labels = {label: named, "shows": product.shows, "data set": "{dataset}", "SAEs": "{sae}", "type": kind}
    return {"category": category, "subcategory": "{dataset}, SAEs {sae}", "labels": labels}


def paper_option(wildcards):
    """The options that add Table 3 next to the paper's, where a matrix is compared with the paper."""
    if wildcards.dataset not in STUDY.paper_datasets(wildcards.name):
        return ""
    return f"--dataset {wildcards.dataset} --size {STUDY.analyses.matrices[wildcards.name].paper}"


def names_command(wildcards):
    """The option with the program that names features, where the study has one."""
    return f"--command {quote(STUDY.names.command)}" if STUDY.names.command else ""


def pairs_with(member):
    """The pairs that a member is compared in."""
    return [sorted_pair(as_member(member), other) for other in COMPARISONS[as_member(member)]]


def compared_with(member):
    """The members that a member is compared with."""
    return ", ".join(map(str, COMPARISONS[as_member(member)]))


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
    for dataset, sae in SETTINGS:
        place = study | {"dataset": dataset, "sae": sae}
        found += [layout.PAGES_OF_MEMBER.format(**place, member=member) for member in STUDY.members()]
        found += [layout.PAGES_OF_PAIR.format(**place, a=a, b=b) for a, b in STUDY.directed_pairs()]
    return found


def analysis_names():
    """What a wildcard that names an analysis can be: its names, as their files have more dots than these."""
    kinds = (STUDY.analyses.matrices, STUDY.analyses.layerwise, STUDY.analyses.sharedness)
    return one_of({name for kind in kinds for name in kind})


def study_results():
    """Every table, figure and page of the study."""
    results = pages() if STUDY.members() else []
    for dataset, sae in SETTINGS:
        place = {"study": STUDY.study, "dataset": dataset, "sae": sae}
        results += products_of(dataset, sae)
        results += [f"{layout.ANALYSES.format(**place)}/matrices/{name}" for name in STUDY.analyses.matrices]
        results += [layout.PAIR.format(**place, a=a, b=b) for a, b in STUDY.pairs()]
    return results
