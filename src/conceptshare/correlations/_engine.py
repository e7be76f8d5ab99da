"""Best matches between the features of two encoders: one product for every pair of layers, both directions from it."""

import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from itertools import pairwise, product
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from conceptshare.correlations._arrays import Array, as_layers, as_tensor, sample_count, sizes_of
from conceptshare.correlations._standardise import (
    Block,
    Memory,
    Panel,
    Standard,
    standard_of,
    standardised,
)
from conceptshare.correlations.blocks import MEMORY_BYTES, Blocks, Precision, plan_blocks
from conceptshare.device import default_device, full_float32
from conceptshare.io.errors import NumericsError
from conceptshare.io.progress import progress
from conceptshare.io.readers import MaxCorrelations

# A sparse feature is slightly below its mean on nearly all samples. If 100,000 such values are added one by one in
# float32 to a sum near 1, as in products of few columns, they are lost, which costs the third digit. Wide products add
# in blocks.
_SUMMED, _SUMMED_NARROW, _NARROW = 8192, 512, 256
_GROUP = 32
_SECONDS_BETWEEN_SAVES = 60
# Bytes of a maximum and its match.
_RESULT_BYTES = 8


Full = Mapping[tuple[int, int], Any]
"""Arrays for full correlation matrices ``[F_a, F_b]``, by the positions of A's and B's layer."""


class Kept(NamedTuple):
    """State from which an interrupted computation can resume."""

    best: MaxCorrelations
    """The maxima so far."""
    steps: int
    """Number of finished steps; each is a panel of B with a group of panels of A."""
    blocks: Blocks
    """Partition of the work. With another partition, such as for another budget, the computation starts over."""


