"""Standardisation of features to mean 0 and norm 1 over the samples, so that products are correlations."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from conceptshare.correlations._arrays import Array
from conceptshare.correlations.blocks import GPU_COLUMNS
from conceptshare.io.errors import NumericsError

_CACHED_BYTES = 2**20
# Number of parts in which a GPU processes a panel. Temporary values of a part, up to 40 bytes per value, take less than
# the budget's share for the prefetched panel (at least one byte per value), which is in the host's memory.
_GPU_PARTS = 64


@dataclass(frozen=True)
class Panel:
    """Consecutive features of one layer."""

    layer: int
    first: int
    """The first feature within the layer."""
    width: int
    start: int
    """Index of the first feature when the features of all layers are concatenated."""
    array: Array
    """The array of the features, for error messages."""


@dataclass(frozen=True)
class Standard:
    """Parameters that standardise the non-constant features of a panel: z = (x - centre) scale + bias."""

    columns: Tensor
    """``[v]`` int64: indices of these features within the panel."""
    centre: Tensor
    """``[v]`` mean, in the dtype of the arithmetic."""
    scale: Tensor
    """``[v]``"""
    bias: Tensor
    """``[v]`` scaled rounding error of the centre."""
    everything: bool
    """Whether the columns are all columns of the panel."""
    N: int
    """Number of samples."""


@dataclass(frozen=True)
class Block:
    """Standardised features of a block of samples."""

    values: Tensor
    """``[n, w]`` float32, each feature of norm 1 over all samples, or float16, of variance 1; columns from ``v`` on, if
    any, are zeros."""
    squares: Tensor
    """``[w]`` float32 sums of squares of the values in float16; zeros in float32."""
    v: int
    """Number of features."""


def standard_of(chunks: Callable[[], Iterator[Tensor]], panel: Panel) -> Standard:
    """Compute mean and norm of each feature of a panel, in two passes over its samples.

    Args:
        chunks: returns an iterator over all samples, ``[n, width]`` at a time; called for each pass.
        panel: the panel, for error messages.

    Raises:
        NumericsError: if a value is not finite.
    """
    N, first, total = 0, torch.empty(0), torch.zeros(panel.width, dtype=torch.float64)
    for chunk in chunks():
        if not N:
            # Sum deviations from the first sample, so that the mean of a constant feature is exact.
            first, total = _working(chunk[0]), total.to(chunk.device)
        N += len(chunk)
        for x in _cached(chunk):
            total += _sums(x.sub_(first))
        del chunk  # before the next one is read
    if not total.isfinite().all():
        raise NumericsError(_where_not_finite(chunks(), panel))
    mean = first.double() + total / N
    centre = mean.to(first.dtype)
    rest = (mean - centre.double()).to(first.dtype)
    squares = torch.zeros_like(total)
    for chunk in chunks():
        for x in _cached(chunk):
            x.sub_(centre).sub_(rest)
            squares += _sums(x.mul_(x))
        del chunk
    if not squares.isfinite().all():
        raise NumericsError(f"{panel.array.name}: squares of values that are beyond float64; scale them down")
    columns = squares.nonzero()[:, 0]
    scale = squares[columns].rsqrt().to(first.dtype)
    return Standard(
        columns=columns,
        centre=centre[columns],
        scale=scale,
        bias=-rest[columns] * scale,
        everything=len(columns) == panel.width,
        N=N,
    )


class Memory:
    """A reusable buffer, because allocating memory can take longer than filling it."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._values = torch.empty(0, dtype=dtype, device=device)

    def view(self, rows: int, columns: int) -> Tensor:
        """``[rows, columns]`` uninitialised view of the buffer."""
        if self._values.numel() < rows * columns:
            self._values = self._values.new_empty(rows * columns)
        return self._values[: rows * columns].view(rows, columns)


def standardised(x: Tensor, standard: Standard, memory: Memory) -> Block:
    """Standardise samples ``[n, width]`` of a panel into ``memory``, in its dtype."""
    v = len(standard.columns)
    values = memory.view(len(x), v if x.device.type == "cpu" else -(-v // GPU_COLUMNS) * GPU_COLUMNS)
    values[:, v:] = 0
    rounded = values.dtype == torch.float16
    # Of norm 1, the values of most samples would be below float16's smallest normal number.
    scale = standard.N**0.5 if rounded else 1
    squares, start = torch.zeros(values.shape[1], device=values.device), 0
    for part in _cached(x):
        place = slice(start, start + len(part))
        start += len(part)
        chosen = part if standard.everything else part[:, standard.columns]
        z = torch.addcmul(standard.bias, chosen.sub_(standard.centre), standard.scale)
        values[place, :v] = z.mul_(scale) if rounded else z
        if rounded:
            squares += values[place].float().square_().sum(0)
    return Block(values, squares, v)


def _working(x: Tensor) -> Tensor:
    """Convert float16 to float32, which can hold squares and fourth powers of its values, and all else to float64."""
    return x.to(torch.float32 if x.dtype == torch.float16 else torch.float64, copy=True)


def _cached(x: Tensor) -> Iterator[Tensor]:
    """Yield working copies of blocks of rows of ``x [n, w]`` that fit a core's cache, or a GPU's budget."""
    on_cpu = x.device.type == "cpu"
    rows = max(16, _CACHED_BYTES // (4 * max(1, x.shape[1])) if on_cpu else -(-len(x) // _GPU_PARTS))
    for start in range(0, len(x), rows):
        yield _working(x[start : start + rows])


def _sums(x: Tensor) -> Tensor:
    """``[w]`` sums of the rows of ``x [n, w]``, in float64; in x's dtype on a CPU, which sums few rows at a time."""
    return x.sum(0, dtype=None if x.device.type == "cpu" else torch.float64)


def _where_not_finite(chunks: Iterator[Tensor], panel: Panel) -> str:
    sample = 0
    for chunk in chunks:
        bad = (~chunk.isfinite()).nonzero()
        if len(bad):
            row, column = bad[0].tolist()
            place = f"row {sample + row}, column {panel.first + column}"
            return f"{panel.array.name}: {place} is {chunk[row, column].item()}; {panel.array.remedy}"
        sample += len(chunk)
    return f"{panel.array.name}: sums of values that are beyond float64; scale them down"
