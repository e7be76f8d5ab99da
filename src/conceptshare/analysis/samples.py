"""How well each sample's image and caption fit, by matched features of an image encoder and a text encoder."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from conceptshare.analysis.retrieval import Pairs, matched, read_rows
from conceptshare.analysis.tables import check_fit
from conceptshare.config.settings import MAX_FVU_GLOBAL
from conceptshare.correlations import FeatureStore, check_pair, max_correlations
from conceptshare.data.dataset import Data
from conceptshare.device import default_device
from conceptshare.io.errors import NumericsError, StoreError
from conceptshare.io.files import PARQUET, atomic_output
from conceptshare.io.progress import progress
from conceptshare.io.readers import FEATURES, check_samples, read_spec, unexplained_layers
from conceptshare.io.sizes import CKA_SAMPLES, FEATURE_ROWS, FIT_SAMPLES

_VALUES = 2**24
"""Values of features per batch of samples, unless it would have fewer rows than a chunk."""


def fit_table(
    image: Path,
    text: Path,
    data: Data,
    image_layers: Sequence[int] | None = None,
    text_layers: Sequence[int] | None = None,
    max_fvu_global: float = MAX_FVU_GLOBAL,
) -> pd.DataFrame:
    """The fit of each sample by the features of an image encoder and a text encoder, the worst first.

    Args:
        image: the feature store of the encoder that reads images.
        text: that of the encoder that reads captions, of the same samples.
        data: the samples.
        image_layers: the layers of ``image`` whose features are matched, all together; by default the last.
        text_layers: the same of ``text``.
        max_fvu_global: layers whose SAE has a larger FVU at global tokens are unexplained.

    Returns:
        ``row, id, caption, fit``: the sample's place in the data set, and the result of `fits`. ``attrs`` record
        ``layers``, those of each member, and ``unexplained``, which of them are not explained.

    Raises:
        StoreError: if a store is missing, damaged or of the other modality, has no such layer, or the stores or the
            data are of other samples.
        NumericsError: if there are fewer than 4 samples, or no feature of one correlates with any of the other.
    """
    stores = {"image": FeatureStore(image), "text": FeatureStore(text)}
    for modality, store in stores.items():
        if (reads := read_spec(store.path, FEATURES)["encoder"]["modality"]) != modality:
            raise StoreError(f"{store.path}: its encoder reads {reads}; name an image encoder, then a text encoder")
    check_pair(*stores.values())
    check_samples(image, data.folder, data.content_hash)
    captions = [data.caption(row) for row in range(len(data))]
    table = pd.DataFrame({"row": range(len(data)), "id": data.ids(), "caption": captions})
    chosen = {"image": image_layers, "text": text_layers}
    layers = {store.name: list(chosen[side] or store.layers[-1:]) for side, store in stores.items()}
    places = {store.name: [store.position(layer) for layer in layers[store.name]] for store in stores.values()}
    arrays = ([store.arrays[place] for place in places[store.name]] for store in stores.values())
    table = table.assign(fit=fits(*arrays)).sort_values("fit", kind="stable")
    table.attrs["features"] = {store.name: store.digest for store in stores.values()}
    table.attrs |= {"layers": layers, "max_fvu_global": max_fvu_global, "unexplained": {}}
    for store in stores.values():
        marked = unexplained_layers(store.path, max_fvu_global)
        table.attrs["unexplained"][store.name] = [store.layers[place] for place in places[store.name] if marked[place]]
    return table


def fits(a: Sequence[Any], b: Sequence[Any]) -> NDArray[np.float64]:
    """How far each sample's features in A and B agree more than those of two samples.

    A sample's similarity in A to a sample in B is the cosine of `retrieval.matched_retrieval`. Its fit is the mean of
    two z-scores of its similarity to itself: among those of it in A to up to 1,000 samples in B, and the reverse.
    Matches and scaling come from the other half of the samples, at most `CKA_SAMPLES` / 2 of them.

    Args:
        a: ``[N, F]`` features of each layer, read in slices of rows and columns; layers are taken together.
        b: ``[N, F']`` of the same samples.

    Returns:
        ``[N]`` float64; about 0 for a sample whose caption fits no better than another's.
    """
    N = a[0].shape[0]
    if N < 4:
        raise NumericsError(f"{N} samples; matches from one half of the samples and fits of the other need at least 4")
    found = np.empty(N)
    halves = slice(0, N // 2), slice(N // 2, N)
    for given, scored in (halves, halves[::-1]):
        fitted = slice(given.start, min(given.stop, given.start + CKA_SAMPLES // 2))
        x, y = (_rows(side, fitted) for side in (a, b))
        pairs = matched(max_correlations(x, y, what="matches of half of the samples"))
        if not len(pairs.rho):
            raise NumericsError("no feature of one encoder correlates with any of the other; nothing to score by")
        sides = [_Side(side, half, chosen, pairs) for side, half, chosen in ((a, x, pairs.of_a), (b, y, pairs.of_b))]
        others = slice(scored.start, min(scored.stop, scored.start + FIT_SAMPLES))
        compared = [side.vectors(others) for side in sides]
        rows = max(FEATURE_ROWS, _VALUES // len(pairs.rho))
        starts = range(scored.start, scored.stop, rows)
        for start in progress(starts, len(starts), "fit of samples", "batches"):
            batch = slice(start, min(start + rows, scored.stop))
            u, v = (side.vectors(batch) for side in sides)
            own = (u * v).sum(1)
            z = [
                _z(own, mine @ theirs.T, start - others.start)
                for mine, theirs in zip((u, v), compared[::-1], strict=True)
            ]
            found[batch] = ((z[0] + z[1]) / 2).cpu().numpy()
    return found


def _rows(layers: Sequence[Any], rows: slice) -> NDArray[np.float32]:
    """``[n, F]`` rows of the features of some layers."""
    return np.concatenate([read_rows(layer, rows) for layer in layers], axis=1)


class _Side:
    """One encoder's matched features, scaled as in the half that the matches come from."""

    def __init__(
        self, features: Sequence[Any], half: NDArray[np.float32], chosen: NDArray[np.int64], pairs: Pairs
    ) -> None:
        self._features, self._chosen = features, chosen
        self._mean = half.mean(axis=0, dtype=np.float64)[chosen]
        self._scale = pairs.rho**0.5 / half.std(axis=0, dtype=np.float64)[chosen]

    def vectors(self, rows: slice) -> torch.Tensor:
        """``[n, M]`` float32 vectors of length 1; 0 for a sample that has the mean of all features."""
        values = (_rows(self._features, rows)[:, self._chosen] - self._mean) * self._scale
        x = torch.from_numpy(values.astype(np.float32)).to(default_device())
        return torch.nn.functional.normalize(x, eps=1e-30)


def _z(own: torch.Tensor, similarity: torch.Tensor, first: int) -> torch.Tensor:
    """z-scores of ``own [n]`` among ``similarity [n, R]``, where column ``first`` + s is row s itself, and left out."""
    rows = torch.arange(len(own), device=own.device)
    rows = rows[rows + first < similarity.shape[1]]
    similarity[rows, rows + first] = torch.nan
    mean = similarity.nanmean(1)
    deviation = (similarity - mean[:, None]).square().nanmean(1).sqrt()
    return ((own - mean) / deviation.clamp(min=1e-12)).double()


def write_best(fit: pd.DataFrame, data: Data, keep: float, out: Path) -> int:
    """Write the samples with the best fit as a data set of their own, in the order of the data set.

    Args:
        fit: the table of `fit_table`.
        data: the samples.
        keep: share of the samples to keep.
        out: a Parquet file with the columns ``id, image, caption``, which a study can name as a source.

    Returns:
        Their number.

    Raises:
        StoreError: if the table is not of these samples.
        NumericsError: if fewer than 2 samples would be left.
    """
    ids = data.ids()
    check_fit(fit, ids)
    if round(keep * len(fit)) < 2:
        raise NumericsError(f"keep = {keep:g} of {len(fit)} samples leaves fewer than the 2 that correlations need")
    kept = sorted(fit.nlargest(round(keep * len(fit)), "fit").row)
    schema = pa.schema([("id", pa.string()), ("image", pa.binary()), ("caption", pa.string())])
    with atomic_output(out, PARQUET) as partial, pq.ParquetWriter(partial, schema) as writer:
        for start in range(0, len(kept), 256):
            rows = kept[start : start + 256]
            columns = [
                [ids[row] for row in rows],
                [data.image_bytes(row) for row in rows],
                [data.caption(row) for row in rows],
            ]
            writer.write_table(pa.table(columns, schema))
    return len(kept)
