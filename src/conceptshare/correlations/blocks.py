"""Partition of the work of the stage `correlations` for a memory budget. Free of torch, because `plan` uses it too."""

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

from conceptshare.io.errors import NumericsError
from conceptshare.io.sizes import FEATURE_COLUMNS, FEATURE_ROWS

Precision = Literal["float32", "float16"]

MEMORY_BYTES = 2**30
"""Default memory budget on a CPU."""

# Maximum bytes per value of the product, with its sum and the search for maxima.
_PRODUCT_BYTES = 10
# Time that a GPU takes to launch the kernels of one product, as a number of values that it could read instead.
_LAUNCH_VALUES = 2**22

GPU_COLUMNS = 64
"""On a GPU, operands are padded to a multiple of this number of columns: tensor cores need aligned rows."""


class Blocks(NamedTuple):
    """Partition of the work."""

    width: int
    """Maximum number of features per panel."""
    rows: int
    """Number of samples that are read and multiplied at a time."""
    group: int
    """Number of panels of A whose standardised features are kept in memory; 0 if samples are read in several blocks."""
    times_a: int
    """How often A is read."""
    times_b: int
    """How often B is read."""
    bytes: int
    """Working memory in bytes."""


def plan_blocks(
    N: int,
    sizes_a: Sequence[int],
    sizes_b: Sequence[int],
    raw: int,
    budget: int,
    standard: int = 4,
    gpu: bool = False,
) -> Blocks:
    """Choose the partition that reads the least data within the budget.

    Either as many panels of A as the budget allows are kept, and B is read once per group of panels; if all panels fit,
    both sides are read once. Or nothing is kept, and both sides are read for each product of two panels, in blocks of
    samples, after two passes for means and norms.

    Args:
        N: number of samples.
        sizes_a: number of features per layer of A.
        sizes_b: number of features per layer of B.
        raw: size of a stored value in bytes.
        budget: memory budget in bytes.
        standard: size of a standardised value in bytes.
        gpu: plan for a GPU, which pads operands and takes time to launch each product.

    Raises:
        NumericsError: if the budget cannot hold one feature of one block.
    """
    align = GPU_COLUMNS if gpu else 1
    widest, rows, per_pair = -(-max(*sizes_a, *sizes_b) // align) * align, min(N, FEATURE_ROWS), _PRODUCT_BYTES
    # Both operands, the values being read and the prefetched values.
    per_value = 2 * standard + 2 * raw
    choices = []
    for width in _widths(_widest(budget, N * per_value, per_pair, widest, align)):
        panels = _panels(sizes_a, width)
        taken, each = N * per_value * width + per_pair * width**2, N * standard * width
        group = min(panels, 1 + (budget - taken) // each)
        choices.append(Blocks(width, N, group, 1, -(-panels // group), taken + (group - 1) * each))
    if width := _widest(budget, rows * per_value, per_pair, widest, align) if rows < N else 0:
        taken = rows * per_value * width + per_pair * width**2
        choices.append(Blocks(width, rows, 0, 2 + _panels(sizes_b, width), 2 + _panels(sizes_a, width), taken))
    if not choices:
        raise NumericsError(
            f"{N} samples need {align * rows * per_value + align**2 * per_pair:,} bytes of working memory, but only "
            f"{budget:,} are left of the budget; raise it (--memory-mb, or correlations.memory_mb)"
        )

    def cost(blocks: Blocks) -> int:
        products = _panels(sizes_a, blocks.width) * _panels(sizes_b, blocks.width) * -(-N // blocks.rows)
        read = N * (blocks.times_a * sum(sizes_a) + blocks.times_b * sum(sizes_b))
        return read + gpu * _LAUNCH_VALUES * products

    return min(choices, key=cost)


def _panels(sizes: Sequence[int], width: int) -> int:
    return sum(-(-size // width) for size in sizes)


def _widths(largest: int) -> Iterator[int]:
    """Yield candidate widths: with narrower panels more of them fit, while wider panels multiply faster."""
    width = largest
    while width:
        yield width
        width = width // 2 // FEATURE_COLUMNS * FEATURE_COLUMNS


def _widest(budget: int, per_feature: int, per_pair: int, widest: int, align: int) -> int:
    """The largest width w with w per_feature + w^2 per_pair within the budget, in whole chunks if possible; else 0."""
    if budget < align * per_feature + align**2 * per_pair:
        return 0
    width = int((-per_feature + (per_feature**2 + 4 * per_pair * budget) ** 0.5) / (2 * per_pair))
    while width * per_feature + width**2 * per_pair > budget:
        width -= 1
    width = min(width, widest)
    unit = align if width < FEATURE_COLUMNS or width == widest else FEATURE_COLUMNS
    return width // unit * unit
