"""The concept pages of 10 members of 8,192 features a layer: what they take to write, and to see first in Chromium."""

import itertools
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import unquote, urlparse

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from playwright.sync_api import Browser, sync_playwright

from conceptshare.config.catalog import DatasetSpec
from conceptshare.config.members import as_member, pair_name
from conceptshare.data.dataset import Data, make_dataset
from conceptshare.io.layout import layer_name
from conceptshare.io.readers import CORRELATIONS, FEATURES
from conceptshare.io.store import new_store, save_array
from conceptshare.metrics import READINGS
from conceptshare.pages import write_index, write_member, write_pair, write_samples

MEMBERS = [f"{kind}-{n}@0" for kind in ("image", "text") for n in range(5)]
LAYERS, F, N = 2, 8192, 2000
# Patches of a ViT at 224 pixels, and pieces of a caption.
SIDE, PIECES = 16, 14
DATASET, SAE, STUDY = "noise", "paper", "large"
SOURCE, TARGET = MEMBERS[0], MEMBERS[1]
WORDS = [f"{a}{b}{c}" for a in "bdfgklmnprst" for b in ("a", "ea", "io", "u") for c in ("ck", "ll", "rm", "st", "nd")]
SPARE_MS = 300


def measure_site(folder: Path) -> None:
    """Make the site, print what its parts took, and what its views take."""
    results, rng = folder / "results", np.random.default_rng(0)
    pages = results / "studies" / STUDY / "pages"
    make_samples(folder / "noise.parquet", rng)
    with silence():
        make_dataset(DatasetSpec(source=str(folder / "noise.parquet")), results / DATASET / "data")
    study = make_study(results, rng)
    with timed("samples", pages / "samples", f"{N} thumbnails"):
        write_samples(Data(results / DATASET / "data"), f"samples/{DATASET}", pages / "samples" / DATASET, 2)
    for member in MEMBERS:
        place = f"data/{DATASET}/{SAE}/{member}"
        with timed(member, pages / place, f"{LAYERS} layers"):
            write_member(
                results / f"{member}.zarr",
                results / modality(member),
                results / "names.parquet",
                results / "pairs",
                [other for other in MEMBERS if other != member],
                {"ranking": results / "studies" / STUDY / DATASET / SAE / "sharedness" / "ranking.parquet"}
                if member == SOURCE
                else {},
                place,
                pages / place,
            )
    for a, b in itertools.permutations((SOURCE, TARGET)):
        place = f"data/{DATASET}/{SAE}/pairs/{a}__{b}"
        with timed(f"{a} to {b}", pages / place, f"{LAYERS} x {LAYERS} layers"):
            write_pair(results / "correlations.zarr", a, b, place, pages / place)
    write_index(study, results, pages)
    look(pages)


def look(pages: Path) -> None:
    """Print what each view takes, in a browser that was started for it."""
    here = f"{DATASET}/{SAE}"
    views = {
        "overview": "#/",
        "features of a layer": f"#/layer/{here}/{SOURCE}/1",
        "feature of an image encoder": f"#/feature/{here}/{SOURCE}/1/4711",
        "the same with where it fires": f"#/feature/{here}/{SOURCE}/1/4711?overlay=yes",
        "feature of a text encoder": f"#/feature/{here}/{MEMBERS[-1]}/1/4711",
        "two layers": f"#/pair/{here}/{SOURCE}/1/{TARGET}/0",
        "a layer and any of another member": f"#/pair/{here}/{SOURCE}/1/{TARGET}/any",
        "ranking": f"#/ranking/{here}/ranking",
    }
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        for what, route in views.items():
            seen = []
            for _ in range(3):
                browser = playwright.chromium.launch(executable_path=chromium, args=arguments)
                seen.append(first_view(browser, f"{(pages / 'index.html').as_uri()}{route}"))
                browser.close()
            seconds, size, files = sorted(seen)[1]
            print(f"{what} (under 2 s and 5 MB): {seconds:.2f} s, {size / 1e6:.2f} MB in {files} files")


# All that is in the window is there: the view, what waited to be seen, and its pictures.
READY = """() => {
    const seen = (element) => {
        const box = element.getBoundingClientRect();
        return box.top < innerHeight && box.bottom > 0;
    };
    return document.querySelector('main:not([aria-busy]) h1')
        && [...document.querySelectorAll('.strip, .samples')].every((part) => !seen(part) || part.childNodes.length)
        && [...document.images].every((image) => !seen(image) || (image.complete && image.naturalWidth))
        && performance.now();
}"""


