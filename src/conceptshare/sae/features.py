"""Stage `features`: the SAE features of every sample's global token, after ReLU, and before or after TopK.

`results/{dataset}/features/{sae}/{encoder}@{seed}.zarr` holds for each layer, before TopK, ``features [N, F]`` float16
minus each feature's ``offset [F]`` float32; the strength S ``strength [F]`` (summed activation), the fraction of
positive samples ``density [F]`` and the standard ``deviation [F]`` over the samples, all float64; and the samples with
each feature's largest activations, ``top_samples [F, K]`` int32 with ``top_values [F, K]`` float32, in decreasing order
and padded with -1. Statistics are those of the stored values plus the offset, as `read_features` returns them. If the
study does not keep features, the array ``features`` is left out, and `read_features` recomputes it from the global
tokens and the SAEs: the same operation on the same blocks, so on the same kind of device the same bytes.

After TopK, at most k features of a sample are above 0; with another activation, k is the largest number of any sample.
In place of ``features``, stores in `features/{sae}+after_topk/` hold ``values [N, k]`` float16, minus the offset, and
``places [N, k]`` int32, the features that have them, or -1. All else is the same, and `read_features` makes slices
dense.

float16 has a relative rounding error of up to 2^-11. For a feature that is nearly constant over samples, such as one
that marks the global token, this would destroy most of its variation. Therefore, if mean^2 of a feature exceeds 3
variances, its mean is subtracted first. The mean is rounded to float16 if the feature is zero anywhere, so that zero
stays exact, and to float32 otherwise. docs/formats.md derives a bound on the error of correlations.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr
from numpy.typing import NDArray
from torch import Tensor

from conceptshare.activations import extraction
from conceptshare.device import default_device, full_float32
from conceptshare.io.errors import StoreError
from conceptshare.io.files import Unchanged
from conceptshare.io.layout import Code, layer_name
from conceptshare.io.progress import progress
from conceptshare.io.readers import FEATURES, LayerFeatures, read_kept_features, source_of
from conceptshare.io.sizes import (
    FEATURE_COLUMNS,
    FEATURE_ROWS,
    IN_MEMORY_BYTES,
    SHARD_BYTES,
    SLAB_BYTES,
    TOP_SAMPLES,
)
from conceptshare.io.store import RowWriter, as_float16, layer_array, new_array, new_store, open_store, save_array
from conceptshare.sae import SAE, TopK, load_sae
from conceptshare.sae.folder import REMEDY, fvu_global, sae_of

# Rows of global tokens that are copied to a GPU at a time, in whole blocks.
_GPU_ROWS = 64 * FEATURE_ROWS


@dataclass
class Top:
    """Streaming top samples of each feature."""

    values: Tensor
    """``[K, F]``"""
    samples: Tensor
    """``[K, F]``"""

    def add(self, features: Tensor, first: int) -> None:
        """Merge ``features [n, F]`` of the samples from ``first`` on; ties go to the earlier sample."""
        samples = torch.arange(first, first + len(features), dtype=torch.int32, device=features.device)
        samples = samples[:, None].expand(-1, features.shape[1])
        values = torch.cat([self.values, features])
        order = values.sort(dim=0, descending=True, stable=True).indices[: len(self.values)]
        self.values = values.gather(0, order)
        self.samples = torch.cat([self.samples, samples]).gather(0, order)


@full_float32()
def record_features(
    activation_store: Path, saes: Path, seed: int, out: Path, keep: bool = True, code: Code = "before_topk"
) -> None:
    """Encode the global tokens of every layer and write the feature store ``out``.

    Args:
        activation_store: the encoder's activations.
        saes: the folder with `layer-NN/seed-S/` for each layer.
        seed: S.
        out: the store to write.
        keep: store features before TopK; otherwise only their statistics and top samples, and readers recompute them.
            Those after TopK, which are few, are stored in any case.
        code: which features: before or after TopK.

    Raises:
        StoreError: if the activations or an SAE are missing or damaged, or do not match.
        NumericsError: if a feature is not finite or does not fit float16.
    """
    inputs = Unchanged(activation_store, *sorted(saes.glob(f"*/seed-{seed}")))
    source: Any = open_store(activation_store, extraction.KIND)
    spec: Any = source.attrs["spec"]
    described = source_of(spec)
    records = _read_saes(saes, seed, spec)
    digests = {str(layer): sae["digest"] for layer, (_, sae) in records.items()}
    described |= {
        "seed": seed,
        "code": code,
        "made_from": {"activations": source.attrs["digest"], "saes": digests},
        "fvu_global": [fvu_global(*sae) for sae in records.values()],
    }
    if not keep and code == "before_topk":
        inputs_by_name = {"activations": activation_store, "saes": saes}
        described["recomputed_from"] = {name: os.path.relpath(path, out) for name, path in inputs_by_name.items()}
    with new_store(out, FEATURES, described) as store, inputs:
        for layer in progress(spec["layers"], len(spec["layers"]), f"features of {out.stem}", "layers"):
            folder, sae_record = records[layer]
            sae = load_sae(folder, sae_record).to(default_device())
            x = layer_array(source, layer, "global", activation_store)
            if x.shape[1] != sae.W_dec.shape[1]:
                raise StoreError(
                    f"{folder}: an SAE for width {sae.W_dec.shape[1]}, but the activations have {x.shape[1]}; "
                    f"run the sae stage again"
                )
            _record_layer(store.create_group(layer_name(layer)), sae, x, f"{out.stem}, layer {layer}", keep, code)


def _read_saes(saes: Path, seed: int, activations: dict[str, Any]) -> dict[int, tuple[Path, dict[str, Any]]]:
    """The folders and records of the SAEs of all layers.

    Raises:
        StoreError: if one is missing, is of another layer or seed, or was trained on other activations or with other
            settings than the rest.
    """
    records = {layer: sae_of(saes, layer, seed) for layer in activations["layers"]}
    # Imported SAEs do not record their settings and activations.
    settings: dict[str, Any] = next(
        (sae["spec"]["settings"] for _, sae in records.values() if "settings" in sae["spec"]), {}
    )
    for folder, sae in records.values():
        for key, wanted, what in (
            ("made_from", activations, "on other activations"),
            ("settings", settings, "with other settings"),
        ):
            recorded = sae["spec"].get(key, wanted)
            other = sorted(name for name in {*recorded, *wanted} if recorded.get(name) != wanted.get(name))
            if other:
                first = f"{other[0]} is {recorded.get(other[0])!r}, not {wanted.get(other[0])!r}"
                raise StoreError(f"{folder}: an SAE trained {what} ({first}); {REMEDY}")
    return records


@torch.no_grad()
def _record_layer(group: zarr.Group, sae: SAE, x: Any, where: str, keep: bool, code: Code) -> None:
    N, F = x.shape[0], len(sae.W_dec)
    offset, most = _offset(sae, x, code)
    sparse: list[RowWriter] = []
    if code == "after_topk":
        kept = sae.activation.k if isinstance(sae.activation, TopK) else max(most, 1)
        kinds = {"values": np.float16, "places": np.int32}
        sparse = [RowWriter(group, name, kept, kind, SHARD_BYTES) for name, kind in kinds.items()]
    elif keep:
        rows, columns = min(FEATURE_ROWS, N), min(FEATURE_COLUMNS, F)
        stored = new_array(group, "features", (N, F), np.float16, (rows, columns), (rows, columns * -(-F // columns)))
    total, density, squares = np.zeros(F), np.zeros(F), np.zeros(F)
    k, device = min(TOP_SAMPLES, N), sae.W_dec.device
    top = Top(torch.zeros(k, F, device=device), torch.full((k, F), -1, dtype=torch.int32, device=device))
    c = torch.from_numpy(offset).to(device)
    for start, block in _rounded_blocks(sae, x, offset, range(N), where, code):
        if keep and not sparse:
            stored[start : start + len(block)] = block.cpu().numpy()
        n, (of_block, deviations) = len(block), _moments(block)
        if start:  # Chan, Golub and LeVeque (1979)
            deviations += (of_block / n - total / start) ** 2 * (start * n / (start + n))
        squares += deviations
        total += of_block
        restored = block.float() + c
        density += (restored > 0).sum(0).cpu().numpy()
        top.add(restored, start)
        if sparse:
            largest, places = restored.topk(kept)
            sparse[0].append(block.gather(1, places).cpu().numpy())
            sparse[1].append(places.where(largest > 0, -1).int().cpu().numpy())
    for writer in sparse:
        writer.flush()
    save_array(group, "offset", offset)
    save_array(group, "strength", total + N * offset.astype(np.float64))
    save_array(group, "density", density / N)
    save_array(group, "deviation", np.sqrt(squares / N))
    values, samples = top.values.cpu().numpy(), top.samples.cpu().numpy()
    save_array(group, "top_samples", np.where(values > 0, samples, -1).astype(np.int32).T)
    save_array(group, "top_values", values.T)


def _offset(sae: SAE, x: Any, code: Code) -> tuple[NDArray[np.float32], int]:
    """``[F]`` offsets to subtract before rounding: the mean of features whose mean^2 exceeds 3 variances, else 0.

    For features after TopK, also the largest number of a sample's features above 0.
    """
    N, F, device = x.shape[0], len(sae.W_dec), sae.W_dec.device
    total, squares = (torch.zeros(F, dtype=torch.float64, device=device) for _ in range(2))
    lowest, most = torch.full((F,), torch.inf, device=device), 0
    for _, f in _blocks(sae, x, range(N), code):
        total += f.sum(0, dtype=torch.float64)
        squares += f.double().square_().sum(0)
        lowest = torch.minimum(lowest, f.amin(0))
        if code == "after_topk":
            most = max(most, int((f > 0).sum(1).max()))
    mean = (total / N).clamp_(max=float(np.finfo(np.float16).max))
    mean = torch.where(lowest > 0, mean.float(), mean.half().float())
    return torch.where(4 * (total / N) ** 2 > 3 * squares / N, mean, 0).cpu().numpy(), most


def _next_float16(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """The smallest float16 above each value, as float32."""
    rounded = values.astype(np.float16)
    return np.where(rounded > values, rounded, np.nextafter(rounded, np.float16(np.inf))).astype(np.float32)


def _moments(block: Tensor) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """``[F]`` sums of a block's columns and of their squared deviations from the mean."""
    if block.is_cuda:
        values = block.double()
        total = values.sum(0)
        return total.cpu().numpy(), (values - total / len(block)).square_().sum(0).cpu().numpy()
    x: NDArray[np.float64] = block.numpy().astype(np.float64)
    sums: NDArray[np.float64] = x.sum(0)
    return sums, ((x - sums / len(x)) ** 2).sum(0)


