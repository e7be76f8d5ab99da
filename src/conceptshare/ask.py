"""Answers from feature stores alone, without a study: wMPPC of two of them, Comparative Sharedness of some.

Nothing is stored. The numbers are those of the stages `correlations` and `metrics` for the same stores.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from conceptshare import metrics
from conceptshare.blocks import Precision
from conceptshare.correlations import FeatureStore, check_pair, max_correlations
from conceptshare.errors import StoreError
from conceptshare.tables import active_statistics, ranking, wmppc_readings


def wmppc_between(a: Path, b: Path, memory_bytes: int | None = None, precision: Precision = "float32") -> pd.DataFrame:
    """WMPPC and MPPC between two feature stores, a row for each direction.

    Args:
        a: a feature store.
        b: another of the same samples.
        memory_bytes: bound of the working memory, as of `max_correlations`.
        precision: what standardised features are rounded to in the product.

    Returns:
        The columns ``source`` and ``target``, the wMPPC of each of `metrics.READINGS`, and ``mppc``, over all layers.

    Raises:
        StoreError: where a store is not whole or has no active feature, or they are not of the same samples.
        NumericsError: where a feature is not finite.
    """
    layers = _layers([a, b])
    S = {path: np.concatenate([layer.strength for layer in active_statistics(path).values()]) for path in (a, b)}
    side_a, side_b = (list(layers[path].values()) for path in (a, b))
    found = max_correlations(side_a, side_b, memory_bytes=memory_bytes, precision=precision)
    names = _names([a, b])
    return pd.DataFrame(
        [
            {
                "source": names[source],
                "target": names[target],
                **wmppc_readings(of_source.rho_ab, S[source], of_source.sizes_a),
                "mppc": metrics.mppc(of_source.rho_ab.max(axis=0)),
            }
            for source, target, of_source in ((a, b, found), (b, a, found.reverse()))
        ]
    )


def sharedness_of(source: Path, shared_with: Sequence[Path], not_shared_with: Sequence[Path]) -> pd.DataFrame:
    """The last-layer features of a store by Comparative Sharedness, with the columns of `tables.ranking`.

    Only last layers are correlated.

    Args:
        source: the feature store whose features are ranked.
        shared_with: the stores of the group G that should share them.
        not_shared_with: those of the group H that should not.

    Raises:
        StoreError: where a store is not whole or has no active feature, they are not of the same samples, or one is
            in both groups, or the source in a group.
        NumericsError: where a feature is not finite.
    """
    groups = [*shared_with, *not_shared_with]
    _check_groups(source, shared_with, not_shared_with)
    layers, names = _layers([source, *groups]), _names([source, *groups])
    statistics = {path: active_statistics(path) for path in (source, *groups)}[source]
    last = max(statistics)
    rho = {
        names[path]: max_correlations(layers[source][last], layers[path][max(layers[path])]).rho_ab[0]
        for path in groups
    }
    named = ([names[path] for path in group] for group in (shared_with, not_shared_with))
    return ranking(names[source], last, statistics[last], rho, *named)


def _layers(paths: Iterable[Path]) -> dict[Path, dict[int, Any]]:
    """The feature arrays ``[N, F]`` of stores, by layer, which are of the same samples."""
    stores = {path: FeatureStore(path) for path in paths}
    first, *others = stores.values()
    for store in others or [first]:
        check_pair(first, store)
    return {path: dict(zip(store.layers, store.arrays, strict=True)) for path, store in stores.items()}


def _names(paths: Sequence[Path]) -> dict[Path, str]:
    """The members that stores are of, or their paths where two of them have one name."""
    distinct = list(dict.fromkeys(paths))
    stems = [path.stem for path in distinct]
    return {path: path.stem if stems.count(path.stem) == 1 else str(path) for path in distinct}


def _check_groups(source: Path, shared_with: Sequence[Path], not_shared_with: Sequence[Path]) -> None:
    shared, unshared = ({path.resolve(): path for path in group} for group in (shared_with, not_shared_with))
    if source.resolve() in shared | unshared:
        raise StoreError(
            f"{source}: the source is also in a group it is compared with, where every feature has a perfect match; "
            f"leave it out there"
        )
    for place in shared.keys() & unshared.keys():
        raise StoreError(
            f"{shared[place]} is in both groups, and cannot share a feature and not share it; leave it out of one"
        )
