"""Mathematics of the stage `metrics`: pure functions on NumPy arrays, without files and without torch.

Notation: rho_i is the largest Pearson correlation of feature i of A with any feature of B, S_i its summed activation.
"""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from conceptshare.io.errors import NumericsError

Array = NDArray[np.float64]

READINGS = ("pooled", "layer_mean", "last")
"""The readings of wMPPC: two over all layers, and one between the last layers only."""

# Number of resamples counted at a time: 15 MB of float32 counts for 118,287 samples.
_REPLICATES_PER_BLOCK = 32


def mppc(rho: ArrayLike) -> float:
    """Max pairwise Pearson correlation: the mean of rho ``[F]``."""
    return float(np.mean(np.asarray(rho, np.float64)))


def wmppc(rho: ArrayLike, weights: ArrayLike) -> float:
    """Weighted MPPC: sum_i S_i rho_i / sum_i S_i.

    Args:
        rho: ``[F]``.
        weights: ``[F]`` S, not negative.

    Returns:
        The weighted mean; NaN if all weights are zero, that is, no feature was ever active.
    """
    rho, weights = np.asarray(rho, np.float64), np.asarray(weights, np.float64)
    total = weights.sum()
    return float((weights * rho).sum() / total) if total > 0 else float("nan")


def wmppc_pooled(rho: ArrayLike, weights: ArrayLike) -> float:
    """wMPPC over all layers as in Eq. 6: features of all layers of A, each with its maximum over all layers of B.

    Args:
        rho: ``[L_B, F]`` for each layer of B, the features of all layers of A concatenated.
        weights: ``[F]`` S.
    """
    return wmppc(np.max(np.asarray(rho), axis=0), weights)


def wmppc_layer_mean(rho: ArrayLike, weights: ArrayLike, sizes: ArrayLike) -> float:
    """wMPPC over all layers as in the authors' code: per layer of A, then averaged over A's layers by size.

    Args:
        rho: ``[L_B, F]`` as in `wmppc_pooled`.
        weights: ``[F]`` S.
        sizes: ``[L_A]`` number of features per layer of A, which sum to F. A layer without an active feature has no
            wMPPC and is left out.
    """
    best = np.max(np.asarray(rho, np.float64), axis=0)
    sizes = np.asarray(sizes)
    ends = np.cumsum(sizes)
    S = np.asarray(weights, np.float64)
    values = np.array([wmppc(best[end - n : end], S[end - n : end]) for n, end in zip(sizes, ends, strict=True)])
    present = ~np.isnan(values)
    return float(np.average(values[present], weights=sizes[present])) if present.any() else float("nan")


def null_readings(
    null: ArrayLike, error: ArrayLike, weights: ArrayLike, sizes: ArrayLike, kept: ArrayLike = True
) -> dict[str, tuple[Array, float]]:
    """The null of each of the `READINGS`: ``[R]`` for the re-pairings, and the standard error of their mean.

    Args:
        null: ``[R, L_A, L_B + 1]`` wMPPC of re-paired samples per layer of A, last to all layers of B.
        error: ``[L_A, L_B + 1]`` standard errors of their means.
        weights: ``[F]`` S of the features of all layers of A, concatenated.
        sizes: ``[L_A]`` number of features per layer of A.
        kept: ``[L_A]`` which layers of A take part in ``pooled`` and ``layer_mean``; by default all.
    """
    null, error, S = np.asarray(null, np.float64), np.asarray(error, np.float64), np.asarray(weights, np.float64)
    sizes = np.asarray(sizes)
    totals = np.array([S[end - n : end].sum() for n, end in zip(sizes, np.cumsum(sizes), strict=True)])
    found, S_kept = {}, np.where(kept, totals, 0)
    for reading, shares in (("pooled", S_kept), ("layer_mean", np.where(S_kept > 0, sizes, 0))):
        shares = shares / shares.sum() if shares.any() else np.full(len(shares), np.nan)
        found[reading] = null[:, :, -1] @ shares, float(np.sqrt((shares**2 * error[:, -1] ** 2).sum()))
    last = null[:, -1, -2] if totals[-1] > 0 else np.full(len(null), np.nan)
    return found | {"last": (last, float(error[-1, -2]))}


def excess(value: float, null: float) -> float:
    """Share of the way from the null to 1: (wMPPC - null) / (1 - null)."""
    return (value - null) / (1 - null) if null < 1 else float("nan")


def relative(value: float, null: float, ceiling: float) -> float:
    """Share of the way from the null to the ceiling: (wMPPC - null) / (ceiling - null); NaN unless that is above it."""
    return (value - null) / (ceiling - null) if ceiling > null else float("nan")