def _rounded_blocks(
    sae: SAE, x: Any, offset: NDArray[np.float32], samples: range, where: str, code: Code = "before_topk"
) -> Iterator[tuple[int, Tensor]]:
    """Yield features ``[n, F]`` float16 minus their offset, as they are stored, block by block; see `_blocks`."""
    c, least = (torch.from_numpy(each).to(sae.W_dec.device) for each in (offset, _next_float16(-offset)))
    for start, f in _blocks(sae, x, samples, code):
        # Zero stays zero, and no other value becomes zero.
        shifted = torch.maximum(f - c, torch.where(f > 0, least, 0 - c))
        block = shifted.half()
        if not block.isfinite().all():
            as_float16(shifted.cpu().numpy(), where, np.arange(start, start + len(f)))  # raises
        yield start, block


def _blocks(sae: SAE, x: Any, samples: range, code: Code) -> Iterator[tuple[int, Tensor]]:
    """Yield features ``[n, F]`` float32 of consecutive samples block by block, with each block's first sample.

    The samples start at the start of a block.
    """
    # Blocks always have the same number of rows: smaller products round differently, so equal tokens would get unequal
    # features.
    device = sae.W_dec.device
    rows = torch.zeros(FEATURE_ROWS, x.shape[1], device=device)
    span = FEATURE_ROWS if device.type == "cpu" else _GPU_ROWS
    for first in range(samples.start, samples.stop, span):
        tokens = torch.as_tensor(x[first : min(first + span, samples.stop)]).to(device, non_blocking=True)
        for start in range(0, len(tokens), FEATURE_ROWS):
            read = tokens[start : start + FEATURE_ROWS]
            rows[: len(read)] = read
            f = sae.encode(rows)[: len(read)]
            yield first + start, f if code == "before_topk" else sae.activation(f).dense(len(sae.W_dec))


