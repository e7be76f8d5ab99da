"""Figures are readable files with content, deterministic, and handle unusual data."""

import io
import json
import re
import warnings
from itertools import pairwise, product
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib import font_manager
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Polygon
from matplotlib.text import Text
from PIL import Image
from scipy import stats
from typer.testing import CliRunner

from conceptshare.analysis.paper import compare
from conceptshare.analysis.tables import write_table
from conceptshare.cli import app
from conceptshare.config.catalog import DatasetSpec
from conceptshare.data.dataset import Data, make_dataset
from conceptshare.figures import (
    draw_averages,
    draw_intervals,
    draw_layerwise,
    draw_matrix,
    draw_paper,
    draw_saes,
    draw_scatter,
    draw_sharedness,
    draw_similarity,
    draw_strength,
)
from conceptshare.io.errors import StoreError, StudyError
from conceptshare.io.readers import FeatureStatistics, read_statistics
from conceptshare.io.seals import seal
from conceptshare.io.store import read_root

READINGS = ("pooled", "layer_mean", "last")
TITLES = {
    "pooled": "All layers, pooled (Eq. 6)",
    "layer_mean": "All layers, mean over layers",
    "last": "Last layer",
}
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


NOT_WRITTEN = b""


@pytest.fixture(autouse=True)
def drawn(request, monkeypatch):
    """The saved figures, in order.

    Writing files is slow: PDFs are only written for tests that request `pdf`, and PNGs not for those with `unsaved`.
    """
    figures, save = [], Figure.savefig
    asked = request.fixturenames

    def savefig(figure, path, **options):
        kind = options.get("format", "png")
        if kind == "png":
            figures.append(figure)
        if "pdf" in asked if kind == "pdf" else "unsaved" not in asked:
            save(figure, path, **options)
        else:
            Path(path).write_bytes(NOT_WRITTEN)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return figures


@pytest.fixture
def pdf():
    """Write PDFs."""


@pytest.fixture
def unsaved():
    """Do not write PNGs."""


def read(out):
    """The PNG at ``out`` as an array, after checking that it and the PDF next to it are complete."""
    with Image.open(out) as picture:
        assert picture.format == "PNG"
        pixels = np.asarray(picture.convert("RGB"))
    pdf = out.with_suffix(".pdf").read_bytes()
    if pdf != NOT_WRITTEN:
        assert pdf.startswith(b"%PDF-")
        assert pdf.rstrip().endswith(b"%%EOF")
        assert len(pdf) > 3000
    files = [path.name for path in out.parent.iterdir() if path.is_file()]
    assert sorted(files) == sorted([out.name, out.with_suffix(".pdf").name])
    return pixels


def colours(pixels):
    return len(np.unique(pixels @ np.array([1, 2**8, 2**16])))


def check(draw, folder, colours_at_least=60):
    """Draw to a file and check that it is readable, large enough, and neither empty nor truncated."""
    draw(folder / "figure.png")
    pixels = read(folder / "figure.png")
    assert min(pixels.shape[:2]) >= 300
    assert colours(pixels) >= colours_at_least
    assert (pixels[0] == 255).all()
    assert (pixels[:, -1] == 255).all()
    return pixels


def coloured(pixels):
    """The colours other than greys that each fill at least 0.3 % of the image."""
    found, counts = np.unique(pixels.reshape(-1, 3), axis=0, return_counts=True)
    return found[(np.ptp(found.astype(int), axis=1) > 30) & (counts > 0.003 * counts.sum())]


def filled_colours(pixels):
    return len(coloured(pixels))


def box(pixels, where):
    """The bounding box of the pixels ``where``, as part of the image."""
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
    table = pd.DataFrame(rows)
    return table.assign(excess=table.wmppc - 0.1, p=0.04, unexplained=0, left_out=0, code="before_topk")


FOUR = {
    "clip-image@0": ("image", "vlm"),
    "dinov2-small@0": ("image", "vision"),
    "dinov2-small@1": ("image", "vision"),
    "minilm@0": ("text", "language"),
}


def test_matrix(tmp_path, rng):
    table = matrix(FOUR, rng)
    pixels = check(lambda out: draw_matrix(table, out), tmp_path / "one")
    assert pixels.shape[1] > pixels.shape[0]  # three panels side by side, twice


def test_matrix_leaves_cells_of_a_missing_target_empty(tmp_path, rng, drawn, unsaved):
    table = matrix(FOUR, rng)
    draw_matrix(table[table.target != next(iter(FOUR))], tmp_path / "figure.png")
    first = np.ma.getmaskarray(np.ma.masked_invalid(drawn[0].axes[0].images[0].get_array()))
    assert first[:, 0].all()
    assert first.sum() == 2 * len(FOUR) - 1


@pytest.mark.parametrize("missing", ["some", "all"])
def test_matrix_with_cells_that_are_nan(tmp_path, rng, drawn, missing):
    table = matrix(FOUR, rng)
    table.loc[table.index[:3] if missing == "some" else table.index, ["wmppc", "excess", "p"]] = np.nan
    pixels = check(lambda out: draw_matrix(table, out), tmp_path / "drawn")
    assert (filled_colours(pixels) >= 8) == (missing == "some")
    assert "grey: an encoder with itself, or no value" in written_on(drawn[0])
    if missing == "all":
        grey = (np.ptp(pixels, axis=2) == 0) & (abs(pixels[..., 0].astype(int) - 230) <= 1)
        assert grey.mean() > 0.2
        cells = pixels[np.ix_(grey.mean(axis=1) > 0.2, grey.mean(axis=0) > 0.2)]
        assert cells.min() > 200  # cells without a value have no number


def test_a_matrix_shows_the_excess_below_and_hatches_cells_that_are_not_above_chance(tmp_path, rng, drawn, unsaved):
    table = matrix(FOUR, rng)
    by_chance = (table.source == "minilm@0") & (table.target == "clip-image@0") & (table.reading == "last")
    draw_matrix(table.assign(p=np.where(by_chance, 0.3, 0.04)), tmp_path / "matrix.png")
    (figure,) = drawn
    panels = [ax for ax in figure.axes if ax.get_title()]
    assert [ax.get_title().startswith("Excess:") for ax in panels] == [False] * 3 + [True] * 3
    members = list(FOUR)
    for ax, (column, reading) in zip(panels, product(("wmppc", "excess"), READINGS), strict=True):
        of_reading = table[table.reading == reading]
        cells = of_reading.pivot(index="source", columns="target", values=column).reindex(members, columns=members)
        np.testing.assert_array_equal(np.ma.filled(ax.images[0].get_array(), np.nan), cells)
        hatched = [patch.get_xy() for patch in ax.patches if patch.get_hatch()]
        assert hatched == ([(-0.5, 2.5)] if reading == "last" else [])
    assert any("hatched: not above" in text.get_text() for text in figure.texts)


def corners(ax, x=0.5, y=-0.5):
    """Column and row of the cells with a marked corner: the upper right one, or another relative to their centres."""
    triangles = [patch.get_xy() for patch in ax.patches if isinstance(patch, Polygon)]
    cells = [tuple(np.floor(triangle.min(axis=0) + 0.5)) for triangle in triangles]
    of = zip(cells, triangles, strict=True)
    return sorted(cell for cell, triangle in of if [cell[0] + x, cell[1] + y] in triangle.tolist())


NOTE = "layers whose SAE has an FVU above 0.8 at global tokens"


def bounded(table):
    """A table that records the bound by which it marks layers."""
    table.attrs["max_fvu_global"] = 0.8
    return table


def test_every_figure_marks_what_unexplained_layers_are_part_of(tmp_path, rng, drawn, unsaved):
    table, note = bounded(matrix(FOUR, rng)), f"with {NOTE}"
    draw_matrix(table.assign(unexplained=(table.source == "minilm@0") * 2), tmp_path / "figure.png")
    assert corners(drawn[-1].axes[0]) == [(0, 3), (1, 3), (2, 3)]
    assert any(text.endswith(f"marked upper corner: {note}") for text in written_on(drawn[-1]))
    cells = bounded(layerwise(PAIRS[:1], 3, 4))
    draw_layerwise(cells.assign(unexplained=(cells.target_layer == 2).astype(int)), PAIRS[:1], tmp_path / "figure.png")
    assert corners(drawn[-1].axes[0]) == [(2, 0), (2, 1), (2, 2)]
    assert f"marked corner: {note}" in written_on(drawn[-1])
    whole = bounded(full_matrix(SOME["four"], rng))
    whole["unexplained"] = (whole.index == 0).astype(int)
    draw_intervals(whole, tmp_path / "figure.png")
    hollow = [
        x
        for ax in drawn[-1].axes
        for line in ax.lines
        if line.get_markerfacecolor() == "white"
        for x in line.get_xdata()
    ]
    assert hollow == [whole.wmppc[0]]
    assert f"hollow: {note}" in written_on(drawn[-1])
    whole["unexplained"] = (whole.reading == "last").astype(int)
    draw_similarity(whole, tmp_path / "figure.png")
    points = by_title(drawn[-1])["Linear CKA"].collections
    assert [len(of.get_offsets()) for of in points if not len(of.get_facecolor())] == [
        0,
        (whole.reading == "last").sum(),
    ]
    assert f"hollow: {note}" in written_on(drawn[-1])
    averages = bounded(modality_averages(rng))
    averages["unexplained"] = (averages.index == 1).astype(int)
    draw_averages(averages, tmp_path / "figure.png")
    assert f"{averages.wmppc[1]:.3f}*" in written_on(drawn[-1])
    assert any(f"* cells {note}" in text for text in written_on(drawn[-1]))
    draw_scatter(bounded(scattered(60, rng)).assign(unexplained="minilm@0"), tmp_path / "figure.png")
    assert f"last {NOTE}: minilm@0" in written_on(drawn[-1])
    assert_readable(drawn[-1])


