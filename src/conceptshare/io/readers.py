"""What the stages `features` and `correlations` wrote, read without torch, so that tables and figures start at once."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from conceptshare.io.errors import StoreError
from conceptshare.io.store import StoredArray, layer_array, open_store, read_root

FEATURES, CORRELATIONS = "features", "correlations"
"""Kinds of stores."""


@dataclass(frozen=True)
class FeatureStatistics:
    """What analyses need to know of one layer's features."""

    strength: NDArray[np.float64]
    """``[F]`` S: the summed activation."""
    density: NDArray[np.float64]
    """``[F]`` share of samples on which the feature is above zero."""
    deviation: NDArray[np.float64]
    """``[F]`` standard deviation over the samples; 0 where the feature does not vary."""
    top_samples: NDArray[np.int32]
    """``[F, K]`` samples on which it is strongest, -1 where there are fewer."""


def read_statistics(path: Path) -> dict[int, FeatureStatistics]:
    """The statistics of each layer of a feature store, by layer.

    Raises:
        StoreError: where the store is not whole.
    """
    store: Any = open_store(path, FEATURES)
    names = ("strength", "density", "deviation", "top_samples")
    return {
        layer: FeatureStatistics(*(layer_array(store, layer, name, path)[:] for name in names))
        for layer in store.attrs["spec"]["layers"]
    }


class FeatureArray:
    """A layer's features ``[N, F]`` in float32, read as they are sliced: what is stored, with the offset added."""

    def __init__(self, store: Any, layer: int, path: Path) -> None:
        """Open a layer of the ``store`` at ``path``."""
        self.stored = layer_array(store, layer, "features", path)
        """``[N, F]`` float16, less the offset, which no correlation depends on."""
        self.shape = self.stored.shape
        self.offset: NDArray[np.float32] = layer_array(store, layer, "offset", path)[:]
        """``[F]``"""

    def __getitem__(self, place: Any) -> NDArray[np.float32]:
        """Some rows, or a pair of rows and columns.

        Raises:
            StoreError: where that cannot be read.
        """
        rows, columns = place if isinstance(place, tuple) else (place, slice(None))
        values = self.stored[rows, columns].astype(np.float32)
        values += self.offset[columns]
        return values


def read_features(path: Path) -> dict[int, FeatureArray]:
    """The features of each layer of a feature store, by layer; they are read when they are sliced.

    Raises:
        StoreError: where the store is not whole.
    """
    store: Any = open_store(path, FEATURES)
    return {layer: FeatureArray(store, layer, path) for layer in store.attrs["spec"]["layers"]}


def read_spec(path: Path, kind: str) -> dict[str, Any]:
    """What a store says that it is of, and was made from.

    Raises:
        StoreError: where it says nothing, or not what was written.
    """
    spec: dict[str, Any] = read_root(path, kind)["spec"]
    return spec


def read_modality(path: Path) -> str:
    """What the encoder of a feature store reads: ``image`` or ``text``.

    Raises:
        StoreError: where the store is not whole.
    """
    return str(read_spec(path, FEATURES)["encoder"]["modality"])


def check_samples(features: Path, data: Path, content_hash: str) -> None:
    """Make sure that a feature store is of the samples of the data set at ``data``, in their order.

    Raises:
        StoreError: if it is of others than those with this ``content_hash``.
    """
    if read_spec(features, FEATURES)["content_hash"] != content_hash:
        raise StoreError(
            f"{features} and {data} are of different samples; make both from the same data set, or give the folder of "
            f"that data set"
        )


@dataclass(frozen=True)
class MaxCorrelations:
    """Best matches between the features of two encoders, for every pair of layers, in both directions."""

    rho_ab: NDArray[np.float32]
    """``[L_B, F_A]`` largest correlation of each feature of A (all layers side by side) with a layer of B."""
    match_ab: NDArray[np.int32]
    """``[L_B, F_A]`` the feature of that layer of B."""
    rho_ba: NDArray[np.float32]
    """``[L_A, F_B]``"""
    match_ba: NDArray[np.int32]
    """``[L_A, F_B]``"""
    sizes_a: NDArray[np.int64]
    """``[L_A]`` features of each layer of A."""
    sizes_b: NDArray[np.int64]
    """``[L_B]`` features of each layer of B."""

    def reverse(self) -> "MaxCorrelations":
        """The same, seen from B."""
        return MaxCorrelations(self.rho_ba, self.match_ba, self.rho_ab, self.match_ab, self.sizes_b, self.sizes_a)


@dataclass(frozen=True)
class PairCorrelations:
    """The best matches of a pair of members, as the store holds them, and what they are judged by."""

    found: MaxCorrelations
    layers_a: list[int]
    layers_b: list[int]
    samples: int
    floor: NDArray[np.float32]
    """``[L_B, f_A]`` rho of the first features of each layer of A, where B's samples are shuffled."""
    floor_sizes: NDArray[np.int64]
    """``[L_A]`` how many."""
    influence: NDArray[np.float32]
    """``[3, N]`` each sample's influence on the wMPPC from A to B, for each of `metrics.READINGS`."""


def read_correlations(path: Path, source: str) -> PairCorrelations:
    """A pair's correlations, turned so that ``source`` is A.

    Raises:
        StoreError: where the store is not whole, or ``source`` is neither of the pair.
    """
    store: Any = open_store(path, CORRELATIONS)
    spec: Any = store.attrs["spec"]
    if source not in (spec["a"], spec["b"]):
        raise StoreError(f"{path}: a pair of {spec['a']} and {spec['b']}, without {source}; name one of them")

    def read(name: str) -> NDArray[Any]:
        return StoredArray(store, name, path)[:]

    found = MaxCorrelations(**{name: read(name) for name in MaxCorrelations.__dataclass_fields__})
    direction, one, other = "ab", "a", "b"
    if source != spec["a"]:
        found, direction, one, other = found.reverse(), "ba", "b", "a"
    return PairCorrelations(
        found=found,
        layers_a=spec[f"layers_{one}"],
        layers_b=spec[f"layers_{other}"],
        samples=spec["samples"],
        floor=read(f"floor_{direction}"),
        floor_sizes=read(f"floor_sizes_{one}"),
        influence=read(f"influence_{direction}"),
    )
