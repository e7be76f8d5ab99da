"""Two members, layer by layer: every feature of one with its best match in each layer of the other."""

from pathlib import Path

import numpy as np

from conceptshare.io.files import PAIR_PAGES, atomic_output
from conceptshare.io.layout import layer_name
from conceptshare.io.readers import read_correlations
from conceptshare.pages._script import numbers, write_script


def write_pair(correlations: Path, source: str, target: str, place: str, out: Path) -> None:
    """Write, for each layer of ``source``, its features' best matches in each layer of ``target``.

    Args:
        correlations: the pair's store.
        source: a member.
        target: the other.
        place: the path of ``out`` in the site.
        out: the folder to write.

    Raises:
        StoreError: if the store is missing or damaged.
    """
    pair = read_correlations(correlations, source)
    ends = np.cumsum(pair.best.sizes_a)
    with atomic_output(out, PAIR_PAGES) as partial:
        partial.mkdir()
        for layer, first, last in zip(pair.layers_a, ends - pair.best.sizes_a, ends, strict=True):
            key = layer_name(layer)
            matches = {
                "target": target,
                "layers": pair.layers_b,
                "rho": [numbers(row[first:last]) for row in pair.best.rho_ab],
                "match": [row[first:last].tolist() for row in pair.best.match_ab],
            }
            write_script(partial / f"{key}.js", f"{place}/{key}", matches)