@full_float32()
def max_correlations(
    a: Any,
    b: Any,
    memory_bytes: int | None = None,
    precision: Precision = "float32",
    full: Full | None = None,
    what: str = "correlations",
    kept: Kept | None = None,
    keep: Callable[[Kept], None] | None = None,
) -> MaxCorrelations:
    """Correlate every feature of A with every feature of B over the same samples.

    A constant feature has no correlation: its rho is 0, its match -1, and it is never a best match. Operands are
    standardised once, or, if they do not fit the budget, as often as they are needed. In float32 the error of a
    correlation is below 1e-5: means and norms are computed from float64 sums (on a CPU, from sums over blocks of rows
    in float32), products are summed in float32. In float16 the error is below 5e-4 for SAE features, and below 2^-10
    for any features.

    Args:
        a: for each layer of A, an array ``[N, F]`` of real numbers: NumPy, torch or Zarr, or anything that NumPy
            converts, such as a data frame. Only Zarr and other arrays that are read in slices may exceed memory. A
            single array is one layer.
        b: the same for B.
        memory_bytes: limit of the working memory, on the GPU if there is one; by default 1 GiB, or four fifths of the
            free memory of the GPU. On a CPU, the result is not included.
        precision: precision of standardised features. ``float16`` is for NVIDIA GPUs; a CPU computes in float32.
        full: arrays for full matrices, for pairs of layers.
        what: name of the step in the progress report.
        kept: state to resume from.
        keep: called with the state once a minute, and at the end.

    Raises:
        NumericsError: if an argument is not such an array, is sparse or has masked values, sample counts differ, a
            value is not finite, or the budget cannot hold the smallest block.
    """
    (layers_a, known_a), (layers_b, known_b) = as_layers(a, "a"), as_layers(b, "b")
    if precision not in get_args(Precision):
        raise NumericsError(f"precision {precision!r}: use one of {', '.join(get_args(Precision))}")
    N = sample_count([*layers_a, *layers_b])
    device = default_device()
    sizes_a, sizes_b = sizes_of(layers_a), sizes_of(layers_b)
    operands = torch.float16 if precision == "float16" and device.type == "cuda" else torch.float32
    of_result = _RESULT_BYTES * int(len(layers_b) * sizes_a.sum() + len(layers_a) * sizes_b.sum())
    plan = plan_blocks(
        N,
        sizes_a.tolist(),
        sizes_b.tolist(),
        max(array.value_bytes for array in [*known_a, *known_b]),
        _budget(memory_bytes, device) - (of_result if device.type == "cuda" else 0),
        operands.itemsize,
        device.type == "cuda",
    )
    side_a, side_b = _Side(layers_a, known_a, plan, device), _Side(layers_b, known_b, plan, device)
    best_ab = _Best(len(layers_b), int(sizes_a.sum()), device)
    best_ba = _Best(len(layers_a), int(sizes_b.sum()), device)
    done, saved = 0, time.monotonic()
    if kept is not None and kept.blocks == plan:
        done = kept.steps
        best_ab.restore(kept.best.rho_ab, kept.best.match_ab)
        best_ba.restore(kept.best.rho_ba, kept.best.match_ba)

    def result() -> MaxCorrelations:
        return MaxCorrelations(*best_ab.result(), *best_ba.result(), sizes_a, sizes_b)

    size = plan.group or 1
    groups = [side_a.panels[first : first + size] for first in range(0, len(side_a.panels), size)]
    steps = list(product(groups, side_b.panels))
    with closing(_Tiles(side_a, side_b, steps[done:], plan, N, operands)) as tiles:
        for step in progress(range(done, len(steps)), len(steps) - done, what, "blocks"):
            for panel_a, panel_b, r in tiles.of_step():
                columns_a, columns_b = side_a.columns(panel_a), side_b.columns(panel_b)
                if len(columns_a) and len(columns_b):
                    best_ab.update(panel_b.layer, panel_a, columns_a, panel_b.first, columns_b, *_row_maxima(r))
                    best_ba.update(panel_a.layer, panel_b, columns_b, panel_a.first, columns_a, *_column_maxima(r))
                if full and (panel_a.layer, panel_b.layer) in full:
                    _write_full(full[panel_a.layer, panel_b.layer], panel_a, panel_b, columns_a, columns_b, r)
            due = step + 1 == len(steps) or time.monotonic() - saved >= _SECONDS_BETWEEN_SAVES
            if keep is not None and due:
                keep(Kept(result(), step + 1, plan))
                saved = time.monotonic()
    return result()


def _budget(memory_bytes: int | None, device: torch.device) -> int:
    if memory_bytes is not None:
        return memory_bytes
    return MEMORY_BYTES if device.type == "cpu" else torch.cuda.mem_get_info(device)[0] * 4 // 5


class _Side:
    """The panels of one encoder, with the statistics that standardise them."""

    def __init__(self, layers: Sequence[Any], known: Sequence[Array], plan: Blocks, device: torch.device) -> None:
        self.layers, self.rows, self.device = layers, plan.rows, device
        starts = np.concatenate([[0], np.cumsum(sizes_of(layers))])
        self.panels = [
            Panel(n, first, min(plan.width, int(end - start) - first), int(start) + first, known[n])
            for n, (start, end) in enumerate(pairwise(starts))
            for first in range(0, int(end - start), plan.width)
        ]
        self._standards: dict[Panel, Standard] = {}

    def read(self, panel: Panel, start: int) -> Any:
        """Stored values of a panel for the samples from ``start`` on, at most ``[rows, width]``."""
        return self.layers[panel.layer][start : start + self.rows, panel.first : panel.first + panel.width]

    def block(self, panel: Panel, values: Any, memory: Memory) -> Block:
        """Standardise values that were read from a panel."""
        x = as_tensor(values, self.device)
        N = self.layers[0].shape[0]
        if panel not in self._standards:

            def chunks() -> Iterator[Tensor]:
                if len(x) == N:
                    return iter([x])
                return (as_tensor(self.read(panel, start), self.device) for start in range(0, N, self.rows))

            self._standards[panel] = standard_of(chunks, panel)
        return standardised(x, self._standards[panel], memory)

    def columns(self, panel: Panel) -> Tensor:
        """The non-constant features of a panel, in the order of its blocks' columns."""
        return self._standards[panel].columns


