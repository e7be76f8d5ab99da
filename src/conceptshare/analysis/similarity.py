"""Stage `similarity`: similarity of two encoders' activations, layer by layer, without SAEs.

`results/{dataset}/similarity/{a}__{b}.csv` has one row per pair of layers, with the linear CKA and the mutual
nearest neighbours of their global tokens. If these are high, shared concepts are no surprise.

Samples are shuffled, so the first ones are a random subset: CKA uses at most the first `CKA_SAMPLES`, neighbours at
most the first `NEIGHBOUR_SAMPLES`. The share of common neighbours depends on the number of samples, so only values for
equal numbers of samples are comparable.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from conceptshare.activations import extraction
from conceptshare.analysis.tables import write_table
from conceptshare.device import default_device
from conceptshare.io import provenance
from conceptshare.io.errors import NumericsError, StoreError
from conceptshare.io.files import Unchanged
from conceptshare.io.progress import progress
from conceptshare.io.readers import source_of
from conceptshare.io.sizes import CKA_SAMPLES, NEIGHBOUR_SAMPLES
from conceptshare.io.store import layer_array, open_store

NEIGHBOURS = 10
"""How many neighbours a sample has, as in Huh et al. (2024)."""

_BLOCK_ROWS = 512
# Cosines that differ by less are ties: rounding can tell two equal rows apart by about 1e-16.
_COSINE_DECIMALS = 12

Representation = NDArray[Any] | Tensor


def linear_cka(x: Representation, y: Representation) -> float:
    """Linear centred kernel alignment (Kornblith et al., 2019): ||Y'X||_F^2 / (||X'X||_F ||Y'Y||_F), columns centred.

    Columns are centred in float64, so large means are exact, and stored as float32, with products in float64: the error
    is below 1e-6. With few samples and many dimensions, CKA is high for unrelated representations too.

    Args:
        x: ``[n, D]``.
        y: ``[n, D']`` of the same samples.

    Returns:
        A value from 0 to 1; NaN if one representation is the same for all samples.

    Raises:
        NumericsError: if sample counts differ, there is only one sample, or a value is not finite.
    """
    x, y = _same_samples(x, y, 2, "CKA needs at least 2")
    return _cka(_centred(x), _centred(y))


def mutual_knn(x: Representation, y: Representation, k: int = NEIGHBOURS) -> float:
    """Mutual nearest neighbours (Huh et al., 2024): the share of k nearest neighbours common to both representations.

    Neighbours have the largest cosine similarity. A sample is not its own neighbour, and ties go to the earlier sample.
    Unrelated representations share k / (n - 1) by chance. Unlike the authors' code, this does not clip the largest
    values first.

    Args:
        x: ``[n, D]``.
        y: ``[n, D']`` of the same samples.
        k: number of neighbours per sample.

    Returns:
        The mean over samples, from 0 to 1; NaN if one representation is the same for all samples.

    Raises:
        NumericsError: if sample counts differ, there are fewer than k + 1 samples, or a value is not finite.
    """
    x, y = _same_samples(x, y, k + 1, f"{k} neighbours need at least {k + 1}")
    return _common(_neighbours(x, k), _neighbours(y, k))


def compare_stores(path_a: Path, path_b: Path, out: Path) -> None:
    """Compare all layers of two activation stores; write ``out`` (.csv), and the same as Parquet.

    Its columns are ``source_layer`` (of A), ``target_layer`` (of B), ``cka``, ``mutual_knn`` and ``samples``, the
    number of samples for CKA. Both measures are symmetric. They are empty for a layer that is the same for all samples.
    ``cka_null`` and ``mutual_knn_null`` are their means over all ways to re-pair the samples at random.

    Args:
        path_a: A's activations.
        path_b: B's activations, of the same data set.
        out: the file to write.

    Raises:
        StoreError: if a store is incomplete or damaged, or they have different samples or another order.
        NumericsError: if there are too few samples, or a layer has a value that is not finite.
    """
    inputs = Unchanged(path_a, path_b)
    stores: list[Any] = [open_store(path, extraction.KIND) for path in (path_a, path_b)]
    specs = [dict(store.attrs["spec"]) for store in stores]
    if specs[0]["content_hash"] != specs[1]["content_hash"]:
        raise StoreError(f"{path_a} and {path_b} have different samples; make both from the same data set")
    N = specs[0]["samples"]
    if N <= NEIGHBOURS:
        raise NumericsError(
            f"{path_a}: {N} samples; {NEIGHBOURS} nearest neighbours need at least {NEIGHBOURS + 1}, so use more"
        )
    (store_a, store_b), (layers_a, layers_b) = stores, [spec["layers"] for spec in specs]
    what = f"similarity of {out.stem}"
    of_a = {
        layer: _layer(store_a, layer, path_a)
        for layer in progress(layers_a, len(layers_a), f"{what}, layers of {path_a.stem}", "layers")
    }
    rows = []
    for target_layer in progress(layers_b, len(layers_b), what, "layers"):
        b = _layer(store_b, target_layer, path_b)
        for source_layer, a in of_a.items():
            cka, mutual = _cka(a.centred, b.centred), _common(a.neighbours, b.neighbours)
            chance = float("nan") if math.isnan(mutual) else NEIGHBOURS / (min(N, NEIGHBOUR_SAMPLES) - 1)
            nulls = cka_null(a.centred, b.centred), chance
            rows.append((source_layer, target_layer, cka, mutual, min(N, CKA_SAMPLES), *nulls))
    columns = ["source_layer", "target_layer", "cka", "mutual_knn", "samples", "cka_null", "mutual_knn_null"]
    table = pd.DataFrame(rows, columns=columns).sort_values(columns[:2])
    table.attrs["activations"] = {spec["name"]: source_of(spec) for spec in specs}
    with inputs:
        provenance.record(out)
        write_table(table, out)


@dataclass(frozen=True)
class _Layer:
    """The preprocessed data of a layer that every comparison needs."""

    centred: Tensor
    neighbours: Tensor | None


def _layer(store: Any, layer: int, path: Path) -> _Layer:
    x = _on_device(layer_array(store, layer, "global", path)[:CKA_SAMPLES], f"{path}, layer {layer}")
    return _Layer(_centred(x), _neighbours(x[:NEIGHBOUR_SAMPLES], NEIGHBOURS))


def _same_samples(x: Representation, y: Representation, least: int, need: str) -> tuple[Tensor, Tensor]:
    if len(x) != len(y):
        raise NumericsError(f"representations of {len(x)} and {len(y)} samples; they must be of the same samples")
    if len(x) < least:
        raise NumericsError(f"{len(x)} samples, where {need}")
    return _on_device(x, "the first representation"), _on_device(y, "the second representation")


def _on_device(x: Representation, what: str) -> Tensor:
    values = torch.as_tensor(x).detach().to(default_device())
    broken = ~values.isfinite().all(dim=1)
    if broken.any():
        raise NumericsError(f"{what}: sample {int(broken.nonzero()[0])} has a value that is not finite")
    return values


def _centred(x: Tensor) -> Tensor:
    """``[n, D]`` float32, columns of mean 0, scaled so that ||X'X||_F is 1; NaN where x is the same for all samples."""
    deviation = x.double()
    # After subtracting the first row, constant columns are exactly zero, and large means cost no precision.
    deviation = deviation - deviation[0]
    deviation -= deviation.mean(dim=0)
    # Avoid overflow and underflow of fourth powers in float32.
    deviation /= deviation.abs().max()
    centred = deviation.float()
    centred /= _product(centred, centred).norm().sqrt().float()
    return centred


def _cka(x: Tensor, y: Tensor) -> float:
    return float(_product(x, y).square().sum())


def cka_null(x: Tensor, y: Tensor) -> float:
    """The mean linear CKA over all ways to pair the rows of centred ``x [n, D]`` and ``y [n, D']``.

    With K = XX' and L = YY', it is tr(K) tr(L) / ((n - 1) ||K|| ||L||); x and y are scaled so that the norms are 1.
    """
    traces = x.double().square().sum() * y.double().square().sum()
    return float(traces / (len(x) - 1))


def _product(x: Tensor, y: Tensor) -> Tensor:
    """``x.T @ y`` in float64.

    In float32, if one sample has nearly all of the variance, the sum is near 1 and 10,000 other samples are lost.
    """
    product = torch.zeros(x.shape[1], y.shape[1], dtype=torch.float64, device=x.device)
    for start in range(0, len(x), _BLOCK_ROWS):
        product += x[start : start + _BLOCK_ROWS].double().T @ y[start : start + _BLOCK_ROWS].double()
    return product


def _neighbours(x: Tensor, k: int) -> Tensor | None:
    """``[n, k]`` each sample's neighbours, nearest first; None if x is the same for all samples."""
    if (x == x[0]).all():
        return None
    unit = torch.nn.functional.normalize(x.double(), dim=1)
    neighbours = torch.empty(len(x), k, dtype=torch.int64, device=x.device)
    for start in range(0, len(x), _BLOCK_ROWS):
        cosines = (unit[start : start + _BLOCK_ROWS] @ unit.T).round(decimals=_COSINE_DECIMALS)
        cosines.diagonal(start).fill_(-torch.inf)
        neighbours[start : start + _BLOCK_ROWS] = cosines.sort(dim=1, descending=True, stable=True).indices[:, :k]
    return neighbours


def _common(a: Tensor | None, b: Tensor | None) -> float:
    """The share of neighbours ``a [n, k]`` that are also neighbours in ``b [n, k]``."""
    if a is None or b is None:
        return float("nan")
    return float((a[:, :, None] == b[:, None, :]).any(dim=2).double().mean())
