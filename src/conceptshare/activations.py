"""Stage `activations`: one forward pass over a data set records every layer of an encoder.

`results/{dataset}/activations/{encoder}.zarr` holds, for each recorded layer, ``layer-NN/tokens [T, D]`` (the tokens
that SAEs train on: unpadded ones and the global token) and ``layer-NN/global [N, D]``, both float16, and once for all
layers ``offsets [N + 1]``: the tokens of sample i are rows ``offsets[i]`` to ``offsets[i + 1]``. Where the global
token is a mean, it is the last of its sample's rows.
"""

import time
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from conceptshare.catalog import EncoderSpec
from conceptshare.dataset import Data
from conceptshare.encoders import Activations, Encoder
from conceptshare.progress import progress, say
from conceptshare.store import RowWriter, as_float16, layer_group, layer_name, new_store, open_store, save_array

KIND = "activations"

# Larger shards are fewer files; each layer keeps up to one in memory.
_SHARD_BYTES = 2**26
# Layers up to this size are read at once; of larger ones, each sample is read when its turn comes.
_IN_MEMORY_BYTES = 2**30


def extract_activations(encoder: Encoder, data: Data, out: Path) -> None:
    """Record the residual stream of every sample in the store ``out``.

    Raises:
        NumericsError: where an activation is not finite or does not fit float16; it names layer and sample.
        EncoderError: where the encoder is not what its entry says.
    """
    spec = encoder.spec
    layers = spec.layer_numbers()
    described = {
        "name": out.stem,
        "encoder": spec.model_dump(mode="json", exclude={"seeds", "note"}),
        "content_hash": data.content_hash,
        "samples": len(data),
        "layers": layers,
        "width": spec.width,
    }
    started = time.monotonic()
    lengths: list[NDArray[np.int64]] = []
    with new_store(out, KIND, described) as store:
        tokens: dict[int, RowWriter] = {}
        global_tokens: dict[int, RowWriter] = {}
        for layer in layers:
            group = store.create_group(layer_name(layer))
            tokens[layer] = RowWriter(group, "tokens", spec.width, np.float16, _SHARD_BYTES)
            global_tokens[layer] = RowWriter(group, "global", spec.width, np.float16, _SHARD_BYTES)
        starts = range(0, len(data), spec.batch_size)
        for start in progress(starts, len(starts), f"activations of {out.stem}", "batches"):
            found = encoder.activations(_samples(data, spec, start))
            counts = training_counts(found, spec)
            numbers = np.arange(start, start + len(counts))
            for layer in layers:
                where = f"{out.stem}, layer {layer}"
                global_rows = found.global_token[layer].cpu().numpy()
                global_tokens[layer].append(as_float16(global_rows, where, numbers))
                rows = training_rows(found, layer, spec).cpu().numpy()
                tokens[layer].append(as_float16(rows, where, np.repeat(numbers, counts)))
            lengths.append(counts)
        for writer in [*tokens.values(), *global_tokens.values()]:
            writer.close()
        save_array(store, "offsets", np.concatenate([[0], np.cumsum(np.concatenate(lengths))]).astype(np.int64))
    seconds = time.monotonic() - started
    say(f"{out.stem}: {len(data):,} samples, {len(layers)} layers in {seconds:.1f} s ({len(data) / seconds:.3g}/s)")


def training_counts(found: Activations, spec: EncoderSpec) -> NDArray[np.int64]:
    """``[B]`` rows that each sample of a batch adds to the training tokens."""
    extra = 1 if spec.global_token == "mean" else 0
    counts: NDArray[np.int64] = found.training.sum(1).cpu().numpy().astype(np.int64) + extra
    return counts


def training_rows(found: Activations, layer: int, spec: EncoderSpec) -> Tensor:
    """``[rows, D]`` training tokens of a batch, sample after sample."""
    x, chosen = found.tokens[layer], found.training
    if spec.global_token == "mean":
        x = torch.cat([x, found.global_token[layer][:, None]], dim=1)
        chosen = torch.cat([chosen, chosen.new_ones(len(chosen), 1)], dim=1)
    return x[chosen]


class TokenReader:
    """The training tokens of one layer, sample by sample."""

    def __init__(
        self, tokens: NDArray[np.float16], global_tokens: NDArray[np.float16], offsets: NDArray[np.int64]
    ) -> None:
        self._tokens = tokens
        self.global_tokens = global_tokens
        self.offsets = offsets

    @classmethod
    def open(cls, path: Path, layer: int) -> Self:
        """Open a layer of an activation store.

        Raises:
            StoreError: where the store is not whole, or has no such layer.
        """
        store: Any = open_store(path, KIND)
        group = layer_group(store, layer, path)
        tokens = group["tokens"]
        return cls(tokens[:] if tokens.nbytes <= _IN_MEMORY_BYTES else tokens, group["global"][:], store["offsets"][:])

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def width(self) -> int:
        """D."""
        return int(self._tokens.shape[1])

    def read(self, samples: NDArray[np.int64]) -> Tensor:
        """``[rows, D]`` float32 tokens of the given samples, in their order."""
        parts = [self._tokens[self.offsets[i] : self.offsets[i + 1]] for i in samples]
        return torch.from_numpy(np.concatenate(parts).astype(np.float32))


def _samples(data: Data, spec: EncoderSpec, start: int) -> list[Image.Image] | list[str]:
    rows = range(start, min(start + spec.batch_size, len(data)))
    return [data.image(i) for i in rows] if spec.modality == "image" else [data.caption(i) for i in rows]