Step = tuple[list[Panel], Panel]
"""A group of panels of A, and a panel of B."""


class _Tiles:
    """Correlations ``[v_a, v_b]`` of the panels of each step, tile by tile, reusing the same memory."""

    def __init__(self, a: _Side, b: _Side, steps: Sequence[Step], plan: Blocks, N: int, operands: torch.dtype) -> None:
        self._a, self._b, self._steps, self._left = a, b, steps, iter(steps)
        self._starts = range(0, N, plan.rows)
        self._read = _read_ahead(self._loads())
        self._product = _Product(a.device, operands)
        self._memory_a = [Memory(operands, a.device) for _ in range(plan.group or 1)]
        self._memory_b = Memory(operands, b.device)
        self._group: list[Panel] = []
        self._kept: list[Block] = []

    def close(self) -> None:
        """End the prefetching thread; if it were garbage-collected while a thread starts, Python could hang."""
        self._read.close()

    def of_step(self) -> Iterator[tuple[Panel, Panel, Tensor]]:
        """The tiles of the next step."""
        group, panel_b = next(self._left)
        if len(self._starts) > 1:
            (panel_a,) = group
            for start in self._starts:
                block_a = self._a.block(panel_a, next(self._read), self._memory_a[0])
                self._product.add(block_a, self._b.block(panel_b, next(self._read), self._memory_b), start == 0)
            yield panel_a, panel_b, self._product.correlations()
            return
        block_b = self._b.block(panel_b, next(self._read), self._memory_b)
        if group is not self._group:
            self._group, self._kept = group, []
        for n, panel_a in enumerate(group):
            if n == len(self._kept):
                self._kept.append(self._a.block(panel_a, next(self._read), self._memory_a[n]))
            self._product.add(self._kept[n], block_b, reset=True)
            yield panel_a, panel_b, self._product.correlations()

    def _loads(self) -> Iterator[Callable[[], Any]]:
        """Yield the reads of all steps in order."""
        before: list[Panel] = []
        for group, panel_b in self._steps:
            if len(self._starts) > 1:
                for start in self._starts:
                    yield partial(self._a.read, group[0], start)
                    yield partial(self._b.read, panel_b, start)
                continue
            yield partial(self._b.read, panel_b, 0)
            if group is not before:
                before = group
                yield from (partial(self._a.read, panel_a, 0) for panel_a in group)


def _read_ahead(loads: Iterator[Callable[[], Any]]) -> Generator[Any, None, None]:
    """Yield the result of each load, with prefetching of the next one."""
    with ThreadPoolExecutor(1) as pool:
        ahead = None
        for load in loads:
            following = pool.submit(load)
            if ahead is not None:
                yield ahead.result()
            ahead = following
        if ahead is not None:
            yield ahead.result()


class _Product:
    """Correlations as a sum of products of blocks of samples, reusing the same memory."""

    def __init__(self, device: torch.device, operands: torch.dtype) -> None:
        self._rounded = operands == torch.float16
        self._memory, self._part = Memory(torch.float32, device), Memory(torch.float32, device)

    def add(self, a: Block, b: Block, reset: bool) -> None:
        """Add the products of a block of samples, after a reset if requested."""
        if reset:
            self._sum = self._memory.view(a.values.shape[1], b.values.shape[1]).zero_()
            self._squares_a, self._squares_b = torch.zeros_like(a.squares), torch.zeros_like(b.squares)
            self._v = a.v, b.v
        r = self._sum
        self._squares_a += a.squares
        self._squares_b += b.squares
        rows = _SUMMED_NARROW if min(r.shape) < _NARROW else _SUMMED
        for start in range(0, len(a.values), rows):
            one, other = a.values[start : start + rows].T, b.values[start : start + rows]
            if self._rounded:
                r = self._sum = torch.addmm(r, one, other, out_dtype=torch.float32)
            elif r.is_cuda:
                r.addmm_(one, other)
            else:  # addmm_ would add to the long sum several times per block
                r.add_(torch.mm(one, other, out=self._part.view(*r.shape)))

    def correlations(self) -> Tensor:
        """``[w_a, w_b]`` float32, valid until more is added; -inf in the padding beyond ``[v_a, v_b]``."""
        r = self._sum
        if self._rounded:
            r.mul_(self._squares_a.rsqrt()[:, None]).mul_(self._squares_b.rsqrt())
        # Rounding can push a perfect correlation slightly beyond 1, where artanh is undefined.
        r.clamp_(-1, 1)
        v_a, v_b = self._v
        r[v_a:], r[:, v_b:] = -torch.inf, -torch.inf
        return r


