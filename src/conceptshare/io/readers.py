"""Readers for feature and correlation stores, free of torch so that tables and figures start quickly."""

from collections.abc import Mapping
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
    """Statistics of one layer's features, as analyses need them."""

    strength: NDArray[np.float64]
    """``[F]`` strength S: the summed activation."""
    density: NDArray[np.float64]
    """``[F]`` fraction of samples on which the feature is positive."""
    deviation: NDArray[np.float64]
    """``[F]`` standard deviation over the samples; 0 if the feature is constant."""
    top_samples: NDArray[np.int32]
    """``[F, K]`` samples with the largest activations, padded with -1."""


def read_statistics(path: Path) -> dict[int, FeatureStatistics]:
    """Read the statistics of each layer of a feature store, by layer.

    Raises:
        StoreError: if the store is missing, incomplete or damaged.
    """
    store: Any = open_store(path, FEATURES)
    names = ("strength", "density", "deviation", "top_samples")
    return {
        layer: FeatureStatistics(*(layer_array(store, layer, name, path)[:] for name in names))
        for layer in store.attrs["spec"]["layers"]
    }


class LayerFeatures:
    """A layer's features ``[N, F]`` in float32, read when sliced: the stored values plus the offset.

    Args:
        stored: ``[N, F]`` float16, without the offset, on which no correlation depends.
        offset: ``[F]``.
    """

    def __init__(self, stored: Any, offset: NDArray[np.float32]) -> None:
        self.stored, self.offset, self.shape = stored, offset, stored.shape

    def __getitem__(self, index: Any) -> NDArray[np.float32]:
        """Read rows, or a pair of rows and columns.

        Raises:
            StoreError: if they cannot be read.
        """
        rows, columns = index if isinstance(index, tuple) else (index, slice(None))
        values = self.stored[rows, columns]
        values = (values if isinstance(values, np.ndarray) else values.cpu().numpy()).astype(np.float32)
        values += self.offset[columns]
        return values


def read_kept_features(path: Path) -> dict[int, LayerFeatures] | None:
    """Open the features of each layer of a feature store, by layer; None if it does not hold them all.

    `sae.features.read_features` also reads features after TopK, and recomputes those that were not kept.

    Raises:
        StoreError: if the store is missing, incomplete or damaged.
    """
    store: Any = open_store(path, FEATURES)
    spec: Any = store.attrs["spec"]
    if "recomputed_from" in spec or spec.get("code") == "after_topk":
        return None
    return {
        layer: LayerFeatures(layer_array(store, layer, "features", path), layer_array(store, layer, "offset", path)[:])
        for layer in spec["layers"]
    }


def read_code(features: Path) -> str:
    """Whether the features of a store are those before or after TopK, a `layout.Code`.

    Raises:
        StoreError: if the store is missing or incomplete, or its attributes were changed.
    """
    return str(read_spec(features, FEATURES).get("code", "before_topk"))


def read_spec(path: Path, kind: str) -> dict[str, Any]:
    """Read the inputs and settings that a store was made from.

    Raises:
        StoreError: if the store is missing or incomplete, or its attributes were changed.
    """
    spec: dict[str, Any] = read_root(path, kind)["spec"]
    return spec


def unexplained_layers(path: Path, max_fvu_global: float) -> list[bool]:
    """Whether each layer of a feature store is unexplained: the FVU of its SAE at global tokens is above a bound.

    Layers of an unknown FVU are not.

    Raises:
        StoreError: if the store is missing or incomplete, or its attributes were changed.
    """
    return [fvu is not None and fvu > max_fvu_global for fvu in read_spec(path, FEATURES)["fvu_global"]]


def source_of(spec: Mapping[str, Any]) -> dict[str, Any]:
    """What activations are of, from their spec or that of features: the encoder, its weights, samples and layers."""
    return {key: spec.get(key) for key in ("name", "encoder", "weights", "content_hash", "samples", "layers")}


def check_samples(features: Path, data: Path, content_hash: str) -> None:
    """Make sure that a feature store was made from the data set at ``data``: the same samples in the same order.

    Raises:
        StoreError: if the store's content hash is not ``content_hash``.
    """
    if read_spec(features, FEATURES)["content_hash"] != content_hash:
        raise StoreError(
            f"{features} and {data} have different samples; make both from the same data set, or give the folder of "
            f"that data set"
        )


@dataclass(frozen=True)
class MaxCorrelations:
    """Best matches between the features of two encoders, for every pair of layers, in both directions."""

    rho_ab: NDArray[np.float32]
    """``[L_B, F_A]`` largest correlation of each feature of A (all layers concatenated) with a layer of B."""
    match_ab: NDArray[np.int32]
    """``[L_B, F_A]`` the matching feature in that layer of B."""
    rho_ba: NDArray[np.float32]
    """``[L_A, F_B]``"""
    match_ba: NDArray[np.int32]
    """``[L_A, F_B]``"""
    sizes_a: NDArray[np.int64]
    """``[L_A]`` number of features per layer of A."""
    sizes_b: NDArray[np.int64]
    """``[L_B]`` number of features per layer of B."""

    def reverse(self) -> "MaxCorrelations":
        """Return the same correlations with A and B swapped."""
        return MaxCorrelations(self.rho_ba, self.match_ba, self.rho_ab, self.match_ab, self.sizes_b, self.sizes_a)


