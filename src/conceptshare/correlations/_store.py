"""The store of a pair of members: matches, floors, nulls, influences, and full matrices if requested."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from conceptshare.correlations._arrays import View, sample_count
from conceptshare.correlations._crossfit import cross_fitted
from conceptshare.correlations._engine import Full, Kept, max_correlations
from conceptshare.correlations._influence import Encoder, influences, matches_of
from conceptshare.correlations._null import repaired, repaired_features
from conceptshare.correlations._one_to_one import one_to_one
from conceptshare.correlations._resample import resampled
from conceptshare.correlations.blocks import MEMORY_BYTES, Blocks, Precision
from conceptshare.io.errors import StoreError
from conceptshare.io.files import FILE, Unchanged, unlocked_output
from conceptshare.io.layout import layer_name
from conceptshare.io.readers import (
    CORRELATIONS,
    FEATURES,
    LastLayer,
    MaxCorrelations,
    PairCorrelations,
    read_code,
    unexplained_layers,
)
from conceptshare.io.sizes import FLOOR_FEATURES
from conceptshare.io.store import layer_array, new_array, new_store, open_store, resuming, save_array
from conceptshare.sae.features import read_features

_PROGRESS = "progress.npz"
_FULL_SIDE = 512
_FOUND = tuple(MaxCorrelations.__dataclass_fields__)


def correlate_stores(
    path_a: Path,
    path_b: Path,
    out: Path,
    memory_bytes: int | None = None,
    precision: Precision = "float32",
    full: Sequence[tuple[int, int]] = (),
    leave_out_above: float | None = None,
) -> None:
    """Correlate two feature stores and write the store ``out``, resuming an interrupted attempt if there is one.

    Args:
        path_a: a feature store.
        path_b: another feature store of the same samples, or the same store.
        out: the store to write.
        memory_bytes: as in `max_correlations`.
        precision: as in `max_correlations`.
        full: pairs of a layer of A and one of B whose full matrix is written too.
        leave_out_above: as in `FeatureStore`.

    Raises:
        StoreError: if a store is incomplete or damaged, has no such layer, no active feature or no layer left, or they
            have different samples or another order.
        NumericsError: if a feature is not finite, or there is only one sample.
    """
    inputs = Unchanged(path_a, path_b)
    a, b = FeatureStore(path_a, leave_out_above), FeatureStore(path_b, leave_out_above)
    check_pair(a, b)
    described: dict[str, Any] = {
        "a": path_a.stem,
        "b": path_b.stem,
        "layers_a": a.layers,
        "layers_b": b.layers,
        "content_hash": a.content_hash,
        "samples": a.samples,
        "precision": precision,
        "full": sorted([int(layer_a), int(layer_b)] for layer_a, layer_b in full),
        "features_a": a.digest,
        "features_b": b.digest,
        "unexplained_layers": "mark" if leave_out_above is None else "leave_out",
        "left_out_a": a.left_out,
        "left_out_b": b.left_out,
    }
    if leave_out_above is not None:
        described["max_fvu_global"] = leave_out_above
    for layer_a, layer_b in full:
        a.position(layer_a), b.position(layer_b)
    with new_store(out, CORRELATIONS, described, resume=True) as store, inputs:
        progress = _Progress(Path(store.store.root) / _PROGRESS)  # type: ignore[attr-defined]
        with resuming(out):
            matrices = {
                (a.position(layer_a), b.position(layer_b)): _matrix(store, layer_a, layer_b, a, b)
                for layer_a, layer_b in full
            }
            kept = progress.read()
        found = max_correlations(a.arrays, b.arrays, memory_bytes, precision, matrices, out.stem, kept, progress.write)
        arrays = dict(vars(found))
        for direction, pair in zip(("ab", "ba"), judged(a, b, found, memory_bytes, precision), strict=True):
            arrays |= {f"floor_{direction}": pair.floor, f"floor_sizes_{direction[0]}": pair.floor_sizes}
            arrays |= {f"null_{direction}": pair.null, f"null_error_{direction}": pair.null_error}
            arrays[f"influence_{direction}"] = pair.influence
            arrays |= {f"iou_{direction}": pair.iou, f"one_to_one_{direction}": pair.one_to_one}
            arrays |= {f"cross_fitted_{name}_{direction}": values for name, values in vars(pair.cross_fitted).items()}
        for direction, last in zip(("ab", "ba"), last_layers(a, b, found, memory_bytes, precision), strict=True):
            arrays[f"null_features_{direction}"] = last.null
            arrays[f"resampled_rho_{direction}"] = last.resampled_rho
            arrays[f"resampled_strength_{direction}"] = last.resampled_strength
        for name, values in arrays.items():
            if name in store:  # from an attempt that was interrupted while writing these
                del store[name]
            save_array(store, name, values)
        progress.remove()


def check_pair(a: "FeatureStore", b: "FeatureStore") -> None:
    """Make sure that two stores can be correlated.

    Raises:
        StoreError: if they have different samples or another order, only one is of features after TopK, or no feature
            of one is active.
        NumericsError: if there is only one sample.
    """
    if a.content_hash != b.content_hash:
        raise StoreError(
            f"{a.path} and {b.path} have different samples, or another order; make both from the same data set"
        )
    if a.code != b.code:
        raise StoreError(f"{a.path} has features {a.code}, but {b.path} {b.code}; compare features of one code")
    sample_count([*a.arrays, *b.arrays])
    for store in (a, b):
        if not store.encoder().strength.any():
            raise StoreError(
                f"{store.path}: no sample activates any of its features; train its SAEs with other settings"
            )


def judged(
    a: "FeatureStore",
    b: "FeatureStore",
    found: MaxCorrelations,
    memory_bytes: int | None = None,
    precision: Precision = "float32",
) -> tuple[PairCorrelations, PairCorrelations]:
    """Add floors, nulls, influences and companions to the best matches of two stores, from A to B and from B to A."""
    floors = [
        shuffled_floor(source.arrays, target.arrays, memory_bytes, precision, f"floor of {source.name}")
        for source, target in ((a, b), (b, a))
    ]
    nulls = [
        repaired(
            source.arrays,
            source.strengths,
            target.arrays,
            memory_bytes,
            precision,
            f"re-paired samples of {source.name}",
            target.kept,
        )
        for source, target in ((a, b), (b, a))
    ]
    names = f"influence, {a.name} and {b.name}"
    matches = matches_of(found, found.rho_ab, b.kept), matches_of(found.reverse(), found.rho_ba, a.kept)
    of_both = influences(a.encoder(), b.encoder(), *matches, memory_bytes or MEMORY_BYTES, names)
    crossed = cross_fitted(a.encoder(), b.encoder(), memory_bytes, precision, f"cross-fit, {a.name} and {b.name}")
    partners_of = one_to_one(found, a.kept, b.kept)
    of_ab, of_ba = (
        PairCorrelations(
            best=best,
            layers_a=source.layers,
            layers_b=target.layers,
            kept_a=source.kept,
            kept_b=target.kept,
            samples=a.samples,
            floor=floor.rho_ab,
            floor_sizes=floor.sizes_a,
            null=null.values,
            null_error=null.error,
            influence=matched.influence,
            iou=matched.iou,
            one_to_one=partners,
            cross_fitted=of_halves,
        )
        for best, source, target, floor, null, matched, partners, of_halves in zip(
            (found, found.reverse()), (a, b), (b, a), floors, nulls, of_both, partners_of, crossed, strict=True
        )
    )
    return of_ab, of_ba


def last_layers(
    a: "FeatureStore",
    b: "FeatureStore",
    found: MaxCorrelations,
    memory_bytes: int | None = None,
    precision: Precision = "float32",
) -> tuple[LastLayer, LastLayer]:
    """What Comparative Sharedness needs of the last layers of two stores, from A to B and from B to A.

    Args:
        a: a feature store.
        b: another one.
        found: their best matches; only those between last layers are used.
        memory_bytes: as in `max_correlations`.
        precision: as in `max_correlations`.
    """
    names = f"{a.name} and {b.name}"
    last_a, last_b = slice(-a.arrays[-1].shape[1], None), slice(-b.arrays[-1].shape[1], None)
    null_ab, null_ba = repaired_features(
        a.arrays[-1], b.arrays[-1], memory_bytes, precision, f"re-paired last layers, {names}"
    )
    samples_ab, samples_ba = resampled(
        a.last(),
        b.last(),
        found.match_ab[-1, last_a],
        found.match_ba[-1, last_b],
        memory_bytes or MEMORY_BYTES,
        f"resamples, {names}",
    )
    of_ab = LastLayer(found.rho_ab[-1, last_a], null_ab, *samples_ab)
    return of_ab, LastLayer(found.rho_ba[-1, last_b], null_ba, *samples_ba)


def shuffled_floor(
    a: Sequence[Any], b: Sequence[Any], memory_bytes: int | None, precision: Precision, what: str
) -> MaxCorrelations:
    """Best matches by chance: those of the first features of each layer of A, with B's samples shuffled.

    Samples are in random order, so it suffices to pair sample i with sample i + N/2: no sample is paired with itself,
    and reading stays sequential.
    """
    N = a[0].shape[0]
    first = [View(layer, min(FLOOR_FEATURES, layer.shape[1]), 0, N) for layer in a]
    shuffled = [View(layer, layer.shape[1], N // 2, N) for layer in b]
    return max_correlations(first, shuffled, memory_bytes, precision, what=what)


class FeatureStore:
    """A feature store, open for reading."""

    def __init__(self, path: Path, leave_out_above: float | None = None) -> None:
        """Open the store.

        Args:
            path: the store.
            leave_out_above: layers whose SAE has a larger FVU at global tokens take no part in ``pooled`` and
                ``layer_mean``, neither as source nor as target.

        Raises:
            StoreError: if it is missing, incomplete or damaged, or all of its layers would be left out.
        """
        store: Any = open_store(path, FEATURES)
        self.path, self.name, self.digest = path, path.stem, str(store.attrs["digest"])
        spec: Any = store.attrs["spec"]
        self.layers: list[int] = spec["layers"]
        bound = np.inf if leave_out_above is None else leave_out_above
        self.kept = ~np.array(unexplained_layers(path, bound))
        """``[L]`` which layers take part in ``pooled`` and ``layer_mean``."""
        self.left_out = [layer for layer, kept in zip(self.layers, self.kept, strict=True) if not kept]
        if not self.kept.any():
            raise StoreError(
                f"{path}: the SAEs of all its layers have an FVU above max_fvu_global = {bound:g} at global tokens, "
                f"and unexplained_layers: leave_out would leave none; train better SAEs, raise max_fvu_global, remove "
                f"the encoder from the comparison, or set correlations.unexplained_layers: mark"
            )
        self.samples: int = spec["samples"]
        self.content_hash: str = spec["content_hash"]
        self.code = read_code(path)
        features = read_features(path).values()
        # The offset does not affect correlations, and adding it would cost precision.
        self.arrays = [layer.stored for layer in features]
        self._offset = np.concatenate([layer.offset for layer in features])
        self.strengths, deviations = (
            [layer_array(store, n, name, path)[:] for n in self.layers] for name in ("strength", "deviation")
        )
        self._strength, self._deviation = np.concatenate(self.strengths), np.concatenate(deviations)

    def encoder(self) -> Encoder:
        """The features, with the statistics that standardise them."""
        mean = self._strength / self.samples - self._offset
        return Encoder(self.arrays, self._strength, mean, self._deviation, self._offset, self.kept)

    def last(self) -> Encoder:
        """The same of the last layer alone."""
        layers, *statistics, kept = vars(self.encoder()).values()
        strength, mean, deviation, offset = (values[-layers[-1].shape[1] :] for values in statistics)
        return Encoder(layers[-1:], strength, mean, deviation, offset, kept[-1:])

    def position(self, layer: int) -> int:
        """The position of a layer among the store's layers, from 0.

        Raises:
            StoreError: if it has no such layer.
        """
        if layer not in self.layers:
            raise StoreError(f"{self.path}: no layer {layer}; it has {', '.join(map(str, self.layers))}")
        return self.layers.index(layer)


class _Progress:
    """The maxima so far, in a file that is replaced atomically, with the chunks of full matrices at that time."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> Kept | None:
        """Read the progress of an earlier attempt, if any."""
        if not self._path.is_file():
            return None
        with np.load(self._path) as kept:
            lost = [name for name in kept["files"].tolist() if not (self._path.parent / name).is_file()]
            if lost:
                raise ValueError(f"{lost[0]} is lost")
            found = MaxCorrelations(**{name: kept[name] for name in _FOUND})
            return Kept(found, int(kept["steps"]), Blocks(*kept["blocks"].tolist()))

    def write(self, kept: Kept) -> None:
        """Save the progress."""
        with unlocked_output(self._path, FILE) as partial, partial.open("wb") as file:
            chunks = (self._path.parent / "full").glob("*/c/*/*")
            files = np.array(sorted(str(chunk.relative_to(self._path.parent)) for chunk in chunks), np.str_)
            np.savez(file, steps=kept.steps, blocks=np.array(kept.blocks), files=files, **vars(kept.best))

    def remove(self) -> None:
        """Remove the file, which is not part of the finished store."""
        self._path.unlink(missing_ok=True)


def _matrix(store: zarr.Group, layer_a: int, layer_b: int, a: FeatureStore, b: FeatureStore) -> Full:
    """The array for a full matrix."""
    name = f"full/{layer_name(layer_a)}__{layer_name(layer_b)}"
    if name not in store:
        shape = a.arrays[a.position(layer_a)].shape[1], b.arrays[b.position(layer_b)].shape[1]
        new_array(store, name, shape, np.float32, (min(_FULL_SIDE, shape[0]), min(_FULL_SIDE, shape[1])))
    array: Any = store[name]
    return array  # type: ignore[no-any-return]
