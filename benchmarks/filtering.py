"""Do matched features find wrong captions, and does a CLIP learn more from the pairs that are kept?

Captions of the demo's training pairs are exchanged at random. The study `benchmarks/filtering.yaml` trains SAEs on
these data and scores every sample's fit; tiny-clip's image encoder then learns from the samples that fit best, from as
many random ones, and from all, in as many steps.

    python -m benchmarks.filtering write     # the data sets, in build/filtering
    snakemake --configfile benchmarks/filtering.yaml --cores 2 --until metrics_samples
    python -m benchmarks.filtering measure   # AUROC
    python -m benchmarks.filtering train     # R@5, about three minutes per training on two cores
"""

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from demo.train_tiny_clip import (
    HERE,
    Captions,
    Pairs,
    Settings,
    Teacher,
    load_pairs,
    split,
    square,
    teacher_folder,
    train_images,
)
from numpy.typing import NDArray
from open_clip.transformer import PatchDropout

from conceptshare.analysis.tables import read_table
from conceptshare.config.study import load_study
from conceptshare.io import layout

FOLDER, CONFIG = Path("build/filtering"), Path("benchmarks/filtering.yaml")
SHARES = (0.0, 0.1, 0.2, 0.4)
"""Shares of the captions that are exchanged."""
SELECTED_BY = "unpaired"
"""The analysis of samples whose fit selects the pairs to train on: its encoders never saw an image with its caption."""
SEEDS, RESAMPLES = (0, 1, 2), 2000
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
    for share in SHARES[1:]:
        of, wrong = exchanged(share, len(pairs.ids))
        scores = [fit_of(share, name, pairs) for name in analyses] + [(images * texts[of]).sum(1).numpy()]
        print(f"| {share:.0%} | " + " | ".join(f"{auroc(-score, wrong):.3f}" for score in scores) + " |")


def auroc(score: Array, wrong: Array) -> float:
    """The probability that a wrong pair has a higher score than a right one."""
    rank = pd.Series(score).rank().to_numpy()
    return float((rank[wrong].mean() - (wrong.sum() + 1) / 2) / (~wrong).sum())


@torch.inference_mode()
def embeddings(pairs: Pairs, model: Any = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings of images and captions of length 1, by the demo's tiny-clip or another."""
    name = f"local-dir:{HERE / 'tiny-clip'}"
    shipped, _, preprocess = open_clip.create_model_and_transforms(name)
    model = (model or shipped).eval()
    images = torch.stack([preprocess(image) for image in pairs.images])
    tokens = open_clip.get_tokenizer(name)(pairs.captions)
    return model.encode_image(images, normalize=True), model.encode_text(tokens, normalize=True)


def train() -> None:
    """Print R@5 on held-out pairs of image encoders trained on selected pairs."""
    torch.set_num_threads(2)
    settings = Settings()
    pairs, held_out = split(load_pairs(HERE / "openclipart.parquet"), settings.held_out, settings.seed)
    name = f"local-dir:{HERE / 'tiny-clip'}"
    captions = Captions(pairs.captions, open_clip.get_tokenizer(name), Teacher(teacher_folder()), settings)
    images = torch.from_numpy(np.stack([square(image, 96) for image in pairs.images])).permute(0, 3, 1, 2)
    steps = settings.image_epochs * (len(pairs.ids) // settings.batch_size)
    done = FOLDER / "found.parquet"
    found = pd.read_parquet(done) if done.exists() else pd.DataFrame(columns=["share", "pairs", "seed", "found"])
    for share, kind, seed, chosen in trainings(pairs):
        if ((found.share == share) & (found.pairs == kind) & (found.seed == seed)).any():
            continue
        of, _ = exchanged(share, len(pairs.ids))
        model = open_clip.create_model(name)
        torch.manual_seed(seed)
        model.visual = open_clip.create_model(name, load_weights=False).visual
        model.visual.patch_dropout = PatchDropout(settings.patch_dropout)
        epochs = round(steps / (len(chosen) // settings.batch_size))
        of_seed = dataclasses.replace(settings, seed=seed, image_epochs=epochs)
        train_images(model, images[chosen], captions.take(of[chosen]), of_seed)
        hits = found_within(5, *embeddings(held_out, model))
        found = pd.concat([found, pd.DataFrame([{"share": share, "pairs": kind, "seed": seed, "found": hits}])])
        found.to_parquet(done)
        print(f"{share:.0%} exchanged, {kind}, seed {seed}: R@5 {np.mean(hits):.1%}", flush=True)
    report(found)


def trainings(pairs: Pairs) -> Iterator[tuple[float, str, int, Array]]:
    """Share of exchanged captions, kind of selection, seed, and the pairs that it selects."""
    for seed in SEEDS:
        for share in (0.4, 0.2, 0.0):
            count = len(pairs.ids)
            yield share, "all", seed, np.arange(count)
            if share:
                kept = round((1 - share) * count)
                yield share, "kept", seed, np.sort(np.argsort(-fit_of(share, SELECTED_BY, pairs))[:kept])
                yield share, "random", seed, np.sort(np.random.default_rng(seed).permutation(count)[:kept])
                yield share, "right", seed, np.flatnonzero(~exchanged(share, count)[1])


def found_within(k: int, images: torch.Tensor, texts: torch.Tensor) -> list[float]:
    """For each pair, the mean over both directions of whether its other side is among the first k."""
    similarity = images @ texts.T
    ranks = [(scores > scores.diagonal()[:, None]).sum(1) for scores in (similarity, similarity.T)]
    found: list[float] = torch.stack([(rank < k).float() for rank in ranks]).mean(0).tolist()
    return found


def report(found: pd.DataFrame) -> None:
    """Print the mean R@5 over seeds, with 95% bootstrap intervals over seeds and held-out pairs."""
    generator = np.random.default_rng(0)
    for (share, kind), rows in found.groupby(["share", "pairs"]):
        hits = np.stack(rows.found.to_list())
        means = [
            hits[generator.integers(len(hits), size=len(hits))][
                :, generator.integers(hits.shape[1], size=hits.shape[1])
            ].mean()
            for _ in range(RESAMPLES)
        ]
        low, high = np.quantile(means, [0.025, 0.975])
        print(f"{share:.0%} exchanged, {kind}: R@5 {hits.mean():.1%} ({low:.1%} to {high:.1%}), {len(hits)} seeds")


if __name__ == "__main__":
    {"write": write, "measure": measure, "train": train}[sys.argv[1]]()
