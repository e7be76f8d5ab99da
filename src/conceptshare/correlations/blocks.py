"""How the stage `correlations` cuts its work to a memory budget. Without torch, so that `plan` can ask as well."""

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

from conceptshare.io.errors import NumericsError
from conceptshare.io.sizes import FEATURE_COLUMNS, FEATURE_ROWS

Precision = Literal["float32", "bfloat16"]

MEMORY_BYTES = 2**30
"""Default memory budget on a CPU."""

# Of a standardised value, at most; of a value of the product, its sum and what its maxima are found with.
_STANDARD_BYTES = 4
_PRODUCT_BYTES = 10


class Blocks(NamedTuple):
    """How the work is cut."""

    width: int
    """Features of a panel, at most."""
    rows: int
    """Samples that are read and multiplied at once."""
    group: int
    """Panels of A whose standardised features stay in memory together; none where not all samples are read at once."""
    times_a: int
    """How often A is read."""
    times_b: int
    """How often B is."""
    bytes: int
    """What it takes."""


def plan_blocks(N: int, sizes_a: Sequence[int], sizes_b: Sequence[int], raw: int, budget: int) -> Blocks:
    """The way to cut the work that reads least within the budget.

    Either panels of A are kept, as many as the budget holds, and B is read once for each group of them: where all are
    kept, both sides are read once. Or nothing is kept, and both are read for each product of two panels, some samples
    at a time, after two readings for means and lengths.

    Args:
        N: samples.
        sizes_a: features of each layer of A.
        sizes_b: the same of B.
        raw: bytes of a value as it is stored.
        budget: bytes.

    Raises:
        NumericsError: where the budget cannot hold one feature of one block.
    """
    widest, rows, per_pair = max(*sizes_a, *sizes_b), min(N, FEATURE_ROWS), _PRODUCT_BYTES
    # Both operands; what is being read, what is read ahead.
    per_value = 2 * _STANDARD_BYTES + 2 * raw
    choices = []
    for width in _widths(_widest(budget, N * per_value, per_pair, widest)):
        panels = _panels(sizes_a, width)
        taken, each = N * per_value * width + per_pair * width**2, N * _STANDARD_BYTES * width
        group = min(panels, 1 + (budget - taken) // each)
        choices.append(Blocks(width, N, group, 1, -(-panels // group), taken + (group - 1) * each))
    if width := _widest(budget, rows * per_value, per_pair, widest) if rows < N else 0:
        taken = rows * per_value * width + per_pair * width**2
        choices.append(Blocks(width, rows, 0, 2 + _panels(sizes_b, width), 2 + _panels(sizes_a, width), taken))
    if not choices:
        raise NumericsError(
            f"{N} samples need {rows * per_value + per_pair:,} bytes of working memory; raise the budget of "
            f"{budget:,} bytes (--memory-mb, or correlations.memory_mb)"
        )
    return min(choices, key=lambda blocks: blocks.times_a * sum(sizes_a) + blocks.times_b * sum(sizes_b))


def _panels(sizes: Sequence[int], width: int) -> int:
    return sum(-(-size // width) for size in sizes)


def _widths(largest: int) -> Iterator[int]:
    """Widths to choose from: a narrower panel leaves room for more of them, a wider one multiplies faster."""
    width = largest
    while width:
        yield width
        width = width // 2 // FEATURE_COLUMNS * FEATURE_COLUMNS


def _widest(budget: int, per_feature: int, per_pair: int, widest: int) -> int:
    """The largest width w with w per_feature + w^2 per_pair within the budget, in whole chunks if it can be; or 0."""
    if budget < per_feature + per_pair:
        return 0
    width = int((-per_feature + (per_feature**2 + 4 * per_pair * budget) ** 0.5) / (2 * per_pair))
    while width * per_feature + width**2 * per_pair > budget:
        width -= 1
    width = min(width, widest)
    return width if width < FEATURE_COLUMNS or width == widest else width // FEATURE_COLUMNS * FEATURE_COLUMNS
