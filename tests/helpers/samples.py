"""Data sets and results in the form that tests need."""

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from conceptshare.data.dataset import Data
from conceptshare.io import provenance


def contents(folder):
    """The bytes of every file below a folder, by relative path, except provenance and the study itself."""
    left_out = (provenance.FILE, "study.json")
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.endswith(left_out)]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def write_rows(path, samples, words):
    """A Parquet table of noisy images and captions of some words."""
    rng, cells = np.random.default_rng(0), []
    for pixels in rng.integers(0, 256, (samples, 24, 32, 3), dtype=np.uint8):
        png = io.BytesIO()
        Image.fromarray(pixels).save(png, "png")
        cells.append(png.getvalue())
    captions = [" ".join(rng.choice(words, n)) for n in rng.integers(1, 9, samples)]
    pq.write_table(pa.table({"image": cells, "caption": captions}), path)


class AsRead(Data):
    """The samples in the order of their source, which tests expect, with the dropped rows."""

    def __init__(self, folder):
        super().__init__(folder)
        self.manifest["dropped"] = [json.loads(line) for line in (folder / "dropped.jsonl").read_bytes().splitlines()]
        self._rows = np.argsort(np.random.default_rng(self.manifest["order_seed"]).permutation(len(self))).tolist()

    def ids(self):
        ids = super().ids()
        return [ids[row] for row in self._rows]

    def caption(self, row):
        return super().caption(self._rows[row])

    def image(self, row):
        return super().image(self._rows[row])
