"""The samples of a data set: thumbnails and captions."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from conceptshare.data.dataset import Data
from conceptshare.io.ahead import in_order
from conceptshare.io.errors import DatasetError
from conceptshare.io.files import SAMPLE_PAGES, atomic_output
from conceptshare.io.progress import progress, warn
from conceptshare.pages._script import write_script

TOGETHER = 500
"""Samples whose captions are in one file, and their thumbnails in one folder."""
_SIDE = 160
_QUALITY = 80


def write_samples(data: Data, place: str, out: Path, threads: int = 1) -> None:
    """Write thumbnails and captions of all samples.

    An image that can no longer be decoded has none, and a line in the log.

    Args:
        data: the samples.
        place: the path of ``out`` in the site.
        out: the folder to write.
        threads: threads that make thumbnails.
    """
    starts = range(0, len(data), TOGETHER)
    with atomic_output(out, SAMPLE_PAGES) as partial, ThreadPoolExecutor(threads) as pool:
        partial.mkdir()
        jobs = (pool.submit(_thumbnail, data, n, partial / _folder(n)).result for n in range(len(data)))
        sizes = list(progress(in_order(jobs, 4 * threads), len(data), "thumbnails", "samples"))
        for start in starts:
            chosen = range(start, min(start + TOGETHER, len(data)))
            shown = {"captions": [data.caption(n) for n in chosen], "sizes": [sizes[n] for n in chosen]}
            write_script(partial / f"{_folder(start)}.js", f"{place}/{_folder(start)}", shown)


def _folder(sample: int) -> str:
    return f"{sample // TOGETHER:03d}"


def _thumbnail(data: Data, sample: int, folder: Path) -> tuple[int, int] | None:
    try:
        image = data.image(sample)
    except DatasetError as error:
        warn(f"no thumbnail of sample {sample}: {error}")
        return None
    image.thumbnail((_SIDE, _SIDE))
    folder.mkdir(exist_ok=True)
    image.save(folder / f"{sample:06d}.webp", quality=_QUALITY)
    return image.size