def read_features(path: Path) -> dict[int, LayerFeatures]:
    """Open the features of each layer of a feature store, by layer; they are read, or computed, when sliced.

    Raises:
        StoreError: if the store is missing, incomplete or damaged, or features that were not kept cannot be recomputed,
            because the activations or SAEs are not there or have changed.
    """
    kept = read_kept_features(path)
    if kept is not None:
        return kept
    store: Any = open_store(path, FEATURES)
    spec: Any = store.attrs["spec"]
    offsets = {layer: layer_array(store, layer, "offset", path)[:] for layer in spec["layers"]}
    if spec.get("code") == "after_topk":
        return {n: LayerFeatures(_Sparse(store, n, path, offset), offset) for n, offset in offsets.items()}
    try:
        return {n: LayerFeatures(_Recomputed(path, spec, n, offset), offset) for n, offset in offsets.items()}
    except StoreError as error:
        raise StoreError(
            f"{path}: its features were not kept, and cannot be recomputed ({error}); run the features stage again, or "
            f"set keep_features: true"
        ) from error


class _Sparse:
    """A layer's features after TopK ``[N, F]`` float16 minus their offset, made dense when sliced."""

    value_bytes = 2

    def __init__(self, store: zarr.Group, layer: int, path: Path, offset: NDArray[np.float32]) -> None:
        self._stored = [layer_array(store, layer, name, path) for name in ("values", "places")]
        self._zeros = torch.from_numpy(-offset).half().to(default_device())
        self.shape = self._stored[0].shape[0], len(offset)

    @cached_property
    def _code(self) -> list[Tensor]:
        return [torch.from_numpy(array[:]) for array in self._stored]

    def __getitem__(self, index: tuple[slice, slice]) -> Tensor:
        """``[n, columns]`` float16, on the GPU if there is one."""
        rows, columns = (range(*each.indices(size)) for each, size in zip(index, self.shape, strict=True))
        values, places = (each[rows.start : rows.stop].to(self._zeros.device) for each in self._code)
        sample, rank = ((places >= columns.start) & (places < columns.stop)).nonzero(as_tuple=True)
        dense = self._zeros[columns.start : columns.stop].repeat(len(rows), 1)
        dense[sample, places[sample, rank] - columns.start] = values[sample, rank]
        return dense


