"""The null of a wMPPC: its values for random re-pairings of the samples, from a sample of the source's features."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from conceptshare.correlations._engine import max_correlations
from conceptshare.correlations.blocks import Precision
from conceptshare.io.sizes import FEATURE_COLUMNS, FEATURE_REPAIRINGS, NULL_FEATURES, REPAIRINGS

_SEED = 0


class Null(NamedTuple):
    """wMPPC of randomly re-paired samples, for each pair of layers."""

    values: NDArray[np.float32]
    """``[R, L_A, L_B + 1]`` for each re-pairing, from each layer of A to each of B, and last to all layers of B that
    are kept."""
    error: NDArray[np.float32]
    """``[L_A, L_B + 1]`` the standard error of their mean over re-pairings, because features are sampled."""


def repaired(
    a: Sequence[Any],
    strengths: Sequence[NDArray[np.float64]],
    b: Sequence[Any],
    memory_bytes: int | None,
    precision: Precision,
    what: str,
    kept: NDArray[np.bool_],
) -> Null:
    """Estimate the wMPPC from A to B with the samples of A in random order, for `REPAIRINGS` orders.

    wMPPC is the mean of the best correlations, weighted by S. So their plain mean over features that are drawn with a
    probability proportional to S estimates it without bias. Each re-pairing draws `NULL_FEATURES` features of each
    layer, systematically: at equal distances on the cumulative S, with a random start. With 1,280 features per layer,
    the standard error of the mean over re-pairings is below 0.002 if their best correlations have a standard deviation
    below 0.07; the result has the actual one.

    Args:
        a: the layers of A, ``[N, F]`` each.
        strengths: S of the features of each layer of A, ``[F]``.
        b: the layers of B.
        memory_bytes: as in `max_correlations`.
        precision: as in `max_correlations`.
        what: name of the step in the progress report.
        kept: ``[L_B]`` the layers of B that take part in the best of all layers.
    """
    rng = np.random.default_rng(_SEED)
    N = a[0].shape[0]
    orders = [rng.permutation(N) for _ in range(REPAIRINGS)]
    layers = [
        _Repaired(layer, orders, [drawn(S, NULL_FEATURES, rng) for _ in orders])
        for layer, S in zip(a, strengths, strict=True)
    ]
    rho = max_correlations(layers, b, memory_bytes, precision, what=what).rho_ab
    best = np.concatenate([rho, rho[kept].max(axis=0)[None]]).astype(np.float64)
    of_feature = best.reshape(len(b) + 1, len(a), REPAIRINGS, NULL_FEATURES).transpose(2, 1, 0, 3)
    error = of_feature.std(axis=(0, 3)) / (REPAIRINGS * NULL_FEATURES) ** 0.5
    return Null(of_feature.mean(axis=3).astype(np.float32), error.astype(np.float32))


def repaired_features(
    a: Any, b: Any, memory_bytes: int | None, precision: Precision, what: str
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The null of each feature of two layers: the mean of its best correlation over `FEATURE_REPAIRINGS` re-pairings.

    Args:
        a: a layer, ``[N, F_a]``.
        b: another one.
        memory_bytes: as in `max_correlations`.
        precision: as in `max_correlations`.
        what: name of the step in the progress report.

    Returns:
        ``[F_a]`` and ``[F_b]``: for a feature of A with any of B, and for one of B with any of A.
    """
    rng = np.random.default_rng(_SEED)
    N, F = a.shape
    orders = [rng.permutation(N) for _ in range(FEATURE_REPAIRINGS)]
    found = max_correlations(
        [_Repaired(a, [order], [np.arange(F)]) for order in orders], [b], memory_bytes, precision, what=what
    )
    return found.rho_ab.reshape(len(orders), F).mean(axis=0), found.rho_ba.mean(axis=0)


def drawn(S: NDArray[np.float64], count: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Draw ``count`` indices with a probability proportional to S, in order; uniformly if all S are 0."""
    cumulative = np.cumsum(S if S.any() else np.ones_like(S))
    places = (rng.random() + np.arange(count)) / count * cumulative[-1]
    indices: NDArray[np.int64] = np.searchsorted(cumulative, places, side="right").clip(max=len(S) - 1)
    return indices


class _Repaired:
    """Drawn features of a layer, ``[N, R n]`` float16: those of each re-pairing, with the samples in its order."""

    value_bytes = 2

    def __init__(self, layer: Any, orders: Sequence[NDArray[Any]], chosen: Sequence[NDArray[np.int64]]) -> None:
        self._layer, self._orders = layer, orders
        self._features = np.concatenate(chosen)
        self._order_of = np.repeat(np.arange(len(orders)), [len(each) for each in chosen])
        self._columns, self._values = slice(0), torch.empty(0)
        self.shape = layer.shape[0], len(self._features)

    def __getitem__(self, place: tuple[slice, slice]) -> Tensor:
        rows, columns = place
        if rows.indices(self.shape[0]) == (0, self.shape[0], 1):
            return self._read(columns)
        if columns != self._columns:  # the next rows need all samples again
            self._columns, self._values = columns, self._read(columns)
        return self._values[rows]

    def _read(self, columns: slice) -> Tensor:
        features, order_of = self._features[columns], self._order_of[columns]
        values: Any = None
        # In whole chunks, so that each is read once.
        for first in range(0, self._layer.shape[1], FEATURE_COLUMNS):
            here = np.flatnonzero((features >= first) & (features < first + FEATURE_COLUMNS))
            if not len(here):
                continue
            block = torch.as_tensor(self._layer[0 : self.shape[0], first : first + FEATURE_COLUMNS])
            if values is None:
                values = torch.empty(len(block), len(features), dtype=block.dtype, device=block.device)
            for number in np.unique(order_of[here]):
                placed = here[order_of[here] == number]
                order, chosen, to = (
                    torch.from_numpy(each).to(block.device)
                    for each in (self._orders[number], features[placed] - first, placed)
                )
                values[:, to] = block[:, chosen][order]
        return values  # type: ignore[no-any-return]
