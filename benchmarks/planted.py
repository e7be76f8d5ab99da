"""Do the SAEs find planted features, and do the scores find the planted share?

The global tokens of these encoders are sums of known sparse features, some of which they share, and noise. They go
through the stages `sae`, `features`, `correlations` and `metrics`, with trained SAEs, and with SAEs made of the planted
features (oracles), which separate errors of the scores from those of the training.
"""

import io
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from conceptshare.activations import extraction
from conceptshare.analysis.tables import Stores, matrix_table, pair_table, sharedness_table
from conceptshare.config.members import GroupedMember
from conceptshare.config.settings import SAESettings
from conceptshare.correlations import correlate_stores
from conceptshare.io.layout import Code, layer_name, sae_place
from conceptshare.io.store import new_store, save_array
from conceptshare.sae import SAE, TopK, save_sae, train_sae
from conceptshare.sae.features import read_features, record_features

Array = NDArray[np.float64]


class World(NamedTuple):
    """How features are planted."""

    name: str
    crowding: int = 1
    """Features per dimension of the residual stream."""
    noise: float = 0
    """Standard deviation of the noise in each dimension, relative to that of the features."""
    correlation: float = 0
    """Correlation of the normal variables by which four features each are active."""
    densities: tuple[float, float] = (0.005, 0.05)
    """Range of the fractions of samples on which features are active, log-uniform."""
    samples: int = 4096


WORLDS = (
    World("sparse"),
    World("the same, 1,024 samples", samples=1024),
    World("noisy, correlated, denser", noise=0.2, correlation=0.5, densities=(0.005, 0.1)),
    World("twice as many features as dimensions", crowding=2, noise=0.1, correlation=0.5),
)
# The width of each encoder, and its blocks of features: together as many as dimensions, times the crowding.
ENCODERS = {
    "a": (96, {"ab": 32, "ac": 24, "a": 40}),
    "b": (64, {"ab": 32, "b": 32}),
    "b-wide": (128, {"ab": 32, "b": 32, "b-wide": 64}),
    "c": (80, {"ac": 24, "c": 56}),
}
TARGETS = ("b", "b-wide", "c")
TRAINED = SAESettings(preset="global", expansion=2, k=8)
FOUND = 0.7
"""Correlation above which a latent has found a planted feature."""


class Planted(NamedTuple):
    """An encoder's global tokens, and what they are made of."""

    tokens: Array
    """``[samples, D]``"""
    features: Array
    """``[samples, F]``"""
    directions: Array
    """``[F, D]`` of length 1."""
    names: NDArray[Any]
    """``[F]`` names of the features, which shared ones have in common."""


def main() -> None:
    """Print what the SAEs and the scores found."""
    jobs = list(product(WORLDS, (None, TRAINED)))
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        saes, scores = zip(*pool.map(find, *zip(*jobs, strict=True)), strict=True)
    for tables in (saes, scores):
        print(pd.concat(tables).to_string(index=False, float_format="%.3f", na_rep=""), end="\n\n")


