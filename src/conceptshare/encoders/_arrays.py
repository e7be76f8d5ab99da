"""Arrays in place of an encoder: embeddings that were computed elsewhere, one vector per sample and layer.

Their folder holds `layer-NN.npy`, `layer-NN.safetensors` or `layer-NN.zarr` for each layer, ``[N, D]`` of any
floating-point type, and `ids.json`, the list of the ids of the N samples, in the order of the rows.
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr
from safetensors.torch import load_file
from torch import Tensor

from conceptshare.config.catalog import EncoderSpec
from conceptshare.data.dataset import Data
from conceptshare.io.errors import EncoderError, reading
from conceptshare.io.layout import layer_name
from conceptshare.io.progress import warn
from conceptshare.io.store import as_float16

_ENDINGS = (".npy", ".safetensors", ".zarr")
# Number of rows that are checked at a time.
_ROWS = 4096


class Arrays:
    """The global tokens of samples, read from a folder.

    Args:
        spec: the entry, with ``library: arrays``.
        folder: the folder with the arrays and `ids.json`.
        data: the data set whose samples they are of; without it, their ids are not checked.
        fingerprint: digest of the files, if they were recorded.

    Raises:
        EncoderError: if a layer is missing or not ``[N, D]`` of floating-point numbers, with the width in the entry, or
            the ids are not those of the data set in its order.
    """

    def __init__(self, spec: EncoderSpec, folder: Path, data: Data | None = None, fingerprint: str = "") -> None:
        self.spec, self.fingerprint = spec, fingerprint
        self._ids = _read_ids(folder / "ids.json")
        if data is not None:
            _check_ids(folder / "ids.json", self._ids, data.ids())
        paths = _paths(spec, folder)
        self._paths = {layer: paths[layer_name(layer)] for layer in spec.layer_numbers()}
        self._arrays = {layer: _open(path) for layer, path in self._paths.items()}
        for layer, array in self._arrays.items():
            _check_shape(self._paths[layer], tuple(array.shape), len(self), spec.width_of(layer))

    def __len__(self) -> int:
        return len(self._ids)

    def rows(self, layer: int, start: int, stop: int) -> Tensor:
        """``[n, D]`` float32 global tokens of the samples from ``start`` to ``stop`` (exclusive) in one layer."""
        rows = self._arrays[layer][start:stop]
        if isinstance(rows, Tensor):
            return rows.float()
        with np.errstate(over="ignore"):
            return torch.from_numpy(np.array(rows, np.float32))

    def check_values(self) -> None:
        """Read all rows. A layer with the same values in all rows is a warning.

        Raises:
            NumericsError: if a value is not finite or does not fit float16, the type in which they are stored.
        """
        ids, remedy = np.array(self._ids), "correct the row, or divide the whole array by a number"
        for layer, path in self._paths.items():
            first, varies = self.rows(layer, 0, 1).numpy(), False
            for start in range(0, len(self), _ROWS):
                rows = self.rows(layer, start, start + _ROWS).numpy()
                as_float16(rows, str(path), ids[start : start + len(rows)], remedy)
                varies = varies or bool((rows != first).any())
            if not varies:
                warn(f"{path}: all rows are equal; unless intended, write the array again")


def _read_ids(file: Path) -> list[str]:
    try:
        ids = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EncoderError(f"{file}: cannot be read ({error}); write the list of the samples' ids there") from None
    if not isinstance(ids, list) or not all(isinstance(one, str | int) for one in ids):
        raise EncoderError(f"{file}: not a list of ids; write a JSON list with the id of each row of the arrays")
    return list(map(str, ids))


def _check_ids(file: Path, ids: list[str], wanted: list[str]) -> None:
    """Raise an EncoderError if ids are not those of the data set, in its order."""
    if ids == wanted:
        return
    twice = [name for name, count in Counter(ids).items() if count > 1]
    if twice:
        raise EncoderError(f"{file}: has {twice[0]!r} more than once; give each sample one row")
    if not {*ids} & {*wanted}:
        raise EncoderError(f"{file}: has none of the data set's ids, such as {wanted[0]!r}; write these, as strings")
    absent, others = sorted({*wanted} - {*ids}), sorted({*ids} - {*wanted})
    if absent:
        raise EncoderError(
            f"{file}: lacks {len(absent):,} of the data set's {len(wanted):,} samples, such as {absent[0]!r}; add them "
            f"and their rows"
        )
    if others:
        raise EncoderError(
            f"{file}: has {len(others):,} samples that the data set lacks, such as {others[0]!r}; leave out them and "
            f"their rows"
        )
    n = next(n for n, pair in enumerate(zip(ids, wanted, strict=True)) if pair[0] != pair[1])
    raise EncoderError(
        f"{file}: row {n} is sample {ids[n]!r}, but the data set's is {wanted[n]!r}; sort ids and rows as its ids"
    )


def _paths(spec: EncoderSpec, folder: Path) -> dict[str, Path]:
    """The array of each layer, by its name without an ending."""
    found = [path for path in sorted(folder.glob("layer-*")) if path.suffix in _ENDINGS]
    paths = {path.stem: path for path in found}
    if len(paths) < len(found):
        twice = next(path for path in found if paths[path.stem] != path)
        raise EncoderError(f"{twice}: {paths[twice.stem].name} is the same layer; remove one of both")
    expected = [layer_name(layer) for layer in range(spec.layers)]
    if paths.keys() != set(expected):
        raise EncoderError(
            f"{folder}: holds {', '.join(path.name for path in found[:5]) or 'no arrays'}{', ...' * (len(found) > 5)}, "
            f"but its entry has layers: {spec.layers}; name one array per layer, {expected[0]} to {expected[-1]}, with "
            f"the ending {', '.join(_ENDINGS)}"
        )
    return paths


def _open(path: Path) -> Any:
    """An array, from which rows are read as they are needed."""
    with reading(EncoderError, f"{path}: cannot be read", "; write it again"):
        array: Any
        match path.suffix:
            case ".npy":
                array = np.load(path, mmap_mode="r", allow_pickle=False)
            case ".zarr":
                array = zarr.open_array(path, mode="r")
            case _:
                tensors = load_file(path)
                if len(tensors) != 1:
                    raise EncoderError(f"{path}: has {len(tensors)} tensors; write one, the layer's array")
                (array,) = tensors.values()
        floating = array.is_floating_point() if isinstance(array, Tensor) else array.dtype.kind == "f"
        if not floating:
            raise EncoderError(f"{path}: has numbers of type {array.dtype}; write floating-point numbers")
        return array


def _check_shape(path: Path, shape: tuple[int, ...], samples: int, width: int) -> None:
    if len(shape) != 2:
        raise EncoderError(f"{path}: has the shape {list(shape)}; write one vector per sample, [N, D]")
    if shape[0] != samples:
        raise EncoderError(f"{path}: has {shape[0]:,} rows, but ids.json {samples:,} ids; give each row its id")
    if shape[1] != width:
        raise EncoderError(f"{path}: has the width {shape[1]}, but its entry has {width}; set width: {shape[1]}")
