"""Stage `correlations`: for every pair of layers of two encoders, each feature's best match in the other.

`results/{dataset}/correlations/{sae}/{a}__{b}.zarr` holds both directions. The features of all layers of an encoder
stand side by side, ``sizes_a [L_A]`` and ``sizes_b [L_B]`` telling how many each layer has:

- ``rho_ab [L_B, F_A]`` float32: the largest Pearson correlation of a feature of A with any of a layer of B, and
  ``match_ab [L_B, F_A]`` int32: which feature of that layer it is;
- ``rho_ba [L_A, F_B]`` and ``match_ba [L_A, F_B]``: the same from B to A.

Both directions are the row and the column maxima of one matrix, so one product serves both. The matrix never
exists: features are standardised and multiplied a panel at a time, and panels are as wide as a memory budget allows.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from conceptshare import features
from conceptshare.errors import NumericsError, StoreError
from conceptshare.progress import progress
from conceptshare.store import layer_name, new_store, open_store, save_array

KIND = "correlations"
MEMORY_BYTES = 2**30
"""Default memory budget."""

# For a sample and a feature of a panel: the stored value, its float64 copy and deviation, and the float32 result.
_BYTES_STANDARDISING = 24
_BYTES_STANDARDISED = 4
_BLOCK_SAMPLES = 512


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


def max_correlations(a: Any, b: Any, memory_bytes: int = MEMORY_BYTES, what: str = "correlations") -> MaxCorrelations:
    """Correlate every feature of A with every feature of B over the same samples.

    A feature with zero variance has no correlation: its rho is 0, its match -1, and it is nobody's best match.
    Sums run in float32 over standardised float32 operands, whose means and norms are float64: the error of a
    correlation is below 1e-5.

    Args:
        a: for each layer of A, an array ``[N, F]``: NumPy, torch or Zarr. One array alone is one layer.
        b: the same of B.
        memory_bytes: bound of the working memory.
        what: the step's name in the progress report.

    Raises:
        NumericsError: where sample counts differ, a value is not finite, or the budget cannot hold one panel.
    """
    a, b = ([side] if hasattr(side, "shape") else list(side) for side in (a, b))
    N = _sample_count([*a, *b])
    width = _panel_width(N, memory_bytes)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sizes_a, sizes_b = (np.array([layer.shape[1] for layer in side], np.int64) for side in (a, b))
    best_ab, best_ba = _Best(len(b), int(sizes_a.sum())), _Best(len(a), int(sizes_b.sum()))
    panels_a, panels_b = _panels(sizes_a, width), _panels(sizes_b, width)
    for panel_a in progress(panels_a, len(panels_a), what, "panels"):
        z_a, constant_a = _standardise(a[panel_a.layer], panel_a, device)
        for panel_b in panels_b:
            z_b, constant_b = _standardise(b[panel_b.layer], panel_b, device)
            r = _product(z_a, z_b)
            r[constant_a] = -torch.inf
            r[:, constant_b] = -torch.inf
            best_ab.update(panel_b.layer, panel_a.place, r.max(dim=1), panel_b.first)
            best_ba.update(panel_a.layer, panel_b.place, r.max(dim=0), panel_a.first)
    return MaxCorrelations(*best_ab.result(), *best_ba.result(), sizes_a, sizes_b)


def correlate_stores(path_a: Path, path_b: Path, out: Path, memory_bytes: int = MEMORY_BYTES) -> None:
    """Correlate two feature stores and write the store ``out``.

    Raises:
        StoreError: where a store is not whole, or they are not of the same samples in the same order.
        NumericsError: where a feature is not finite.
    """
    stores: list[Any] = [open_store(path, features.KIND) for path in (path_a, path_b)]
    specs = [dict(store.attrs["spec"]) for store in stores]
    if specs[0]["content_hash"] != specs[1]["content_hash"]:
        raise StoreError(f"{path_a} and {path_b} are of different samples; make both from the same data set")
    a, b = (
        [store[layer_name(n)]["features"] for n in spec["layers"]] for store, spec in zip(stores, specs, strict=True)
    )
    found = max_correlations(a, b, memory_bytes, what=out.stem)
    described = {
        "a": path_a.stem,
        "b": path_b.stem,
        "layers_a": specs[0]["layers"],
        "layers_b": specs[1]["layers"],
        "content_hash": specs[0]["content_hash"],
        "samples": specs[0]["samples"],
    }
    with new_store(out, KIND, described) as store:
        for name, values in vars(found).items():
            save_array(store, name, values)


@dataclass(frozen=True)
class PairCorrelations:
    """The best matches of a pair of members, as the store holds them, and the layers they are of."""

    found: MaxCorrelations
    layers_a: list[int]
    layers_b: list[int]
    samples: int


def read_correlations(path: Path, source: str) -> PairCorrelations:
    """A pair's correlations, turned so that ``source`` is A.

    Raises:
        StoreError: where the store is not whole, or ``source`` is neither of the pair.
    """
    store: Any = open_store(path, KIND)
    spec: Any = store.attrs["spec"]
    found = MaxCorrelations(**{name: store[name][:] for name in MaxCorrelations.__dataclass_fields__})
    if source == spec["a"]:
        return PairCorrelations(found, spec["layers_a"], spec["layers_b"], spec["samples"])
    if source == spec["b"]:
        return PairCorrelations(found.reverse(), spec["layers_b"], spec["layers_a"], spec["samples"])
    raise StoreError(f"{path}: a pair of {spec['a']} and {spec['b']}, without {source}")


@dataclass(frozen=True)
class _Panel:
    """Some neighbouring features of one layer."""

    layer: int
    first: int
    """The first feature within the layer."""
    place: slice
    """Where the features stand when all layers are side by side."""


def _panels(sizes: NDArray[np.int64], width: int) -> list[_Panel]:
    starts = np.concatenate([[0], np.cumsum(sizes)])
    return [
        _Panel(layer, first, slice(int(starts[layer]) + first, int(starts[layer]) + min(first + width, int(size))))
        for layer, size in enumerate(sizes)
        for first in range(0, int(size), width)
    ]


class _Best:
    """Running maxima over the panels of each layer of the other side."""

    def __init__(self, layers: int, count: int) -> None:
        self.rho = np.full((layers, count), -np.inf, np.float32)
        self.match = np.full((layers, count), -1, np.int32)

    def update(self, layer: int, place: slice, found: Any, first: int) -> None:
        rho, match = found.values.cpu().numpy(), found.indices.cpu().numpy() + first
        better = rho > self.rho[layer, place]
        self.rho[layer, place][better] = rho[better]
        self.match[layer, place][better] = match[better]

    def result(self) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
        """The maxima; 0 and -1 where there was nothing to correlate."""
        # Rounding can take a perfect correlation a little beyond 1, where artanh has no value.
        return np.where(self.match < 0, np.float32(0), self.rho.clip(-1, 1)), self.match


def _standardise(layer: Any, panel: _Panel, device: torch.device) -> tuple[Tensor, Tensor]:
    """``[N, width]`` float32 columns of mean 0 and norm 1, and ``[width]`` which of them have no variance."""
    last = panel.first + panel.place.stop - panel.place.start
    values = torch.as_tensor(layer[:, panel.first : last]).to(device)
    if not values.isfinite().all():
        column = int((~values.isfinite()).any(0).nonzero()[0]) + panel.first
        raise NumericsError(f"layer {panel.layer}, feature {column}: a value that is not finite")
    constant = (values == values[:1]).all(0)
    x = values.double()
    x -= x.mean(0)
    norm = x.norm(dim=0)
    norm[constant] = torch.inf
    x /= norm
    return x.float(), constant


def _product(z_a: Tensor, z_b: Tensor) -> Tensor:
    """``z_a.T @ z_b``, a sum of products of some samples each.

    A rare feature is a little below its mean nearly everywhere. Added one by one in float32 to a sum near 1, as a
    product of few columns adds them, 100,000 such samples are lost, and with them the third digit.
    """
    r = z_a.new_zeros(z_a.shape[1], z_b.shape[1])
    for start in range(0, len(z_a), _BLOCK_SAMPLES):
        r += z_a[start : start + _BLOCK_SAMPLES].T @ z_b[start : start + _BLOCK_SAMPLES]
    return r


def _sample_count(layers: list[Any]) -> int:
    counts = {int(layer.shape[0]) for layer in layers}
    if len(counts) != 1:
        raise NumericsError(f"the arrays have different numbers of samples: {sorted(counts)}")
    (N,) = counts
    if N < 2:
        raise NumericsError(f"{N} samples: a correlation needs at least 2")
    return N


def _panel_width(N: int, memory_bytes: int) -> int:
    """The widest panel whose copies, and the product of two with its running sum, fit the budget."""
    per_feature = N * (_BYTES_STANDARDISING + _BYTES_STANDARDISED)
    # width * per_feature + 8 width^2 = budget, solved for the width.
    width = int((-per_feature + (per_feature**2 + 32 * memory_bytes) ** 0.5) / 16)
    if width < 1:
        raise NumericsError(
            f"{N} samples need {per_feature + 8:,} bytes of working memory; raise the budget of {memory_bytes:,}"
        )
    return width
