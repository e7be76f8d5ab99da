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

from conceptshare.correlations._arrays import as_tensor, sizes_of
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


class Matched(NamedTuple):
    """What one direction of a pair tells about features and their best matches."""

    influence: NDArray[np.float32]
    """``[3, N]`` influence of each sample on the wMPPC, by reading."""
    iou: NDArray[np.float32]
    """``[2, F]`` intersection over union of the samples on which a feature and its best match are active: its match in
    all layers, and for features of the last layer, else 0, its match in the last layer."""


@full_float32()
def influences(
    a: Encoder, b: Encoder, found: MaxCorrelations, memory_bytes: int, what: str = "influence"
) -> tuple[Matched, Matched]:
    """The influence of each sample on the wMPPC from A to B and from B to A, and the IoU of features and best matches.

    See `influence_weights` for the definition. It takes one pass over the features, and only the product of each
    feature with its best match. Sums are in float32, with an error of about 1e-5 of the largest influence. Counts of
    samples are exact.

    Args:
        a: an encoder.
        b: another one.
        found: their best matches.
        memory_bytes: limit of the working memory.
        what: name of the step in the progress report.
    """
    N, device = int(a.layers[0].shape[0]), default_device()
    to_b, to_a = _Direction(a, b, found, N, device), _Direction(b, a, found.reverse(), N, device)
    ab, ba = (np.zeros((len(READINGS), N), np.float32) for _ in range(2))
    rows = _rows(a, b, memory_bytes)
    for start in progress(range(0, N, rows), -(-N // rows), what, "blocks"):
        block = slice(start, start + rows)
        of_a, of_b = ([as_tensor(layer[block, :], device) for layer in each.layers] for each in (a, b))
        ab[:, block], ba[:, block] = to_b.influence(of_a, of_b), to_a.influence(of_b, of_a)
    return Matched(ab, to_b.iou()), Matched(ba, to_a.iou())


class _Direction:
    """The influences on the wMPPC from one encoder to another, given its best matches."""

    def __init__(self, a: Encoder, b: Encoder, found: MaxCorrelations, N: int, device: torch.device) -> None:
        self._a, self._b, self._device = a, b, device
        self._layers = [
            slice(int(end - size), int(end)) for size, end in zip(found.sizes_a, np.cumsum(found.sizes_a), strict=True)
        ]
        starts_b = np.cumsum(found.sizes_b) - found.sizes_b
        self._best, self._last = found.rho_ab.max(axis=0), found.rho_ab[-1, self._layers[-1]]
        self._weights = influence_weights(self._best, self._last, a.strength, found.sizes_a, N)
        # Features of B are numbered through all layers; -1 means none. The second row is for matches in the last layer.
        layer = found.rho_ab.argmax(axis=0)
        match = np.take_along_axis(found.match_ab, layer[None], axis=0)[0]
        self._matched = np.stack(
            [
                np.where(found.match_ab.max(axis=0) < 0, -1, starts_b[layer] + match),
                np.where(found.match_ab[-1] < 0, -1, starts_b[-1] + found.match_ab[-1]),
            ]
        )
        self._both, self._either = (torch.zeros(2, len(match), dtype=torch.int64, device=device) for _ in range(2))

    def influence(self, of_a: Sequence[Tensor], of_b: Sequence[Tensor]) -> NDArray[np.float32]:
        """``[3, n]`` influences of a block of samples, from its features in all layers of A and B."""
        result = torch.zeros(len(READINGS), len(of_a[0]), device=self._device)
        for x, place in zip(of_a, self._layers, strict=True):
            one = _Layer(x.float(), self._a, place, self._weights)
            y = self._matches(x, of_b, 0, place)
            result[:2] += one.influence(slice(0, 2), self._best[place], self._b, y, self._matched[0, place])
        y = self._matches(x, of_b, 1, place)
        result[2:] += one.influence(slice(2, 3), self._last, self._b, y, self._matched[1, place])
        return result.cpu().numpy()

    def _matches(self, x: Tensor, of_b: Sequence[Tensor], row: int, place: slice) -> Tensor:
        """``[n, F]`` the matches of a layer's features ``x [n, F]``, after counting the samples that activate them."""
        matched = self._matched[row, place]
        y = _gathered(of_b, matched)
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
        return np.where(self._matched < 0, 0, shares)


def influence_weights(
    best: ArrayLike, last: ArrayLike, weights: ArrayLike, sizes: ArrayLike, samples: int
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
        best: ``[F]`` rho with the best match in all layers of the target, for ``pooled`` and ``layer_mean``.
        last: ``[sizes[-1]]`` rho of the last layer's features with their best match in the target's last layer.
        weights: ``[F]`` S.
        sizes: ``[L]`` features of each layer of the source, which sum to F.
        samples: N.

    Returns:
        c1 and c2, each ``[3, F]``: zero for features that do not take part in a reading, such as those of a layer that
        was never active.
    """
    best, last = np.asarray(best, np.float64), np.asarray(last, np.float64)
    S, sizes = np.asarray(weights, np.float64), np.asarray(sizes)
    layers = [slice(end - size, end) for size, end in zip(sizes, np.cumsum(sizes), strict=True)]
    active = sum(size for size, layer in zip(sizes, layers, strict=True) if S[layer].any())
    c = np.zeros((2, 3, len(S)))
    c[:, 0] = _jackknife(best, S, samples)
    for size, layer in zip(sizes, layers, strict=True):
        c[:, 1, layer] = _jackknife(best[layer], S[layer], samples) * (size / max(active, 1))
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
        self._z = self._deviations * self._on_device(_inverse(a.deviation[place]))

    def influence(self, readings: slice, rho: Any, b: Encoder, y: Tensor, matched: NDArray[np.int64]) -> Tensor:
        """``[readings, n]`` influences for the matches ``matched [F]`` in B with values ``y [n, F]``, which change."""
        scale = np.where(matched < 0, 0, _inverse(b.deviation[matched]))
        z = y.sub_(self._on_device(b.mean[matched])).mul_(self._on_device(scale))
        # Pairs without a correlation do not contribute.
        products = self._z * z - self._on_device(rho / 2) * (self._z**2 + z**2)
        return self._c1[readings] @ self._deviations.T + self._c2[readings] @ products.T

    def _on_device(self, values: Any) -> Tensor:
        return torch.as_tensor(np.asarray(values, np.float32)).to(self._device)


def _gathered(of_b: Sequence[Tensor], matched: NDArray[np.int64]) -> Tensor:
    """``[n, F]`` the features of B that are matched; zeros without a match."""
    y = torch.zeros(len(of_b[0]), len(matched), device=of_b[0].device)
    start = 0
    for layer in of_b:
        here = np.flatnonzero((matched >= start) & (matched < start + layer.shape[1]))
        if len(here):
            y[:, here] = layer[:, matched[here] - start].float()
        start += layer.shape[1]
    return y


def _inverse(deviation: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.divide(1, deviation, out=np.zeros_like(deviation), where=deviation > 0)


def _rows(a: Encoder, b: Encoder, memory_bytes: int) -> int:
    """Number of samples per block: all layers in float16, and float32 copies of one layer, are in memory."""
    sizes = [sizes_of(each.layers) for each in (a, b)]
    per_sample = sum(2 * int(of.sum()) for of in sizes) + 4 * 6 * max(int(of.max()) for of in sizes)
    return max(1, min(FEATURE_ROWS, memory_bytes // per_sample))
