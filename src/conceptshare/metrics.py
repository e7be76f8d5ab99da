"""Stage `metrics`, the mathematics: plain functions on NumPy arrays, without files and without torch.

Notation: rho_i is the largest Pearson correlation of feature i of A with any feature of B, S_i its summed activation.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import log_ndtr

Array = NDArray[np.float64]


def mppc(rho: ArrayLike) -> float:
    """Max pairwise Pearson correlation: the mean of rho ``[F]``."""
    return float(np.mean(np.asarray(rho, np.float64)))


def wmppc(rho: ArrayLike, weights: ArrayLike) -> float:
    """Weighted MPPC: sum_i S_i rho_i / sum_i S_i.

    Args:
        rho: ``[F]``.
        weights: ``[F]`` S, not negative.

    Returns:
        The weighted mean, or NaN where all weights are zero: no feature was ever active.
    """
    rho, weights = np.asarray(rho, np.float64), np.asarray(weights, np.float64)
    total = weights.sum()
    return float((weights * rho).sum() / total) if total > 0 else float("nan")


def wmppc_pooled(rho: ArrayLike, weights: ArrayLike) -> float:
    """WMPPC over all layers as Eq. 6 has it: features of all layers of A, their maximum over all layers of B.

    Args:
        rho: ``[L_B, F]`` for each layer of B, the features of all layers of A side by side.
        weights: ``[F]`` S.
    """
    return wmppc(np.max(np.asarray(rho), axis=0), weights)


def wmppc_layer_mean(rho: ArrayLike, weights: ArrayLike, sizes: ArrayLike) -> float:
    """WMPPC over all layers as the authors' code has it: per layer of A, averaged over A's layers by their size.

    Args:
        rho: ``[L_B, F]`` as in `wmppc_pooled`.
        weights: ``[F]`` S.
        sizes: ``[L_A]`` features of each layer of A, which sum to F. A layer without an active feature has no
            wMPPC and is left out.
    """
    best = np.max(np.asarray(rho, np.float64), axis=0)
    sizes = np.asarray(sizes)
    ends = np.cumsum(sizes)
    S = np.asarray(weights, np.float64)
    values = np.array([wmppc(best[end - n : end], S[end - n : end]) for n, end in zip(sizes, ends, strict=True)])
    present = ~np.isnan(values)
    return float(np.average(values[present], weights=sizes[present])) if present.any() else float("nan")


def comparative_sharedness(weights: ArrayLike, rho_g: ArrayLike, rho_h: ArrayLike) -> Array:
    """Comparative Sharedness (Eq. 7 and 8): Delta_i = S_i (rho_Gi^2 - rho_Hi^2).

    rho_G is the least rho over the group that should share the feature, rho_H the largest over the group that should
    not. With one model a side this is Eq. 7.

    Args:
        weights: ``[F]`` S.
        rho_g: ``[|G|, F]`` (or ``[F]`` for one model).
        rho_h: ``[|H|, F]`` (or ``[F]`` for one model).

    Returns:
        ``[F]`` Delta.
    """
    g = np.atleast_2d(np.asarray(rho_g, np.float64)).min(axis=0)
    h = np.atleast_2d(np.asarray(rho_h, np.float64)).max(axis=0)
    delta: Array = np.asarray(weights, np.float64) * (g**2 - h**2)
    return delta


def significance(rho: ArrayLike, samples: int, candidates: int) -> Array:
    """Chance that the best of many unrelated features correlates more than rho (appendix B), as log10.

    P(max > rho) = 1 - Phi(artanh(rho) sqrt(L - 3))^N underflows long before it means nothing, so log-probabilities are
    carried throughout.

    Args:
        rho: correlations.
        samples: L, more than 3.
        candidates: N, the features that rho is the maximum over.

    Returns:
        log10 P, of rho's shape.
    """
    with np.errstate(divide="ignore"):
        z = np.arctanh(np.asarray(rho, np.float64)) * np.sqrt(samples - 3)
    # Phi(z)^N = exp(N log Phi(z)), and log Phi(z) is near -Q(z), which underflows where log Q(z) does not.
    power = candidates * log_ndtr(z)
    with np.errstate(divide="ignore"):
        exact = np.log(-np.expm1(power))
    small = np.log(candidates) + log_ndtr(-z)
    result: Array = np.where(power > -1e-9, small, exact) / np.log(10)
    return result


def modality_averages(
    matrix: Mapping[tuple[str, str], float], modalities: Mapping[str, str]
) -> dict[tuple[str, str], float]:
    """Mean wMPPC from each modality to each (Table 3): cells of one encoder with itself are left out.

    Args:
        matrix: the wMPPC by source and target.
        modalities: of every source and target, such as ``"image"``.

    Returns:
        The mean by source modality and target modality, where there is a cell.
    """
    cells: dict[tuple[str, str], list[float]] = {}
    for (source, target), value in matrix.items():
        if source != target:
            cells.setdefault((modalities[source], modalities[target]), []).append(value)
    return {pair: float(np.mean(values)) for pair, values in cells.items()}
