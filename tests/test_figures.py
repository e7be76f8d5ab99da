"""Figures: files that can be read and show something, the same bytes from the same data, and no data too odd."""

import io

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from conceptshare.catalog import DatasetSpec
from conceptshare.dataset import Data, make_dataset
from conceptshare.features import FeatureStatistics
from conceptshare.figures import draw_layerwise, draw_matrix, draw_saes, draw_sharedness, short_labels

READINGS = ("pooled", "layer_mean", "last")
CAPTIONS = [
    "a cat that costs $5, not $x_{2$",
    "ein schöner Käfer über dem Fluß",
    "кошка сидит на окне",
    "<b>bold</b> & <i>not</i> \\frac{1}{2} {x} %s",
    "a caption so long that it cannot be shown whole, since it goes on and on about many things",
    "Averyveryverylongwordwithoutanyspacesthatcannotbebrokenanywhereatall",
    "tab\tand\nnewline",
    "_under_ ^hat^ #hash $",
]


def read(out):
    """The PNG at ``out`` as an array, once it and the PDF beside it are seen to be whole."""
    with Image.open(out) as picture:
        assert picture.format == "PNG"
        pixels = np.asarray(picture.convert("RGB"))
    pdf = out.with_suffix(".pdf").read_bytes()
    assert pdf.startswith(b"%PDF-")
    assert pdf.rstrip().endswith(b"%%EOF")
    assert len(pdf) > 3000
    assert sorted(path.name for path in out.parent.iterdir()) == sorted([out.name, out.with_suffix(".pdf").name])
    return pixels


def colours(pixels):
    return len(np.unique(pixels.reshape(-1, 3), axis=0))


def check(draw, folder, colours_at_least=60):
    """Draw to a file, which is then readable, of some size, and not empty or cut off."""
    draw(folder / "figure.png")
    pixels = read(folder / "figure.png")
    assert min(pixels.shape[:2]) >= 300
    assert colours(pixels) >= colours_at_least
    assert (pixels[0] == 255).all()
    assert (pixels[:, -1] == 255).all()
    return pixels