def test_every_figure_says_that_layers_are_left_out(tmp_path, rng, drawn, unsaved):
    note = f"without {NOTE}"
    whole, averages = bounded(full_matrix(SOME["four"], rng)), bounded(modality_averages(rng))
    matrices = bounded(matrix(FOUR, rng))
    for draw, table in (
        (draw_intervals, whole),
        (draw_similarity, whole),
        (draw_averages, averages),
        (draw_matrix, matrices),
    ):
        for left_out in (0, 2):
            draw(table.assign(left_out=(table.reading == "pooled") * left_out), tmp_path / "figure.png")
            assert any(note in text for text in written_on(drawn[-1])) == bool(left_out)
    some = (matrices.source == "minilm@0") & (matrices.reading != "last")
    marks = {"left_out": some * 2, "unexplained": (matrices.target == "minilm@0") * 1}
    draw_matrix(matrices.assign(**marks), tmp_path / "figure.png")
    pooled, _, last = drawn[-1].axes[:3]
    assert corners(pooled, -0.5, 0.5) == [(0, 3), (1, 3), (2, 3)]
    assert corners(pooled) == corners(last) == [(3, 0), (3, 1), (3, 2)]
    assert corners(last, -0.5, 0.5) == []
    both = f"\nmarked upper corner: with {NOTE}; marked lower corner: without them"
    assert any(text.endswith(both) for text in written_on(drawn[-1]))
    draw_averages(averages.assign(left_out=(averages.index == 1).astype(int)), tmp_path / "figure.png")
    assert f"{averages.wmppc[1]:.3f}†" in written_on(drawn[-1])
    features = pd.DataFrame({"source": "a@0", "target": "b@0", "strength": [1.0, 2, 3, 4], "rho": [0.1, 0.4, 0.3, 0.9]})
    draw_strength([("a@0", "b@0", features.assign(left_out=[False, False, False, True]))], tmp_path / "figure.png", 0.8)
    assert any(note in text for text in written_on(drawn[-1]))
    assert any("0 of 3 silent" in text for text in written_on(drawn[-1]))
    assert f"r {np.corrcoef([1, 2, 3], [0.1, 0.4, 0.3])[0, 1]:.2f}" in written_on(drawn[-1])


def test_a_matrix_before_and_after_topk_has_panels_of_each_in_the_same_colours(tmp_path, rng, drawn, unsaved):
    tables = [matrix(FOUR, rng), matrix(FOUR, rng).assign(code="after_topk")]
    draw_matrix(pd.concat(tables), tmp_path / "matrix.png")
    (figure,) = drawn
    panels = [ax for ax in figure.axes if ax.get_title()]
    titles = [" ".join(ax.get_title().split()) for ax in panels]
    words = ("Before TopK", "Excess before TopK", "After TopK", "Excess after TopK")
    assert titles == [f"{title}: {name}" for title in words for name in ("pooled", "mean over layers", "last layer")]
    for number, (ax, (table, column, reading)) in enumerate(
        zip(panels, product(tables, ("wmppc", "excess"), READINGS), strict=True)
    ):
        of_reading = table[table.reading == reading]
        cells = of_reading.pivot(index="source", columns="target", values=column).reindex(FOUR, columns=[*FOUR])
        np.testing.assert_array_equal(np.ma.filled(ax.images[0].get_array(), np.nan), cells)
        assert ax.images[0].get_clim() == panels[number % 6].images[0].get_clim()


def test_a_matrix_of_two_members_shows_its_values(tmp_path, rng):
    """Cells are coloured by value: other values give other pixels."""
    table = matrix(dict(list(FOUR.items())[:2]), rng)
    drawings = [
        check(lambda out, values=values: draw_matrix(table.assign(wmppc=values, excess=0.01), out), tmp_path / str(n))
        for n, values in enumerate((table.wmppc, table.wmppc[::-1].to_numpy()))
    ]
    assert drawings[0].shape == drawings[1].shape
    published = drawings[0][: len(drawings[0]) // 2]  # the excess is below
    cells = [(published == colour).all(axis=2) for colour in coloured(published)]
    assert len(cells) == 6
    for cell in cells:
        assert 0.9 < box(cell, cell).mean() < 1  # it has a number
    assert (drawings[0] != drawings[1]).any(axis=2).mean() > 0.05


WORDS = {"image": "images", "text": "text", "vlm": "vision-language", "vision": "vision", "language": "language"}
WORDS |= {"untrained": "untrained"}
GROUPS = [("image", "vlm"), ("image", "vision"), ("text", "vlm"), ("text", "language")]
GROUPS += [("image", "untrained"), ("text", "untrained")]


@pytest.mark.parametrize(
    ("sizes", "annotated"),
    [((2,), True), ((1, 1, 1, 1), True), ((3, 3), True), ((3, 3, 3, 2), True), ((6, 6, 6, 4), False), ((1,) * 6, True)],
)
def test_a_matrix_fits_a_page_and_names_its_groups(tmp_path, rng, drawn, unsaved, sizes, annotated):
    groups = dict(zip(GROUPS, sizes, strict=False))
    members = {f"{a}-{kind}-encoder@{n}": (a, kind) for (a, kind), size in groups.items() for n in range(size)}
    table = matrix(members, rng)
    draw_matrix(table, tmp_path / "figure.png")
    assert_readable(drawn[0])
    assert drawn[0].get_figwidth() <= 7.21
    panels = [ax for ax in drawn[0].axes if ax.images]
    assert [ax.get_title().replace("\n", " ") for ax in panels[:3]] == list(TITLES.values())
    edges = np.cumsum(sizes)
    for ax, reading in zip(panels[:3], READINGS, strict=True):
        shown = {(round(t.get_position()[1]), round(t.get_position()[0])): t.get_text() for t in numbers_on(ax)}
        cells = table[table.reading == reading].set_index(["source", "target"]).wmppc
        expected = {
            (i, j): f"{cells[a, b]:.2f}" for i, a in enumerate(members) for j, b in enumerate(members) if a != b
        }
        assert shown == (expected if annotated else {})
        lines = [line for line in ax.lines if line.get_color() == "white"]
        rows = {line.get_ydata()[0]: line.get_linewidth() for line in lines if len(set(line.get_ydata())) == 1}
        assert set(rows) == {end - 0.5 for end in edges[:-1]}
        assert len(lines) == 2 * len(rows)
        if len(sizes) == 4:
            assert rows[edges[1] - 0.5] > rows[edges[0] - 0.5] == rows[edges[2] - 0.5]
    named = {text.get_text(): pytest.approx(text.xy[1]) for text in panels[0].texts if not text.get_text()[0].isdigit()}
    starts = [0, *edges[:-1]]
    groups_named = [f"{WORDS[modality]}, {WORDS[kind]}" for modality, kind in groups]
    assert named == {"input, kind of model": -0.5} | {
        name: (start + end - 1) / 2 for name, start, end in zip(groups_named, starts, edges, strict=True)
    }
    assert "grey: an encoder with itself" in [text.get_text() for text in drawn[0].texts]


def numbers_on(ax):
    return [text for text in ax.texts if text.get_text()[0].isdigit()]


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
    ).assign(excess=lambda table: table.wmppc / 2, p=0.04, unexplained=0)


PAIRS = [
    ("vit@0", "vit@1"),
    ("siglip2-image-large@0", "siglip2-image-large@1"),
    ("siglip2-image-large@0", "mambavision-large@0"),
    ("bert@0", "bert@1"),
    ("bert@0", "clip-text@0"),
]


@pytest.mark.parametrize(("count", "rows", "columns"), [(2, 24, 24), (3, 2, 2), (4, 3, 3), (5, 2, 3)])
def test_layerwise(tmp_path, drawn, count, rows, columns):
    pairs = PAIRS[:count]
    pixels = check(lambda out: draw_layerwise(layerwise(pairs, rows, columns), pairs, out), tmp_path / "drawn")
    assert colours(pixels) > 100
    assert_readable(drawn[0])
    images = [ax.images[0] for ax in drawn[0].axes if ax.images]
    assert len(images) == 2 * count  # wMPPC, and below it the excess, on a scale of its own
    for of_value in (images[:count], images[count:]):
        assert len({(image.norm.vmin, image.norm.vmax) for image in of_value}) == 1


def test_layerwise_is_in_colour(tmp_path):
    pixels = check(lambda out: draw_layerwise(layerwise(PAIRS[:1], 6, 4), PAIRS[:1], out), tmp_path / "one")
    assert filled_colours(pixels) >= 5


def test_layerwise_draws_only_the_requested_pairs(tmp_path):
    """The table has both directions; a panel shows the one of the pair."""
    table = layerwise(PAIRS[:1], 4, 4)
    back = table.rename(columns={"source": "target", "target": "source"}).assign(wmppc=0.01, excess=0.3)
    for name, rows in (("forth", table), ("both", pd.concat([back, table]))):
        draw_layerwise(rows, PAIRS[:1], tmp_path / name / "figure.png")
    assert (tmp_path / "forth" / "figure.png").read_bytes() == (tmp_path / "both" / "figure.png").read_bytes()