def planted(count: int, world: World, rng: np.random.Generator) -> Array:
    """``[samples, count]`` activations: log-normal if active, else 0."""
    samples = world.samples
    common = rng.standard_normal((samples, -(-count // 4))).repeat(4, axis=1)[:, :count]
    z = world.correlation**0.5 * common + (1 - world.correlation) ** 0.5 * rng.standard_normal((samples, count))
    density = np.exp(rng.uniform(*np.log(world.densities), count))
    active = z.argsort(axis=0).argsort(axis=0) >= samples - np.rint(density * samples)
    activations: Array = active * rng.lognormal(0, 0.4, (samples, count))
    return activations


def encoders(world: World) -> dict[str, Planted]:
    """The encoders of a world."""
    rng = np.random.default_rng(0)
    sizes = {name: world.crowding * n for _, own in ENCODERS.values() for name, n in own.items()}
    blocks = {name: planted(size, world, rng) for name, size in sizes.items()}
    made = {}
    for encoder, (width, own) in ENCODERS.items():
        features = np.concatenate([blocks[name] for name in own], axis=1)
        directions = rng.standard_normal((features.shape[1], width))
        directions /= np.linalg.norm(directions, axis=1, keepdims=True)
        tokens = features @ directions
        tokens += world.noise * tokens.std() * rng.standard_normal(tokens.shape)
        names = np.array([f"{name} {n}" for name in own for n in range(sizes[name])])
        made[encoder] = Planted(tokens.astype(np.float16).astype(np.float64), features, directions, names)
    return made


def oracle(encoder: Planted) -> SAE:
    """An SAE that decodes by the planted directions, and encodes by the best linear estimate of the features."""
    x, f = encoder.tokens, encoder.features
    weights = np.linalg.lstsq(x - x.mean(0), f - f.mean(0), rcond=None)[0]
    sae = SAE(x.shape[1], f.shape[1], TopK(TRAINED.k))
    with torch.no_grad():
        sae.W_enc_T.copy_(torch.from_numpy(weights.T))
        sae.W_dec.copy_(torch.from_numpy(encoder.directions))
        sae.b_enc.copy_(torch.from_numpy(f.mean(0) - x.mean(0) @ weights))
    return sae


def make_saes(made: dict[str, Planted], settings: SAESettings | None, folder: Path) -> None:
    """Write activations and SAEs, which are oracles without settings."""
    for name, encoder in made.items():
        spec = {"name": name, "encoder": {"modality": "image"}, "content_hash": "planted", "batch_size": 64}
        spec |= {"samples": len(encoder.tokens), "layers": [0]}
        with new_store(folder / f"{name}.zarr", extraction.KIND, spec) as store:
            save_array(store.create_group(layer_name(0)), "global", encoder.tokens.astype(np.float16))
        out = folder / "saes" / name / sae_place(0, 0)
        if settings is None:
            out.mkdir(parents=True)
            save_sae(oracle(encoder), out, name, "layer 0", {"layer": 0, "seed": 0})
        else:
            train_sae(folder / f"{name}.zarr", 0, settings, 0, out)


def compare(made: dict[str, Planted], folder: Path, code: Code = "before_topk") -> Stores:
    """Write features and correlations."""
    stores = Stores(folder / code / "features", folder / code / "correlations")
    for name in made:
        store, saes = folder / f"{name}.zarr", folder / "saes" / name
        record_features(store, saes, 0, stores.features / f"{name}@0.zarr", code=code)
    for target in TARGETS:
        paths = (stores.features / f"{name}@0.zarr" for name in ("a", target))
        correlate_stores(*paths, stores.correlations / f"a@0__{target}@0.zarr")
    return stores


def found_by(encoder: Planted, features: Array) -> tuple[NDArray[Any], Array]:
    """The name of the feature that each latent found, or none, and each planted feature's best correlation ``[F]``."""
    x, y = (each - each.mean(0) for each in (encoder.features, features))
    norms = np.linalg.norm(x, axis=0)[:, None] * np.linalg.norm(y, axis=0)
    r = np.divide(x.T @ y, norms, out=np.zeros_like(norms), where=norms > 0)
    return np.where(r.max(0) > FOUND, encoder.names[r.argmax(0)], ""), r.max(1)


def find(world: World, settings: SAESettings | None) -> tuple[pd.DataFrame, pd.DataFrame]:
    """What the SAEs find of each encoder, and the scores of each pair of encoders."""
    torch.set_num_threads(1)
    made = encoders(world)
    with TemporaryDirectory() as folder, redirect_stderr(io.StringIO()):
        make_saes(made, settings, Path(folder))
        names: dict[Code, str] = {"before_topk": "oracle"}
        if settings:
            names = {"before_topk": "trained", "after_topk": "trained, after TopK"}
        found = [
            reported(made, compare(made, Path(folder), code), {"world": world.name, "SAEs": name})
            for code, name in names.items()
        ]
    return pd.concat([saes for saes, _ in found]), pd.concat([scores for _, scores in found])


def reported(made: dict[str, Planted], stores: Stores, what: dict[str, str]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The two tables of `find`."""
    latents, saes, scores = {}, [], []
    for name, encoder in made.items():
        features = read_features(stores.features / f"{name}@0.zarr")[0][:].astype(np.float64)
        latents[name], r = found_by(encoder, features)
        S = features.sum(0)
        recovery = {"recovered": (r > FOUND).mean(), "median r": np.median(r)}
        recovery["S of found"] = S[latents[name] != ""].sum() / S.sum()
        saes.append({**what, "encoder": name, "width": encoder.tokens.shape[1], "features": len(r), **recovery})
    ranked = sharedness_table("a@0", ["b@0"], ["c@0"], stores)
    for target in TARGETS:
        members = [GroupedMember(f"{name}@0", "image", "vision") for name in ("a", target)]
        cells = matrix_table(members, stores).query("reading == 'last'").set_index("source")
        pairs = pair_table("a@0", f"{target}@0", stores)
        for source, other in (("a", target), (target, "a")):
            S, shared = made[source].features.sum(0), np.isin(made[source].names, made[other].names)
            rows = pairs[pairs.source == f"{source}@0"]
            own, match = latents[source], latents[other][rows.match_feature]
            right, counted = (own != "") & (own == match), rows.beyond_shuffled.to_numpy()
            to_match = np.isin(own, made[source].names[shared])
            score = {**what, "pair": f"{source} to {other}", "planted": S[shared].sum() / S.sum()}
            score |= cells.loc[f"{source}@0", ["wmppc", "excess", "cross_fitted"]].to_dict()
            score |= {"matched": right[to_match].mean(), "counted": counted[to_match].mean()}
            score["precision"] = right[counted & (own != "")].mean()
            if (source, other) == ("a", "b"):
                score |= {rank: ranking_precision(ranked, rank, latents["a"]) for rank in ("rank", "calibrated_rank")}
            scores.append(score)
    return pd.DataFrame(saes), pd.DataFrame(scores)


def ranking_precision(ranking: pd.DataFrame, rank: str, latents: NDArray[Any]) -> float:
    """Of as many first features of a ranking as found what A and B, but not C, share, the share that did."""
    good = np.char.startswith(latents.astype(str), "ab ")[ranking.sort_values(rank).feature]
    return float(good[: good.sum()].mean())


if __name__ == "__main__":
    main()
