"""Stage `metrics`: tidy tables from the correlation and feature stores of a study, as CSV and Parquet.

One row a value, so that pandas, R or a spreadsheet can pivot them at will. The mathematics is in `metrics`.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from conceptshare import metrics
from conceptshare.correlations import PairCorrelations, read_correlations
from conceptshare.errors import StoreError
from conceptshare.features import FeatureStatistics, read_statistics
from conceptshare.store import layer_name, written_aside
from conceptshare.study import Member, pair_name


class Stores(NamedTuple):
    """Where the stores of one data set and SAE setting lie."""

    features: Path
    correlations: Path

    def statistics(self, member: str) -> dict[int, FeatureStatistics]:
        """A member's feature statistics by layer."""
        return read_statistics(self.features / f"{member}.zarr")

    def pair(self, source: str, target: str) -> PairCorrelations:
        """The best matches of the source's features in the target."""
        name = pair_name(as_member(source), as_member(target))
        return read_correlations(self.correlations / f"{name}.zarr", source)


class GroupedMember(NamedTuple):
    """A member of a matrix with its group."""

    member: str
    modality: str
    kind: str


def matrix_table(members: Sequence[GroupedMember], stores: Stores) -> pd.DataFrame:
    """WMPPC and MPPC from every member to every other, for three readings.

    The readings are ``pooled`` and ``layer_mean`` over all layers, and ``last``, the last recorded layers alone.
    """
    rows = []
    for source in members:
        statistics = stores.statistics(source.member)
        S = np.concatenate([layer.strength for layer in statistics.values()])
        for target in members:
            if source == target:
                continue
            pair = stores.pair(source.member, target.member)
            described = {
                "source": source.member,
                "target": target.member,
                "source_modality": source.modality,
                "target_modality": target.modality,
                "source_kind": source.kind,
                "target_kind": target.kind,
            }
            rows += [described | reading for reading in _readings(pair, S)]
    return pd.DataFrame(rows)


def _readings(pair: PairCorrelations, S: metrics.Array) -> list[dict[str, Any]]:
    rho, sizes = pair.found.rho_ab, pair.found.sizes_a
    last = slice(len(S) - int(sizes[-1]), len(S))
    best = rho.max(axis=0)
    return [
        {"reading": "pooled", "wmppc": metrics.wmppc_pooled(rho, S), "mppc": metrics.mppc(best)},
        {"reading": "layer_mean", "wmppc": metrics.wmppc_layer_mean(rho, S, sizes), "mppc": metrics.mppc(best)},
        {"reading": "last", "wmppc": metrics.wmppc(rho[-1, last], S[last]), "mppc": metrics.mppc(rho[-1, last])},
    ]


def layerwise_table(pairs: Sequence[tuple[str, str]], stores: Stores) -> pd.DataFrame:
    """WMPPC and MPPC from each layer of one member to each of another, in both directions."""
    rows = []
    for a, b in pairs:
        for source, target in ((a, b), (b, a)):
            pair = stores.pair(source, target)
            statistics = stores.statistics(source)
            ends = np.cumsum(pair.found.sizes_a)
            for layer, size, end in zip(pair.layers_a, pair.found.sizes_a, ends, strict=True):
                for target_layer, rho in zip(pair.layers_b, pair.found.rho_ab[:, end - size : end], strict=True):
                    rows.append(
                        {
                            "source": source,
                            "target": target,
                            "source_layer": layer,
                            "target_layer": target_layer,
                            "wmppc": metrics.wmppc(rho, statistics[layer].strength),
                            "mppc": metrics.mppc(rho),
                        }
                    )
    return pd.DataFrame(rows)


def sharedness_table(
    source: str, shared_with: Sequence[str], not_shared_with: Sequence[str], stores: Stores
) -> pd.DataFrame:
    """The source's last-layer features by Comparative Sharedness, the most shared with G and least with H first.

    A feature's rho with a member is its best match in that member's last layer. Ties keep the features' order.
    """
    statistics = stores.statistics(source)
    layer = max(statistics)
    of_layer = statistics[layer]
    F = len(of_layer.strength)
    rho = {
        member: stores.pair(source, member).found.rho_ab[-1, -F:].astype(np.float64)
        for member in [*shared_with, *not_shared_with]
    }
    g, h = (np.stack([rho[member] for member in group]) for group in (shared_with, not_shared_with))
    table = pd.DataFrame(
        {
            "source": source,
            "layer": layer,
            "feature": np.arange(F),
            "delta": metrics.comparative_sharedness(of_layer.strength, g, h),
            "strength": of_layer.strength,
            "density": of_layer.density,
            "rho_g": g.min(axis=0),
            "rho_h": h.max(axis=0),
            **{f"rho[{member}]": values for member, values in rho.items()},
        }
    )
    table = table.sort_values("delta", ascending=False, kind="stable", ignore_index=True)
    table.insert(0, "rank", np.arange(1, F + 1))
    return table


def sae_table(members: Sequence[str], saes: Path, stores: Stores) -> pd.DataFrame:
    """Size and quality of every SAE: FVU, L0 and dead latents over all tokens and over global tokens.

    Raises:
        StoreError: where an SAE's metrics are missing or unreadable.
    """
    rows = []
    for text in members:
        member = as_member(text)
        for layer, statistics in stores.statistics(text).items():
            folder = saes / member.encoder / layer_name(layer) / f"seed-{member.seed}"
            try:
                found = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise StoreError(f"{folder}: no readable metrics ({error}); run the sae stage") from None
            rows.append(
                {
                    "encoder": member.encoder,
                    "seed": member.seed,
                    "layer": layer,
                    "latents": len(statistics.strength),
                    "steps": found["steps"],
                    **{f"{key}_all": found["all_tokens"][key] for key in ("fvu", "l0", "dead")},
                    **{f"{key}_global": found["global_tokens"][key] for key in ("fvu", "l0", "dead")},
                    "silent_features": int((statistics.density == 0).sum()),
                }
            )
    return pd.DataFrame(rows)


def write_table(table: pd.DataFrame, out: Path) -> None:
    """Write a table as CSV at ``out`` and as Parquet beside it."""
    with written_aside(out.with_suffix(".parquet")) as partial:
        table.to_parquet(partial, index=False)
    with written_aside(out) as partial:
        table.to_csv(partial, index=False, float_format="%.6g", lineterminator="\n")


def as_member(text: str) -> Member:
    """The member that ``encoder@seed`` names."""
    encoder, _, seed = text.rpartition("@")
    return Member(encoder, int(seed))