def test_layerwise_names_a_missing_pair_and_lists_the_existing_ones(tmp_path):
    table = layerwise(PAIRS[:2], 2, 2)
    error = f'no pair ["deit@0", "gpt@0"]; give pairs that it has: {json.dumps(PAIRS[0])}, {json.dumps(PAIRS[1])}'
    with pytest.raises(StudyError, match=re.escape(error)):
        draw_layerwise(table, [PAIRS[0], ("deit@0", "gpt@0")], tmp_path / "figure.png")


@pytest.mark.parametrize(("missing", "shown"), [(slice(0, 4), True), (slice(0, 25), True), (slice(0, 50), False)])
def test_layerwise_with_cells_that_are_nan(tmp_path, missing, shown):
    """The scale comes from the existing values, so they keep their colours."""
    table = layerwise(PAIRS[:2], 5, 5)
    table.loc[table.index[missing], ["wmppc", "excess", "p"]] = np.nan
    pixels = check(lambda out: draw_layerwise(table, PAIRS[:2], out), tmp_path / "drawn")
    assert (filled_colours(pixels) >= 4) == shown


def test_layerwise_of_zeros(tmp_path):
    table = layerwise(PAIRS[:1], 3, 3).assign(wmppc=0.0, excess=0.0)
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
            "excess_g": np.linspace(0.8, 0, count),
            "excess_h": 0.0,
            "calibrated_delta": np.linspace(20, 0, count),
            "calibrated_rank": np.arange(count, 0, -1),
            "calibrated_top": np.arange(count) == count - 1,
            "top_share": 0.955,
            "calibrated_top_share": 0.124,
        }
    )


def ranking_of(store, count=8):
    """The same for the features of a store."""
    table, of = ranking(count), read_statistics(store)[3]
    table = table.assign(strength=of.strength[table.feature], density=of.density[table.feature])
    table.attrs["features"] = {store.stem: read_root(store, "features")["digest"]}
    return table


def statistics(count=4):
    top = np.full((count, 10), -1, np.int32)
    top[3] = [0, 1, 2, 3, 4, 5, 6, 7, 0, 1]
    top[2, :2] = [5, 6]
    top[0, :1] = [7]
    return {3: FeatureStatistics(*np.ones((3, count)), top)}


@pytest.mark.filterwarnings("ignore:Glyph")
def test_sharedness_with_captions_of_markup_or_other_scripts(tmp_path, data, drawn, pdf):
    def draw(out):
        draw_sharedness(ranking(), statistics(), data, 3, out)

    check(draw, tmp_path / "one", colours_at_least=1000)
    assert_readable(drawn[0])


@pytest.mark.filterwarnings("ignore:Glyph")
def test_sharedness_of_one_never_active_feature(tmp_path, data, drawn):
    table = ranking().query("feature == 1").reset_index(drop=True)
    draw_sharedness(table, statistics(), data, 6, tmp_path / "one" / "figure.png")
    assert colours(read(tmp_path / "one" / "figure.png")) > 20
    assert "active on no sample" in written_on(drawn[0])


@pytest.mark.filterwarnings("ignore:Glyph")
def test_sharedness_marks_only_never_active_features(tmp_path, data, drawn, unsaved):
    draw_sharedness(ranking(), statistics(), data, 4, tmp_path / "all" / "figure.png")
    assert written_on(drawn[0]).count("active on no sample") == 1


@pytest.mark.filterwarnings("ignore:Glyph")
@pytest.mark.parametrize(("samples", "side", "shown"), [(9, 3, 8), (100, 10, 8), (4, 2, 4)])
def test_images_are_in_a_square_grid_strongest_first_and_keep_their_aspect_ratio(
    tmp_path, data, drawn, unsaved, samples, side, shown
):
    order = [3, 0, 2, 1, 7, 6, 5, 4]
    kept = {3: FeatureStatistics(*np.ones((3, 1)), np.array([[*order, *[-1] * 92]], np.int32))}
    draw_sharedness(ranking(1).assign(feature=0), kept, data, 1, tmp_path / "figure.png", samples)
    drawings = [image for ax in drawn[0].axes for image in ax.images]
    assert len(drawings) == shown
    cells = []
    for image, sample in zip(drawings, order, strict=False):
        left, right, foot, head = image.get_extent()
        width, height = data.image(sample).size
        assert (right - left) / (foot - head) == pytest.approx(width / height)
        assert max(right - left, foot - head) == pytest.approx(0.66)
        cells.append((foot, (left + right) / 2))
    centres = sorted({round(x, 6) for _, x in cells})
    assert len(centres) == min(side, shown)
    assert [round(x, 6) for _, x in cells] == [centres[n % side] for n in range(shown)]
    assert_apart([image.get_window_extent().extents for image in drawings])


@pytest.mark.filterwarnings("ignore:Glyph")
def test_draws_a_grid_per_feature_of_the_ranking(tmp_path, data, drawn, unsaved):
    for count, features_shown in ((4, 3), (4, 4), (2, 4)):
        draw_sharedness(ranking(count), statistics(), data, features_shown, tmp_path / "figure.png")
    headings = [
        [words for words in written_on(figure) if words.startswith("#") and "feature" in words] for figure in drawn
    ]
    every = [f"#{n}  layer 3, feature {feature}" for n, feature in enumerate([3, 2, 1, 0], 1)]
    assert headings == [every[:3], every, ["#1  layer 3, feature 1", "#2  layer 3, feature 0"]]
    assert "$\\Delta$ 30, $\\rho_G$ 0.90, $\\rho_H$ 0.05" in written_on(drawn[0])
    assert "calibrated #4; top share 96%, calibrated 12%" in written_on(drawn[0])


@pytest.mark.filterwarnings("ignore:Glyph")
@pytest.mark.parametrize("members", [["bert@0"], [f"{'a-member-of-a-long-name' * 3}-{n}@0" for n in range(9)]])
def test_labels_features_of_a_ranking_with_names_and_groups(tmp_path, data, drawn, unsaved, members):
    names = pd.DataFrame({"layer": [2, 3, 3, 3], "feature": [3, 3, 2, 1]})
    names = names.assign(name=["other", "flag, $x_1$", None, None], candidate=["other", "flag, $x_1$", "cat", None])
    table = ranking(3).assign(feature=[3, 2, 1], shared_with=", ".join(members), not_shared_with="dinov2@0")
    draw_sharedness(table, statistics(), data, 3, tmp_path / "figure.png", names=names)
    assert_readable(drawn[0])
    colour = {text.get_text(): text.get_color() for text, _ in visible_texts(drawn[0])}
    assert (colour["flag, $x_1$"], colour["perhaps cat"], colour["no clear name"]) == ("black", "0.45", "0.45")
    written = written_on(drawn[0])
    assert "more than with (H): dinov2@0" in written
    assert written[1].startswith(f"shared with (G): {members[0]}")


@pytest.mark.filterwarnings("ignore:Glyph")
def test_draws_chosen_features_and_the_top_of_two_rankings(tmp_path, data, drawn, unsaved, write_features, rng):
    """The paper's Figure 2 shows features of two rankings, its Figures 3 and 4 chosen features."""
    x = {3: rng.random((len(CAPTIONS), 8))}
    store = write_features(tmp_path, "clip_image@0", x, content_hash=data.content_hash)
    table = ranking_of(store).assign(top=np.arange(8) < 4)
    other = table.set_index("feature").loc[[5, 3, 6, 2, 7, 4, 1, 0]].reset_index()
    for name, written in (("a", table), ("b", other), ("c", other.assign(source="bert@0")), ("d", table[::-1])):
        write_table(written.reset_index(drop=True).assign(top=np.arange(8) < 4), tmp_path / f"{name}.csv")

    def draw(*options):
        places = ["--table", tmp_path / "a.parquet", "--features", store, "--data", tmp_path / "data"]
        command = ["figures", "sharedness", *places, "--out", tmp_path / "drawn.png", *options]
        result = CliRunner().invoke(app, [str(word) for word in command])
        if result.exception:
            return str(result.exception)
        written = written_on(drawn.pop())
        headings = [words for words in written if words.startswith("#") and "feature" in words]
        assert written.count("no clear name") == len(headings) * ("--names" in options)
        return [int(words.split("feature ")[1].split()[0]) for words in headings]

    assert draw() == [7, 6, 5, 4, 3, 2]
    made = ["names", "--features", store, "--data", tmp_path / "data", "--out", tmp_path / "names.parquet"]
    assert CliRunner().invoke(app, [str(word) for word in made]).exit_code == 0
    assert draw("--names", tmp_path / "names.parquet") == [7, 6, 5, 4, 3, 2]
    assert draw("--feature", 0, "--feature", 6, "--samples", 100) == [6, 0]
    assert draw("--also-top-of", tmp_path / "b.parquet") == [6, 5]
    assert draw("--also-top-of", tmp_path / "b.parquet", "--feature", 5) == [5]
    assert "feature 8 is not among the 8" in draw("--feature", 8)
    assert "c.parquet: ranks the features of bert@0, but" in draw("--also-top-of", tmp_path / "c.parquet")
    assert "no feature is at the top of both" in draw("--also-top-of", tmp_path / "d.parquet")