def check_twice(draw, tmp_path, colours_at_least=60):
    """The same, and equal to the byte when it is drawn again."""
    pixels = check(draw, tmp_path / "one", colours_at_least)
    draw(tmp_path / "two" / "figure.png")
    for name in ("figure.png", "figure.pdf"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    return pixels


def coloured(pixels):
    """The colours, other than greys, that fill at least 1 % of the picture each."""
    found, counts = np.unique(pixels.reshape(-1, 3), axis=0, return_counts=True)
    return found[(np.ptp(found.astype(int), axis=1) > 30) & (counts > 0.01 * counts.sum())]


def filled_colours(pixels):
    return len(coloured(pixels))


def box(pixels, where):
    """The part of a picture that just holds all the places ``where``."""
    rows, columns = np.flatnonzero(where.any(axis=1)), np.flatnonzero(where.any(axis=0))
    return pixels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def matrix(members, rng):
    rows = [
        {
            "source": source,
            "target": target,
            "source_modality": kinds[0],
            "target_modality": "image",
            "source_kind": kinds[1],
            "target_kind": "vlm",
            "reading": reading,
            "wmppc": rng.uniform(0.1, 0.6),
            "mppc": 0.1,
        }
        for source, kinds in members.items()
        for target in members
        if source != target
        for reading in READINGS
    ]
    return pd.DataFrame(rows)


FOUR = {
    "clip-image@0": ("image", "vlm"),
    "dinov2-small@0": ("image", "vision"),
    "dinov2-small@1": ("image", "vision"),
    "minilm@0": ("text", "language"),
}


def test_matrix(tmp_path, rng):
    table = matrix(FOUR, rng)
    pixels = check_twice(lambda out: draw_matrix(table, out), tmp_path)
    assert pixels.shape[1] > 2 * pixels.shape[0]  # three panels side by side


@pytest.mark.parametrize("missing", ["some", "all"])
def test_matrix_with_cells_that_are_nan(tmp_path, rng, missing):
    table = matrix(FOUR, rng)
    table.loc[table.index[:3] if missing == "some" else table.index, "wmppc"] = np.nan
    pixels = check(lambda out: draw_matrix(table, out), tmp_path / "drawn")
    assert (filled_colours(pixels) >= 10) == (missing == "some")
    if missing == "all":
        grey = (np.ptp(pixels, axis=2) == 0) & (abs(pixels[..., 0].astype(int) - 230) <= 1)
        assert grey.mean() > 0.2
        cells = pixels[np.ix_(grey.mean(axis=1) > 0.2, grey.mean(axis=0) > 0.2)]
        assert cells.min() > 200  # nothing is written on a cell without a value


def test_a_matrix_of_two_members_shows_its_values(tmp_path, rng):
    """Cells have the colours of their values: with other values, other pixels."""
    table = matrix(dict(list(FOUR.items())[:2]), rng)
    pictures = [
        check(lambda out, values=values: draw_matrix(table.assign(wmppc=values), out), tmp_path / str(n))
        for n, values in enumerate((table.wmppc, table.wmppc[::-1].to_numpy()))
    ]
    assert pictures[0].shape == pictures[1].shape
    cells = [(pictures[0] == colour).all(axis=2) for colour in coloured(pictures[0])]
    assert len(cells) == 6
    for cell in cells:
        assert 0.9 < box(cell, cell).mean() < 1  # a number is written on it
    assert (pictures[0] != pictures[1]).any(axis=2).mean() > 0.1


def layerwise(pairs, rows, columns):
    return pd.DataFrame(
        [
            {
                "source": a,
                "target": b,
                "source_layer": i,
                "target_layer": j,
                "wmppc": 0.9 * np.exp(-abs(i / rows - j / columns)),
                "mppc": 0.1,
            }
            for a, b in pairs
            for i in range(rows)
            for j in range(columns)
        ]
    )


PAIRS = [
    ("vit@0", "vit@1"),
    ("vit@0", "bert@0"),
    ("clip-image@0", "clip-text@0"),
    ("bert@0", "bert@1"),
    ("bert@0", "clip-text@0"),
]


@pytest.mark.parametrize(("count", "rows", "columns"), [(2, 24, 24), (3, 2, 2), (4, 3, 3), (5, 2, 3)])
def test_layerwise(tmp_path, count, rows, columns):
    pairs = PAIRS[:count]
    pixels = check(lambda out: draw_layerwise(layerwise(pairs, rows, columns), pairs, out), tmp_path / "drawn")
    assert colours(pixels) > 100


def test_layerwise_of_one_pair_is_the_same_twice(tmp_path):
    pixels = check_twice(lambda out: draw_layerwise(layerwise(PAIRS[:1], 6, 4), PAIRS[:1], out), tmp_path)
    assert filled_colours(pixels) >= 5


def test_layerwise_draws_the_pairs_asked_for_alone(tmp_path):
    """The table has both directions; a panel is the one that the pair names."""
    table = layerwise(PAIRS[:1], 4, 4)
    back = table.rename(columns={"source": "target", "target": "source"}).assign(wmppc=0.01)
    for name, rows in (("forth", table), ("both", pd.concat([back, table]))):
        draw_layerwise(rows, PAIRS[:1], tmp_path / name / "figure.png")
    assert (tmp_path / "forth" / "figure.png").read_bytes() == (tmp_path / "both" / "figure.png").read_bytes()


@pytest.mark.parametrize(
    ("missing", "shown"), [(slice(0, 4), True), (slice(0, 25), True), (slice(25, 50), True), (slice(0, 50), False)]
)
def test_layerwise_with_cells_that_are_nan(tmp_path, missing, shown):
    """The scale comes from the values that there are: what is not missing keeps its colours."""
    table = layerwise(PAIRS[:2], 5, 5)
    table.loc[table.index[missing], "wmppc"] = np.nan
    pixels = check(lambda out: draw_layerwise(table, PAIRS[:2], out), tmp_path / "drawn")
    assert (filled_colours(pixels) >= 4) == shown


def test_layerwise_where_everything_is_zero(tmp_path):
    table = layerwise(PAIRS[:1], 3, 3).assign(wmppc=0.0)
    check(lambda out: draw_layerwise(table, PAIRS[:1], out), tmp_path / "drawn")


@pytest.fixture
def data(tmp_path):
    images = []
    for n in range(len(CAPTIONS)):
        buffer = io.BytesIO()
        size = [(64, 48), (1, 1), (400, 20), (20, 400)][n % 4]
        noise = np.random.default_rng(n).integers(0, 256, (size[1], size[0], 3), np.uint8)
        Image.fromarray(noise).save(buffer, "PNG")
        images.append(buffer.getvalue())
    pq.write_table(pa.table({"image": images, "caption": CAPTIONS}), tmp_path / "pairs.parquet")
    make_dataset(DatasetSpec(source=str(tmp_path / "pairs.parquet")), tmp_path / "data")
    return Data(tmp_path / "data")


def ranking(count=4):
    return pd.DataFrame(
        {
            "rank": np.arange(1, count + 1),
            "source": "clip_image@0",
            "layer": 3,
            "feature": np.arange(count)[::-1],
            "delta": np.linspace(30, -3, count),
            "strength": 10.0,
            "density": 0.125,
            "rho_g": np.linspace(0.9, 0.1, count),
            "rho_h": 0.05,
        }
    )


def statistics(count=4):
    top = np.full((count, 10), -1, np.int32)
    top[3] = [0, 1, 2, 3, 4, 5, 6, 7, 0, 1]
    top[2, :2] = [5, 6]
    top[0, :1] = [7]
    return {3: FeatureStatistics(np.ones(count), np.ones(count), top)}


@pytest.mark.filterwarnings("ignore:Glyph")
def test_sharedness_with_captions_that_are_markup_or_other_scripts(tmp_path, data):
    def draw(out):
        draw_sharedness(ranking(), statistics(), data, 3, out)

    pixels = check_twice(draw, tmp_path, colours_at_least=1000)
    more = tmp_path / "more" / "figure.png"
    draw_sharedness(ranking(), statistics(), data, 4, more)
    assert read(more).shape[0] > 1.2 * pixels.shape[0]  # a row more
    fewer = tmp_path / "fewer" / "figure.png"
    draw_sharedness(ranking(2), statistics(), data, 4, fewer)
    assert read(fewer).shape[0] < pixels.shape[0]  # a ranking shorter than what could be pictured


@pytest.mark.filterwarnings("ignore:Glyph")
def test_sharedness_of_one_feature_that_was_never_active(tmp_path, data):
    table = ranking().query("feature == 1").reset_index(drop=True)
    draw_sharedness(table, statistics(), data, 6, tmp_path / "one" / "figure.png")
    assert colours(read(tmp_path / "one" / "figure.png")) > 20


def test_a_sample_is_one_picture_with_its_caption_below(tmp_path):
    buffer = io.BytesIO()
    Image.new("RGB", (64, 48), "red").save(buffer, "PNG")
    rows = {"image": [buffer.getvalue()] * 2, "caption": ["a red picture of nothing at all"] * 2}
    pq.write_table(pa.table(rows), tmp_path / "red.parquet")
    make_dataset(DatasetSpec(source=str(tmp_path / "red.parquet")), tmp_path / "red")
    table = ranking().query("feature == 0").reset_index(drop=True)
    shown = {3: FeatureStatistics(np.ones(1), np.ones(1), np.array([[0, -1, -1]], np.int32))}
    draw_sharedness(table, shown, Data(tmp_path / "red"), 1, tmp_path / "one" / "figure.png")
    pixels = read(tmp_path / "one" / "figure.png")
    red = (pixels == [255, 0, 0]).all(axis=2)
    picture = box(pixels, red)
    assert picture.shape[1] / picture.shape[0] == pytest.approx(64 / 48, rel=0.05)
    assert picture[..., 0].min() > 200  # no black letters on it


@pytest.fixture
def saes(tmp_path):
    """Two encoders, one of two seeds, of three layers each, with their loss curves."""
    rows = []
    for encoder, seeds in (("vit", (0, 1)), ("mini_lm", (4,))):
        for seed in seeds:
            for layer in (0, 2, 5):
                folder = tmp_path / "saes" / encoder / f"layer-{layer:02d}" / f"seed-{seed}"
                folder.mkdir(parents=True)
                curve = np.exp(-np.arange(50) / (10 + layer)) + 0.05 * seed
                pd.DataFrame({"step": range(50), "loss": curve}).to_csv(folder / "loss.csv", index=False)
                rows.append(
                    {"encoder": encoder, "seed": seed, "layer": layer, "fvu_all": 0.3 + layer / 10, "dead_all": 0.1}
                )
    return pd.DataFrame(rows), tmp_path / "saes"


def test_saes(tmp_path, saes):
    table, folder = saes
    check_twice(lambda out: draw_saes(table, folder, out), tmp_path)


def test_saes_of_one_layer_with_metrics_that_are_nan(tmp_path, saes):
    table, folder = saes
    table = table.query("encoder == 'mini_lm' and layer == 2").assign(fvu_all=np.nan)
    check(lambda out: draw_saes(table, folder, out), tmp_path / "drawn")


def test_labels_leave_out_seeds_that_tell_nothing_apart():
    assert short_labels(["vit@0", "bert@3"]) == ["vit", "bert"]
    assert short_labels(["vit@0", "vit@1", "bert@3"]) == ["vit@0", "vit@1", "bert"]
