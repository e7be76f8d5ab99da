"""Cross-fitted wMPPC: matches chosen on either half of the samples, and measured on both."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from conceptshare import metrics
from conceptshare.correlations._arrays import View, as_tensor, places_of, sizes_of
from conceptshare.correlations._engine import max_correlations
from conceptshare.correlations._influence import Encoder, Matches, influences, inverse, matches_of
from conceptshare.correlations.blocks import MEMORY_BYTES, Precision
from conceptshare.device import default_device
from conceptshare.io.progress import progress
from conceptshare.io.readers import CrossFitted, MaxCorrelations
from conceptshare.io.sizes import FEATURE_ROWS

Array = NDArray[np.float64]

_FEWEST = 20
"""Minimum number of samples in a half."""


def cross_fitted(
    a: Encoder, b: Encoder, memory_bytes: int | None, precision: Precision, what: str
) -> tuple[CrossFitted, CrossFitted]:
    """The wMPPC from A to B and from B to A, corrected for the choice of the best of many matches.

    Matches, and the layer of the best match, are chosen on either half of the samples. Measured on the same half, their
    wMPPC W is too high. Measured on the other half, it is too low (C), because the best match of all samples is often
    missed. The result is T = sqrt(C W), with the sign of C; C and W are the means over both halves, with S of the half
    that is measured. If the correlations of a feature with all others are normally distributed with a variance v, and
    those on a half have errors of a variance e, then W is proportional to sqrt(v + e) and C to v / sqrt(v + e), so that
    T is the wMPPC without errors.

    Influences are those on C W, times a factor for the choice of matches. With matches held fixed, they are
    f = W dC + C dW, with the influences dC and dW of a sample on C and W. In the same model C W is proportional to the
    scalar product of the correlations on both halves, on which the influence is 2 W dC: the choice adds
    g = W dC - C dW. Near 0 the scalar product is not linear, and its variance is the half of that of f + g, the sum of
    the variances of f and g. So the factor is sqrt(1 + sum g^2 / sum f^2), which is 1 if the choice is certain.

    With fewer than 20 samples in a half, all values are NaN.

    Args:
        a: an encoder.
        b: another one.
        memory_bytes: as in `max_correlations`.
        precision: as in `max_correlations`.
        what: name of the step in the progress report.
    """
    N, budget = int(a.layers[0].shape[0]), memory_bytes or MEMORY_BYTES
    if N // 2 < _FEWEST:
        return _nothing(a, b, N), _nothing(b, a, N)
    halves = slice(0, N // 2), slice(N // 2, N)
    chosen = []
    for half in halves:
        of_a, of_b = (
            [View(layer, layer.shape[1], half.start, half.stop - half.start) for layer in each.layers]
            for each in (a, b)
        )
        chosen.append(max_correlations(of_a, of_b, memory_bytes, precision, what=what))
    to_b, to_a = _Means(a, b, N), _Means(b, a, N)
    for half, own, other in zip(halves, chosen, chosen[::-1], strict=True):
        part_a, part_b, crossed_ab, crossed_ba = _measured(a, b, other, half.start, half.stop, budget, what)
        measured = (0, other, crossed_ab, crossed_ba), (1, own, own.rho_ab, own.rho_ba)
        for kind, found, rho_ab, rho_ba in measured:
            matches_ab = matches_of(found, rho_ab, b.kept)
            matches_ba = matches_of(found.reverse(), rho_ba, a.kept)
            ab, ba = influences(part_a, part_b, matches_ab, matches_ba, budget, what, count=False)
            to_b.add(kind, half, part_a.strength, rho_ab, matches_ab, ab.influence)
            to_a.add(kind, half, part_b.strength, rho_ba, matches_ba, ba.influence)
    return to_b.result(), to_a.result()


def _nothing(a: Encoder, b: Encoder, N: int) -> CrossFitted:
    readings = len(metrics.READINGS)
    layers = np.full((len(a.layers), len(b.layers) + 1), np.nan)
    return CrossFitted(layers, np.full(readings, np.nan), np.zeros((readings, N), np.float32))


class _Means:
    """C and W from A to B: means over both halves of values on each."""

    def __init__(self, a: Encoder, b: Encoder, N: int) -> None:
        readings, self._kept = len(metrics.READINGS), a.kept
        self._layers, self._readings = np.zeros((2, len(a.layers), len(b.layers) + 1)), np.zeros((2, readings))
        self._influence = np.zeros((2, readings, N))

    def add(
        self, kind: int, half: slice, S: Array, rho: NDArray[Any], matches: Matches, influence: NDArray[np.float32]
    ) -> None:
        """Add C (``kind`` 0) or W (1) of a half: correlations ``rho [L_B, F_A]``, and influences on its readings."""
        of_kept, sizes = np.repeat(self._kept, matches.sizes), matches.sizes[self._kept]
        best, S_kept = matches.best[None, of_kept], S[of_kept]
        last = metrics.wmppc(matches.last, S[-len(matches.last) :])
        readings = [metrics.wmppc_pooled(best, S_kept), metrics.wmppc_layer_mean(best, S_kept, sizes), last]
        layers = [
            [metrics.wmppc(of_target[place], S[place]) for of_target in (*rho, matches.best)]
            for place in places_of(matches.sizes)
        ]
        self._readings[kind] += np.array(readings) / 2
        self._layers[kind] += np.array(layers) / 2
        N = self._influence.shape[-1]
        self._influence[kind, :, half] = influence * (N / (2 * (half.stop - half.start)))

    def result(self) -> CrossFitted:
        """T of the means, and influences on its square."""
        layers, readings = (c * np.abs(w) for c, w in (self._layers, self._readings))
        (c, w), (of_c, of_w) = self._readings[:, :, None], self._influence
        of_c, of_w = np.abs(w) * of_c, c * np.sign(w) * of_w
        influence, of_choice = of_c + of_w, of_c - of_w
        variances = [np.square(values).sum(axis=1) for values in (influence, of_choice)]
        factor = np.sqrt(1 + np.divide(variances[1], variances[0], out=np.zeros(len(c)), where=variances[0] > 0))
        influence *= factor[:, None]
        return CrossFitted(metrics.signed_root(layers), metrics.signed_root(readings), influence.astype(np.float32))


def _measured(
    a: Encoder, b: Encoder, chosen: MaxCorrelations, start: int, stop: int, memory_bytes: int, what: str
) -> tuple[Encoder, Encoder, Array, Array]:
    """Both encoders on the samples from ``start`` to ``stop``, and correlations with the chosen matches there.

    The correlations are ``[L_B, F_A]`` and ``[L_A, F_B]``, 0 for a feature that is constant there.
    """
    device = default_device()
    sums_a, sums_b = _Sums(a, start, stop, device), _Sums(b, start, stop, device)
    matches_ab, matches_ba = (
        torch.from_numpy(match).clamp(min=0).to(device) for match in (chosen.match_ab, chosen.match_ba)
    )
    ab, ba = (torch.zeros(match.shape, dtype=torch.float64, device=device) for match in (matches_ab, matches_ba))
    rows = _rows(a, b, memory_bytes)
    for first in progress(range(start, stop, rows), -(-(stop - start) // rows), what, "blocks"):
        z_a, z_b = (sums.add(first, min(first + rows, stop)) for sums in (sums_a, sums_b))
        for place, x in zip(places_of(chosen.sizes_a), z_a, strict=True):
            for n, y in enumerate(z_b):
                ab[n, place] += torch.linalg.vecdot(x, y[matches_ab[n, place]])
        for place, y in zip(places_of(chosen.sizes_b), z_b, strict=True):
            for n, x in enumerate(z_a):
                ba[n, place] += torch.linalg.vecdot(y, x[matches_ba[n, place]])
    rho_ab = _correlations(ab.cpu().numpy() / (stop - start), chosen, sums_a, sums_b)
    rho_ba = _correlations(ba.cpu().numpy() / (stop - start), chosen.reverse(), sums_b, sums_a)
    return sums_a.encoder(), sums_b.encoder(), rho_ab, rho_ba


def _correlations(products: Array, chosen: MaxCorrelations, a: "_Sums", b: "_Sums") -> Array:
    """``[L_B, F_A]`` correlations with the chosen matches, from the mean products of standardised values."""
    starts = np.cumsum(chosen.sizes_b) - chosen.sizes_b
    matched = starts[:, None] + chosen.match_ab
    (mean_a, deviation_a), (mean_b, deviation_b) = a.moments(), b.moments()
    r = (products - mean_a * mean_b[matched]) * inverse(deviation_a) * inverse(deviation_b)[matched]
    return np.where(chosen.match_ab < 0, 0, r).clip(-1, 1)


class _Sums:
    """Sums of an encoder's features over a part of the samples."""

    def __init__(self, encoder: Encoder, start: int, stop: int, device: torch.device) -> None:
        self._encoder, self._start, self._n, self._device = encoder, start, stop - start, device
        # Of deviations from the part's first sample, so that those of a constant feature are exactly 0.
        self._first, self._sum, self._squares = (
            torch.zeros(len(encoder.mean), dtype=torch.float64, device=device) for _ in range(3)
        )

    def add(self, start: int, stop: int) -> list[Tensor]:
        """Add samples, and return their features of each layer, standardised over all samples: ``[F, n]`` float32."""
        mean, scale = (
            torch.as_tensor(values.astype(np.float32)).to(self._device)[:, None]
            for values in (self._encoder.mean, inverse(self._encoder.deviation))
        )
        z = []
        for layer, place in zip(self._encoder.layers, places_of(sizes_of(self._encoder.layers)), strict=True):
            x = as_tensor(layer[start:stop, :], self._device).T.contiguous()
            if start == self._start:
                self._first[place] = x[:, 0].double()
            deviations = x.double().sub_(self._first[place, None])
            self._sum[place] += deviations.sum(1)
            self._squares[place] += deviations.square_().sum(1)
            z.append(x.float().sub_(mean[place]).mul_(scale[place]))
        return z

    def encoder(self) -> Encoder:
        """The encoder on the part."""
        first, total, squares = (values.cpu().numpy() for values in (self._first, self._sum, self._squares))
        return Encoder(
            layers=[View(layer, layer.shape[1], self._start, self._n) for layer in self._encoder.layers],
            strength=total + self._n * (first + self._encoder.offset),
            mean=first + total / self._n,
            deviation=np.sqrt(np.maximum(0, squares / self._n - (total / self._n) ** 2)),
            offset=self._encoder.offset,
            kept=self._encoder.kept,
        )

    def moments(self) -> tuple[Array, Array]:
        """``[F]`` mean and deviation over the part of the values that are standardised over all samples."""
        part, scale = self.encoder(), inverse(self._encoder.deviation)
        return (part.mean - self._encoder.mean) * scale, part.deviation * scale


def _rows(a: Encoder, b: Encoder, memory_bytes: int) -> int:
    """Number of samples per block: all features in float32, and float64 copies of one layer, are in memory."""
    sizes = [sizes_of(each.layers) for each in (a, b)]
    per_sample = sum(4 * int(of.sum()) for of in sizes) + 8 * 3 * max(int(of.max()) for of in sizes)
    return max(1, min(FEATURE_ROWS, memory_bytes // per_sample))