class _Recomputed:
    """A layer's features ``[N, F]`` float16 minus their offset, recomputed when sliced.

    Raises:
        StoreError: if the activations or the SAE of the feature store are missing, damaged or others.
    """

    value_bytes = 2

    def __init__(self, path: Path, spec: Any, layer: int, offset: NDArray[np.float32]) -> None:
        activations, saes = (
            Path(os.path.normpath(path / spec["recomputed_from"][name])) for name in ("activations", "saes")
        )
        source: Any = open_store(activations, extraction.KIND, layer)
        folder, record = sae_of(saes, layer, spec["seed"])
        for place, digest, recorded in (
            (activations, source.attrs["digest"], spec["made_from"]["activations"]),
            (folder, record["digest"], spec["made_from"]["saes"][str(layer)]),
        ):
            if digest != recorded:
                raise StoreError(f"{place} has changed since")
        self._folder, self._record, self._offset = folder, record, offset
        self._stored_tokens = layer_array(source, layer, "global", activations)
        self._where, self._device = f"{path.stem}, layer {layer}", default_device()
        self._slab, self._values = (range(0), range(0)), torch.empty(0, 0)
        self.shape = self._stored_tokens.shape[0], len(offset)

    @cached_property
    def _slab_bytes(self) -> int:
        if self._device.type == "cpu":
            return SLAB_BYTES
        return max(SLAB_BYTES, torch.cuda.mem_get_info(self._device)[0] // 4)

    @cached_property
    def _sae(self) -> SAE:
        return load_sae(self._folder, self._record).to(self._device)

    @cached_property
    def _tokens(self) -> Any:
        if self._stored_tokens.nbytes > IN_MEMORY_BYTES:
            return self._stored_tokens
        tokens = torch.from_numpy(self._stored_tokens[:])
        return tokens.pin_memory() if self._device.type == "cuda" else tokens

    def __getitem__(self, index: tuple[slice, slice]) -> Tensor:
        """``[n, columns]`` float16, on the device that computes them."""
        rows, columns = (range(*each.indices(size)) for each, size in zip(index, self.shape, strict=True))
        if len(columns) == self.shape[1]:
            return self._computed(rows, columns)
        # Every access computes all columns, so the next ones are kept, as they are what is read next.
        first, last = columns.start - self._slab[1].start, columns.stop - self._slab[1].start
        if rows != self._slab[0] or first < 0 or last > len(self._slab[1]):
            width = max(len(columns), self._slab_bytes // (2 * max(1, len(rows))))
            self._slab = rows, range(columns.start, min(columns.start + width, self.shape[1]))
            self._values = self._computed(*self._slab)
            first, last = 0, len(columns)
        return self._values[:, first:last]

    @full_float32()
    @torch.no_grad()
    def _computed(self, rows: range, columns: range) -> Tensor:
        values = torch.empty(len(rows), len(columns), dtype=torch.float16, device=self._device)
        samples = range(rows.start // FEATURE_ROWS * FEATURE_ROWS, rows.stop)
        for first, block in _rounded_blocks(self._sae, self._tokens, self._offset, samples, self._where):
            skipped = max(0, rows.start - first)
            place = slice(first + skipped - rows.start, first + len(block) - rows.start)
            values[place] = block[skipped:, columns.start : columns.stop]
        return values