@pytest.mark.filterwarnings("ignore:Glyph")
def test_draws_the_samples_that_fit_worst_and_best(tmp_path, data, drawn, unsaved):
    order = [3, 0, 2, 1, 7, 6, 5, 4]
    ids, captions = data.ids(), [data.caption(n) for n in order]
    table = pd.DataFrame({"row": order, "id": [ids[n] for n in order], "caption": captions, "fit": np.arange(8) - 2.5})
    layers = {"vit@0": [11], "bert@0": [3, 5]}
    table.attrs |= {"layers": layers, "unexplained": {"vit@0": [], "bert@0": [5]}, "max_fvu_global": 0.9}
    write_table(table, tmp_path / "fit.csv")
    command = ["figures", "samples", "--table", str(tmp_path / "fit.parquet"), "--out", str(tmp_path / "drawn.png")]
    assert CliRunner().invoke(app, [*command, "--data", str(tmp_path / "data")]).exit_code == 0
    written = written_on(drawn[0])
    assert [words for words in written if "fit:" in words] == ["Worst fit: -2.50 to -2.50", "Best fit: 4.50 to 4.50"]
    assert next(words for words in written if words.startswith("Fit by")).splitlines() == [
        "Fit by features of vit@0, layer 11 and bert@0, layers 3, 5",
        "SAEs with an FVU above 0.9 at global tokens: bert@0, layer 5",
    ]
    images = [image for ax in drawn[0].axes for image in ax.images]
    for image, sample in zip(images, [3, 4], strict=True):
        left, right, foot, head = image.get_extent()
        width, height = data.image(sample).size
        assert (right - left) / (foot - head) == pytest.approx(width / height)
    assert_apart([image.get_window_extent().extents for image in images])
    write_table(table.assign(row=range(8)), tmp_path / "fit.csv")
    refused = CliRunner().invoke(app, [*command, "--data", str(tmp_path / "data")]).exception
    assert "of other samples than the data" in str(refused)


def test_refuses_features_or_samples_that_do_not_belong_to_a_ranking(tmp_path, data, write_features_from, rng):
    x = rng.random((len(CAPTIONS), 8))

    def store(folder, member, layers, content_hash=data.content_hash):
        made = tmp_path / folder
        return write_features_from(made, made / "features", member, layers, content_hash)

    own, bert = store("own", "clip_image@0", {3: x}), store("bert", "bert@0", {3: x})
    shuffled = store("shuffled", "clip_image@0", {3: x}, "another order")
    other = store("other", "clip_image@0", {3: x[:, :7]})
    places = {"--table": tmp_path / "a.parquet", "--features": own, "--data": tmp_path / "data"}
    table = ranking_of(own).assign(top=True)
    table.attrs["features"] = {path.stem: read_root(path, "features")["digest"] for path in (own, bert)}
    write_table(table, tmp_path / "a.csv")

    def refused(**options):
        given = {**places, **{f"--{name}": path for name, path in options.items()}, "--out": tmp_path / "drawn.png"}
        words = [str(word) for option in given.items() for word in option]
        error = CliRunner().invoke(app, ["figures", "sharedness", *words]).exception
        assert isinstance(error, StoreError)
        return str(error)

    error = f"a.parquet: ranks the features of clip_image@0, but {bert} is of bert@0; give clip_image@0.zarr"
    assert error in refused(features=bert)
    assert "have different samples" in refused(features=shuffled)
    assert "a.parquet: made from other features of clip_image@0 than the current ones" in refused(features=other)
    names = ["names", "--features", bert, "--data", tmp_path / "data", "--out", tmp_path / "names.parquet"]
    assert CliRunner().invoke(app, [str(word) for word in names]).exit_code == 0
    error = refused(names=tmp_path / "names.parquet")
    assert "names.parquet: made from features of bert@0, not of clip_image@0; give the result for clip_image@0" in error


@pytest.mark.filterwarnings("ignore:Glyph")
@pytest.mark.parametrize("samples", [9, 100])
def test_captions_of_a_text_encoder_fit_their_cards(tmp_path, data, drawn, unsaved, samples):
    order = (list(range(8)) * 13)[:100]
    kept = {3: FeatureStatistics(*np.ones((3, 4)), np.array([order] * 4, np.int32))}
    draw_sharedness(ranking(), kept, data, 1, tmp_path / "figure.png", samples, "text")
    assert_readable(drawn[0])
    (ax,) = drawn[0].axes
    assert not ax.images
    cards = [card.get_window_extent() for card in ax.patches if card.get_visible()]
    assert len(cards) == samples
    assert_apart([card.extents for card in cards])
    found = [[] for _ in cards]
    for text, box in visible_texts(drawn[0]):
        for n, card in enumerate(cards):
            if card.x0 <= box.x0 < card.x1 and card.y0 < (box.y0 + box.y1) / 2 <= card.y1:
                assert box.x1 <= card.x1
                found[n].append(text.get_text())
    for lines, sample in zip(found, order[:samples], strict=True):
        whole, words = "".join(data.caption(sample).split()), "".join("".join(lines).split())
        assert words == whole or (words.endswith("…") and len(words) > 60 and whole.startswith(words[:-1]))


def font_with(letter, family, folder):
    """A font with a single letter, a square."""
    pen = TTGlyphPen(None)
    pen.moveTo((0, 0))
    for corner in ((0, 900), (900, 900), (900, 0)):
        pen.lineTo(corner)
    pen.closePath()
    square = pen.glyph()
    font = FontBuilder(1000, isTTF=True)
    font.setupGlyphOrder([".notdef", "letter"])
    font.setupCharacterMap({ord(letter): "letter"})
    font.setupGlyf({".notdef": square, "letter": square})
    font.setupHorizontalMetrics({".notdef": (1000, 0), "letter": (1000, 0)})
    font.setupHorizontalHeader(ascent=900, descent=-100)
    font.setupNameTable({"familyName": family, "styleName": "Regular"})
    font.setupOS2()
    font.setupPost()
    font.save(folder / "font.ttf")
    return folder / "font.ttf"


def test_truncates_long_words_with_few_measurements_and_drops_invisible_text(monkeypatch):
    from conceptshare.figures import _cards

    measured = []
    monkeypatch.setattr(_cards, "text_width", lambda line, *_: measured.append(line) or len(line))
    assert _cards.wrapped("x" * 100_000, 10, 2, 6) == "xxxxxxxxxx\nxxxxxxxxx…"
    assert len(measured) < 50
    assert _cards.wrapped("a\ufeff b\x01c\u200d", 10, 2, 6) == "a b c"


@pytest.mark.parametrize("value", np.linspace(0, 1, 21))
def test_numbers_on_cells_have_contrast(value):
    from conceptshare.figures._style import COLOURS, letters_on

    image = Figure().subplots().imshow([[0, 1]], cmap=COLOURS)

    def luminance(colour):
        return np.dot(
            [((c + 0.055) / 1.055) ** 2.4 if c > 0.04045 else c / 12.92 for c in colour[:3]], [0.2126, 0.7152, 0.0722]
        )

    lighter, darker = sorted((luminance(image.cmap(value)), float(letters_on(image, value) == "white")), reverse=True)
    assert (lighter + 0.05) / (darker + 0.05) > 4.5


@pytest.mark.parametrize("installed", [True, False])
def test_draws_other_scripts_with_an_installed_font(tmp_path, monkeypatch, capsys, installed):
    fonts = font_manager.fontManager
    known = {name for name in fonts.get_font_names() if "CJK" not in name and "Gothic" not in name}
    monkeypatch.setattr(fonts, "ttflist", [font for font in fonts.ttflist if font.name in known])
    if installed:
        fonts.addfont(font_with("猫", "Noto Sans CJK JP", tmp_path))
    buffer = io.BytesIO()
    Image.new("RGB", (64, 48), "red").save(buffer, "PNG")
    pq.write_table(pa.table({"image": [buffer.getvalue()] * 2, "caption": ["a 猫"] * 2}), tmp_path / "cat.parquet")
    make_dataset(DatasetSpec(source=str(tmp_path / "cat.parquet")), tmp_path / "cat")
    shown = {3: FeatureStatistics(*np.ones((3, 1)), np.array([[0]], np.int32))}
    table = ranking().query("feature == 0").reset_index(drop=True)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        draw_sharedness(table, shown, Data(tmp_path / "cat"), 1, tmp_path / "one" / "figure.png")
    assert not warned
    line = "no font here has 猫, drawn as boxes; install one, such as Noto Sans CJK or Noto Emoji, delete "
    lines = [line_ for line_ in capsys.readouterr().err.splitlines() if "font" in line_]
    assert [line in line_ for line_ in lines] == [True] * (not installed)


def test_a_sample_is_an_image_above_its_caption(tmp_path):
    buffer = io.BytesIO()
    Image.new("RGB", (64, 48), "red").save(buffer, "PNG")
    rows = {"image": [buffer.getvalue()] * 2, "caption": ["a red picture of nothing at all"] * 2}
    pq.write_table(pa.table(rows), tmp_path / "red.parquet")
    make_dataset(DatasetSpec(source=str(tmp_path / "red.parquet")), tmp_path / "red")
    table = ranking().query("feature == 0").reset_index(drop=True)
    shown = {3: FeatureStatistics(*np.ones((3, 1)), np.array([[0, -1, -1]], np.int32))}
    draw_sharedness(table, shown, Data(tmp_path / "red"), 1, tmp_path / "one" / "figure.png")
    pixels = read(tmp_path / "one" / "figure.png")
    red = (pixels == [255, 0, 0]).all(axis=2)
    picture = box(pixels, red)
    assert picture.shape[1] / picture.shape[0] == pytest.approx(64 / 48, rel=0.05)
    assert picture[..., 0].min() > 200  # without black letters


