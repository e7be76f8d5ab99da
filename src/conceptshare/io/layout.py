"""Layout of `results/`: every path is defined here once, and rules, pages, checks and docs use these definitions.

Paths contain Snakemake wildcards. A member is an encoder with the seed of its SAEs; a pair consists of two members.
From ``FEATURES`` on, ``sae`` is a name of `coded`.
"""

from pathlib import Path
from typing import Literal

Code = Literal["before_topk", "after_topk"]
"""Which values of an SAE's latents its features are."""

MEMBER = "{encoder}@{seed}"

WEIGHTS = "results/weights/{encoder}.json"
DATA = "results/{dataset}/data"
PARTS = "results/{dataset}/parts/{encoder}.{part}-of-{parts}.zarr"
ACTIVATIONS = "results/{dataset}/activations/{encoder}.zarr"
TOKENS = "results/{dataset}/tokens/{encoder}.zarr"
SAES = "results/{dataset}/saes/{sae}/{encoder}"
STREAMED_SAES = "results/{dataset}/streams/{sae}/saes/{encoder}"
STREAMED_ACTIVATIONS = "results/{dataset}/streams/{sae}/activations/{encoder}.zarr"
SAE = "layer-{layer}/seed-{seed}"
"""An SAE in a folder of SAEs; layer numbers have at least two digits."""
PRETRAINED = "results/pretrained/{sae}/{encoder}"
"""A folder of imported SAEs, not measured on any data set."""
FEATURES = "results/{dataset}/features/{sae}/{member}.zarr"
NAMES = "results/{dataset}/names/{sae}/{member}.parquet"
EXAMPLES = "results/{dataset}/examples/{sae}/{member}"
CORRELATIONS = "results/{dataset}/correlations/{sae}/{a}__{b}.zarr"
SIMILARITY = "results/{dataset}/similarity/{encoder_a}__{encoder_b}.parquet"
STREAMED_SIMILARITY = "results/{dataset}/streams/{sae}/similarity/{encoder_a}__{encoder_b}.parquet"

STUDY_FOLDER = "results/studies/{study}"
STUDY = f"{STUDY_FOLDER}/study.json"
PROVENANCE = f"{STUDY_FOLDER}/provenance.json"
ANALYSES = f"{STUDY_FOLDER}/{{dataset}}/{{sae}}"
PAIR = f"{ANALYSES}/pairs/{{a}}__{{b}}.parquet"
PAGES = f"{STUDY_FOLDER}/pages"
PAGES_OF_SAMPLES = f"{PAGES}/samples/{{dataset}}"
PAGES_OF_MEMBER = f"{PAGES}/data/{{dataset}}/{{sae}}/{{member}}"
PAGES_OF_PAIR = f"{PAGES}/data/{{dataset}}/{{sae}}/pairs/{{a}}__{{b}}"

RELEASE = "results/releases/{study}"
"""What `conceptshare publish` uploads."""


def layer_name(layer: int) -> str:
    """Name of a layer's group or folder: ``layer-03``."""
    return f"layer-{layer:02d}"


def sae_place(layer: int, seed: int) -> str:
    """Path of an SAE in a folder of SAEs: ``layer-03/seed-0``."""
    return SAE.replace("layer-{layer}", layer_name(layer)).format(seed=seed)


def coded(sae: str, code: Code) -> str:
    """Name of an SAE setting in the paths of its features and of all that is made from them.

    Features before TopK have the name of the setting alone. No setting has a name with a plus sign.
    """
    return sae if code == "before_topk" else f"{sae}+{code}"


def uncoded(name: str) -> tuple[str, Code]:
    """The SAE setting and the code of a name of `coded`."""
    sae, after, _ = name.partition("+")
    return sae, "after_topk" if after else "before_topk"


def path(pattern: str, results: Path = Path("results"), **wildcards: object) -> Path:
    """Path of one result: a pattern with its wildcards filled in, below the results folder."""
    return results / pattern.removeprefix("results/").format(**wildcards)


def log(pattern: str, what: str = "") -> str:
    """Log file of the job that makes a result; ``what`` distinguishes several jobs for the same name."""
    place = Path(pattern.replace("results/", "results/logs/", 1))
    name = place.stem if place.suffix in {".zarr", ".parquet", ".json", ".csv"} else place.name
    return str(place.with_name(f"{name}{what and '.' + what}.log"))