def p_value(value: float, nulls: ArrayLike) -> float:
    """Probability of a value at least as large for re-paired samples: (1 + number of such nulls) / (1 + R)."""
    nulls = np.asarray(nulls, np.float64)
    return float((1 + (nulls >= value).sum()) / (1 + len(nulls))) if not np.isnan(nulls).any() else float("nan")


def comparative_sharedness(weights: ArrayLike, rho_g: ArrayLike, rho_h: ArrayLike) -> Array:
    """Comparative Sharedness (Eq. 7 and 8): Delta_i = S_i (rho_Gi^2 - rho_Hi^2).

    rho_G is the smallest rho over the group that should share the feature, rho_H the largest over the group that should
    not. With one model per group this is Eq. 7.

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


def feature_excess(rho: ArrayLike, null: ArrayLike) -> Array:
    """Share of the way from the null of each feature's rho to 1: max(0, (rho - null) / (1 - null)).

    Both are of one shape, or shapes that broadcast. A null of 1 leaves no way, and gives 0.
    """
    rho, null = np.asarray(rho, np.float64), np.asarray(null, np.float64)
    above, way = np.broadcast_arrays(np.maximum(0, rho - null), 1 - null)
    excess: Array = np.divide(above, way, out=np.zeros(above.shape), where=way > 0)
    return excess


def top_shares(delta: ArrayLike, top: int) -> Array:
    """``[F]`` the share of resamples, the rows of ``delta [R, F]``, in which each feature is among the ``top`` largest.

    Ties keep the features' order.
    """
    delta = np.asarray(delta, np.float64)
    first = np.argsort(-delta, axis=1, kind="stable")[:, :top]
    shares: Array = np.bincount(first.ravel(), minlength=delta.shape[1]) / len(delta)
    return shares


def significance(rho: ArrayLike, samples: int, candidates: int) -> Array:
    """Probability that the best of many unrelated features correlates more than rho (appendix B), as log10.

    P(max > rho) = 1 - Phi(artanh(rho) sqrt(L - 3))^N easily underflows, so log-probabilities are used throughout.

    The formula holds for independent features that are normally distributed over the samples. SAE features are neither:
    they are skewed and sparse, and two features that happen to be active on the same few samples correlate far more
    than it predicts. Even features of an encoder with random weights come out as shared. `beyond_shuffled` only assumes
    that samples are exchangeable; prefer it.

    Args:
        rho: correlations.
        samples: L, more than 3.
        candidates: N, the number of features that rho is the maximum over.

    Returns:
        log10 P, of rho's shape.

    Raises:
        NumericsError: if there are too few samples, or no candidate.
    """
    from scipy.special import log_ndtr  # slow to import, and most jobs with this module do not need it

    if samples <= 3:
        raise NumericsError(f"{samples} samples: the probability of a correlation needs at least 4 samples")
    if candidates < 1:
        raise NumericsError(f"{candidates} candidates: the best match needs at least 1 candidate")
    with np.errstate(divide="ignore"):
        z = np.arctanh(np.asarray(rho, np.float64)) * np.sqrt(samples - 3)
    # Phi(z)^N = exp(N log Phi(z)), and log Phi(z) is near -Q(z), which underflows before log Q(z) does.
    power = candidates * log_ndtr(z)
    with np.errstate(divide="ignore"):
        exact = np.log(-np.expm1(power))
    small = np.log(candidates) + log_ndtr(-z)
    result: Array = np.where(power > -1e-9, small, exact) / np.log(10)
    return result


def modality_averages(
    matrix: Mapping[tuple[str, str], float], modalities: Mapping[str, str]
) -> dict[tuple[str, str], float]:
    """Mean wMPPC between modalities (Table 3), without the cells of an encoder with itself.

    Args:
        matrix: the wMPPC by source and target.
        modalities: modality of every source and target, such as ``"image"``.

    Returns:
        The mean by source modality and target modality, for directions with any cell.
    """
    cells: dict[tuple[str, str], list[float]] = {}
    for (source, target), value in matrix.items():
        if source != target:
            cells.setdefault((modalities[source], modalities[target]), []).append(value)
    return {pair: float(np.mean(values)) for pair, values in cells.items()}


def coefficient_of_variation(values: ArrayLike) -> float:
    """The population standard deviation divided by the mean; NaN if the mean is 0."""
    values = np.asarray(values, np.float64)
    mean = values.mean()
    return float(values.std() / mean) if mean != 0 else float("nan")


def correlation(x: ArrayLike, y: ArrayLike) -> float:
    """The Pearson correlation of ``x [n]`` and ``y [n]``; NaN if one of them is constant."""
    unit = []
    for values in (x, y):
        values = np.asarray(values, np.float64)
        if (values == values[:1]).all():
            return float("nan")
        deviation = values - values.mean()
        # Avoid overflow and underflow of squares.
        deviation /= np.abs(deviation).max()
        unit.append(deviation / np.linalg.norm(deviation))
    return float(np.clip(unit[0] @ unit[1], -1, 1))


def benjamini_hochberg(log10_p: ArrayLike, level: float = 0.05) -> NDArray[np.bool_]:
    """Which hypotheses are rejected at a false discovery rate (Benjamini and Hochberg, 1995).

    With the p-values in ascending order p_1, ..., p_m, those up to the last i with p_i <= level i / m are rejected.
    Logarithms are compared, so that p-values below the smallest float are handled exactly.

    Args:
        log10_p: ``[F]`` log10 of the p-values. NaN means no test: it is not rejected and does not count in m.
        level: the maximum false discovery rate.

    Returns:
        ``[F]``.
    """
    log10_p = np.asarray(log10_p, np.float64)
    ascending = np.sort(log10_p[~np.isnan(log10_p)])
    bounds = np.log10(level * np.arange(1, len(ascending) + 1) / max(1, len(ascending)))
    (below,) = np.nonzero(ascending <= bounds)
    rejected: NDArray[np.bool_] = log10_p <= (ascending[below[-1]] if len(below) else np.nan)
    return rejected


def strata(active: ArrayLike) -> NDArray[np.int64]:
    """Strata of features of similar density: active on 1 to 15 samples, on 16 to 255, and so on.

    Two features that are active on few samples correlate strongly if any of these coincide. In a comparison across all
    densities, these few shuffled features would mask that other features are shared.

    Args:
        active: ``[F]`` number of samples on which each feature is active.

    Returns:
        ``[F]`` strata from 0, which includes features that are never active.
    """
    return np.log2(np.maximum(1, np.rint(active))).astype(np.int64) // 4


def beyond_shuffled(rho: ArrayLike, shuffled: ArrayLike, level: float = 0.05) -> NDArray[np.bool_]:
    """Which correlations are larger than those with shuffled samples, at a false discovery rate.

    These are the rho above the smallest threshold t at which the expected share of chance matches is at most the level:
    (1 + #{shuffled > t}) (F / F_shuffled) / #{rho > t} <= level, like the target-decoy approach in proteomics. It needs
    no formula for the distribution of correlations, so it also holds for skewed and sparse features. If F_shuffled is
    below F, at least F / (level F_shuffled) features must exceed the threshold to be detected.

    Args:
        rho: ``[F]`` best correlations.
        shuffled: ``[F_shuffled]`` best correlations of some of these features with the target's samples shuffled.
        level: the maximum false discovery rate.

    Returns:
        ``[F]``.
    """
    rho, shuffled = np.asarray(rho, np.float64), np.sort(np.asarray(shuffled, np.float64))
    if not rho.size or not shuffled.size:
        return np.zeros(rho.shape, bool)
    ascending = np.sort(rho)
    # A threshold just below a rho includes it and all rho that are not smaller.
    above = len(rho) - np.searchsorted(ascending, ascending)
    by_chance = (1 + len(shuffled) - np.searchsorted(shuffled, ascending)) * (len(rho) / len(shuffled))
    (enough,) = np.nonzero(by_chance <= level * above)
    beyond: NDArray[np.bool_] = rho >= (ascending[enough[0]] if len(enough) else np.nan)
    return beyond


def bootstrap_intervals(
    values: ArrayLike, influence: ArrayLike, level: float = 0.95, replicates: int = 2000, seed: int = 0
) -> Array:
    """Bootstrap percentile intervals of several values, such as all cells of a matrix, with the same resamples.

    The value of a resample is approximated by the value plus the mean influence of the drawn samples. This is cheap,
    because no products of features are recomputed: the influence of a sample on a wMPPC is a single number. The
    influence on a mean of cells is the mean of the influences. Matches are held fixed, so the interval shows how a
    value varies with the samples, not the upward bias of the best of many matches.

    Args:
        values: ``[C]``.
        influence: ``[C, N]`` influence of each sample on each value. With float32 influences, the product in float32
            changes the ends by less than 0.001 of the interval's width.
        level: the share of resamples within the interval.
        replicates: number of resamples.
        seed: seed of the draws, which also depend on N and ``replicates``.

    Returns:
        ``[C, 2]`` lower and upper end, NaN if the value is NaN.
    """
    influence = np.asarray(influence)
    C, N = influence.shape
    draws = resamples(N, replicates, seed)
    sums = np.empty((replicates, C))
    for start in range(0, replicates, _REPLICATES_PER_BLOCK):
        block = sums[start : start + _REPLICATES_PER_BLOCK]
        counts = np.empty((len(block), N), influence.dtype)
        for row, drawn in zip(counts, draws):  # noqa: B905 - the draws of the next blocks are left
            row[:] = drawn
        block[:] = counts @ influence.T
    ends = np.quantile(sums / N, [(1 - level) / 2, (1 + level) / 2], axis=0)
    intervals: Array = np.asarray(values, np.float64)[:, None] + ends.T
    return intervals


def signed_root(squares: ArrayLike) -> Array:
    """Square roots of absolute values, with the signs of the values."""
    squares = np.asarray(squares, np.float64)
    roots: Array = np.sign(squares) * np.sqrt(np.abs(squares))
    return roots


def signed_square(values: ArrayLike) -> Array:
    """The inverse of `signed_root`."""
    values = np.asarray(values, np.float64)
    squares: Array = values * np.abs(values)
    return squares


def root_intervals(values: ArrayLike, influence: ArrayLike) -> Array:
    """Like `bootstrap_intervals`, from the influences on the values' squares, which have their signs.

    The ends are roots of the ends for the squares: a root is too steep at 0 to be replaced by its slope.
    """
    return signed_root(bootstrap_intervals(signed_square(values), influence))


def root_influence(values: ArrayLike, influence: ArrayLike) -> Array:
    """``[C, N]`` influences on values from those on their squares, to average values.

    The factor is the mean slope of the root within two standard errors of the square.
    """
    squares, influence = signed_square(values), np.asarray(influence, np.float64)
    width = 2 * influence.std(axis=1) / influence.shape[1] ** 0.5
    rise = signed_root(squares + width) - signed_root(squares - width)
    slope = np.divide(rise, 2 * width, out=np.zeros_like(rise), where=width > 0)
    of_values: Array = slope[:, None] * influence
    return of_values


def seed_interval(
    values: ArrayLike, uses: Sequence[NDArray[np.bool_]], influence: ArrayLike, level: float = 0.95
) -> tuple[float, float]:
    """Interval of a mean over pairs of seeds, over samples and seeds together, from components of its variance.

    The variance of the mean is V = V_0 + sum_k V_k: V_0 = sum_s psi_s^2 / N^2 for samples, and for the n_k seeds of
    encoder k, by the jackknife, V_k = (n_k - 1) / n_k sum_j (m_j - mean m)^2 with the mean m_j of the pairs without its
    seed j. An encoder with one seed has no component. The ends are the mean plus and minus t sqrt(V), where t is the
    quantile of Student's distribution with V^2 / sum_k (V_k^2 / nu_k) degrees of freedom (Welch and Satterthwaite),
    nu_0 = N - 1 and nu_k = n_k - 1: few seeds give wide intervals.

    Args:
        values: ``[P]`` of each pair of seeds.
        uses: for each encoder ``[n_k, P]``, which pairs use each of its seeds.
        influence: ``[N]`` psi, the influence of each sample on the mean.
        level: the probability that the interval covers.

    Returns:
        The lower and the upper end: NaN if all pairs use some seed, as those of two seeds of one encoder.
    """
    from scipy.stats import t  # slow to import

    values, psi = np.asarray(values, np.float64), np.asarray(influence, np.float64)
    variances, freedom = [(psi**2).sum() / len(psi) ** 2], [len(psi) - 1]
    for used in uses:
        if len(used) > 1:
            left_out = [values[~by_seed].mean() if not by_seed.all() else np.nan for by_seed in used]
            variances.append((len(used) - 1) * np.var(left_out))
            freedom.append(len(used) - 1)
    V, mean = sum(variances), values.mean()
    if V == 0:
        return mean, mean
    half = t.ppf((1 + level) / 2, V**2 / sum(v**2 / nu for v, nu in zip(variances, freedom, strict=True))) * V**0.5
    return float(mean - half), float(mean + half)


def resamples(samples: int, replicates: int, seed: int = 0) -> Iterator[NDArray[np.int64]]:
    """Yield how often each sample is in each bootstrap resample, ``[N]``; they depend on N and the seed alone."""
    rng = np.random.default_rng(seed)
    for _ in range(replicates):
        yield np.bincount(rng.integers(samples, size=samples), minlength=samples)
