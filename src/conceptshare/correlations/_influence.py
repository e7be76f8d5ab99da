"""Each sample's influence on a wMPPC, which gives its confidence interval without recomputing products of features.

The same pass counts the samples on which a feature and its best match are active.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from conceptshare.correlations._arrays import as_tensor, places_of, sizes_of
from conceptshare.device import default_device, full_float32
from conceptshare.io.progress import progress
from conceptshare.io.readers import MaxCorrelations
from conceptshare.io.sizes import FEATURE_ROWS
from conceptshare.metrics import READINGS

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Encoder:
    """The features of one encoder over N samples, with the statistics that standardise them."""

    layers: Sequence[Any]
    """For each layer ``[N, F]``; a constant may have been added to all values of a feature."""
    strength: NDArray[np.float64]
    """``[F]`` S, of all layers concatenated."""
    mean: NDArray[np.float64]
    """``[F]`` mean of the values in ``layers``."""
    deviation: NDArray[np.float64]
    """``[F]`` population standard deviation over the samples."""
    offset: NDArray[np.float32]
    """``[F]`` constant to add to the values in ``layers``; a feature is active if the sum is positive."""
    kept: NDArray[np.bool_]
    """``[L]`` which layers take part in ``pooled`` and ``layer_mean``."""


class Matched(NamedTuple):
    """What one direction of a pair tells about features and their best matches."""

    influence: NDArray[np.float32]
    """``[3, N]`` influence of each sample on the wMPPC, by reading."""
    iou: NDArray[np.float32]
    """``[2, F]`` intersection over union of the samples on which a feature and its best match are active: its match in
    all kept layers, and for features of the last layer, else 0, its match in the last layer."""


class Matches(NamedTuple):
    """For each feature of an encoder its match in another one, as the `READINGS` use it."""

    sizes: NDArray[np.int64]
    """``[L]`` number of features per layer of the encoder."""
    best: NDArray[Any]
    """``[F]`` correlation with the match in all kept layers of the other encoder, for ``pooled`` and ``layer_mean``."""
    matched: NDArray[np.int64]
    """``[F]`` that match; features are numbered through all layers, and -1 means none."""
    last: NDArray[Any]
    """``[sizes[-1]]`` correlation of the last layer's features with their match in the other's last layer."""
    matched_last: NDArray[np.int64]
    """``[sizes[-1]]`` that match, with the same numbers."""


def matches_of(found: MaxCorrelations, rho: NDArray[Any], kept: NDArray[np.bool_]) -> Matches:
    """The matches from A to B that ``found`` chooses, with their correlations ``rho [L_B, F_A]``.

    ``kept [L_B]`` are the layers of B among which that of the best match is chosen.
    """
    starts = np.cumsum(found.sizes_b) - found.sizes_b
    matched = np.where(found.match_ab < 0, -1, starts[:, None] + found.match_ab)
    layer = np.flatnonzero(kept)[found.rho_ab[kept].argmax(axis=0)][None]
    last = slice(-int(found.sizes_a[-1]), None)
    best, matched_best = (np.take_along_axis(of, layer, axis=0)[0] for of in (rho, matched))
    return Matches(found.sizes_a, best, matched_best, rho[-1, last], matched[-1, last])


@full_float32()
def influences(
    a: Encoder,
    b: Encoder,
    matches_ab: Matches,
    matches_ba: Matches,
    memory_bytes: int,
    what: str = "influence",
    count: bool = True,
) -> tuple[Matched, Matched]:
    """The influence of each sample on the wMPPC from A to B and from B to A, and the IoU of features and their matches.

    See `influence_weights` for the definition. It takes one pass over the features, and only the product of each
    feature with its best match. Sums are in float32, with an error of about 1e-5 of the largest influence. Counts of
    samples are exact.

    Args:
        a: an encoder.
        b: another one.
        matches_ab: the matches of A's features in B.
        matches_ba: the matches of B's features in A.
        memory_bytes: limit of the working memory.
        what: name of the step in the progress report.
        count: whether to count active samples; without, the IoU are 0.
    """
    N, device = int(a.layers[0].shape[0]), default_device()
    to_b = _Direction(a, b, matches_ab, N, device, count)
    to_a = _Direction(b, a, matches_ba, N, device, count)
    ab, ba = (np.zeros((len(READINGS), N), np.float32) for _ in range(2))
    rows = _rows(a, b, memory_bytes)
    for start in progress(range(0, N, rows), -(-N // rows), what, "blocks"):
        block = slice(start, start + rows)
        of_a, of_b = ([as_tensor(layer[block, :], device) for layer in each.layers] for each in (a, b))
        # Rows are gathered faster than columns.
        rows_a, rows_b = (torch.cat([x.T for x in layers]) for layers in (of_a, of_b))
        ab[:, block], ba[:, block] = to_b.influence(of_a, rows_b), to_a.influence(of_b, rows_a)
    return Matched(ab, to_b.iou()), Matched(ba, to_a.iou())


class _Direction:
    """The influences on the wMPPC from one encoder to another, given its matches."""

    def __init__(self, a: Encoder, b: Encoder, matches: Matches, N: int, device: torch.device, count: bool) -> None:
        self._a, self._b, self._matches, self._device, self._count = a, b, matches, device, count
        self._layers = places_of(matches.sizes)
        self._weights = influence_weights(matches.best, matches.last, a.strength, matches.sizes, N, a.kept)
        self._both, self._either = (
            torch.zeros(2, len(matches.best), dtype=torch.int64, device=device) for _ in range(2)
        )

    def influence(self, of_a: Sequence[Tensor], of_b: Tensor) -> NDArray[np.float32]:
        """``[3, n]`` influences of a block of samples, from its features in each layer of A, and in B ``[F, n]``."""
        result = torch.zeros(len(READINGS), len(of_a[0]), device=self._device)
        for x, place in zip(of_a, self._layers, strict=True):
            one = _Layer(x.float(), self._a, place, self._weights)
            best, matched = (of[place] for of in (self._matches.best, self._matches.matched))
            y = self._matches_of(x, of_b, matched, 0, place)
            result[:2] += one.influence(slice(0, 2), best, self._b, y, matched)
        last, matched = self._matches.last, self._matches.matched_last
        y = self._matches_of(x, of_b, matched, 1, place)
        result[2:] += one.influence(slice(2, 3), last, self._b, y, matched)
        return result.cpu().numpy()

    def _matches_of(self, x: Tensor, of_b: Tensor, matched: NDArray[np.int64], row: int, place: slice) -> Tensor:
        """``[n, F]`` the matches of a layer's features ``x [n, F]``, after counting the samples that activate them."""
        y = of_b[torch.from_numpy(matched).clamp(min=0).to(self._device)].float().T.contiguous()
        if not self._count:
            return y
        of_x, of_y = (
            values + torch.from_numpy(offset).to(self._device) > 0
            for values, offset in ((x, self._a.offset[place]), (y, self._b.offset[matched]))
        )
        self._both[row, place] += (of_x & of_y).sum(0)
        self._either[row, place] += (of_x | of_y).sum(0)
        return y

    def iou(self) -> NDArray[np.float32]:
        """The IoU of all samples so far, see `Matched`; 0 for features without a match."""
        shares = (self._both / self._either.clamp(min=1)).cpu().numpy()
        shares[0, self._matches.matched < 0] = 0
        shares[1, self._layers[-1]][self._matches.matched_last < 0] = 0
        return shares


