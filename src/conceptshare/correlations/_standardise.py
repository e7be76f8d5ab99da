"""Operands: the features of a panel with mean 0 and length 1 over the samples, so that products are correlations."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from conceptshare.correlations._arrays import Array
from conceptshare.correlations.blocks import Precision
from conceptshare.io.errors import NumericsError

COARSE = 1 / 64
"""Largest sum of z^4 of a feature that bfloat16 may round.

Rounding changes each z by up to 2^-8 of itself, by 0.0016 of itself in the mean square. A correlation adds such errors
with random signs: sqrt(2 sum a^2 b^2) 0.0016, at most 2.8e-4 at this bound. Beyond it, a feature has most of its
length in a few samples, whose errors do not average out."""

_CACHED_BYTES = 2**20
# Parts that a GPU takes a panel in. What is computed of one, up to 40 bytes a value, is less than the byte or more a
# value of a whole panel that is read ahead: that is part of the budget, and waits in the machine's memory.
_GPU_PARTS = 64
# Its multiples are spread evenly between whole numbers.
_GOLDEN = (5**0.5 - 1) / 2


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
    """``[v]`` int64: the features within the panel, those that may be rounded first."""
    rounded: int
    """How many may be."""
    centre: Tensor
    """``[v]`` the mean, in the type of the arithmetic."""
    scale: Tensor
    """``[v]``"""
    bias: Tensor
    """``[v]`` what the centre's rounding left, scaled."""
    spread: Tensor
    """``[rounded]`` float32 lengths from 1 to 2 that the rounded features get. Features of the same values, as binary
    or nearly equal ones have, would else all be rounded the same way, and errors of their mean not average out."""
    everything: bool
    """Whether the columns are all of the panel's, in their order."""


@dataclass(frozen=True)
class Block:
    """Standardised features of some samples, ``[n, v]``, as up to two parts side by side."""

    rounded: Tensor
    """``[n, rounded]`` bfloat16, each feature with a length of its own, and parts of the samples stretched."""
    exact: Tensor
    """``[n, v - rounded]`` float32, each of length 1 over all samples."""
    squares: Tensor
    """``[rounded]`` float32 sums of squares of ``rounded``, unstretched."""

    @property
    def features(self) -> int:
        """How many there are: v."""
        return self.rounded.shape[1] + self.exact.shape[1]


def standard_of(chunks: Callable[[], Iterator[Tensor]], panel: Panel, precision: Precision) -> Standard:
    """Mean and length of each feature of a panel, in two passes over its samples.

    Args:
        chunks: gives all samples anew, ``[n, width]`` at a time.
        panel: which features, for messages.
        precision: whether features may be rounded.

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
    squares, fourths = torch.zeros_like(total), torch.zeros_like(total)
    for chunk in chunks():
        for x in _cached(chunk):
            x.sub_(centre).sub_(rest)
            squares += _sums(x.mul_(x))
            if precision == "bfloat16":
                fourths += _sums(x.mul_(x))
    varies = squares > 0
    may_round = varies & (fourths <= COARSE * squares**2) & (precision == "bfloat16")
    if not squares.isfinite().all():
        raise NumericsError(f"{panel.array.name}: squares of values that are beyond float64; scale them down")
    columns = torch.cat([may_round.nonzero()[:, 0], (varies & ~may_round).nonzero()[:, 0]])
    scale = squares[columns].rsqrt().to(first.dtype)
    everything = len(columns) == panel.width and bool((columns[1:] > columns[:-1]).all())
    rounded = int(may_round.sum())
    return Standard(
        columns=columns,
        rounded=rounded,
        centre=centre[columns],
        scale=scale,
        bias=-rest[columns] * scale,
        spread=2 ** ((panel.start + columns[:rounded]).float() * _GOLDEN).remainder(1),
        everything=everything,
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


class BlockMemory:
    """Memory for one block at a time."""

    def __init__(self, device: torch.device) -> None:
        self._rounded, self._exact = Memory(torch.bfloat16, device), Memory(torch.float32, device)

    def view(self, samples: int, rounded: int, exact: int) -> Block:
        """A block to fill."""
        parts = self._rounded.view(samples, rounded), self._exact.view(samples, exact)
        return Block(*parts, torch.zeros(rounded, device=parts[0].device))


def stretch(part: int) -> float:
    """What part of a block's samples is multiplied by, so that each has roundings of its own: from 1 to 2."""
    return 2 ** (part * _GOLDEN % 1)


def standardised(x: Tensor, standard: Standard, memory: BlockMemory, at_once: int) -> Block:
    """Standardise samples ``[n, width]`` of a panel, into ``memory``; what is rounded, stretched ``at_once`` alike."""
    rounded = standard.rounded
    block = memory.view(len(x), rounded, len(standard.columns) - rounded)
    for first in range(0, len(x), at_once):
        stretched, start = stretch(first // at_once), first
        for part in _cached(x[first : first + at_once]):
            place = slice(start, start + len(part))
            start += len(part)
            chosen = part if standard.everything else part[:, standard.columns]
            z = torch.addcmul(standard.bias, chosen.sub_(standard.centre), standard.scale)
            block.exact[place] = z[:, rounded:]
            if rounded:
                block.rounded[place] = z[:, :rounded] * (standard.spread * stretched)
                block.squares.add_(block.rounded[place].float().square_().sum(0), alpha=stretched**-2)
    return block


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