def first_view(browser: Browser, address: str) -> tuple[float, int, int]:
    """Seconds until all of the window is there, and the bytes and number of files that were read by then and after."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    read: set[str] = set()
    page.on("request", lambda request: read.add(unquote(urlparse(request.url).path)))
    page.goto(address, wait_until="commit")
    seconds: float = page.wait_for_function(READY).json_value() / 1000
    page.wait_for_timeout(SPARE_MS)
    return seconds, sum(Path(file).stat().st_size for file in read), len(read)


def modality(member: str) -> str:
    return member.partition("-")[0]


def make_samples(path: Path, rng: np.random.Generator) -> None:
    """Pictures of noise that is smooth enough to be a picture, and captions of words that are none."""
    rows = []
    for n in range(N):
        small = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        file = path.parent / "picture.jpg"
        small.resize((320, 240), Image.Resampling.BICUBIC).save(file, quality=85)
        rows.append({"image": file.read_bytes(), "caption": f"{n} {' '.join(rng.choice(WORDS, 10))}"})
    pd.DataFrame(rows).to_parquet(path)


def make_study(results: Path, rng: np.random.Generator) -> dict[str, Any]:
    """What the pages are made of. Members of one modality share their examples, and all share their names."""
    layers = list(range(LAYERS))
    strength = rng.gamma(0.5, 300, (LAYERS, F))
    for member in MEMBERS:
        with new_store(results / f"{member}.zarr", FEATURES, {"layers": layers}) as store:
            for layer in layers:
                group = store.create_group(layer_name(layer))
                save_array(group, "strength", strength[layer])
                for name in ("density", "deviation"):
                    save_array(group, name, rng.beta(0.5, 8, F))
                save_array(group, "top_samples", np.zeros((F, 1), np.int32))
    for kind in ("image", "text"):
        make_examples(results / kind, kind, rng)
    make_names(rng).to_parquet(results / "names.parquet")
    (results / "pairs").mkdir()
    for a, b in itertools.combinations(MEMBERS, 2):
        table = pd.concat([matches(a, b, rng), matches(b, a, rng)])
        table.to_parquet(results / "pairs" / f"{pair_name(as_member(a), as_member(b))}.parquet")
    make_correlations(results / "correlations.zarr", rng)
    make_tables(results / "studies" / STUDY / DATASET / SAE, strength[LAYERS - 1], rng)
    told = {"seed": 0, "layers": layers, "features": {SAE: F}, "kind": "vlm"}
    return {
        "study": STUDY,
        "datasets": [DATASET],
        "saes": [SAE],
        "members": [{"name": m, "encoder": m[:-2], "modality": modality(m), **told} for m in MEMBERS],
        "matrices": {"all": MEMBERS},
        "layerwise": {"depth": [[SOURCE, TARGET]]},
        "sharedness": {
            "ranking": {"source": SOURCE, "shared_with": MEMBERS[5:], "not_shared_with": MEMBERS[1:5]},
        },
        "overlapping": False,
    }


def make_examples(folder: Path, kind: str, rng: np.random.Generator) -> None:
    """Nine strongest samples, four around each of three quantiles, and where each of the nine fires."""
    folder.mkdir()
    tokens = SIDE**2 if kind == "image" else PIECES
    if kind == "image":
        told = [{"sample": n, "box": [0.125, 0.0, 0.875, 1.0], "rows": SIDE, "columns": SIDE} for n in range(N)]
    else:
        told = [{"sample": n, "tokens": rng.choice(WORDS, PIECES).tolist()} for n in range(N)]
    pq.write_table(pa.Table.from_pylist(told), folder / "samples.parquet")
    for layer in range(LAYERS):
        samples = rng.integers(0, N, (F, 21))
        values = -np.sort(-rng.gamma(2, 1, (F, 21)), axis=1)
        counts = np.sort(rng.poisson(8 * np.exp(-np.arange(20) / 4), (F, 20)))[:, ::-1]
        rows = []
        for n in range(F):
            fires = np.maximum(0, rng.normal(-40, 80, (9, tokens))).clip(0, 255).astype(np.uint8)
            top = [
                {"sample": sample, "value": value, "fires": fire.tobytes(), "fires_highest": value}
                for sample, value, fire in zip(samples[n, :9].tolist(), values[n, :9].tolist(), fires, strict=True)
            ]
            near = [
                {"quantile": q, "samples": samples[n, at : at + 4].tolist(), "values": values[n, at : at + 4].tolist()}
                for q, at in ((0.9, 9), (0.5, 13), (0.1, 17))
            ]
            row = {"feature": n, "top": top, "near": near, "histogram": counts[n].tolist(), "highest": values[n, 0]}
            rows.append(row)
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{layer_name(layer)}.parquet")


def make_names(rng: np.random.Generator) -> pd.DataFrame:
    clear = rng.random(LAYERS * F) < 0.6
    return pd.DataFrame(
        {
            "layer": np.repeat(np.arange(LAYERS), F),
            "feature": np.tile(np.arange(F), LAYERS),
            "name": [", ".join(rng.choice(WORDS, 3)) if one else None for one in clear],
            "score": rng.gamma(4, 2, LAYERS * F),
            "auc": rng.uniform(0.3, 1, LAYERS * F),
            "source": "captions",
        }
    )


def matches(a: str, b: str, rng: np.random.Generator) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "source": a,
            "layer": np.repeat(np.arange(LAYERS), F),
            "feature": np.tile(np.arange(F), LAYERS),
            "rho": rng.beta(2, 3, LAYERS * F).astype(np.float32),
            "match_layer": rng.integers(0, LAYERS, LAYERS * F),
            "match_feature": rng.integers(0, F, LAYERS * F).astype(np.int32),
        }
    )


def make_correlations(path: Path, rng: np.random.Generator) -> None:
    spec = {"a": SOURCE, "b": TARGET, "layers_a": list(range(LAYERS)), "layers_b": list(range(LAYERS)), "samples": N}
    with new_store(path, CORRELATIONS, spec) as store:
        for direction, one in (("ab", "a"), ("ba", "b")):
            save_array(store, f"rho_{direction}", rng.beta(2, 3, (LAYERS, LAYERS * F)).astype(np.float32))
            save_array(store, f"match_{direction}", rng.integers(0, F, (LAYERS, LAYERS * F), np.int32))
            save_array(store, f"sizes_{one}", np.full(LAYERS, F))
            save_array(store, f"floor_{direction}", np.zeros((LAYERS, LAYERS), np.float32))
            save_array(store, f"floor_sizes_{one}", np.full(LAYERS, 1))
            save_array(store, f"influence_{direction}", np.zeros((len(READINGS), N), np.float32))


def make_tables(place: Path, strength: np.ndarray, rng: np.random.Generator) -> None:
    pairs = pd.DataFrame(itertools.permutations(MEMBERS, 2), columns=["source", "target"])
    matrix = pd.concat([pairs.assign(reading=reading, wmppc=rng.uniform(0.1, 0.6, 90)) for reading in READINGS])
    cells = pd.DataFrame(itertools.product(range(LAYERS), repeat=2), columns=["source_layer", "target_layer"])
    layerwise = cells.assign(source=SOURCE, target=TARGET, wmppc=rng.uniform(0.1, 0.6, LAYERS**2))
    rho_g, rho_h = rng.beta(2, 3, (2, F))
    delta = strength * (rho_g**2 - rho_h**2)
    ranking = pd.DataFrame(
        {"layer": LAYERS - 1, "feature": np.arange(F), "delta": delta, "rho_g": rho_g, "rho_h": rho_h}
    ).sort_values("delta", ascending=False)
    ranking["top"] = np.arange(F) < F // 100
    for name, table in {"matrices/all": matrix, "layerwise/depth": layerwise, "sharedness/ranking": ranking}.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        table.to_parquet(place / f"{name}.parquet")


@contextmanager
def timed(what: str, folder: Path, of: str) -> Iterator[None]:
    """Print what writing a folder took, and its size."""
    start = time.perf_counter()
    with silence():
        yield
    seconds, sizes = time.perf_counter() - start, [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    print(f"writing {what}, {of}: {seconds:.1f} s, {sum(sizes) / 1e6:.1f} MB in {len(sizes)} files", flush=True)


@contextmanager
def silence() -> Iterator[None]:
    """Without the progress report."""
    stderr = sys.stderr
    with open(os.devnull, "w", encoding="utf-8") as sys.stderr:  # noqa: PTH123
        yield
    sys.stderr = stderr


if __name__ == "__main__":
    with TemporaryDirectory() as folder:
        measure_site(Path(folder))
