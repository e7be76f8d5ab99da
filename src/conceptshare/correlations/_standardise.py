"""Operands: the features of a panel with mean 0 and length 1 over the samples, so that products are correlations."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from conceptshare.correlations._arrays import Array
from conceptshare.io.errors import NumericsError

_CACHED_BYTES = 2**20
# Parts that a GPU takes a panel in. What is computed of one, up to 40 bytes a value, is less than the byte or more a
# value of a whole panel that is read ahead: that is part of the budget, and waits in the machine's memory.
_GPU_PARTS = 64


@dataclass(frozen=True)
class Panel:
    """Some neighbouring features of one layer."""

    layer: int
    first: int
    """The first feature within the layer."""
    width: int
    start: int
    """Where the first stands when the features of all layers stand side by side."""
    array: Array
    """Where they are from, for messages."""


@dataclass(frozen=True)
class Standard:
    """What standardises a panel: z = (x - centre) scale + bias, for those of its features that vary."""

    columns: Tensor
    """``[v]`` int64: the features within the panel."""
    centre: Tensor
    """``[v]`` the mean, in the type of the arithmetic."""
    scale: Tensor
    """``[v]``"""
    bias: Tensor
    """``[v]`` what the centre's rounding left, scaled."""
    everything: bool
    """Whether the columns are all of the panel's."""


@dataclass(frozen=True)
class Block:
    """Standardised features of some samples."""

    values: Tensor
    """``[n, v]`` float32 or bfloat16, each feature of length 1 over all samples."""
    squares: Tensor
    """``[v]`` float32 sums of squares of values in bfloat16, which rounding has changed; else zeros."""


def standard_of(chunks: Callable[[], Iterator[Tensor]], panel: Panel) -> Standard:
    """Mean and length of each feature of a panel, in two passes over its samples.

    Args:
        chunks: gives all samples anew, ``[n, width]`` at a time.
        panel: which features, for messages.

    Raises:
        NumericsError: where a value is not finite.
    """
    N, first, total = 0, torch.empty(0), torch.zeros(panel.width, dtype=torch.float64)
    for chunk in chunks():
        if not N:
            # Sums are of deviations from the first sample: a constant feature has a mean that is exactly its value.
            first, total = _working(chunk[0]), total.to(chunk.device)
        N += len(chunk)
        for x in _cached(chunk):
            total += _sums(x.sub_(first))
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
    )


class Memory:
    """Memory that is used again: new memory has to be asked of the system, which can take longer than filling it."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._values = torch.empty(0, dtype=dtype, device=device)

    def view(self, rows: int, columns: int) -> Tensor:
        """``[rows, columns]``, of whatever was there."""
        if self._values.numel() < rows * columns:
            self._values = self._values.new_empty(rows * columns)
        return self._values[: rows * columns].view(rows, columns)


def standardised(x: Tensor, standard: Standard, memory: Memory) -> Block:
    """Standardise samples ``[n, width]`` of a panel, into ``memory`` and to its type."""
    values = memory.view(len(x), len(standard.columns))
    squares, start = torch.zeros(values.shape[1], device=values.device), 0
    for part in _cached(x):
        place = slice(start, start + len(part))
        start += len(part)
        chosen = part if standard.everything else part[:, standard.columns]
        values[place] = torch.addcmul(standard.bias, chosen.sub_(standard.centre), standard.scale)
        if values.dtype == torch.bfloat16:
            squares += values[place].float().square_().sum(0)
    return Block(values, squares)


def _working(x: Tensor) -> Tensor:
    """In float32 where squares and fourth powers of any value fit it, which is float16's; else in float64."""
    return x.to(torch.float32 if x.dtype == torch.float16 else torch.float64, copy=True)


def _cached(x: Tensor) -> Iterator[Tensor]:
    """Working copies of some rows of ``x [n, w]`` each, few enough to stay in a core's cache, or in a GPU's budget."""
    rows = max(16, _CACHED_BYTES // (4 * max(1, x.shape[1])))
    if x.device.type != "cpu":
        rows = max(rows, -(-len(x) // _GPU_PARTS))
    for start in range(0, len(x), rows):
        yield _working(x[start : start + rows])


def _sums(x: Tensor) -> Tensor:
    """``[w]`` sums of the rows of ``x [n, w]``, in float64; in x's type on a CPU, which has few rows at a time."""
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