def influence_weights(
    best: ArrayLike, last: ArrayLike, weights: ArrayLike, sizes: ArrayLike, samples: int, kept: ArrayLike = True
) -> tuple[Array, Array]:
    """Weights of the source's features in a sample's influence on the wMPPC, for each of the `READINGS`.

    The influence of sample s, to first order and with the matches held fixed (the infinitesimal jackknife), is

        psi_s = sum_i c1_i (a_si - mean a_i) + sum_i c2_i (z_si z'_si - rho_i / 2 (z_si^2 + z'_si^2)),

    where a_i is the source's feature, z_i the same standardised to mean 0 and population variance 1, and z'_i its
    standardised best match. The first sum is the influence on the weights, the second that on the correlations. For
    features without a match, z is 0. The psi_s of all samples sum to 0.

    With T the wMPPC of the features, c1_i = (rho_i - T) N / sum S and c2_i = S_i / sum S. For ``layer_mean`` these are
    computed per layer and multiplied by the layer's share of the features of all active layers.

    Args:
        best: ``[F]`` rho with the best match in all kept layers of the target, for ``pooled`` and ``layer_mean``.
        last: ``[sizes[-1]]`` rho of the last layer's features with their best match in the target's last layer.
        weights: ``[F]`` S.
        sizes: ``[L]`` features of each layer of the source, which sum to F.
        samples: N.
        kept: ``[L]`` which layers take part in ``pooled`` and ``layer_mean``; by default all.

    Returns:
        c1 and c2, each ``[3, F]``: zero for features that do not take part in a reading, such as those of a layer that
        was never active.
    """
    best, last = np.asarray(best, np.float64), np.asarray(last, np.float64)
    S, sizes = np.asarray(weights, np.float64), np.asarray(sizes)
    layers = [slice(end - size, end) for size, end in zip(sizes, np.cumsum(sizes), strict=True)]
    of_kept = np.repeat(np.broadcast_to(kept, sizes.shape), sizes)
    S_kept = np.where(of_kept, S, 0)
    active = sum(size for size, layer in zip(sizes, layers, strict=True) if S_kept[layer].any())
    c = np.zeros((2, 3, len(S)))
    c[:, 0] = _jackknife(best, S_kept, samples) * of_kept
    for size, layer in zip(sizes, layers, strict=True):
        c[:, 1, layer] = _jackknife(best[layer], S_kept[layer], samples) * (size / max(active, 1))
    c[:, 2, layers[-1]] = _jackknife(last, S[layers[-1]], samples)
    return c[0], c[1]


