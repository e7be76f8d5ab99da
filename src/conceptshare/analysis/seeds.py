"""How wMPPC and SAEs vary with the seeds of the SAEs: a matrix's table ``seeds``, and the stability of each SAE."""

from collections.abc import Iterable, Sequence
from itertools import permutations, product

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from conceptshare import metrics
from conceptshare.analysis.tables import Stores, part_of, side_by_side, wmppc_readings
from conceptshare.config.members import GroupedMember, Member, Pair, as_member
from conceptshare.io.readers import read_code

STABLE = 0.7
"""Correlation above which another seed has the same feature."""


def seeds_table(members: Sequence[GroupedMember], stores: Stores) -> pd.DataFrame:
    """wMPPC of every pair of seeds, with intervals over seeds and samples.

    One row per reading and ordered pair of seeds, for all seeds of one encoder, and for two encoders of which the
    matrix has several seeds. ``source`` and ``target`` are encoders. ``pairs`` is their number of pairs of seeds,
    ``mean`` the mean wMPPC of these, with its 95% interval ``low`` to ``high`` by `metrics.seed_interval`, and
    ``mean_excess`` the mean of ``excess``, which is as in `tables.matrix_table`, like ``unexplained``.

    Raises:
        StoreError: if a store is missing, or no feature of a member is active.
    """
    listed: dict[str, list[Member]] = {}
    seeds: dict[str, set[Member]] = {}
    for entry in members:
        member = as_member(entry.member)
        listed.setdefault(member.encoder, []).append(member)
        seeds.setdefault(member.encoder, {member}).update(map(as_member, entry.other_seeds))
    rows: list[dict[str, object]] = []
    for source, target in product(sorted(seeds), repeat=2):
        same = source == target
        pairs = list(permutations(sorted(seeds[source]), 2) if same else product(listed[source], listed[target]))
        if len(pairs) > 1:
            rows += _rows(pairs, stores)
    table = pd.DataFrame(rows).assign(code=read_code(stores.features / f"{members[0].member}.zarr"))
    table.attrs["max_fvu_global"] = stores.max_fvu_global
    table.attrs["features"] = stores.digests(str(member) for encoder in sorted(seeds) for member in seeds[encoder])
    return table


def _rows(pairs: Sequence[Pair], stores: Stores) -> list[dict[str, object]]:
    """The rows of all pairs of seeds of two encoders, or of one."""
    values, nulls, unexplained = (np.empty((len(pairs), len(metrics.READINGS))) for _ in range(3))
    influence: metrics.Array | float = 0.0
    for n, (source, target) in enumerate(pairs):
        S, _ = side_by_side(stores.active(str(source)))
        found = stores.pair(str(source), str(target))
        values[n] = [*wmppc_readings(found, S).values()]
        of_readings = metrics.null_readings(found.null, found.null_error, S, found.best.sizes_a, found.kept_a)
        nulls[n] = [null.mean() for null, _ in of_readings.values()]
        marked = [np.array(stores.unexplained(str(member))) for member in (source, target)]
        parts = [part_of(found, reading) for reading in metrics.READINGS]
        unexplained[n] = [marked[0][part.a].sum() + marked[1][part.b].sum() for part in parts]
        influence = influence + found.influence.astype(np.float64) / len(pairs)
    rows: list[dict[str, object]] = []
    for n, reading in enumerate(metrics.READINGS):
        low, high = metrics.seed_interval(values[:, n], _uses(pairs), np.asarray(influence)[n])
        excess = [metrics.excess(value, null) for value, null in zip(values[:, n], nulls[:, n], strict=True)]
        summary = {"pairs": len(pairs), "mean": values[:, n].mean(), "low": low, "high": high}
        summary["mean_excess"] = np.mean(excess)
        columns = values[:, n], nulls[:, n], excess, unexplained[:, n].astype(int)
        for (source, target), value, null, above, marks in zip(pairs, *columns, strict=True):
            cell: dict[str, object] = {"source": source.encoder, "target": target.encoder, "reading": reading}
            cell |= {"source_seed": source.seed, "target_seed": target.seed}
            rows.append(cell | {"wmppc": value, "null": null, "excess": above, "unexplained": marks} | summary)
    return rows


def _uses(pairs: Sequence[Pair]) -> list[NDArray[np.bool_]]:
    """For each encoder ``[seeds, pairs]``: which pairs use each of its seeds."""
    members = sorted({member for pair in pairs for member in pair})
    uses = {member: [member in pair for pair in pairs] for member in members}
    encoders = sorted({member.encoder for member in members})
    return [np.array([uses[member] for member in members if member.encoder == encoder]) for encoder in encoders]


def with_stability(table: pd.DataFrame, pairs: Iterable[Pair], stores: Stores) -> pd.DataFrame:
    """Add to a table of `tables.sae_table` the column ``stable``: the share of features that other seeds have too.

    That is the share of an SAE's features, without those that never vary, with a correlation above `STABLE` with a
    feature of the same layer of another seed: the mean over the other seeds, NaN if there are none.

    Args:
        table: the table.
        pairs: pairs of two seeds of one encoder.
        stores: folders of the features and correlations of these pairs.

    Raises:
        StoreError: if a store is missing.
    """
    shares: dict[tuple[str, int, int], list[float]] = {}
    for pair in pairs:
        for source, target in permutations(pair):
            found = stores.pair(str(source), str(target))
            ends = np.cumsum(found.best.sizes_a)
            for n, (layer, size, end) in enumerate(zip(found.layers_a, found.best.sizes_a, ends, strict=True)):
                rho, match = (of[n, end - size : end] for of in (found.best.rho_ab, found.best.match_ab))
                if (match >= 0).any():
                    shares.setdefault((*source, layer), []).append(float((rho[match >= 0] > STABLE).mean()))
    saes = zip(table.encoder, table.seed, table.layer, strict=True)
    return table.assign(stable=[np.mean(shares[sae]) if sae in shares else float("nan") for sae in saes])
