"""Do matched features find wrong captions?

Captions of the pairs that the demo's tiny-clip is trained on are exchanged at random. The study
`benchmarks/filtering.yaml` trains SAEs on these data and scores every sample's fit.

    python -m benchmarks.filtering write     # the data sets, in build/filtering
    snakemake --configfile benchmarks/filtering.yaml --cores 2 --until metrics_samples
    python -m benchmarks.filtering measure   # AUROC
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from demo.train_tiny_clip import HERE, Pairs, Settings, load_pairs, split
from numpy.typing import NDArray

from conceptshare.analysis.tables import read_table
from conceptshare.config.study import load_study
from conceptshare.io import layout

FOLDER, CONFIG = Path("build/filtering"), Path("benchmarks/filtering.yaml")
SHARES = (0.1, 0.2, 0.4)
"""Shares of the captions that are exchanged."""
Array = NDArray[Any]


def data_set(share: float) -> str:
    """Name of the data set with so large a share of exchanged captions."""
    return f"exchanged-{100 * share:.0f}"


def exchanged(share: float, count: int) -> tuple[Array, Array]:
    """The caption of each of ``count`` images, and which are another's: one cycle through random ones."""
    chosen = np.random.default_rng(0).permutation(count)[: round(share * count)]
    of, wrong = np.arange(count), np.zeros(count, bool)
    of[chosen], wrong[chosen] = np.roll(chosen, 1), True
    return of, wrong


def write() -> None:
    """Write the data sets."""
    rows = {row["id"]: row for row in pq.read_table(HERE / "openclipart.parquet").to_pylist()}
    pairs = trained_on()
    FOLDER.mkdir(parents=True, exist_ok=True)
    for share in SHARES:
        of, _ = exchanged(share, len(pairs.ids))
        captions = [pairs.captions[n] for n in of]
        images = [rows[id]["image"] for id in pairs.ids]
        table = pa.table({"id": pairs.ids, "image": images, "caption": captions})
        pq.write_table(table, FOLDER / f"{data_set(share)}.parquet")


def trained_on() -> Pairs:
    """The pairs that tiny-clip is trained on."""
    settings = Settings()
    return split(load_pairs(HERE / "openclipart.parquet"), settings.held_out, settings.seed)[0]


def fit_of(share: float, analysis: str, pairs: Pairs) -> Array:
    """The fit of each pair."""
    study = load_study(CONFIG)
    place = layout.path(layout.ANALYSES, study=study.study, dataset=data_set(share), sae=next(iter(study.saes)))
    table = read_table(place / "samples" / f"{analysis}.parquet", "samples")
    return table.set_index("id").fit[pairs.ids].to_numpy()


def measure() -> None:
    """Print how well each score finds the exchanged captions."""
    pairs, analyses = trained_on(), list(load_study(CONFIG).analyses.samples)
    images, texts = embeddings(pairs)
    print("| captions exchanged | " + " | ".join(analyses) + " | CLIP score |")
    for share in SHARES:
        of, wrong = exchanged(share, len(pairs.ids))
        scores = [fit_of(share, name, pairs) for name in analyses] + [(images * texts[of]).sum(1).numpy()]
        print(f"| {share:.0%} | " + " | ".join(f"{auroc(-score, wrong):.3f}" for score in scores) + " |")


def auroc(score: Array, wrong: Array) -> float:
    """The probability that a wrong pair has a higher score than a right one."""
    rank = pd.Series(score).rank().to_numpy()
    return float((rank[wrong].mean() - (wrong.sum() + 1) / 2) / (~wrong).sum())


@torch.inference_mode()
def embeddings(pairs: Pairs) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings of images and captions of length 1, by the demo's tiny-clip."""
    name = f"local-dir:{HERE / 'tiny-clip'}"
    model, _, preprocess = open_clip.create_model_and_transforms(name)
    model.eval()
    images = torch.stack([preprocess(image) for image in pairs.images])
    tokens = open_clip.get_tokenizer(name)(pairs.captions)
    return model.encode_image(images, normalize=True), model.encode_text(tokens, normalize=True)


if __name__ == "__main__":
    {"write": write, "measure": measure}[sys.argv[1]]()
