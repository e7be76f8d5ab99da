"""Stage `features`: the SAE features of every sample's global token, before TopK and after ReLU.

`results/{dataset}/features/{sae}/{encoder}@{seed}.zarr` holds for each layer ``features [N, F]`` float16, the summed
activation ``strength [F]`` (S of the paper), the share of samples above zero ``density [F]`` and the standard
``deviation [F]`` over the samples, all float64, and the samples on which each feature is strongest, ``top_samples [F,
K]`` int32 with ``top_values [F, K]`` float32, strongest first, -1 where the feature is active on fewer. Statistics are
those of the stored float16 values.
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

from conceptshare import activations
from conceptshare.errors import StoreError
from conceptshare.files import layer_name
from conceptshare.progress import progress
from conceptshare.reading import FEATURES
from conceptshare.sae import TopKSAE, load_sae
from conceptshare.store import as_float16, layer_array, new_array, new_store, open_store, save_array

_ROWS = 1024
_COLUMNS = 512
_TOP_SAMPLES = 100


@dataclass
class Top:
    """Running top samples of each feature."""

    values: Tensor
    """``[K, F]``"""
    samples: Tensor
    """``[K, F]``"""

    def add(self, features: Tensor, first: int) -> None:
        """Merge ``features [n, F]`` of the samples from ``first`` on; of equal values the earlier sample wins."""
        samples = torch.arange(first, first + len(features), dtype=torch.int32, device=features.device)
        samples = samples[:, None].expand(-1, features.shape[1])
        values = torch.cat([self.values, features])
        order = values.sort(dim=0, descending=True, stable=True).indices[: len(self.values)]
        self.values = values.gather(0, order)
        self.samples = torch.cat([self.samples, samples]).gather(0, order)


def record_features(activation_store: Path, saes: Path, seed: int, out: Path) -> None:
    """Encode the global tokens of every layer and write the feature store ``out``.

    Args:
        activation_store: the encoder's activations.
        saes: the folder with `layer-NN/seed-S/` for each layer.
        seed: S.
        out: the store to write.

    Raises:
        StoreError: where the activations or an SAE are missing or damaged, or do not fit each other.
        NumericsError: where a feature is not finite or does not fit float16.
    """
    source: Any = open_store(activation_store, activations.KIND)
    spec: Any = source.attrs["spec"]
    described = {key: spec[key] for key in ("name", "encoder", "content_hash", "samples", "layers")}
    with new_store(out, FEATURES, described | {"seed": seed}) as store:
        for layer in progress(spec["layers"], len(spec["layers"]), f"features of {out.stem}", "layers"):
            folder = saes / layer_name(layer) / f"seed-{seed}"
            sae = load_sae(folder).to("cuda" if torch.cuda.is_available() else "cpu")
            x = layer_array(source, layer, "global", activation_store)
            if x.shape[1] != sae.W_dec.shape[1]:
                raise StoreError(
                    f"{folder}: an SAE for width {sae.W_dec.shape[1]}, where the activations have {x.shape[1]}; "
                    f"run the sae stage again"
                )
            _record_layer(store.create_group(layer_name(layer)), sae, x, f"{out.stem}, layer {layer}")


@torch.no_grad()
def _record_layer(group: zarr.Group, sae: TopKSAE, x: Any, where: str) -> None:
    N, F = x.shape[0], len(sae.W_dec)
    rows, columns = min(_ROWS, N), min(_COLUMNS, F)
    features = new_array(group, "features", (N, F), np.float16, (rows, columns), (rows, columns * -(-F // columns)))
    strength, density, squares = np.zeros(F), np.zeros(F), np.zeros(F)
    k = min(_TOP_SAMPLES, N)
    device = sae.W_dec.device
    top = Top(torch.zeros(k, F, device=device), torch.full((k, F), -1, dtype=torch.int32, device=device))
    for start, block in _blocks(sae, x, where):
        features[start : start + len(block)] = block
        squares += _merged_squares(strength, start, block)
        strength += block.sum(0, dtype=np.float64)
        density += (block > 0).sum(0)
        top.add(torch.from_numpy(block).to(device).float(), start)
    save_array(group, "strength", strength)
    save_array(group, "density", density / N)
    save_array(group, "deviation", np.sqrt(squares / N))
    values, samples = top.values.cpu().numpy(), top.samples.cpu().numpy()
    save_array(group, "top_samples", np.where(values > 0, samples, -1).astype(np.int32).T)
    save_array(group, "top_values", values.T)


def _merged_squares(strength: NDArray[np.float64], samples: int, block: NDArray[np.float16]) -> NDArray[np.float64]:
    """``[F]`` what a block adds to the sums of squared deviations from the mean (Chan, Golub and LeVeque 1979)."""
    values, n = block.astype(np.float64), len(block)
    mean = values.mean(0)
    squares: NDArray[np.float64] = ((values - mean) ** 2).sum(0)
    if samples:
        squares += (mean - strength / samples) ** 2 * (samples * n / (samples + n))
    return squares


def _blocks(sae: TopKSAE, x: Any, where: str) -> Iterator[tuple[int, NDArray[np.float16]]]:
    for start in range(0, x.shape[0], _ROWS):
        rows = torch.from_numpy(x[start : start + _ROWS].astype(np.float32))
        block = sae.encode(rows.to(sae.W_dec.device)).cpu().numpy()
        yield start, as_float16(block, where, np.arange(start, start + len(block)))
