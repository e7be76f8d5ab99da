"""wMPPC and Comparative Sharedness directly from feature stores, without a study.

Nothing is stored. The values equal those of the stages `correlations` and `metrics` for the same stores.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import pandas as pd

from conceptshare.analysis.tables import (
    active_counts,
    active_statistics,
    cells_of,
    ranking,
    side_by_side,
    with_intervals,
)
from conceptshare.config.settings import MAX_FVU_GLOBAL
from conceptshare.correlations import FeatureStore, check_pair, judged, last_layers, max_correlations
from conceptshare.correlations.blocks import Precision
from conceptshare.io.errors import StoreError
from conceptshare.io.readers import unexplained_layers

COLUMNS = (
    "source",
    "target",
    "reading",
    "wmppc",
    "low",
    "high",
    "null",
    "excess",
    "cross_fitted",
    "cross_fitted_low",
    "cross_fitted_high",
    "mppc",
    "features",
    "beyond_shuffled",
)
"""Columns of the result of `wmppc_between`."""


def wmppc_between(
    a: Path,
    b: Path,
    memory_bytes: int | None = None,
    precision: Precision = "float32",
    leave_out_above: float | None = None,
) -> pd.DataFrame:
    """wMPPC between two feature stores, with its interval and floor: one row per direction and reading.

    Args:
        a: a feature store.
        b: another feature store of the same samples.
        memory_bytes: limit of the working memory, see `max_correlations`.
        precision: what standardised features are rounded to in the product.
        leave_out_above: ``pooled`` and ``layer_mean`` leave out layers whose SAE has a larger FVU at global tokens.

    Returns:
        A table with the columns `COLUMNS`, as in `tables.matrix_table`.

    Raises:
        StoreError: if a store is incomplete, damaged, without an active feature or without a layer left, or they have
            different samples.
        NumericsError: if a feature is not finite.
    """
    stores, names = _stores([a, b], leave_out_above), _names([a, b])
    statistics = {path: active_statistics(path) for path in (a, b)}
    found = max_correlations(stores[a].arrays, stores[b].arrays, memory_bytes=memory_bytes, precision=precision)
    rows = []
    pairs = judged(stores[a], stores[b], found, memory_bytes, precision)
    for source, target, pair in zip((a, b), (b, a), pairs, strict=True):
        cells = cells_of(pair, *side_by_side(statistics[source]), active_counts(statistics[target]))
        named = {"source": names[source], "target": names[target]}
        rows += [named | cell for cell in with_intervals(cells, pair.influence, pair.cross_fitted.influence)]
    return pd.DataFrame(rows)[list(COLUMNS)]


def sharedness_of(
    source: Path,
    shared_with: Sequence[Path],
    not_shared_with: Sequence[Path],
    max_fvu_global: float = MAX_FVU_GLOBAL,
) -> pd.DataFrame:
    """Rank the last-layer features of a store by Comparative Sharedness, like `tables.sharedness_table`.

    Only last layers are correlated.

    Args:
        source: the feature store whose features are ranked.
        shared_with: the stores of the group G, which should share them.
        not_shared_with: the stores of the group H, which should not.
        max_fvu_global: a last layer whose SAE has a larger FVU at global tokens is marked as unexplained.

    Raises:
        StoreError: if a store is incomplete, damaged or without an active feature, they have different samples, one is
            in both groups, or the source is in a group.
        NumericsError: if a feature is not finite.
    """
    groups = [*shared_with, *not_shared_with]
    _check_groups(source, shared_with, not_shared_with)
    stores, names = _stores([source, *groups]), _names([source, *groups])
    statistics = {path: active_statistics(path) for path in (source, *groups)}[source]
    last = max(statistics)
    pairs = {}
    for path in groups:
        # In the order of a study's pairs, because the samples of the first are re-paired.
        first, second = sorted((source, path), key=lambda store: store.stem.rpartition("@"))
        found = max_correlations(stores[first].arrays[-1], stores[second].arrays[-1])
        of_first, of_second = last_layers(stores[first], stores[second], found)
        pairs[names[path]] = of_first if first == source else of_second
    of_g, of_h = ([names[path] for path in group] for group in (shared_with, not_shared_with))
    unexplained = [names[path] for path in (source, *groups) if unexplained_layers(path, max_fvu_global)[-1]]
    drawn = {name: [name] for name in pairs}
    table = ranking(names[source], last, statistics[last], pairs, of_g, of_h, drawn, unexplained)
    table["code"] = stores[source].code
    table.attrs |= {"features": {names[path]: stores[path].digest for path in stores}, "max_fvu_global": max_fvu_global}
    return table


def _stores(paths: Iterable[Path], leave_out_above: float | None = None) -> dict[Path, FeatureStore]:
    """Open feature stores, and make sure that they have the same samples."""
    stores = {path: FeatureStore(path, leave_out_above) for path in paths}
    first, *others = stores.values()
    for store in others or [first]:
        check_pair(first, store)
    return stores


def _names(paths: Sequence[Path]) -> dict[Path, str]:
    """Names of the stores' members, or their paths if two have the same name."""
    distinct = list(dict.fromkeys(paths))
    stems = [path.stem for path in distinct]
    return {path: path.stem if stems.count(path.stem) == 1 else str(path) for path in distinct}


def _check_groups(source: Path, shared_with: Sequence[Path], not_shared_with: Sequence[Path]) -> None:
    shared, unshared = ({path.resolve(): path for path in group} for group in (shared_with, not_shared_with))
    if source.resolve() in shared | unshared:
        raise StoreError(
            f"{source}: the source is also in a group it is compared with, where every feature has a perfect match; "
            f"remove it there"
        )
    for path in shared.keys() & unshared.keys():
        raise StoreError(f"{shared[path]} is in both groups; remove it from one of them")