def _jackknife(rho: Array, S: Array, samples: int) -> Array:
    """``[2, F]`` c1 and c2 of the features of one wMPPC; zeros if none is active."""
    total = S.sum()
    if total == 0:
        return np.zeros((2, len(S)))
    c: Array = np.stack([(rho - (rho * S).sum() / total) * samples, S]) / total
    return c


class _Layer:
    """A layer of A over a block of samples: deviations from the mean, and standardised values z."""

    def __init__(self, x: Tensor, a: Encoder, place: slice, weights: tuple[Any, Any]) -> None:
        self._device = x.device
        self._c1, self._c2 = (self._on_device(c[:, place]) for c in weights)
        self._deviations = x - self._on_device(a.mean[place])
        self._z = self._deviations * self._on_device(inverse(a.deviation[place]))

    def influence(self, readings: slice, rho: Any, b: Encoder, y: Tensor, matched: NDArray[np.int64]) -> Tensor:
        """``[readings, n]`` influences for the matches ``matched [F]`` in B with values ``y [n, F]``, which change."""
        scale = np.where(matched < 0, 0, inverse(b.deviation[matched]))
        z = y.sub_(self._on_device(b.mean[matched])).mul_(self._on_device(scale))
        # Pairs without a correlation do not contribute.
        products = self._z * z - self._on_device(rho / 2) * (self._z**2 + z**2)
        return self._c1[readings] @ self._deviations.T + self._c2[readings] @ products.T

    def _on_device(self, values: Any) -> Tensor:
        return torch.as_tensor(np.asarray(values, np.float32)).to(self._device)


def inverse(deviation: NDArray[np.float64]) -> NDArray[np.float64]:
    """The inverse of deviations, 0 for those of constant features."""
    return np.divide(1, deviation, out=np.zeros_like(deviation), where=deviation > 0)


def _rows(a: Encoder, b: Encoder, memory_bytes: int) -> int:
    """Number of samples per block: all layers in float16, twice, and float32 copies of one layer, are in memory."""
    sizes = [sizes_of(each.layers) for each in (a, b)]
    per_sample = sum(4 * int(of.sum()) for of in sizes) + 4 * 6 * max(int(of.max()) for of in sizes)
    return max(1, min(FEATURE_ROWS, memory_bytes // per_sample))
