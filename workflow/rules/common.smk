# The study, read once, and the functions that turn it into files. Nothing here imports torch: each cluster job
# parses the workflow again.
import os
import sys
from pathlib import Path

import conceptshare
from conceptshare.catalog import local_path, read_yaml
from conceptshare.errors import ConceptshareError
from conceptshare.store import layer_name
from conceptshare.study import build_study, pair_name
from snakemake.exceptions import WorkflowError

# Rules run `python -m conceptshare`: let that be this very Python and library, also where no environment is active. A
# rule's conda environment, where one is used, comes before them.
_LIBRARY = Path(conceptshare.__file__).parent
os.environ.update(
    PATH=os.pathsep.join([str(Path(sys.executable).parent), os.getenv("PATH", "")]),
    PYTHONPATH=os.pathsep.join(filter(None, [str(_LIBRARY.parent), os.getenv("PYTHONPATH", "")])),
)

try:
    for configfile in workflow.configfiles:
        read_yaml(Path(configfile))  # refuses a key written twice, of which Snakemake keeps the last
    STUDY = build_study(config, origin=", ".join(map(str, workflow.configfiles)))
except ConceptshareError as error:
    raise WorkflowError(str(error))


def code(*names):
    """The source files of a stage: inputs this small are compared by content, so a touch reruns nothing."""
    paths = [path for name in names for path in sorted(_LIBRARY.glob(name))]
    return [os.path.relpath(path) for path in paths]


def local_files(text):
    """The files that a source or model is made of, where it is on this machine."""
    path = local_path(text)
    if path is None:
        return []
    if path.is_dir():
        return sorted(str(file) for file in path.rglob("*") if file.is_file())
    return [str(path)]


def grown(megabytes_or_minutes):
    """A resource that grows with each attempt."""
    return lambda wildcards, attempt: megabytes_or_minutes * attempt


def environment_of(wildcards):
    """The conda environment of rules that run an encoder."""
    own = STUDY.encoders[wildcards.encoder].remote_code
    return "../../envs/mambavision.yaml" if own else "../../envs/conceptshare.yaml"


def saes_folder(wildcards):
    """The folder that an SAE setting's encoders lie in."""
    results = f"results/{wildcards.dataset}"
    return f"{results}/streams/{wildcards.sae}/saes" if STUDY.stream else f"{results}/saes/{wildcards.sae}"


def saes_of(wildcards):
    """The SAEs of a member: of all its layers, or the folder that a stream makes of them."""
    folder = f"{saes_folder(wildcards)}/{wildcards.encoder}"
    if STUDY.stream:
        return [folder]
    layers = STUDY.encoders[wildcards.encoder].layer_numbers()
    return [f"{folder}/{layer_name(layer)}/seed-{wildcards.seed}/sae_weights.safetensors" for layer in layers]


def activations_of(wildcards):
    """The store with the global tokens of an encoder."""
    streams = f"streams/{wildcards.sae}/" if STUDY.stream else ""
    return f"results/{wildcards.dataset}/{streams}activations/{wildcards.encoder}.zarr"


def folder_of(files):
    """The folder that stores of one kind lie in."""
    return str(Path(files[0]).parent)


def features_of(members, wildcards):
    """The feature stores of members."""
    return [f"results/{wildcards.dataset}/features/{wildcards.sae}/{member}.zarr" for member in sorted(members)]


def correlations_of(pairs, wildcards):
    """The correlation stores of pairs of members."""
    return [f"results/{wildcards.dataset}/correlations/{wildcards.sae}/{pair_name(a, b)}.zarr" for a, b in pairs]


def study_results():
    """Every table and figure of the study."""
    kinds = {
        "matrices": STUDY.analyses.matrices,
        "layerwise": STUDY.analyses.layerwise,
        "sharedness": STUDY.analyses.sharedness,
    }
    stems = [f"{kind}/{name}" for kind, analyses in kinds.items() for name in analyses]
    stems += ["saes"] if STUDY.members() else []
    return [
        f"results/studies/{STUDY.study}/{dataset}/{sae}/{stem}.{suffix}"
        for dataset in STUDY.datasets
        for sae in STUDY.saes
        for stem in stems
        for suffix in ("csv", "png")
    ]