@dataclass(frozen=True)
class CrossFitted:
    """wMPPC corrected for the choice of the best of many matches, in one direction; NaN for too few samples."""

    layers: NDArray[np.float64]
    """``[L_A, L_B + 1]`` from each layer of A to each of B, and last to all layers of B that are kept."""
    readings: NDArray[np.float64]
    """``[3]`` for each of `metrics.READINGS`."""
    influence: NDArray[np.float32]
    """``[3, N]`` each sample's influence on their squares, which have their signs."""


@dataclass(frozen=True)
class PairCorrelations:
    """Best matches of a pair of members from a correlation store, with their floor and influence."""

    best: MaxCorrelations
    layers_a: list[int]
    layers_b: list[int]
    kept_a: NDArray[np.bool_]
    """``[L_A]`` which layers of A take part in ``pooled`` and ``layer_mean``."""
    kept_b: NDArray[np.bool_]
    """``[L_B]``"""
    samples: int
    floor: NDArray[np.float32]
    """``[L_B, f_A]`` rho of the first features of each layer of A with B's samples shuffled."""
    floor_sizes: NDArray[np.int64]
    """``[L_A]`` number of these features per layer."""
    null: NDArray[np.float32]
    """``[R, L_A, L_B + 1]`` wMPPC with the samples re-paired at random, for R re-pairings, from each layer of A to each
    of B, and last to all layers of B that are kept."""
    null_error: NDArray[np.float32]
    """``[L_A, L_B + 1]`` standard error of their means over re-pairings."""
    influence: NDArray[np.float32]
    """``[3, N]`` each sample's influence on the wMPPC from A to B, for each of `metrics.READINGS`."""
    iou: NDArray[np.float32]
    """``[2, F_A]`` intersection over union of the samples on which a feature of A and its best match are active: its
    match in all kept layers of B, and for features of A's last layer, else 0, its match in B's last layer."""
    one_to_one: NDArray[np.float32]
    """``[2, F_A]`` correlation of each feature of A with its partner in a one-to-one matching: over all kept layers,
    and between the last layers; 0 without a partner."""
    cross_fitted: CrossFitted


@dataclass(frozen=True)
class LastLayer:
    """The features of A's last layer and their best matches in B's last layer, for Comparative Sharedness."""

    rho: NDArray[np.float32]
    """``[F]`` correlation with the best match."""
    null: NDArray[np.float32]
    """``[F]`` the mean of such a correlation with the samples re-paired at random."""
    resampled_rho: NDArray[np.float16]
    """``[R, F]`` correlation with the same match in each of R bootstrap resamples of the samples."""
    resampled_strength: NDArray[np.float16]
    """``[R, F]`` S in each resample, divided by S; 0 if that is 0."""


def read_last_layer(path: Path, source: str) -> LastLayer:
    """Read a pair's last layers, oriented so that ``source`` is A; raises as `read_correlations`."""
    store, direction = _open_pair(path, source)
    names = ("null_features", "resampled_rho", "resampled_strength")
    null, *resampled = (StoredArray(store, f"{name}_{direction}", path)[:] for name in names)
    rho = StoredArray(store, f"rho_{direction}", path)[-1, -len(null) :]
    return LastLayer(rho, null, *resampled)


def read_correlations(path: Path, source: str) -> PairCorrelations:
    """Read a pair's correlations, oriented so that ``source`` is A.

    Raises:
        StoreError: if the store is missing, incomplete or damaged, or ``source`` is not in the pair.
    """
    store, direction = _open_pair(path, source)
    spec: Any = store.attrs["spec"]

    def read(name: str) -> NDArray[Any]:
        return StoredArray(store, name, path)[:]

    best = MaxCorrelations(**{name: read(name) for name in MaxCorrelations.__dataclass_fields__})
    one, other = direction[0], direction[1]
    # Stores of earlier versions of the library leave nothing out.
    kept = {side: ~np.isin(spec[f"layers_{side}"], spec.get(f"left_out_{side}", [])) for side in "ab"}
    return PairCorrelations(
        best=best if direction == "ab" else best.reverse(),
        layers_a=spec[f"layers_{one}"],
        layers_b=spec[f"layers_{other}"],
        kept_a=kept[one],
        kept_b=kept[other],
        samples=spec["samples"],
        floor=read(f"floor_{direction}"),
        floor_sizes=read(f"floor_sizes_{one}"),
        null=read(f"null_{direction}"),
        null_error=read(f"null_error_{direction}"),
        influence=read(f"influence_{direction}"),
        iou=read(f"iou_{direction}"),
        one_to_one=read(f"one_to_one_{direction}"),
        cross_fitted=CrossFitted(
            **{name: read(f"cross_fitted_{name}_{direction}") for name in CrossFitted.__dataclass_fields__}
        ),
    )


def _open_pair(path: Path, source: str) -> tuple[Any, str]:
    """A correlation store, and its direction from a member: ``ab`` or ``ba``."""
    store: Any = open_store(path, CORRELATIONS)
    spec: Any = store.attrs["spec"]
    if source not in (spec["a"], spec["b"]):
        raise StoreError(f"{path}: a pair of {spec['a']} and {spec['b']}, without {source}; name one of them")
    return store, "ab" if source == spec["a"] else "ba"
