"""A functional test of matches: whether matched features alone find a sample's caption among those of other samples.

Matches, their correlations and the scaling of features come from the first half of the samples, and retrieval is
measured on the other half. Samples are shuffled, so at most the first `CKA_SAMPLES` are a random subset.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from conceptshare.analysis.tables import features_digest
from conceptshare.config.members import GroupedMember
from conceptshare.config.settings import MAX_FVU_GLOBAL
from conceptshare.correlations import FeatureStore, check_pair, max_correlations
from conceptshare.device import default_device
from conceptshare.io.progress import progress
from conceptshare.io.readers import MaxCorrelations, unexplained_layers
from conceptshare.io.sizes import CKA_SAMPLES, FEATURE_COLUMNS

# Similarities that differ by less are ties: rounding can tell two equal samples apart.
_DECIMALS = 12


class Pairs(NamedTuple):
    """Pairs of a feature of A and one of B, with their correlation."""

    of_a: NDArray[np.int64]
    of_b: NDArray[np.int64]
    rho: NDArray[np.float64]


def retrieval_table(
    members: Sequence[GroupedMember], features: Path, max_fvu_global: float = MAX_FVU_GLOBAL
) -> pd.DataFrame:
    """Retrieval between the last layers of every image encoder and every text encoder, one row per direction.

    ``source`` holds the queries, ``target`` the candidates, one per sample; ``samples`` is their number n, ``matches``
    the number of pairs of features. ``recall_1`` and ``recall_10`` are the shares of queries whose own sample is among
    the first and the first ten candidates, and ``median_rank`` is its median rank from 1; ties are in random order, of
    which these are the expected values. ``chance_1``, ``chance_10`` and ``chance_rank`` are the same for a random order
    of all candidates. ``unexplained`` is the number of both last layers whose SAE has an FVU above ``max_fvu_global``.

    Args:
        members: members of a matrix.
        features: the folder of their feature stores.
        max_fvu_global: the bound, which ``attrs`` record.

    Raises:
        StoreError: if a store is missing or damaged, no feature is active, or features that were not kept cannot be
            recomputed.
        NumericsError: if there are fewer than 4 samples.
    """
    images, texts = ([entry.member for entry in members if entry.modality == one] for one in ("image", "text"))
    rows = []
    for image in progress(images, len(images), "retrieval", "encoders"):
        a = FeatureStore(features / f"{image}.zarr")
        for text in texts:
            b = FeatureStore(features / f"{text}.zarr")
            check_pair(a, b)
            matches, ranks = matched_retrieval(a.arrays[-1], b.arrays[-1])
            unexplained = sum(unexplained_layers(store.path, max_fvu_global)[-1] for store in (a, b))
            for source, target, found in zip((image, text), (text, image), ranks, strict=True):
                rows.append(
                    {"source": source, "target": target, "matches": matches, **found, "unexplained": unexplained}
                )
    table = pd.DataFrame(rows).assign(code=a.code)
    table.attrs["max_fvu_global"] = max_fvu_global
    table.attrs["features"] = {member: features_digest(features / f"{member}.zarr") for member in (*images, *texts)}
    return table


def matched_retrieval(a: Any, b: Any) -> tuple[int, tuple[dict[str, float], dict[str, float]]]:
    """Retrieve each sample of the second half by its features in A among those in B, and the reverse.

    The similarity of sample s in A and t in B is the cosine of the vectors sqrt(rho_m) z_m(s) and sqrt(rho_m) z'_m(t)
    over the pairs m of `matched`. Pairs, rho, and the means and standard deviations that standardise z and z' are those
    of the first half.

    Args:
        a: ``[N, F]`` features, read in slices of rows and columns.
        b: ``[N, F']`` of the same samples.

    Returns:
        The number of pairs, and the values of `retrieval_table` from A to B and from B to A.
    """
    N = min(a.shape[0], CKA_SAMPLES)
    first = [read_rows(side, slice(0, N // 2)) for side in (a, b)]
    pairs = matched(max_correlations(first[0], first[1], what="matches of half of the samples"))
    moments = [(half.mean(axis=0, dtype=np.float64), half.std(axis=0, dtype=np.float64)) for half in first]
    del first
    second = [read_rows(side, slice(N // 2, N)) for side in (a, b)]
    return len(pairs.rho), retrieved(_cosines(second, moments, pairs))


def read_rows(side: Any, rows: slice) -> NDArray[np.float32]:
    """``[n, F]`` rows of features, on the CPU."""
    values = side[rows, :]
    return np.asarray(values.cpu() if isinstance(values, torch.Tensor) else values, np.float32)


def matched(best: MaxCorrelations) -> Pairs:
    """Every feature of two layers with its best match in the other, if they correlate above 0, without repeats."""
    of_a, of_b = (
        np.stack([np.arange(len(rho)), match])[:, (match >= 0) & (rho > 0)]
        for rho, match in ((best.rho_ab[0], best.match_ab[0]), (best.rho_ba[0], best.match_ba[0]))
    )
    rho = np.concatenate([best.rho_ab[0, of_a[0]], best.rho_ba[0, of_b[0]]])
    pairs, first = np.unique(np.concatenate([of_a, of_b[::-1]], axis=1), axis=1, return_index=True)
    return Pairs(pairs[0], pairs[1], rho[first].astype(np.float64))


def _cosines(features: Sequence[NDArray[Any]], moments: Sequence[tuple[Any, Any]], pairs: Pairs) -> torch.Tensor:
    """``[n, n]`` similarities of each sample in A with each in B; 0 if a sample has the mean of all features."""
    device, n = default_device(), len(features[0])
    products = torch.zeros(n, n, dtype=torch.float64, device=device)
    squares = torch.zeros(2, n, dtype=torch.float64, device=device)
    for start in range(0, len(pairs.rho), FEATURE_COLUMNS):
        some = slice(start, start + FEATURE_COLUMNS)
        u, v = (
            torch.from_numpy((x[:, chosen[some]] - mean[chosen[some]]) * (pairs.rho[some] ** 0.5 / std[chosen[some]]))
            for x, (mean, std), chosen in zip(features, moments, pairs[:2], strict=True)
        )
        u, v = u.to(device), v.to(device)
        products += u @ v.T
        squares += torch.stack([u.square().sum(1), v.square().sum(1)])
    lengths = squares.sqrt()
    return torch.where(products != 0, products / (lengths[0, :, None] * lengths[1]), 0).round(decimals=_DECIMALS)


def retrieved(similarity: torch.Tensor) -> tuple[dict[str, float], dict[str, float]]:
    """Recalls and ranks of the own column of each row of ``similarity [n, n]``, and of the own row of each column."""
    n, own = len(similarity), similarity.diagonal()
    results = []
    for axis, of_own in ((1, own[:, None]), (0, own[None])):
        above = (similarity > of_own).sum(axis).cpu().numpy()
        equal = (similarity == of_own).sum(axis).cpu().numpy()  # with its own
        recalls = {f"recall_{k}": float(((k - above) / equal).clip(0, 1).mean()) for k in (1, 10)}
        ranks = {"median_rank": float(np.median(above + (equal + 1) / 2))}
        chance = {"chance_1": 1 / n, "chance_10": min(1, 10 / n), "chance_rank": (n + 1) / 2}
        results.append({"samples": n, **recalls, **ranks, **chance})
    return results[0], results[1]
