"""Validation and conversion of the arrays that callers pass."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from conceptshare.io.errors import NumericsError
from conceptshare.io.store import StoredArray

_GIVE = "give dense NumPy, torch or Zarr arrays [samples, features], one for each layer"


class Array(NamedTuple):
    """Metadata of an array that is not read yet."""

    name: str
    """Name for error messages."""
    remedy: str
    """Remedy for a value that is not finite, for error messages."""
    value_bytes: int
    """Size of a stored value in bytes."""


def as_layers(side: Any, name: str) -> tuple[list[Any], list[Array]]:
    """The layers of one side, with metadata of each. A single array is one layer.

    Each layer has a shape, and is read by slices of both axes.

    Raises:
        NumericsError: if there is no layer, or one is not a dense matrix of real numbers with at least one column.
    """
    if _is_array(side):
        given = {name: side}
    else:
        given = {f"{name}[{n}]": layer for n, layer in enumerate(side if isinstance(side, Iterable) else [])}
    if not given:
        raise NumericsError(f"{name} has no layers; {_GIVE}")
    layers, known = zip(*(_layer(layer, name) for name, layer in given.items()), strict=True)
    return list(layers), list(known)


def _is_array(side: Any) -> bool:
    # A nested tensor raises if its shape is accessed.
    return isinstance(side, Tensor) or any(
        hasattr(side, name) for name in ("shape", "__array__", "__array_interface__")
    )


def _layer(layer: Any, name: str) -> tuple[Any, Array]:
    if hasattr(layer, "value_bytes"):  # one of ours, where reading a value takes long
        return layer, Array(name, "run the features stage again", layer.value_bytes)
    kind = f"{name}, a {type(layer).__module__}.{type(layer).__qualname__},"
    if hasattr(layer, "todense") or (isinstance(layer, Tensor) and layer.layout is not torch.strided):
        raise NumericsError(
            f"{kind} is sparse; give a dense array, such as .toarray() in SciPy or .to_dense() in torch"
        )
    if np.ma.is_masked(layer):
        raise NumericsError(f"{kind} has masked values; fill them, such as with .filled(0), or leave their samples out")
    try:
        if hasattr(layer, "to_numpy"):  # a data frame
            layer = layer.to_numpy()
        elif not (hasattr(layer, "shape") and hasattr(layer, "__getitem__")):
            layer = np.asarray(layer)
        shape = tuple(map(int, layer.shape))
        first = as_tensor(layer[:1, :1] if len(shape) == 2 else [], torch.device("cpu"))
        first.double()
    except (TypeError, ValueError, RuntimeError, AttributeError, LookupError) as error:
        raise NumericsError(f"{kind} cannot be read as an array ({' '.join(str(error).split())}); {_GIVE}") from error
    except NumericsError as error:
        raise NumericsError(f"{name}: {error}") from None
    if len(shape) != 2 or shape[1] < 1:
        raise NumericsError(f"{name} has the shape {shape}; {_GIVE}")
    if isinstance(layer, StoredArray):
        return layer, Array(str(layer), "delete the store and run the features stage again", first.element_size())
    return layer, Array(name, "replace it, or leave out its row or its column", first.element_size())


def as_tensor(values: Any, device: torch.device) -> Tensor:
    """Copy an array's values to a device.

    Raises:
        NumericsError: if they are not real numbers.
    """
    if not isinstance(values, Tensor):
        values = np.asarray(values)
        if values.dtype.kind not in "fiub" or values.dtype.itemsize > 8:
            raise NumericsError(f"values of type {values.dtype}: give real numbers, as .astype(float) makes them")
        # torch requires native byte order, positive strides and writable memory.
        native = values.astype(values.dtype.newbyteorder("="), copy=not values.flags.writeable)
        native = np.ascontiguousarray(native)
        # For NumPy, an axis of length one is contiguous with any stride.
        if any(stride < 0 or stride % native.itemsize for stride in native.strides):
            native = native.copy()
        values = torch.from_numpy(native)
    tensor: Tensor = values.detach()
    if tensor.is_complex():
        raise NumericsError(f"values of type {tensor.dtype}: give real numbers")
    return tensor.to(device)


def sizes_of(layers: Sequence[Any]) -> NDArray[np.int64]:
    """``[L]`` number of features per layer."""
    return np.array([layer.shape[1] for layer in layers], np.int64)


def places_of(sizes: NDArray[np.int64]) -> list[slice]:
    """Where the features of each layer are when those of all layers are concatenated."""
    return [slice(int(end - size), int(end)) for size, end in zip(sizes, np.cumsum(sizes), strict=True)]


class View:
    """Some of the features and samples of a layer.

    Args:
        layer: ``[N, F]``.
        width: number of features, the first ones.
        start: the first sample.
        count: number of samples, at most N; the first sample follows the last one.
    """

    value_bytes = 2

    def __init__(self, layer: Any, width: int, start: int, count: int) -> None:
        self._layer, self._start, self.shape = layer, start, (count, width)

    def __getitem__(self, place: tuple[slice, slice]) -> Any:
        rows, columns = place
        N = self._layer.shape[0]
        start, stop, _ = rows.indices(self.shape[0])
        start, stop = start + self._start, stop + self._start
        columns = slice(*columns.indices(self.shape[1]))
        if start >= N:
            return self._layer[start - N : stop - N, columns]
        if stop <= N:
            return self._layer[start:stop, columns]
        parts = [self._layer[start:N, columns], self._layer[0 : stop - N, columns]]
        return torch.cat(parts) if isinstance(parts[0], Tensor) else np.concatenate(parts)


def sample_count(layers: Sequence[Any]) -> int:
    """The number of samples that all layers have.

    Raises:
        NumericsError: if their numbers differ, or are below two.
    """
    counts = {int(layer.shape[0]) for layer in layers}
    if len(counts) != 1:
        raise NumericsError(f"the arrays have different numbers of samples: {sorted(counts)}; give the same samples")
    (N,) = counts
    if N < 2:
        raise NumericsError(f"{N} samples: a correlation needs at least 2")
    return N