def scattered(features, rng, silent=0):
    """A ranking of features between two groups; the last ones were never active."""
    strength, h = rng.lognormal(4, 1, features), rng.beta(2, 6, features)
    g = np.clip(0.6 * h + rng.beta(2, 8, features), 0, 0.97)
    for values in (strength, g, h):
        values[features - silent :] = 0
    table = pd.DataFrame({"source": "siglip2-image-large@0", "layer": 23, "rho_g": g, "rho_h": h, "unexplained": ""})
    table = table.assign(excess_g=np.maximum(0, g - 0.2) / 0.8, excess_h=np.maximum(0, h - 0.3) / 0.7)
    for prefix, delta in (
        ("calibrated_", strength * (table.excess_g**2 - table.excess_h**2)),
        ("", strength * (g**2 - h**2)),
    ):
        rank = np.argsort(np.argsort(-delta, kind="stable")) + 1
        table[f"{prefix}rank"], table[f"{prefix}top"] = rank, rank <= max(1, features // 100)
    return table.sort_values("rank", ignore_index=True)


@pytest.mark.parametrize(("features", "silent"), [(60, 0), (512, 12), (8192, 900)])
def test_the_scatter_shows_every_feature_and_highlights_and_counts_the_top(
    tmp_path, rng, drawn, unsaved, features, silent
):
    table = scattered(features, rng, silent)
    draw_scatter(table, tmp_path / "figure.png")
    assert_readable(drawn[0])
    count = max(1, features // 100)
    for ax, symbol, g, h, rank in (
        (drawn[0].axes[0], "\\rho", "rho_g", "rho_h", "rank"),
        (drawn[0].axes[1], "e", "excess_g", "excess_h", "calibrated_rank"),
    ):
        every, top = ax.collections
        assert sorted(map(tuple, every.get_offsets())) == sorted(zip(table[h], table[g], strict=True))
        first = table.sort_values(rank).head(count)
        np.testing.assert_array_equal(top.get_offsets(), first[[h, g]])
        assert len(top.get_paths()[0].vertices) != len(every.get_paths()[0].vertices)  # another marker
        assert np.ptp(top.get_facecolor()[0][:3]) > 0.5  # and coloured, while others are grey
        assert np.ptp(every.get_cmap()(np.linspace(0, 1, 9))[:, :3], axis=1).max() < 0.01
        assert ax.get_xlim() == ax.get_ylim()
        assert ax.get_aspect() == 1
        (diagonal,) = ax.lines
        assert diagonal.get_slope() == 1
        assert diagonal.get_xy1() == (0, 0)
        numbered = {text.get_text(): text.xy for text in ax.texts if text.get_text().isdigit()}
        assert numbered == {str(n): (row[h], row[g]) for n, (_, row) in enumerate(first[:5].iterrows(), 1)}
        more, less = (table[g] > table[h]).sum(), (table[g] < table[h]).sum()
        zero = (table[[g, h]] == 0).all(axis=1).sum()
        counts = f"{more:,} with ${symbol}_G > {symbol}_H$, {less:,} with ${symbol}_G < {symbol}_H$"
        assert counts + (f"\n{zero:,} with both 0" if zero else "") in written_on(drawn[0])
    assert f"siglip2-image-large@0, layer 23: {features:,} features" in written_on(drawn[0])
    assert f"top 1% by $\\Delta$: {count}" in written_on(drawn[0])


def test_the_scatter_is_darker_where_points_are_denser(tmp_path, rng, drawn, unsaved):
    draw_scatter(scattered(3000, rng, 200), tmp_path / "figure.png")
    ax = drawn[0].axes[0]
    points = ax.collections[0]
    x, y = points.get_offsets().T
    shown = np.asarray(points.get_array())
    edges = np.linspace(*ax.get_xlim(), 41)
    counts = np.histogram2d(x, y, (edges, edges))[0]
    np.testing.assert_array_equal(shown, counts[np.digitize(x, edges) - 1, np.digitize(y, edges) - 1])
    assert (np.diff(shown) >= 0).all()  # where points overlap, the darkest are on top
    greys = points.get_cmap()(points.norm(np.array([1, 200])))[:, 0]
    assert greys[0] > greys[1] + 0.3
    busiest = max(
        ax.collections[0].get_array()[(ax.collections[0].get_offsets() > 0).any(axis=1)].max()
        for ax in drawn[0].axes[:2]
    )
    assert points.norm.vmax == busiest  # without inactive features


def test_the_scatter_without_active_features(tmp_path, rng, drawn):
    table = scattered(50, rng, 50)
    check(lambda out: draw_scatter(table, out), tmp_path / "drawn", colours_at_least=20)
    assert any(text.endswith("\n50 with both 0") for text in written_on(drawn[0]))


KINDS = ("all", "global")
MEMBERS = {("vit", 0): (0, 2, 5), ("vit", 1): (0, 2, 5), ("mini_lm", 4): (0, 2, 5)}


def make_saes(folder, members=MEMBERS, steps=60, latents=512):
    """A table of SAEs and the folder of their loss curves and densities, all with different numbers."""
    rng = np.random.default_rng(0)
    rows = []
    for (encoder, seed), layers in members.items():
        for layer in layers:
            sae = folder / encoder / f"layer-{layer:02d}" / f"seed-{seed}"
            sae.mkdir(parents=True)
            curve = 10.0 ** (layer / 3) * (np.exp(-np.arange(steps) / (steps / 8 + layer)) + 0.1 + 0.05 * seed)
            noisy = curve * rng.uniform(0.8, 1.2, steps)
            pd.DataFrame({"step": range(steps), "loss": noisy}).to_csv(sae / "loss.csv", index=False)
            row = {"encoder": encoder, "seed": seed, "layer": layer, "latents": latents, "steps": steps}
            densities = []
            for tokens, share in zip(KINDS, (0.02, 0.6), strict=True):
                never = int(share * latents) + layer
                alive, edges = np.histogram(rng.normal(-2.6, 0.6, latents - never), np.arange(-6, 0.25, 0.25))
                alive[0] += latents - never - alive.sum()
                densities += [(tokens, "never", -np.inf, never)]
                densities += [(tokens, "bin", *values) for values in zip(edges, alive, strict=False)]
                row |= {f"fvu_{tokens}": rng.uniform(0.1, 3), f"l0_{tokens}": rng.uniform(8, 40)}
                row[f"dead_{tokens}"] = never / latents
            columns = ["tokens", "kind", "log10_density", "latents"]
            pd.DataFrame(densities, columns=columns).to_csv(sae / "density.csv", index=False)
            seal(sae, {"spec": {"layer": layer, "seed": seed}})
            rows.append(row)
    table = pd.DataFrame(rows)
    table.attrs["max_fvu_global"] = 0.9
    return table, folder


@pytest.fixture
def saes(tmp_path):
    """Two encoders of three layers each, one with two seeds."""
    return make_saes(tmp_path / "saes")


def written_on(figure):
    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


def panels(figure, ylabel):
    return [ax for ax in figure.axes if ax.get_ylabel() == ylabel]


def cells(figure):
    """The loss and density panels of a member's figure, by layer."""
    losses, densities = panels(figure, "loss / first loss (log)"), panels(figure, "latents")
    return {ax.get_title(loc="left"): (ax, density) for ax, density in zip(losses, densities, strict=True)}


def stored(folder, encoder, seed, layer, name):
    return pd.read_csv(folder / encoder / f"layer-{layer:02d}" / f"seed-{seed}" / name)


def visible_texts(figure):
    """All texts on a figure, with their positions."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    ticks, shown = set(), []
    bars = [bar for ax in figure.axes for bar in ax.child_axes]
    for axis in (axis for ax in [*figure.axes, *bars] for axis in (ax.xaxis, ax.yaxis)):
        low, high = sorted(axis.get_view_interval())
        for tick in axis.get_major_ticks():
            ticks |= {tick.label1, tick.label2}
            if axis.get_visible() and low <= tick.get_loc() <= high:
                shown += [tick.label1, tick.label2]
    others = [text for text in figure.findobj(Text) if text not in ticks]
    return [
        (text, Text.get_window_extent(text, renderer))  # without an annotation's line
        for text in [*shown, *others]
        if text.get_visible() and text.get_text().strip()
    ]


def assert_readable(figure):
    """Texts neither overlap nor exceed the figure's edges."""
    texts = visible_texts(figure)
    assert len(texts) > 10
    edge = figure.bbox
    for text, box in texts:
        assert edge.x0 <= box.x0, text
        assert box.x1 <= edge.x1, text
        assert edge.y0 <= box.y0, text
        assert box.y1 <= edge.y1, text
    # The bounding box of slanted text also contains other things.
    straight = [(text, box.extents) for text, box in texts if text.get_rotation() % 90 == 0]
    assert_apart([box for _, box in straight], [text for text, _ in straight])


def assert_apart(boxes, names=None):
    """No two boxes, ``[N, 4]`` as x0, y0, x1 and y1, overlap."""
    x0, y0, x1, y1 = np.asarray(boxes).T[:, :, None]
    over = (np.minimum(x1, x1.T) > np.maximum(x0, x0.T)) & (np.minimum(y1, y1.T) > np.maximum(y0, y0.T))
    found = [(first, second) for first, second in np.argwhere(over) if first < second]
    assert not found, [(names[first], names[second]) if names else (first, second) for first, second in found]


def test_saes_have_an_overview_and_a_figure_per_member(tmp_path, saes, pdf):
    table, folder = saes
    check(lambda out: draw_saes(table, folder, out), tmp_path / "one")
    members = tmp_path / "one" / "figure"
    assert {path.name for path in members.iterdir()} == {"vit@0.png", "vit@1.png", "mini_lm@4.png"}
    for path in members.iterdir():
        with Image.open(path) as picture:
            pixels = np.asarray(picture.convert("RGB"))
        assert min(pixels.shape[:2]) >= 200
        assert colours(pixels) >= 60


def test_removes_the_figure_of_a_removed_member(tmp_path, saes, unsaved):
    table, folder = saes
    out = tmp_path / "drawn" / "saes.png"
    draw_saes(table, folder, out)
    draw_saes(table.query("encoder == 'vit'"), folder, out)
    assert {path.name for path in out.parent.iterdir()} == {"saes.png", "saes.pdf", "saes"}
    assert {path.name for path in (out.parent / "saes").iterdir()} == {"vit@0.png", "vit@1.png"}


def test_the_overview_shows_the_tables_numbers_and_complete_curves(tmp_path, saes, drawn, unsaved):
    table, folder = saes
    draw_saes(table, folder, tmp_path / "drawn" / "saes.png")
    for label, column in (("FVU (log)", "fvu"), ("dead latents", "dead")):
        for ax, encoder in zip(panels(drawn[0], label), ("vit", "mini_lm"), strict=True):
            lines = {tuple(line.get_ydata()) for line in ax.lines if list(line.get_xdata()) == [0, 2, 5]}
            expected = {
                tuple(of_seed[f"{column}_{tokens}"])
                for _, of_seed in table[table.encoder == encoder].groupby("seed")
                for tokens in KINDS
            }
            assert lines == expected
    for ax, (encoder, count) in zip(
        panels(drawn[0], "loss / first loss (log)"), (("vit", 6), ("mini_lm", 3)), strict=True
    ):
        assert ax.get_title(loc="left") == encoder
        assert ax.get_yscale() == "log"
        assert len(ax.lines) == count
        assert len({line.get_color().tobytes() for line in ax.lines}) == 3  # a colour per layer
        for line in ax.lines:
            assert line.get_ydata()[0] == pytest.approx(1)
            assert list(line.get_xdata()[[0, -1]]) == [0, 59]
    assert_readable(drawn[0])


def test_a_members_figure_shows_its_layers_curves_densities_and_numbers(tmp_path, saes, drawn, unsaved):
    table, folder = saes
    draw_saes(table, folder, tmp_path / "drawn" / "saes.png")
    figures = {name: figure for figure in drawn[1:] for name in written_on(figure) if "@" in name}
    assert set(figures) == {"vit@0", "vit@1", "mini_lm@4"}
    for row in table.itertuples():
        found = cells(figures[f"{row.encoder}@{row.seed}"])
        assert set(found) == {"layer 0", "layer 2", "layer 5"}
        loss, density = found[f"layer {row.layer}"]
        losses = stored(folder, row.encoder, row.seed, row.layer, "loss.csv").loss
        raw, smooth = (line.get_ydata() for line in loss.lines)
        np.testing.assert_allclose(raw, losses / losses[0])
        assert np.abs(np.diff(np.log(smooth))).mean() < 0.6 * np.abs(np.diff(np.log(raw))).mean()
        assert loss.get_yscale() == "log"
        bins = stored(folder, row.encoder, row.seed, row.layer, "density.csv")
        numbers = [text.get_text() for text in density.texts]
        for tokens, stairs, words in zip(KINDS, density.patches, numbers, strict=True):
            of_tokens = bins[bins.tokens == tokens]
            values, edges, _ = stairs.get_data()
            assert list(values) == list(of_tokens[of_tokens.kind == "bin"].latents)
            np.testing.assert_allclose(edges, np.arange(-6, 0.25, 0.25))
            never = of_tokens[of_tokens.kind == "never"].latents.item()
            fvu, l0 = getattr(row, f"fvu_{tokens}"), getattr(row, f"l0_{tokens}")
            assert words == f"FVU {fvu:.3g}, L0 {l0:.3g}, dead {100 * never / 512:.1f}%: {never} of 512"


@pytest.mark.parametrize(
    ("layers", "steps", "latents"),
    [(1, 2, 64), (1, 1, 64), (6, 60, 8192), (7, 3, 64), (24, 2000, 8192)],
)
def test_figures_of_any_number_of_saes_are_readable(tmp_path, drawn, layers, steps, latents, unsaved):
    members = {("an-encoder-with-a-name-that-is-much-too-long", 0): range(layers), ("b", 1): range(layers)}
    table, folder = make_saes(tmp_path / "saes", members, steps, latents)
    draw_saes(table, folder, tmp_path / "drawn" / "saes.png")
    for figure in drawn:
        assert_readable(figure)
        for ax in panels(figure, "loss / first loss (log)"):
            low, high = ax.get_ylim()
            assert sum(low <= tick <= high for tick in ax.get_yticks()) >= 2
    for figure in drawn[1:]:
        assert set(cells(figure)) == {f"layer {layer}" for layer in range(layers)}
        columns = {ax.get_position().x0 for ax in panels(figure, "latents")}
        assert len(columns) == (1 if layers <= 6 else 2)


def test_downsamples_a_long_training_but_keeps_its_extremes(tmp_path, drawn, unsaved):
    table, folder = make_saes(tmp_path / "saes", {("vit", 0): [3]}, steps=100_000)
    draw_saes(table, folder, tmp_path / "drawn" / "saes.png")
    losses = stored(folder, "vit", 0, 3, "loss.csv").loss.to_numpy()
    shares = losses / losses[0]
    (raw, smooth), curve = cells(drawn[1])["layer 3"][0].lines, 10 * (np.exp(-np.arange(100_000) / 12503) + 0.1)
    assert len(raw.get_ydata()) <= 1000
    assert len(smooth.get_ydata()) <= 500
    assert raw.get_ydata().max() == pytest.approx(shares.max())
    assert raw.get_ydata().min() == pytest.approx(shares.min())
    assert list(smooth.get_xdata()[[0, -1]]) == [0, 99_999]
    past = smooth.get_xdata() > 2000
    np.testing.assert_allclose(
        smooth.get_ydata()[past], curve[smooth.get_xdata()[past].astype(int)] / losses[0], rtol=0.03
    )


@pytest.mark.parametrize("scale", [1e-5, 1.0, 1e15])
def test_overview_of_saes_whose_fvu_spans_orders_of_magnitude(tmp_path, saes, drawn, scale, unsaved):
    table, folder = saes
    draw_saes(table.assign(fvu_global=table.fvu_global * scale), folder, tmp_path / "drawn" / "saes.png")
    assert_readable(drawn[0])
    low, high = panels(drawn[0], "FVU (log)")[0].get_ylim()
    assert 2 <= sum(low <= tick <= high for tick in panels(drawn[0], "FVU (log)")[0].get_yticks()) <= 9


def test_saes_with_nan_fvu_or_no_active_latents(tmp_path, drawn):
    table, folder = make_saes(tmp_path / "saes", {("vit", 0): [2]})
    path = folder / "vit" / "layer-02" / "seed-0" / "density.csv"
    densities = pd.read_csv(path)
    densities["latents"] = np.where(densities.kind == "never", 512, 0)
    densities.to_csv(path, index=False)
    seal(path.parent, {"spec": {}})
    table = table.assign(fvu_all=np.nan, fvu_global=np.nan, dead_all=1.0, dead_global=1.0)
    check(lambda out: draw_saes(table, folder, out), tmp_path / "drawn")
    assert "undefined" in written_on(drawn[0])
    numbers = [text for text in written_on(drawn[1]) if text.startswith("FVU")]
    assert len(numbers) == 2
    assert all("FVU undefined" in text and "100.0%: 512 of 512" in text for text in numbers)
    for figure in drawn:
        assert_readable(figure)


def test_saes_with_zero_loss(tmp_path):
    """A logarithmic axis cannot show it, so the panels are empty."""
    table, folder = make_saes(tmp_path / "saes", {("vit", 0): [0, 2]})
    for path in folder.rglob("loss.csv"):
        pd.read_csv(path).assign(loss=0.0).to_csv(path, index=False)
        seal(path.parent, {"spec": {}})
    check(lambda out: draw_saes(table, folder, out), tmp_path / "drawn", colours_at_least=30)


@pytest.mark.parametrize("name", ["loss.csv", "density.csv"])
@pytest.mark.parametrize("content", [None, "", "step,loss\n", "step,loss,tokens,kind,log10_density,latents\n"])
def test_names_a_missing_file_of_loss_or_density(tmp_path, saes, name, content):
    table, folder = saes
    path = folder / "vit" / "layer-02" / "seed-1" / name
    path.unlink()
    if content is not None:
        path.write_text(content)
    with pytest.raises(StoreError, match=f"layer-02/seed-1: {name} (is missing|has .* bytes, not).*run the sae stage"):
        draw_saes(table, folder, tmp_path / "drawn" / "saes.png")
    assert not (tmp_path / "drawn").exists()


ELEVEN = {
    "clip-image-large@0": "image",
    "siglip2-image-large@0": "image",
    "dfn-image-large@0": "image",
    "dinov2-large@0": "image",
    "vit-large@0": "image",
    "mambavision-large@0": "image",
    "clip-text-large@0": "text",
    "siglip2-text-large@0": "text",
    "dfn-text-large@0": "text",
    "bert-large@0": "text",
    "deberta-large@0": "text",
}
SOME = {
    "two": {"vit@0": "image", "vit@1": "image"},
    "four": {"clip-image@0": "image", "dinov2@0": "image", "clip-text@0": "text", "minilm@3": "text"},
    "eleven": ELEVEN,
}


def full_matrix(members, rng):
    """A matrix table with intervals, nulls and, for every second source, a ceiling."""
    rows = [
        {"source": a, "target": b, "source_modality": members[a], "target_modality": members[b], "reading": reading}
        for a in members
        for b in members
        if a != b
        for reading in READINGS
    ]
    table = pd.DataFrame(rows)
    table["wmppc"] = rng.uniform(0.15, 0.6, len(table))
    table["low"] = table.wmppc - rng.uniform(0.001, 0.03, len(table))
    table["high"] = table.wmppc + rng.uniform(0.001, 0.03, len(table))
    table["cross_fitted"] = table.wmppc - 0.05
    table["cross_fitted_low"], table["cross_fitted_high"] = table.low - 0.06, table.high - 0.04
    table["null"] = rng.uniform(0.03, 0.08, len(table))
    table["ceiling"] = np.where(table.source.isin(list(members)[::2]), rng.uniform(0.6, 0.7, len(table)), np.nan)
    for measure in ("cka", "mutual_knn"):
        table[measure] = np.clip(table.wmppc + rng.normal(0, 0.1, len(table)), 0, 1)
    return table.assign(unexplained=0, left_out=0)


def by_title(figure):
    """Panels by the first line of their title."""
    return {ax.get_title().splitlines()[0]: ax for ax in figure.axes if ax.get_title()}


def marked(ax, marker):
    """The data of lines with a marker, as x by y, without NaN."""
    lines = [line for line in ax.lines if line.get_marker() == marker]
    points = [point for line in lines for point in zip(line.get_ydata(), line.get_xdata(), strict=True)]
    return {int(y): float(x) for y, x in points if np.isfinite(x)}


@pytest.mark.parametrize("members", SOME.values(), ids=SOME)
def test_intervals_show_each_cells_interval_null_and_ceiling(tmp_path, rng, drawn, members):
    table = full_matrix(members, rng)
    check(lambda out: draw_intervals(table, out), tmp_path / "drawn")
    assert_readable(drawn[0])
    panels = by_title(drawn[0])
    assert list(panels) == list(TITLES.values())
    names = [label.get_text() for label in drawn[0].axes[0].get_yticklabels()]
    label = {member: member if "vit" in member and len(members) == 2 else member.split("@")[0] for member in members}
    expected, rows = [], {}
    for a in members:
        expected.append(f"from {label[a]}")
        for b in members:
            if a != b:
                rows[a, b] = len(expected)
                expected.append(label[b])
    assert names == expected
    for reading, title in TITLES.items():
        of = table[table.reading == reading].set_index(["source", "target"])
        ax = panels[title]
        assert marked(ax, "x") == {y: of.null[cell] for cell, y in rows.items()}
        assert marked(ax, "|") == {y: of.ceiling[cell] for cell, y in rows.items() if np.isfinite(of.ceiling[cell])}
        for modality, marker in (("image", "o"), ("text", "s")):
            to = {y: of.wmppc[cell] for cell, y in rows.items() if members[cell[1]] == modality}
            assert marked(ax, marker) == to
        assert marked(ax, "d") == {y: of.cross_fitted[cell] for cell, y in rows.items()}
        bars = {y: (x, end) for bars in ax.collections for (x, y), (end, _) in bars.get_segments()}
        crossed = {y + 0.3: (of.cross_fitted_low[cell], of.cross_fitted_high[cell]) for cell, y in rows.items()}
        assert bars == {y: (of.low[cell], of.high[cell]) for cell, y in rows.items()} | crossed
        assert ax.get_xlim()[1] > table[["high", "ceiling"]].max(axis=None)
        assert ax.get_ylim()[0] > len(expected) - 1 > 0 > ax.get_ylim()[1]  # the first row is at the top


def test_intervals_without_values_or_without_ceilings(tmp_path, rng, drawn):
    table = full_matrix(SOME["four"], rng).assign(ceiling=np.nan)
    check(lambda out: draw_intervals(table, out), tmp_path / "one")
    empty = table.assign(
        **dict.fromkeys(
            ["wmppc", "low", "high", "cross_fitted", "cross_fitted_low", "cross_fitted_high", "null"], np.nan
        )
    )
    check(lambda out: draw_intervals(empty, out), tmp_path / "two", colours_at_least=30)
    assert not any("other seeds" in text for figure in drawn for text in written_on(figure))
    assert [written_on(figure).count("no values") for figure in drawn] == [0, 3]


def modality_averages(rng, modalities=("image", "text")):
    rows = [
        {"reading": reading, "source_modality": a, "target_modality": b, "cells": 5}
        for reading in READINGS
        for a in modalities
        for b in modalities
    ]
    numbers = rng.uniform(0.1, 0.6, len(rows))
    ends = {"low": numbers - 0.01, "high": numbers + 0.02}
    return pd.DataFrame(rows).assign(wmppc=numbers, **ends, floor=0.05, unexplained=0, left_out=0)


@pytest.mark.parametrize("modalities", [("image", "text"), ("text",)])
def test_averages_are_written_on_their_cells(tmp_path, rng, drawn, modalities):
    averages = modality_averages(rng, modalities)
    check(lambda out: draw_averages(averages, out), tmp_path / "one")
    assert_readable(drawn[0])
    panels = by_title(drawn[0])
    for reading, title in TITLES.items():
        of = averages[averages.reading == reading].set_index(["source_modality", "target_modality"])
        written = {}
        for text in panels[title].texts:
            row, column = round(text.get_position()[1]), round(text.get_position()[0])
            written.setdefault((modalities[row], modalities[column]), []).append(text.get_text())
        assert written == {
            cell: [f"{row.wmppc:.3f}", f"{row.low:.3f} to {row.high:.3f}"] for cell, row in of.iterrows()
        }
        (image,) = panels[title].images
        np.testing.assert_array_equal(image.get_array().ravel(), of.wmppc)
    assert not any("grey" in text for text in written_on(drawn[0]))


@pytest.mark.parametrize("missing", [1, 12])
def test_missing_averages_are_grey_without_a_number(tmp_path, rng, drawn, missing):
    averages = modality_averages(rng)
    averages.loc[averages.index[:missing], ["wmppc", "low", "high"]] = np.nan
    check(lambda out: draw_averages(averages, out), tmp_path / "drawn")
    assert sum(" to " in text for text in written_on(drawn[0])) == 12 - missing
    assert "nan" not in " ".join(written_on(drawn[0]))
    assert "grey: no pair of different encoders" in written_on(drawn[0])


def test_averages_of_one_encoder_are_empty(tmp_path, rng, drawn):
    averages = modality_averages(rng)[:0]
    draw_averages(averages, tmp_path / "drawn" / "figure.png")
    read(tmp_path / "drawn" / "figure.png")
    assert written_on(drawn[0]).count("nothing to average") == 3
    assert not any(ax.images for ax in drawn[0].axes)


@pytest.mark.parametrize("members", [SOME["four"], ELEVEN], ids=["four", "eleven"])
def test_similarity_shows_each_cell_and_scipys_rank_correlations(tmp_path, rng, drawn, members):
    table = full_matrix(members, rng)
    table.loc[table.index[::7], "cka"] = np.nan
    table.loc[table.index[1::9], "wmppc"] = np.nan
    check(lambda out: draw_similarity(table, out), tmp_path / "one")
    assert_readable(drawn[0])
    panels = by_title(drawn[0])
    for measure, title in (("cka", "Linear CKA"), ("mutual_knn", "Mutual nearest neighbours")):
        known = table[table.reading != "pooled"].dropna(subset=["wmppc", measure])
        ranks = []
        for reading, name, points in zip(
            ("layer_mean", "last"), ("mean over layers", "last layer"), panels[title].collections[::2], strict=True
        ):
            of = known[known.reading == reading]
            np.testing.assert_array_equal(points.get_offsets(), of[["wmppc", measure]])
            rank = stats.spearmanr(of.wmppc, of[measure]).statistic
            ranks.append(f"Spearman, {name}: {rank:.2f} (n = {len(of)})")
        assert panels[title].get_title() == "\n".join([title, *ranks])
        (low, high), (bottom, top) = panels[title].get_xlim(), panels[title].get_ylim()
        assert low <= 0 < known.wmppc.max() < high
        assert bottom <= 0 < known[measure].max() < top


def test_similarity_of_two_seeds_is_empty(tmp_path, rng, drawn):
    table = full_matrix(SOME["two"], rng).assign(cka=np.nan)
    check(lambda out: draw_similarity(table, out), tmp_path / "drawn")
    assert written_on(drawn[0]).count("nothing to compare") == 1  # CKA alone is missing
    assert any(text.startswith("Mutual nearest neighbours\nSpearman") for text in written_on(drawn[0]))


def features(source, targets, rng, count=3000, silent=200):
    """Pairs of one source: the same strengths in each, and a rho that grows with them."""
    strength = 10 ** rng.normal(2, 0.6, count)
    strength[rng.permutation(count)[:silent]] = 0
    pairs = []
    for target in targets:
        rho = np.clip(0.2 + 0.1 * np.log10(strength + 1) + rng.normal(0, 0.1, count), 0, 1)
        table = pd.DataFrame({"source": source, "target": target, "strength": strength, "rho": rho * (strength > 0)})
        table["left_out"] = False
        back = table.rename(columns={"source": "target", "target": "source"}).assign(strength=1e9, rho=0.9)
        pairs.append((source, target, pd.concat([back, table])))
    return pairs


def strength_pairs(members, rng, targets):
    return [pair for a in members for pair in features(a, [b for b in members if b != a][:targets], rng)]


MANY = {f"encoder-{'of-a-kind-' * (n % 2)}{n}@0": "image" for n in range(16)}


@pytest.mark.parametrize(
    ("members", "targets"),
    [(SOME["two"], 9), (SOME["four"], 9), (ELEVEN, 1), (dict(list(ELEVEN.items())[3:9]), 9), (MANY, 15)],
)
def test_strength_shows_every_sources_distribution_and_every_pairs_correlation(tmp_path, rng, drawn, members, targets):
    """One row per source and one column per target, within the width of a page."""
    pairs = strength_pairs(members, rng, targets)
    check(lambda out: draw_strength(pairs, out), tmp_path / "drawn")
    assert_readable(drawn[0])
    assert drawn[0].get_figwidth() <= 7.21
    tables = {(a, b): table[table.source == a] for a, b, table in pairs}
    short = {member: member if len(members) == 2 else member.split("@")[0] for member in members}
    left = {ax.get_title(loc="left"): ax for ax in drawn[0].axes if ax.patches}
    assert list(left) == [short[member] for member in members]
    for member in members:
        strength = next(table for (a, _), table in tables.items() if a == member).strength
        (stairs,), ax = left[short[member]].patches, left[short[member]]
        counts, edges, _ = stairs.get_data()
        np.testing.assert_array_equal(counts, np.histogram(np.log10(strength[strength > 0]), edges)[0])
        assert counts.sum() == 2800
        cv = np.std(strength) / np.mean(strength)
        assert [text.get_text() for text in ax.texts] == [f"CV {cv:.2f}, 200 of 3,000 silent"]
    right = [ax for ax in drawn[0].axes if ax.images]
    assert len(right) == len(pairs)
    heads = column_heads(drawn[0])
    asked = [member for member in members if any(member == b for _, b in tables)]
    assert list(heads) == [f"to {short[member]}" for member in asked]
    for ax, (a, b) in zip(right, sorted(tables, key=lambda pair: [*map(list(members).index, pair)]), strict=True):
        table = tables[a, b]
        assert [text.get_text() for text in ax.texts] == [f"r {np.corrcoef(table.strength, table.rho)[0, 1]:.2f}"]
        place, row = ax.get_position(), left[short[a]].get_position()
        assert (place.y0, place.y1) == pytest.approx((row.y0, row.y1))
        assert place.x0 <= heads[f"to {short[b]}"] <= place.x1
        (image,) = ax.images
        active, (low, high, bottom, top) = table[table.strength > 0], image.get_extent()
        ends = [(low, high), (bottom, top)]
        expected = np.histogram2d(np.log10(active.strength), active.rho, image.get_array().shape[::-1], ends)[0]
        np.testing.assert_array_equal(image.get_array().filled(0).T, expected)
        assert image.get_array().sum() == 2800
        assert image.norm is right[0].images[0].norm  # one colour scale


def column_heads(figure):
    """The names of columns, with their horizontal positions."""
    return {text.get_text(): text.get_position()[0] for text in figure.texts if text.get_text().startswith("to ")}


def test_strength_of_a_source_without_active_features(tmp_path, rng, drawn):
    pairs = strength_pairs(SOME["four"], rng, 2)
    silent = [(a, b, table.assign(strength=0.0, rho=0.0)) for a, b, table in pairs]
    for n, some in enumerate((pairs[:2] + silent[2:], silent)):
        check(lambda out, some=some: draw_strength(some, out), tmp_path / str(n))
        assert_readable(drawn[n])
    assert [written_on(figure).count("no feature is active") for figure in drawn] == [3, 4]
    assert [written_on(figure).count("none\nactive") for figure in drawn] == [6, 8]
    assert [written_on(figure).count("r –") for figure in drawn] == [6, 8]
    assert "CV undefined, 3,000 of 3,000 silent" in written_on(drawn[1])


def compared(rng, members=ELEVEN):
    """Cells of the paper's large encoders on COCO, near the paper's numbers."""
    cells = compare(full_matrix(members, rng), "coco", "large")
    ours = cells.paper + rng.normal(0, 0.03, len(cells))
    return cells.assign(ours=ours, low=ours - 0.01, high=ours + 0.02, difference=ours - cells.paper)


def test_draws_our_numbers_against_the_papers(tmp_path, rng, drawn, pdf):
    cells = compared(rng)
    folders = tmp_path / "one", tmp_path / "two"
    for folder in folders:
        check(lambda out: draw_paper(cells, out), folder)
    # Of the other figures, the tests of the streamed study compare the bytes of two runs.
    for name in ("figure.png", "figure.pdf"):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()
    assert_readable(drawn[0])
    panels = by_title(drawn[0])
    assert list(panels) == [TITLES["layer_mean"], TITLES["last"]]
    for reading in ("layer_mean", "last"):
        of, ax = cells[cells.reading == reading], panels[TITLES[reading]]
        points = [
            tuple(point) for found in ax.collections if len(found.get_offsets()) > 1 for point in found.get_offsets()
        ]
        assert sorted(points) == sorted(zip(of.paper, of.ours, strict=True))
        ends = [
            (x, y, end)
            for bars in ax.collections
            if hasattr(bars, "get_segments")
            for (x, y), (_, end) in bars.get_segments()
        ]
        assert sorted(ends) == sorted(zip(of.paper, of.low, of.high, strict=True))
        spearman, pearson = (f(of.ours, of.paper).statistic for f in (stats.spearmanr, stats.pearsonr))
        far = (of.ours - of.paper).abs().mean()
        assert ax.get_title().splitlines()[1:] == [
            f"Spearman {spearman:.2f}, Pearson {pearson:.2f} (n = {len(of)})",
            f"mean absolute difference {far:.3f}",
        ]
        assert ax.get_xlim() == ax.get_ylim()
        worst = of.loc[of.difference.abs().nlargest(4).index]
        named = next(text.get_text() for text in ax.texts if text.get_text().startswith("farthest")).splitlines()[1:]
        assert named == [
            f"{n}  {cell.source} to {cell.target}: {cell.ours:.3f}, paper {cell.paper:.3f}"
            for n, cell in enumerate(worst.itertuples(), 1)
        ]
        numbered = {text.get_text(): text.xy for text in ax.texts if text.get_text() in "1234"}
        assert numbered == {str(n): (cell.paper, cell.ours) for n, cell in enumerate(worst.itertuples(), 1)}


@pytest.mark.parametrize("seed", range(3))
def test_labels_of_the_farthest_points_do_not_overlap(tmp_path, seed, drawn):
    cells = compared(np.random.default_rng(seed))
    closest = cells[cells.reading == "last"].nlargest(4, "paper").index
    cells.loc[closest, ["ours", "difference"]] = np.array([[0.02, -0.3]]) + 0.002 * np.arange(4)[:, None]
    draw_paper(cells, tmp_path / "figure.png")
    assert_readable(drawn[0])


@pytest.mark.parametrize("count", [2, 3])
def test_few_of_the_papers_cells(tmp_path, rng, drawn, count):
    cells = bounded(compared(rng, dict(list(ELEVEN.items())[:count])))
    cells.loc[cells.reading == "layer_mean", "left_out"] = count - 2
    check(lambda out: draw_paper(cells, out), tmp_path / "drawn")
    assert_readable(drawn[0])
    assert "image to image" in written_on(drawn[0])
    assert "text to image" not in written_on(drawn[0])
    assert (f"all layers: without {NOTE}" in written_on(drawn[0])) == (count > 2)


def test_cells_of_the_paper_missing_from_our_results(tmp_path, rng, drawn):
    cells = compared(rng)
    missing = cells.reading == "last"
    cells.loc[missing, ["ours", "low", "high", "difference"]] = np.nan
    check(lambda out: draw_paper(cells, out), tmp_path / "drawn")
    assert_readable(drawn[0])
    assert written_on(drawn[0]).count("nothing to compare") == 1
    assert any(text.startswith("Last layer\nSpearman undefined") for text in written_on(drawn[0]))


LONG = [f"{'a-member-of-a-long-name-' * 3}{n}@0" for n in range(4)]


def test_long_names_overlap_nothing(tmp_path, rng, drawn, unsaved):
    out = tmp_path / "long" / "figure.png"
    pairs = list(pairwise(LONG))
    draw_layerwise(layerwise(pairs, 6, 6), pairs, out)
    draw_intervals(full_matrix(dict.fromkeys(LONG, "image"), rng), out)
    draw_matrix(matrix(dict.fromkeys(LONG, ("image", "vision")), rng), out)
    draw_strength(strength_pairs(LONG, rng, 3), out)
    assert len(drawn) == 4
    for figure in drawn:
        assert_readable(figure)
    assert [head[-2:] for head in column_heads(drawn[3])] == [f"-{n}" for n in range(4)]
