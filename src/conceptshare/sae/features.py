"""Stage `features`: the SAE features of every sample's global token, before TopK and after ReLU.

`results/{dataset}/features/{sae}/{encoder}@{seed}.zarr` holds for each layer ``features [N, F]`` float16 minus each
feature's ``offset [F]`` float32; the strength S ``strength [F]`` (summed activation), the fraction of positive samples
``density [F]`` and the standard ``deviation [F]`` over the samples, all float64; and the samples with each feature's
largest activations, ``top_samples [F, K]`` int32 with ``top_values [F, K]`` float32, in decreasing order and padded
with -1. Statistics are those of the stored values plus the offset, as `readers.read_features` returns them.

float16 has a relative rounding error of up to 2^-11. For a feature that is nearly constant over samples, such as one
that marks the global token, this would destroy most of its variation. Therefore, if mean^2 of a feature exceeds 3
variances, its mean is subtracted first. The mean is rounded to float16 if the feature is zero anywhere, so that zero
stays exact, and to float32 otherwise. docs/formats.md derives a bound on the error of correlations.
"""

from collections.abc import Iterator
from dataclasses import dataclass
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
from conceptshare.io.layout import layer_name
from conceptshare.io.progress import progress
from conceptshare.io.readers import FEATURES
from conceptshare.io.sizes import FEATURE_COLUMNS, FEATURE_ROWS, TOP_SAMPLES
from conceptshare.io.store import as_float16, layer_array, new_array, new_store, open_store, save_array
from conceptshare.sae import TopKSAE, load_sae
from conceptshare.sae.folder import REMEDY, sae_of


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
def record_features(activation_store: Path, saes: Path, seed: int, out: Path) -> None:
    """Encode the global tokens of every layer and write the feature store ``out``.

    Args:
        activation_store: the encoder's activations.
        saes: the folder with `layer-NN/seed-S/` for each layer.
        seed: S.
        out: the store to write.

    Raises:
        StoreError: if the activations or an SAE are missing or damaged, or do not match.
        NumericsError: if a feature is not finite or does not fit float16.
    """
    inputs = Unchanged(activation_store, *sorted(saes.glob(f"*/seed-{seed}")))
    source: Any = open_store(activation_store, extraction.KIND)
    spec: Any = source.attrs["spec"]
    described = {key: spec.get(key) for key in ("name", "encoder", "weights", "content_hash", "samples", "layers")}
    records = _read_saes(saes, seed, spec)
    digests = {str(layer): sae["digest"] for layer, (_, sae) in records.items()}
    made_from = {"activations": source.attrs["digest"], "saes": digests}
    with new_store(out, FEATURES, described | {"seed": seed, "made_from": made_from}) as store, inputs:
        for layer in progress(spec["layers"], len(spec["layers"]), f"features of {out.stem}", "layers"):
            folder, sae_record = records[layer]
            sae = load_sae(folder, sae_record).to(default_device())
            x = layer_array(source, layer, "global", activation_store)
            if x.shape[1] != sae.W_dec.shape[1]:
                raise StoreError(
                    f"{folder}: an SAE for width {sae.W_dec.shape[1]}, but the activations have {x.shape[1]}; "
                    f"run the sae stage again"
                )
            _record_layer(store.create_group(layer_name(layer)), sae, x, f"{out.stem}, layer {layer}")


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
def _record_layer(group: zarr.Group, sae: TopKSAE, x: Any, where: str) -> None:
    N, F = x.shape[0], len(sae.W_dec)
    rows, columns = min(FEATURE_ROWS, N), min(FEATURE_COLUMNS, F)
    features = new_array(group, "features", (N, F), np.float16, (rows, columns), (rows, columns * -(-F // columns)))
    offset = _offset(sae, x)
    c, least = (torch.from_numpy(each).to(sae.W_dec.device) for each in (offset, _next_float16(-offset)))
    total, density, squares = np.zeros(F), np.zeros(F), np.zeros(F)
    k = min(TOP_SAMPLES, N)
    top = Top(torch.zeros(k, F, device=c.device), torch.full((k, F), -1, dtype=torch.int32, device=c.device))
    for start, f in _blocks(sae, x):
        # Zero stays zero, and no other value becomes zero.
        shifted = torch.maximum(f - c, torch.where(f > 0, least, 0 - c)).cpu().numpy()
        block = as_float16(shifted, where, np.arange(start, start + len(f)))
        features[start : start + len(block)] = block
        squares += _merged_squares(total, start, block)
        total += block.sum(0, dtype=np.float64)
        restored = torch.from_numpy(block).to(c.device).float() + c
        density += (restored > 0).sum(0).cpu().numpy()
        top.add(restored, start)
    save_array(group, "offset", offset)
    save_array(group, "strength", total + N * offset.astype(np.float64))
    save_array(group, "density", density / N)
    save_array(group, "deviation", np.sqrt(squares / N))
    values, samples = top.values.cpu().numpy(), top.samples.cpu().numpy()
    save_array(group, "top_samples", np.where(values > 0, samples, -1).astype(np.int32).T)
    save_array(group, "top_values", values.T)


def _offset(sae: TopKSAE, x: Any) -> NDArray[np.float32]:
    """``[F]`` offsets to subtract before rounding: the mean of features whose mean^2 exceeds 3 variances, else 0."""
    N, F, device = x.shape[0], len(sae.W_dec), sae.W_dec.device
    total, squares = (torch.zeros(F, dtype=torch.float64, device=device) for _ in range(2))
    lowest = torch.full((F,), torch.inf, device=device)
    for _, f in _blocks(sae, x):
        total += f.sum(0, dtype=torch.float64)
        squares += f.double().square_().sum(0)
        lowest = torch.minimum(lowest, f.amin(0))
    mean = (total / N).clamp_(max=float(np.finfo(np.float16).max))
    mean = torch.where(lowest > 0, mean.float(), mean.half().float())
    return torch.where(4 * (total / N) ** 2 > 3 * squares / N, mean, 0).cpu().numpy()


def _next_float16(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """The smallest float16 above each value, as float32."""
    rounded = values.astype(np.float16)
    return np.where(rounded > values, rounded, np.nextafter(rounded, np.float16(np.inf))).astype(np.float32)


def _merged_squares(total: NDArray[np.float64], samples: int, block: NDArray[np.float16]) -> NDArray[np.float64]:
    """``[F]`` a block's contribution to the sums of squared deviations (Chan, Golub and LeVeque 1979)."""
    values, n = block.astype(np.float64), len(block)
    mean = values.mean(0)
    squares: NDArray[np.float64] = ((values - mean) ** 2).sum(0)
    if samples:
        squares += (mean - total / samples) ** 2 * (samples * n / (samples + n))
    return squares


def _blocks(sae: TopKSAE, x: Any) -> Iterator[tuple[int, Tensor]]:
    """Yield features ``[n, F]`` float32 block by block, with the number of the block's first sample."""
    # Blocks always have the same number of rows: smaller products round differently, so equal tokens would get unequal
    # features.
    rows = torch.zeros(FEATURE_ROWS, x.shape[1])
    for start in range(0, x.shape[0], FEATURE_ROWS):
        read = x[start : start + FEATURE_ROWS]
        rows[: len(read)] = torch.from_numpy(read)
        yield start, sae.encode(rows.to(sae.W_dec.device))[: len(read)]