class _Best:
    """Running maxima over the panels of each layer of the other side."""

    def __init__(self, layers: int, count: int, device: torch.device) -> None:
        self._rho = torch.full((layers, count), -torch.inf, device=device)
        self._match = torch.full((layers, count), -1, dtype=torch.int32, device=device)

    def restore(self, rho: NDArray[np.float32], match: NDArray[np.int32]) -> None:
        """Restore the maxima from an earlier `result`."""
        self._match.copy_(torch.from_numpy(match))
        self._rho.copy_(torch.from_numpy(rho)).masked_fill_(self._match < 0, -torch.inf)

    def update(
        self, layer: int, panel: Panel, columns: Tensor, first: int, matched: Tensor, rho: Tensor, match: Tensor
    ) -> None:
        """Merge the maxima ``rho`` of a panel's ``columns``, at indices ``match`` into the columns ``matched``.

        Beyond these columns, ``rho`` is padding.
        """
        indices = panel.start + columns
        rho, match = rho[: len(columns)], match[: len(columns)]
        before = self._rho[layer, indices]
        better = rho > before
        self._rho[layer, indices] = torch.where(better, rho, before)
        self._match[layer, indices] = torch.where(better, (first + matched[match]).int(), self._match[layer, indices])

    def result(self) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
        """The maxima and matches; 0 and -1 for features without a correlation."""
        return self._rho.masked_fill(self._match < 0, 0).cpu().numpy(), self._match.clone().cpu().numpy()


def _row_maxima(r: Tensor) -> tuple[Tensor, Tensor]:
    """The maximum of each row of ``r [n, m]``, and its index."""
    n, m = r.shape
    if m % _GROUP:
        return r.max(dim=1)
    groups = r.view(n, -1, _GROUP)
    group = groups.amax(2).argmax(1)
    rho, within = groups[torch.arange(n, device=r.device), group].max(dim=1)
    return rho, group * _GROUP + within


def _column_maxima(r: Tensor) -> tuple[Tensor, Tensor]:
    """The maximum of each column of ``r [n, m]``, and its index.

    Maxima without indices are ten times as fast, so first the group of rows is found, then the row.
    """
    n, m = r.shape
    if n % _GROUP:
        return r.max(dim=0)
    groups = r.view(-1, _GROUP, m)
    group = groups.amax(1).argmax(0)
    rho, within = groups[group, :, torch.arange(m, device=r.device)].max(dim=1)
    return rho, group * _GROUP + within


def _write_full(
    out: Any,
    panel_a: Panel,
    panel_b: Panel,
    columns_a: Tensor,
    columns_b: Tensor,
    r: Tensor,
) -> None:
    tile = np.zeros((panel_a.width, panel_b.width), np.float32)
    values = r[: len(columns_a), : len(columns_b)].cpu().numpy()
    tile[np.ix_(columns_a.cpu().numpy(), columns_b.cpu().numpy())] = values
    out[panel_a.first : panel_a.first + panel_a.width, panel_b.first : panel_b.first + panel_b.width] = tile
