"""Reads image-caption pairs from every kind of source, in order, and drops and reports unusable rows."""

import io
import json
import random
import re
import struct
import tarfile
import tracemalloc
import warnings
import zlib

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import timm
import transformers
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image, ImageCms, ImageOps, PngImagePlugin

from conceptshare.config.catalog import DatasetSpec
from conceptshare.data import dataset
from conceptshare.data.dataset import MAX_RATIO, Data, decode, make_dataset
from conceptshare.io.errors import DatasetError, HubError
from conceptshare.io.provenance import FILE
from tests.helpers.hub import running, use
from tests.helpers.samples import AsRead, contents

COLOURS = ["red", "lime", "blue", "yellow", "black"]
RGB = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (0, 0, 0)]
CAPTIONS = ["a red square", "naïve façade, 日本語", "blue", "with a , comma and $x$", 'say "cheese"']


def png(picture, **options):
    buffer = io.BytesIO()
    picture.save(buffer, options.pop("format", "PNG"), **options)
    return buffer.getvalue()


IMAGES = [png(Image.new("RGB", (4, 3), colour)) for colour in COLOURS]


def parquet_of_structs(folder):
    images = [{"bytes": image, "path": None} for image in IMAGES]
    pq.write_table(pa.table({"image": images, "caption": CAPTIONS}), folder / "pairs.parquet")
    return folder / "pairs.parquet"


def parquet_of_the_hub(folder):
    """With the features that Hugging Face's library records in the file to decode images."""
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    rows = {"image": [{"bytes": image, "path": None} for image in IMAGES], "caption": CAPTIONS}
    datasets.Dataset.from_dict(rows, features).to_parquet(folder / "pairs.parquet")
    return folder / "pairs.parquet"


def parquet_of_bytes(folder):
    pq.write_table(pa.table({"image": pa.array(IMAGES, pa.binary()), "caption": CAPTIONS}), folder / "pairs.parquet")
    return folder / "pairs.parquet"


def arrow(folder):
    table = pa.table({"image": pa.array(IMAGES, pa.binary()), "caption": CAPTIONS})
    with pa.ipc.new_stream(str(folder / "pairs.arrow"), table.schema) as writer:
        writer.write_table(table)
    return folder / "pairs.arrow"


def pictures(folder):
    (folder / "pictures").mkdir()
    for n, image in enumerate(IMAGES):
        (folder / "pictures" / f"{n}.png").write_bytes(image)
    return [f"pictures/{n}.png" for n in range(len(IMAGES))]


def table_of_paths(folder, writer):
    writer(datasets.Dataset.from_dict({"image": pictures(folder), "caption": CAPTIONS}))


def csv_of_paths(folder):
    table_of_paths(folder, lambda table: table.to_csv(folder / "pairs.csv"))
    return folder / "pairs.csv"


def json_lines_of_paths(folder):
    table_of_paths(folder, lambda table: table.to_json(folder / "pairs.jsonl"))
    return folder / "pairs.jsonl"


def csv_of_absolute_paths(folder):
    (folder / "elsewhere").mkdir()
    paths = [str(folder / path) for path in pictures(folder)]
    datasets.Dataset.from_dict({"image": paths, "caption": CAPTIONS}).to_csv(folder / "elsewhere" / "pairs.csv")
    return folder / "elsewhere" / "pairs.csv"


def json_of_paths(folder):
    rows = [{"image": path, "caption": caption} for path, caption in zip(pictures(folder), CAPTIONS, strict=True)]
    (folder / "pairs.json").write_text(json.dumps(rows), encoding="utf-8")
    return folder / "pairs.json"


def parquet_of_paths(folder):
    pq.write_table(pa.table({"image": pictures(folder), "caption": CAPTIONS}), folder / "pairs.parquet")
    return folder / "pairs.parquet"


def folder_of_tables(folder):
    """Two Parquet files with paths relative to their folder."""
    (folder / "set").mkdir()
    paths = pictures(folder / "set")
    for n, rows in enumerate([slice(0, 2), slice(2, 5)]):
        table = pa.table({"image": paths[rows], "caption": CAPTIONS[rows]})
        pq.write_table(table, folder / "set" / f"train-{n}.parquet")
    return folder / "set"


def image_folder(folder, writer="to_csv", suffix="csv"):
    (folder / "set" / "train").mkdir(parents=True)
    pictures(folder / "set" / "train")
    names = [f"pictures/{n}.png" for n in range(len(IMAGES))]
    metadata = datasets.Dataset.from_dict({"file_name": names, "caption": CAPTIONS})
    getattr(metadata, writer)(folder / "set" / "train" / f"metadata.{suffix}")
    return folder / "set"


def image_folder_with_json_lines(folder):
    return image_folder(folder, "to_json", "jsonl")


def image_folder_with_parquet(folder):
    return image_folder(folder, "to_parquet", "parquet")


def tar_of(path, members):
    """Write a tar file of ``(name, bytes)``."""
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def web_members(rows):
    for n in rows:
        yield f"part/{n:04d}.image", IMAGES[n]
        yield f"part/{n:04d}.caption", CAPTIONS[n].encode()
        yield f"part/{n:04d}.json", b'{"width": 4}'


def web_tar(folder):
    return tar_of(folder / "pairs.tar", web_members(range(5)))


def folder_of_web_tars(folder):
    (folder / "set").mkdir()
    tar_of(folder / "set" / "00000.tar", web_members(range(3)))
    tar_of(folder / "set" / "00001.tar", web_members(range(3, 5)))
    return folder / "set"


SOURCES = [
    parquet_of_structs,
    parquet_of_the_hub,
    parquet_of_bytes,
    arrow,
    csv_of_paths,
    csv_of_absolute_paths,
    json_lines_of_paths,
    json_of_paths,
    parquet_of_paths,
    folder_of_tables,
    image_folder,
    image_folder_with_json_lines,
    image_folder_with_parquet,
    web_tar,
    folder_of_web_tars,
]


@pytest.fixture
def make(tmp_path):
    """Writes a Parquet source of the given columns, makes a data set of it and opens it."""

    def made(images=None, captions=None, name="made", ids=None, **keys):
        images = IMAGES if images is None else images
        columns = {"image": pa.array(images, pa.binary()), "caption": captions or CAPTIONS[: len(images)]}
        if ids:
            columns["key"], keys["id"] = ids, "key"
        pq.write_table(pa.table(columns), tmp_path / f"{name}.parquet")
        make_dataset(DatasetSpec(source=str(tmp_path / f"{name}.parquet"), **keys), tmp_path / name)
        return AsRead(tmp_path / name)

    return made


@pytest.mark.parametrize("source", SOURCES)
def test_all_kinds_of_source_give_the_same_samples_in_order(source, tmp_path, make):
    make_dataset(DatasetSpec(source=str(source(tmp_path))), tmp_path / "data")
    data = AsRead(tmp_path / "data")
    assert len(data) == 5
    assert [data.caption(i) for i in range(5)] == CAPTIONS
    assert [data.image(i).getpixel((1, 1)) for i in range(5)] == RGB
    assert data.image(0).mode == "RGB"
    assert data.image(0).size == (4, 3)
    assert data.ids() == ["00000000", "00000001", "00000002", "00000003", "00000004"]
    assert data.manifest["rows"] == data.manifest["rows_read"] == 5
    assert data.manifest["dropped"] == []
    assert data.content_hash == make().content_hash


def test_samples_are_a_documented_arrow_file(make, tmp_path):
    make(ids=list("abcde"), order_seed=3)
    with pa.memory_map(str(tmp_path / "made" / "samples.arrow")) as source:
        table = pa.ipc.open_file(source).read_all()
    checksums = [("text_crc32", pa.uint32()), ("image_crc32", pa.uint32())]
    columns = [("id", pa.string()), ("image", pa.binary()), ("caption", pa.string()), *checksums]
    assert table.schema == pa.schema(columns)
    assert table["image_crc32"].to_pylist() == [zlib.crc32(image) for image in table["image"].to_pylist()]
    texts = [f"{id_}{text}" for id_, text in zip(table["id"].to_pylist(), table["caption"].to_pylist(), strict=True)]
    assert table["text_crc32"].to_pylist() == [zlib.crc32(text.encode()) for text in texts]
    order = np.random.default_rng(3).permutation(5)
    assert table["image"].to_pylist() == [IMAGES[row] for row in order]
    assert table["id"].to_pylist() == ["abcde"[row] for row in order]
    assert set(contents(tmp_path / "made")) == {"dropped.jsonl", "manifest.json", "samples.arrow"}


def test_the_order_of_samples_is_a_permutation_drawn_from_its_seed(make):
    images, captions = [IMAGES[n % 5] for n in range(600)], [f"caption {n}" for n in range(600)]
    first, again, other = (
        Data.ids(make(images, captions, name=name, order_seed=seed)) for name, seed in [("a", 0), ("b", 0), ("c", 1)]
    )
    assert first == again
    assert sorted(first) == sorted(other) == [f"{n:08d}" for n in range(600)]
    assert first != other
    places = np.array([int(id_) for id_ in first])
    assert abs(np.corrcoef(places, np.arange(600))[0, 1]) < 0.2


def test_keeps_the_order_over_many_batches(make):
    count = 600
    captions = [f"caption {n}" for n in np.random.default_rng(0).permutation(count)]
    data = make([IMAGES[n % 5] for n in range(count)], captions, ids=[f"id {n}" for n in range(count)])
    assert [data.caption(i) for i in range(count)] == captions
    assert data.ids() == [f"id {n}" for n in range(count)]
    assert data.image(599).getpixel((0, 0)) == RGB[599 % 5]


def test_numeric_ids_become_strings(make):
    assert make(ids=[30, 10, 20, 50, 40]).ids() == ["30", "10", "20", "50", "40"]


def test_the_content_hash_depends_on_images_captions_and_ids(make):
    original = make(name="original").content_hash
    assert make(name="again").content_hash == original
    swapped = [1, 0, 2, 3, 4]
    others = {
        "caption": make(captions=["a red squarE", *CAPTIONS[1:]], name="caption"),
        "image": make([png(Image.new("RGB", (4, 3), (254, 0, 0))), *IMAGES[1:]], name="image"),
        "order": make([IMAGES[i] for i in swapped], [CAPTIONS[i] for i in swapped], name="order"),
        "pairing": make([IMAGES[i] for i in swapped], name="pairing"),
        "ids": make(ids=list("abcde"), name="ids"),
        "fewer": make(IMAGES[:4], name="fewer"),
    }
    hashes = [original, *(data.content_hash for data in others.values())]
    assert len(set(hashes)) == len(hashes)


def test_the_content_hash_separates_captions_from_ids(make):
    seed = next(seed for seed in range(9) if np.random.default_rng(seed).permutation(2).tolist() == [0, 1])
    one = make(IMAGES[:2], ["a", "b"], ids=["1", "x2"], name="one", order_seed=seed)
    two = make(IMAGES[:2], ["ax", "b"], ids=["1", "2"], name="two", order_seed=seed)
    assert one.content_hash != two.content_hash


def test_the_content_hash_does_not_depend_on_the_sources_format_or_location(make, tmp_path):
    (tmp_path / "deep").mkdir()
    make_dataset(DatasetSpec(source=str(csv_of_paths(tmp_path / "deep"))), tmp_path / "from csv")
    assert AsRead(tmp_path / "from csv").content_hash == make().content_hash


@pytest.mark.parametrize(("key", "column"), [("image", "picture"), ("caption", "text"), ("id", "key")])
def test_names_a_missing_column_and_lists_the_existing_ones(make, tmp_path, key, column):
    with pytest.raises(DatasetError, match=rf"no column '{column}'; the columns are image, caption: set {key} to"):
        make(**{key: column})
    assert not (tmp_path / "made").exists()


def test_columns_can_have_any_name(tmp_path):
    pq.write_table(pa.table({"jpg": IMAGES, "txt": CAPTIONS, "n": range(5)}), tmp_path / "pairs.parquet")
    spec = DatasetSpec(source=str(tmp_path / "pairs.parquet"), image="jpg", caption="txt", id="n")
    make_dataset(spec, tmp_path / "data")
    assert AsRead(tmp_path / "data").ids() == ["0", "1", "2", "3", "4"]


def test_drops_and_lists_unusable_rows(make):
    truncated = png(Image.effect_noise((64, 64), 50))[:500]
    images = [IMAGES[0], b"no image at all", None, truncated, IMAGES[1], IMAGES[2], IMAGES[3], b""]
    captions = ["first", "b", "c", "d", "", None, "last", "h"]
    data = make(images, captions, ids=[f"id-{n}" for n in range(8)], max_dropped=0.9)
    assert data.ids() == ["id-0", "id-6"]
    assert [data.caption(i) for i in range(2)] == ["first", "last"]
    assert data.image(1).getpixel((0, 0)) == RGB[3]
    dropped = data.manifest["dropped"]
    assert [(d["row"], d["id"]) for d in dropped] == [(n, f"id-{n}") for n in (1, 2, 3, 4, 5, 7)]
    reasons = [d["reason"] for d in dropped]
    assert all("image cannot be decoded" in reasons[n] for n in (0, 1, 2, 5))
    assert "no image" in reasons[1]
    assert "truncated" in reasons[2]
    assert reasons[3] == reasons[4] == "no caption"
    assert (data.manifest["rows_read"], data.manifest["rows"]) == (8, 2)


def test_a_blank_caption_counts_as_missing(make):
    data = make(captions=["a", " \t\n", "c", "d", "e"], max_dropped=0.5)
    assert [d["reason"] for d in data.manifest["dropped"]] == ["no caption"]


def test_drops_a_row_without_an_id(make):
    data = make(ids=["a", None, "c", None, "e"], max_dropped=0.5)
    assert data.ids() == ["a", "c", "e"]
    assert [(d["row"], d["reason"]) for d in data.manifest["dropped"]] == [(1, "no id"), (3, "no id")]


def test_drops_a_missing_image_by_name(tmp_path):
    csv_of_paths(tmp_path)
    (tmp_path / "pictures" / "2.png").unlink()
    make_dataset(DatasetSpec(source=str(tmp_path / "pairs.csv"), max_dropped=0.5), tmp_path / "data")
    (dropped,) = AsRead(tmp_path / "data").manifest["dropped"]
    assert dropped["row"] == 2
    assert "2.png" in dropped["reason"]


def test_numeric_captions_are_reported_as_not_text(make, tmp_path):
    with pytest.raises(DatasetError, match="caption is int, not text"):
        make(captions=[1, 2, 3, 4, 5])


def test_too_many_unusable_rows_are_an_error_and_leave_nothing(make, tmp_path):
    images = [*IMAGES[:4], b"broken"]
    with pytest.raises(
        DatasetError, match=r"1 of 5 rows are unusable, more than max_dropped = 0\.1.*row 4 \(00000004\)"
    ):
        make(images, max_dropped=0.1)
    assert not [path for path in tmp_path.iterdir() if path.name != "made.parquet"]
    assert len(make(images, max_dropped=0.2)) == 4


def test_memory_needs_a_few_bytes_per_row(tmp_path):
    N = 5_000
    tracemalloc.start()
    with (tmp_path / "as-read").open("w+b") as as_read, (tmp_path / "dropped.jsonl").open("w") as listed:
        samples, dropped = dataset._SampleFile(as_read), dataset._DroppedRows(listed)
        for row in range(N):
            samples.add(dataset.Sample(f"a longish id {row}", b"image", f"the caption of row {row}"))
            dropped.add(dataset.Dropped(row, f"a longish id {row}", "no caption"))
        samples.check_ids(DatasetSpec(source="./x"))
        samples.shuffle(tmp_path / "samples.arrow", 0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 150 * N  # the size of the ids alone


def test_duplicate_ids_are_an_error(make, tmp_path):
    with pytest.raises(DatasetError, match="the id 'b' occurs twice"):
        make(ids=["a", "b", "c", "b", "e"])
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_samples_are_an_error(make, tmp_path, count):
    with pytest.raises(DatasetError):
        make(IMAGES[:count])
    assert not (tmp_path / "made").exists()


def test_one_usable_sample_is_too_few(make):
    with pytest.raises(DatasetError, match="1 usable rows; correlations need at least 2"):
        make(captions=["a", "", "", "", ""], max_dropped=1)


def test_limit_reads_only_the_first_rows(make):
    data = make([*IMAGES[:3], b"never read", b"nor this"], limit=3)
    assert [data.caption(i) for i in range(len(data))] == CAPTIONS[:3]
    assert len(make(name="more", limit=99)) == 5


def test_names_a_missing_file(tmp_path):
    with pytest.raises(DatasetError, match=r"absent\.parquet: no such file"):
        make_dataset(DatasetSpec(source=str(tmp_path / "absent.parquet")), tmp_path / "data")


def test_refuses_a_file_that_is_not_a_table_and_lists_the_known_suffixes(tmp_path):
    (tmp_path / "pairs.xlsx").touch()
    with pytest.raises(DatasetError, match=r"cannot read '\.xlsx' files; use \.parquet, \.csv"):
        make_dataset(DatasetSpec(source=str(tmp_path / "pairs.xlsx")), tmp_path / "data")


def test_names_a_damaged_table(tmp_path):
    path = parquet_of_bytes(tmp_path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DatasetError, match=r"pairs\.parquet: cannot be read"):
        make_dataset(DatasetSpec(source=str(path)), tmp_path / "data")


def test_two_runs_give_the_same_bytes(make, tmp_path):
    make()
    first = contents(tmp_path / "made")
    make()
    assert contents(tmp_path / "made") == first
    assert set(first) == {"samples.arrow", "dropped.jsonl", "manifest.json"}


def test_refuses_missing_or_damaged_data(make, tmp_path):
    (tmp_path / "others").mkdir()
    (tmp_path / "others" / "manifest.json").write_text('{"kind": "sae"}')
    for folder in ("absent", "others"):
        with pytest.raises(DatasetError, match=r"no readable data set .*; name a folder that the dataset stage made"):
            AsRead(tmp_path / folder)
    make()
    samples, manifest = tmp_path / "made" / "samples.arrow", tmp_path / "made" / "manifest.json"
    content = samples.read_bytes()
    samples.write_bytes(content[:-30])
    with pytest.raises(DatasetError, match="no readable data set"):
        AsRead(tmp_path / "made")
    samples.write_bytes(content)
    text = manifest.read_text()
    manifest.write_text(text.replace('"rows": 5', '"rows": 6'))
    with pytest.raises(
        DatasetError,
        match=r"manifest\.json is missing, or was changed or written by another version\); delete the folder",
    ):
        AsRead(tmp_path / "made")
    manifest.write_text(text)
    make(captions=["another", *CAPTIONS[1:]], name="other")
    (tmp_path / "other" / "samples.arrow").replace(samples)
    with pytest.raises(
        DatasetError, match=r"samples\.arrow is damaged, or does not belong to manifest\.json; delete the folder"
    ):
        AsRead(tmp_path / "made")


FLIPS = 60
"""Bytes changed in each file, one at a time."""


def everything(folder):
    """The full content of a data set, or the message of the error."""
    try:
        data = Data(folder)
        rows = range(len(data))
        return data.manifest, data.ids(), [(data.caption(row), data.image(row).tobytes()) for row in rows]
    except DatasetError as error:
        return str(error)


@pytest.mark.parametrize("name", ["samples.arrow", "manifest.json"])
def test_detects_any_flipped_bit_that_matters(make, tmp_path, name, rng):
    make()
    whole, path = everything(tmp_path / "made"), tmp_path / "made" / name
    kept = path.read_bytes()
    for place in rng.choice(len(kept), min(len(kept), FLIPS), replace=False):
        damaged = bytearray(kept)
        damaged[place] ^= 1 << rng.integers(8)
        path.write_bytes(damaged)
        found = everything(tmp_path / "made")
        assert found == whole or re.fullmatch(r"\S+/made: .*; delete the folder and run the dataset stage again", found)


def test_transparency_is_composited_on_white():
    picture = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    picture.putpixel((1, 0), (0, 0, 0, 0))
    found = decode(png(picture))
    assert [found.getpixel((x, 0)) for x in range(2)] == [(255, 0, 0), (255, 255, 255)]
    half = decode(png(Image.new("RGBA", (1, 1), (0, 0, 0, 128)))).getpixel((0, 0))
    assert half == pytest.approx((127, 127, 127), abs=1)
    assert decode(png(Image.new("LA", (1, 1), (0, 0)))).getpixel((0, 0)) == (255, 255, 255)


def test_a_transparent_palette_colour_is_composited_on_white():
    picture = Image.new("P", (2, 1), 0)
    picture.putpalette([255, 0, 0, 0, 0, 255])
    picture.putpixel((1, 0), 1)
    opaque, transparent = decode(png(picture)), decode(png(picture, transparency=1))
    assert [opaque.getpixel((x, 0)) for x in range(2)] == [(255, 0, 0), (0, 0, 255)]
    assert [transparent.getpixel((x, 0)) for x in range(2)] == [(255, 0, 0), (255, 255, 255)]


@pytest.mark.parametrize(
    ("picture", "form", "expected"),
    [
        (Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", (255, 0, 0)),
        (Image.new("L", (8, 8), 77), "JPEG", (77, 77, 77)),
        (Image.new("1", (8, 8), 1), "PNG", (255, 255, 255)),
        (Image.new("RGB", (1, 1), (9, 8, 7)), "PNG", (9, 8, 7)),
        (Image.new("RGB", (8, 8), (0, 0, 255)), "WEBP", (0, 0, 255)),
        (Image.new("RGB", (8, 8), (0, 0, 255)), "GIF", (0, 0, 255)),
        (Image.new("RGB", (8, 8), (0, 0, 255)), "TIFF", (0, 0, 255)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_image_mode_becomes_rgb(picture, form, expected):
    found = decode(png(picture, format=form))
    assert (found.mode, found.size) == ("RGB", picture.size)
    assert found.getpixel((0, 0)) == pytest.approx(expected, abs=4)


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_16_bit_greys_keep_their_brightness(form):
    values = np.array([[0, 256 * 64, 256 * 128, 65535]], np.uint16)
    found = decode(png(Image.fromarray(values), format=form))
    assert found.mode == "RGB"
    assert np.asarray(found, int)[0, :, 0] == pytest.approx([0, 64, 128, 255], abs=1)


def test_an_undecodable_image_raises():
    with pytest.raises(OSError, match="cannot identify"):
        decode(b"not a picture")


# The hub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Uploads a source to a local hub as ``someone/pairs`` and returns its commit."""
    with running() as server:
        use(monkeypatch, server.endpoint, tmp_path / "hub")

        def put(source, revision="main"):
            folder = tmp_path / f"made for {revision}"
            folder.mkdir()
            made = source(folder)
            if made.is_file() and (folder / "pictures").is_dir():
                # Among so many images, the hub's library finds a table only if the data set's card names it.
                card = f"---\nconfigs:\n- config_name: default\n  data_files: {made.name}\n---\n"
                (folder / "README.md").write_text(card)
            return server.add("someone/pairs", made if made.is_dir() else folder, "dataset", revision)

        yield put


@pytest.mark.parametrize(
    "source",
    [
        parquet_of_structs,
        parquet_of_the_hub,
        parquet_of_paths,
        csv_of_paths,
        image_folder,
        image_folder_with_parquet,
        web_tar,
        folder_of_web_tars,
    ],
)
def test_a_hub_data_set_gives_the_same_samples_and_records_its_commit(source, hub, make, tmp_path):
    commit = hub(source)
    make_dataset(DatasetSpec(source="someone/pairs", max_dropped=0.0), tmp_path / "data")
    data = AsRead(tmp_path / "data")
    assert data.manifest["revision"] == commit
    copies = [path for path in tmp_path.rglob("*.arrow") if path.is_file()]
    assert copies == [tmp_path / "data" / "samples.arrow"]
    assert data.content_hash == make().content_hash


def test_reads_the_requested_revision(hub, tmp_path):
    old, new = hub(web_tar, "v1"), hub(parquet_of_structs)
    assert old != new
    for revision, commit in [("v1", old), (old, old), (None, new)]:
        make_dataset(DatasetSpec(source="someone/pairs", revision=revision), tmp_path / "data")
        assert AsRead(tmp_path / "data").manifest["revision"] == commit


def test_a_data_set_missing_from_the_hub_is_a_hub_error(hub, tmp_path):
    with pytest.raises(HubError):
        make_dataset(DatasetSpec(source="someone/absent"), tmp_path / "data")
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("path", ["../../../secret.png", "/secret.png", "a/../../secret.png"])
def test_a_hub_table_cannot_read_files_outside_its_data_set(path, hub, tmp_path):
    (tmp_path / "secret.png").write_bytes(IMAGES[0])
    path = str(tmp_path / "secret.png") if path.startswith("/") else path

    def source(folder):
        paths = [*pictures(folder)[:4], path]
        pq.write_table(pa.table({"image": paths, "caption": CAPTIONS}), folder / "pairs.parquet")
        return folder / "pairs.parquet"

    hub(source)
    make_dataset(DatasetSpec(source="someone/pairs", max_dropped=0.5), tmp_path / "data")
    (dropped,) = AsRead(tmp_path / "data").manifest["dropped"]
    assert dropped["row"] == 4
    assert "leads out of the data set" in dropped["reason"]


def test_a_local_data_set_has_no_revision(make):
    assert make().manifest["revision"] is None


# Several captions


SEVERAL = [["one", "two", "three"], [None, "", "only"], ["  ", "first", None, " second "], ["x", "y"], ["lonely"]]


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("first", ["one", "only", "first", "x", "lonely"]),
        ("joined", ["one two three", "only", "first second", "x y", "lonely"]),
    ],
)
def test_takes_the_first_of_several_captions_or_all(make, policy, expected):
    data = make(captions=SEVERAL, several_captions=policy)
    assert [data.caption(row) for row in range(5)] == expected
    assert data.manifest["several_captions"] == policy


def test_a_random_caption_depends_only_on_the_seed_and_the_row(make):
    images = [IMAGES[n % 5] for n in range(200)]
    captions = [[f"{n}-{i}" for i in range(5)] for n in range(200)]

    def drawn(name, **keys):
        data = make(images, keys.pop("captions", captions), name=name, several_captions="sampled", **keys)
        return {data.ids()[row]: data.caption(row) for row in range(len(data))}

    original = drawn("original", caption_seed=3)
    assert [caption.split("-")[0] for caption in original.values()] == [str(n) for n in range(200)]
    counts = np.bincount([int(caption.split("-")[1]) for caption in original.values()], minlength=5)
    assert counts.min() > 20
    assert drawn("again", caption_seed=3) == original
    other = drawn("other", caption_seed=4)
    assert 100 < sum(other[id_] != original[id_] for id_ in original) < 190
    holed = [None if n % 7 == 0 else caption for n, caption in enumerate(captions)]
    assert drawn("holed", caption_seed=3, captions=holed, max_dropped=0.5).items() <= original.items()
    assert drawn("limited", caption_seed=3, limit=50).items() <= original.items()


def test_the_manifest_records_the_caption_seed(make):
    manifest = make(captions=SEVERAL, several_captions="sampled", caption_seed=7).manifest
    assert (manifest["several_captions"], manifest["caption_seed"]) == ("sampled", 7)


@pytest.mark.parametrize("policy", ["first", "joined", "sampled"])
def test_drops_a_row_whose_captions_are_all_empty(make, policy):
    captions = [["a"], [], None, ["", None, " \n"], ["b"]]
    data = make(captions=captions, several_captions=policy, max_dropped=0.6)
    assert [(d["row"], d["reason"]) for d in data.manifest["dropped"]] == [(n, "no caption") for n in (1, 2, 3)]


def test_drops_a_caption_that_is_not_text_and_names_its_type():
    def caption(cell):
        return dataset._caption(DatasetSpec(source="./x", several_captions="joined"), 0, {"caption": cell})

    assert caption(["a", None, "b"]) == caption("a b") == "a b"
    for cell, kind in [(3, "int"), ({"a": "b"}, "dict"), (b"x", "bytes"), (["a", 3], "int"), ([["a"]], "list")]:
        with pytest.raises(dataset.UnusableError, match=f"caption is {kind}, not text"):
            caption(cell)


def test_keeps_unusual_captions_unchanged(make):
    captions = [
        "x" * 1_000_000,
        "مرحبا بالعالم 👩‍👩‍👧",
        "nul \0 bell \a escape \x1b",
        "e\u0301 \u202e rtl",
        "  spaces kept  ",
    ]
    data = make(captions=captions)
    assert [data.caption(row) for row in range(5)] == captions


def test_drops_captions_and_ids_that_cannot_be_encoded_as_utf_8(tmp_path):
    members = [("a.png", IMAGES[0]), ("a.json", b'"fine"'), ("b.png", IMAGES[1]), ("b.json", b'"lone \\ud800 half"')]
    members += [
        ("c.png", IMAGES[2]),
        ("c.json", b'["also", "fine"]'),
        ("d\udcff.png", IMAGES[3]),
        ("d\udcff.json", b'"x"'),
    ]
    spec = DatasetSpec(
        source=str(tar_of(tmp_path / "pairs.tar", members)), image="png", caption="json", id="__key__", max_dropped=0.5
    )
    make_dataset(spec, tmp_path / "data")
    data = AsRead(tmp_path / "data")
    assert [data.caption(row) for row in range(2)] == ["fine", "also"]
    assert [d["reason"].split(" (")[0] for d in data.manifest["dropped"]] == [
        "caption cannot be encoded as UTF-8",
        "id cannot be encoded as UTF-8",
    ]


def json_lines(path, *rows):
    path.write_text("".join(row + "\n" for row in rows), encoding="utf-8")
    return DatasetSpec(source=str(path), max_dropped=0.9)


def test_json_lines_may_have_lone_surrogates_mixed_types_and_missing_columns(tmp_path):
    pictures(tmp_path)
    captions = ['"one"', '"half \\ud800"', '["two", "three"]', "7", "null"]
    rows = [f'{{"image": "pictures/{n}.png", "caption": {caption}}}' for n, caption in enumerate(captions)]
    spec = json_lines(tmp_path / "a.jsonl", '{"caption": "no image"}', "", *rows, '{"image": "pictures/0.png"}')
    make_dataset(spec, tmp_path / "data")
    data = AsRead(tmp_path / "data")
    assert [data.caption(row) for row in range(len(data))] == ["one", "two"]
    assert [(d["row"], d["reason"].split(" (")[0]) for d in data.manifest["dropped"]] == [
        (0, "image cannot be decoded"),
        (2, "caption cannot be encoded as UTF-8"),
        (4, "caption is int, not text"),
        (5, "no caption"),
        (6, "no caption"),
    ]


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ('{"image": "pictures/1.png", "caption": "cut', "line 2 is not valid JSON"),
        ('["pictures/1.png", "a caption"]', "line 2 is not an object of columns and cells"),
    ],
)
def test_names_a_line_that_is_not_a_row(line, fault, tmp_path):
    spec = json_lines(tmp_path / "a.jsonl", '{"image": "pictures/0.png", "caption": "a"}', line)
    with pytest.raises(DatasetError, match=fault):
        make_dataset(spec, tmp_path / "data")


def test_lists_the_columns_of_json_lines_if_one_is_missing(tmp_path):
    spec = json_lines(tmp_path / "a.jsonl", '{"picture": "pictures/0.png", "caption": "a"}')
    with pytest.raises(DatasetError, match="no column 'image'; the columns are caption, picture: set image to one"):
        make_dataset(spec, tmp_path / "data")


def test_csv_captions_such_as_null_are_text(tmp_path):
    captions = ["NA", "null", "None", "", "nan"]
    rows = [f"{path},{caption}" for path, caption in zip(pictures(tmp_path), captions, strict=True)]
    (tmp_path / "a.csv").write_text("\n".join(["image,caption", *rows]))
    make_dataset(DatasetSpec(source=str(tmp_path / "a.csv"), max_dropped=0.5), tmp_path / "data")
    data = AsRead(tmp_path / "data")
    assert [data.caption(row) for row in range(len(data))] == ["NA", "null", "None", "nan"]
    assert [d["reason"] for d in data.manifest["dropped"]] == ["no caption"]


# WebDataset


def web_spec(path, **keys):
    return DatasetSpec(**{"source": str(path), "image": "jpg;png", "caption": "txt", "id": "__key__", **keys})


def test_webdataset_keys_are_ids_and_members_are_columns(tmp_path):
    jpeg = png(Image.new("RGB", (8, 8), (255, 0, 0)), format="JPEG")
    members = [
        ("train/0001.jpg", jpeg),
        ("train/0001.txt", "été".encode()),
        ("train/0001.json", b"{}"),
        ("train/0002.png", IMAGES[1]),
        ("train/0002.txt", b"two"),
        ("train/0003.txt", b"three, the other way round"),
        ("train/0003.JPG", jpeg),
        ("train/0003.png", IMAGES[2]),
        ("README", b"no sample"),
    ]
    make_dataset(web_spec(tar_of(tmp_path / "a.tar", members)), tmp_path / "data")
    data = AsRead(tmp_path / "data")
    assert data.ids() == ["train/0001", "train/0002", "train/0003"]
    assert [data.caption(row) for row in range(3)] == ["été", "two", "three, the other way round"]
    assert [data.image(row).getpixel((0, 0)) for row in range(3)] == [
        pytest.approx((255, 0, 0), abs=4),
        (0, 255, 0),
        pytest.approx((255, 0, 0), abs=4),
    ]


def test_drops_only_webdataset_samples_that_lack_members(tmp_path):
    members = [("1.json", b"{}"), ("2.png", IMAGES[0]), ("3.txt", b"three"), ("4.png", IMAGES[1]), ("4.txt", b"four")]
    members += [("5.png", IMAGES[2]), ("5.txt", b"\xff\xff"), ("6.txt", b"six"), ("6.png", IMAGES[3])]
    make_dataset(web_spec(tar_of(tmp_path / "a.tar", members), max_dropped=0.9), tmp_path / "data")
    manifest = AsRead(tmp_path / "data").manifest
    assert [(d["id"], d["reason"]) for d in manifest["dropped"]] == [
        ("1", "no caption"),
        ("2", "no caption"),
        ("3", "image cannot be decoded (no image)"),
        ("5", "caption is bytes, not text"),
    ]
    assert (manifest["rows_read"], manifest["rows"]) == (6, 2)


def test_names_a_missing_webdataset_column_and_lists_the_extensions(tmp_path):
    with pytest.raises(DatasetError, match=r"no column 'text'; the members' extensions are caption, image, json"):
        make_dataset(web_spec(web_tar(tmp_path), image="image", caption="text", max_dropped=1), tmp_path / "data")


def test_tar_members_are_never_extracted_to_disk(tmp_path):
    (tmp_path / "inner").mkdir()
    members = []
    for name in ("../../evil", str(tmp_path / "absolute"), "plain"):
        members += [(f"{name}.png", IMAGES[0]), (f"{name}.txt", b"text")]
    source = tar_of(tmp_path / "inner" / "a.tar", members)
    with tarfile.open(source, "a") as tar:
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    before = sorted(tmp_path.rglob("*"))
    make_dataset(web_spec(source), tmp_path / "inner" / "data")
    made = {
        tmp_path / "inner" / "data" / name for name in ("", "samples.arrow", "dropped.jsonl", "manifest.json", FILE)
    }
    assert set(tmp_path.rglob("*")) - set(before) == made
    assert AsRead(tmp_path / "inner" / "data").ids() == ["../../evil", str(tmp_path / "absolute"), "plain"]


def test_names_a_sample_with_two_members_of_one_name(tmp_path):
    members = [("a.png", IMAGES[0]), ("a.png", IMAGES[1]), ("a.txt", b"a")]
    with pytest.raises(DatasetError, match=r"a\.tar: the sample 'a' has two members 'png'"):
        make_dataset(web_spec(tar_of(tmp_path / "a.tar", members)), tmp_path / "data")


def test_names_a_truncated_tar(tmp_path):
    path = web_tar(tmp_path)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(DatasetError, match=r"pairs\.tar: cannot be read"):
        make_dataset(DatasetSpec(source=str(path)), tmp_path / "data")


def test_chooses_the_split_of_a_folder_of_tars_by_file_name(tmp_path):
    (tmp_path / "set").mkdir()
    tar_of(tmp_path / "set" / "train-0.tar", web_members([0, 1]))
    tar_of(tmp_path / "set" / "validation-0.tar", web_members([2, 3, 4]))
    for split, count in [("train", 2), ("validation", 3)]:
        make_dataset(DatasetSpec(source=str(tmp_path / "set"), split=split), tmp_path / split)
        assert len(AsRead(tmp_path / split)) == count
    with pytest.raises(DatasetError, match="no split 'test'; it has train, validation"):
        make_dataset(DatasetSpec(source=str(tmp_path / "set"), split="test"), tmp_path / "data")


def test_limit_reads_only_the_first_samples_of_a_tar(tmp_path):
    make_dataset(DatasetSpec(source=str(web_tar(tmp_path)), limit=2), tmp_path / "data")
    assert len(AsRead(tmp_path / "data")) == 2


def test_drops_a_missing_image_of_an_image_folder_by_name(tmp_path):
    source = image_folder(tmp_path)
    (source / "train" / "pictures" / "2.png").unlink()
    make_dataset(DatasetSpec(source=str(source), max_dropped=0.5), tmp_path / "data")
    (dropped,) = AsRead(tmp_path / "data").manifest["dropped"]
    assert dropped["row"] == 2
    assert "2.png" in dropped["reason"]


# Unusual images


def raw_png(width, height, depth, colour, rows, *chunks):
    """A PNG file of a kind that PIL does not write. ``rows`` are bytes, without filter bytes."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    middle = b"".join(chunk(kind, content) for kind, content in chunks)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + middle + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def first_row(image):
    found = decode(image)
    assert found.mode == "RGB"
    return [found.getpixel((x, 0)) for x in range(found.width)]


def grey(*values):
    return [(value,) * 3 for value in values]


def test_32_bit_greys_within_255_are_unchanged():
    picture = Image.fromarray(np.array([[0, 77, 255]], np.int32))
    assert picture.mode == "I"
    assert first_row(png(picture, format="TIFF")) == grey(0, 77, 255)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0, 1, 2]], np.int32), [0, 1, 2]),
        (np.array([[0, 32768, 65535]], np.int32), [0, 128, 255]),
        (np.array([[0, 50_000, 100_000]], np.int32), [0, 128, 255]),
        (np.array([[-100, 0, 100]], np.int32), [0, 128, 255]),
        (np.array([[-(2**31), 2**31 - 1]], np.int32), [0, 255]),
        (np.array([[0, 0.5, 1]], np.float32), [0, 128, 255]),
        (np.array([[0, 12.4, 255]], np.float32), [0, 12, 255]),
        (np.array([[0, 32768, 65535]], np.float32), [0, 128, 255]),
        (np.array([[-1, 0, 1]], np.float32), [0, 128, 255]),
        (np.array([[0, 0]], np.float32), [0, 0]),
        (np.array([[-5, -5]], np.int32), [0, 0]),
    ],
)
def test_32_bit_greys_are_scaled_by_their_range(values, expected):
    assert first_row(png(Image.fromarray(values), format="TIFF")) == [
        pytest.approx(value, abs=1) for value in grey(*expected)
    ]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_refuses_non_finite_greys(value):
    with pytest.raises(ValueError, match="not finite"):
        decode(png(Image.fromarray(np.array([[0, value]], np.float32)), format="TIFF"))


def test_16_bit_greys_keep_their_brightness_and_composite_transparency_on_white():
    greys = [0, 64 * 256, 64 * 256 + 1, 65535]
    rows = [b"".join(value.to_bytes(2, "big") for value in greys)]
    image = raw_png(4, 1, 16, 0, rows, (b"tRNS", (64 * 256).to_bytes(2, "big")))
    assert first_row(image) == grey(0, 255, 64, 255)


def test_16_bit_colours_are_scaled_and_not_clipped():
    def row(*pixels):
        return [b"".join(value.to_bytes(2, "big") for pixel in pixels for value in pixel)]

    assert first_row(raw_png(2, 1, 16, 2, row((65535, 32768, 256), (0, 512, 65280)))) == [(255, 128, 1), (0, 2, 255)]
    assert first_row(raw_png(2, 1, 16, 6, row((65535, 0, 0, 65535), (0, 0, 0, 0)))) == [(255, 0, 0), (255, 255, 255)]
    assert first_row(raw_png(2, 1, 16, 4, row((32768, 65535), (0, 0)))) == grey(128, 255)


def test_a_transparent_16_bit_colour_is_composited_on_white():
    pixels = [(65535, 0, 0), (0, 0, 65535)]
    rows = [b"".join(value.to_bytes(2, "big") for pixel in pixels for value in pixel)]
    image = raw_png(2, 1, 16, 2, rows, (b"tRNS", struct.pack(">HHH", 0, 0, 65535)))
    assert first_row(image) == [(255, 0, 0), (255, 255, 255)]


def test_16_bit_colours_of_a_tiff_are_scaled():
    """Written by hand: little-endian, one strip, 3 samples of 16 bits."""
    pixels = np.array([[[65535, 32768, 256], [0, 512, 65280]]], "<u2").tobytes()
    tags = [(256, 3, 1, 2), (257, 3, 1, 1), (258, 3, 3, 8), (259, 3, 1, 1), (262, 3, 1, 2), (273, 4, 1, 14)]
    tags += [(277, 3, 1, 3), (278, 3, 1, 1), (279, 4, 1, len(pixels))]
    start = 14 + len(pixels)
    head = struct.pack("<2sHI", b"II", 42, start) + struct.pack("<HHH", 16, 16, 16)
    tiff = head + pixels + struct.pack("<H", len(tags))
    tiff += b"".join(struct.pack("<HHII", *tag) for tag in tags) + struct.pack("<I", 0)
    assert first_row(tiff) == [(255, 128, 1), (0, 2, 255)]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_images_are_rotated_upright_as_pil_does(orientation, form):
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (6, 9, 3), np.uint8)).resize((36, 24), Image.Resampling.NEAREST)
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = png(picture, format=form, exif=exif.tobytes())
    with Image.open(io.BytesIO(image)) as opened:
        expected = ImageOps.exif_transpose(opened.convert("RGB") if form != "TIFF" else opened)
    found = decode(image)
    assert found.size == ((36, 24) if orientation < 5 else (24, 36))
    assert np.array_equal(np.asarray(found), np.asarray(expected))
    assert not found.getexif().get(0x0112)


def packed_text(kind, length):
    return kind, b"key\0\0" + zlib.compress(b"x" * length)


@pytest.mark.parametrize(
    "chunks",
    [
        [packed_text(b"zTXt", 2_000_000)],
        [packed_text(b"iCCP", 3_000_000)],
        [(b"tEXt", b"key\0" + b"x" * 900_000)] * 80,
        [(b"iTXt", b"key\0\1\0\0\0" + zlib.compress(b"x" * 200_000_000))],
    ],
    ids=["text", "colour profile", "many texts", "bomb"],
)
def test_reads_a_png_file_with_any_amount_of_text(chunks):
    """PIL's global limits on metadata are unchanged, and nothing is decompressed beyond them."""
    exif = Image.Exif()
    exif[0x0112] = 6
    limits = PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY
    rows = [bytes([200, 0, 0, 0, 0, 200])]
    for more in ([], chunks):
        found = decode(raw_png(2, 1, 8, 2, rows, *more, (b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0"))))
        assert found.size == (1, 2)
        assert [found.getpixel((0, y)) for y in range(2)] == [(200, 0, 0), (0, 0, 200)]
    assert limits == (PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY)
    with pytest.raises(Image.DecompressionBombError):
        decode(raw_png(20, 10, 8, 2, [], *chunks), max_pixels=100)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0", b"MM"])
def test_ignores_damaged_exif_data(exif):
    image = png(Image.new("RGB", (9, 6), (0, 0, 255)), format="JPEG", exif=exif)
    assert decode(image).size == (9, 6)


def test_takes_the_first_frame_of_an_animation():
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "lime")]
    for form in ("GIF", "WEBP", "PNG"):
        image = png(frames[0], format=form, save_all=True, append_images=frames[1:], duration=50)
        assert first_row(image)[0] == pytest.approx((255, 0, 0), abs=4), form


def test_images_in_other_colour_spaces_keep_their_colours():
    red = Image.new("RGB", (2, 2), (200, 30, 60))
    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    for picture in (ImageCms.profileToProfile(red, *profiles, outputMode="LAB"), red.convert("YCbCr")):
        assert first_row(png(picture, format="TIFF"))[0] == pytest.approx((200, 30, 60), abs=6), picture.mode


def test_drops_images_with_too_many_pixels_before_decoding(make):
    """The file's data are damaged, so decoding would report that and not the size."""
    large = raw_png(50_000, 50_000, 8, 2, [])
    data = make([*IMAGES[:4], large], max_dropped=0.5, max_pixels=10_000_000)
    (dropped,) = data.manifest["dropped"]
    assert "50000 x 50000 pixels, more than max_pixels = 10000000" in dropped["reason"]


@pytest.mark.parametrize(("limit", "kept"), [(12, 5), (11, 0)])
def test_max_pixels_is_inclusive(make, limit, kept):
    """IMAGES are 4 by 3."""
    if kept:
        assert len(make(max_pixels=limit)) == kept
    else:
        with pytest.raises(DatasetError, match="5 of 5 rows are unusable"):
            make(max_pixels=limit)


@pytest.mark.parametrize("side", [15, 60])
def test_pils_limit_on_image_size_is_disabled(side, make, monkeypatch):
    """PIL warns above its limit, here 200 pixels (first side), and refuses above twice that (second side)."""
    image = png(Image.new("RGB", (side, side)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200)
        data = make([*IMAGES[:2], image], max_pixels=side * side)
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200)
        assert data.image(2).size == (side, side)
        assert len(make([*IMAGES[:2], image], name="less", max_dropped=0.5, max_pixels=side * side - 1)) == 2


def processors():
    square = {"shortest_edge": 224}
    crop = {"height": 224, "width": 224}
    for kind in ("CLIPImageProcessor", "SiglipImageProcessor", "BitImageProcessor", "ViTImageProcessor"):
        size = square if kind in {"CLIPImageProcessor", "BitImageProcessor"} else crop
        processor = getattr(transformers, kind)(size=size)
        yield kind, lambda picture, processor=processor: processor(images=[picture], return_tensors="pt")
    for mode in ("shortest", "squash", "longest"):
        yield f"open_clip {mode}", image_transform_v2(PreprocessCfg(size=224, resize_mode=mode), is_train=False)
    yield "timm", timm.data.create_transform((3, 224, 224), interpolation="bicubic", crop_pct=0.9)


@pytest.mark.parametrize("size", [(1, 1), (1, 2), (3, 3), (3, 1), (1, MAX_RATIO), (MAX_RATIO, 1)])
def test_kept_images_work_with_every_librarys_preprocessing(size, make):
    data = make([png(Image.new("RGB", size, (200, 0, 0))), *IMAGES[:2]])
    assert len(data) == 3
    for name, processor in processors():
        assert processor(data.image(0)) is not None, name


@pytest.mark.parametrize("size", [(MAX_RATIO + 1, 1), (1, MAX_RATIO + 1), (2 * MAX_RATIO + 1, 2)])
def test_drops_images_too_narrow_to_resize_in_memory(size, make):
    data = make([png(Image.new("RGB", size)), *IMAGES[:2]], max_dropped=0.5)
    (dropped,) = data.manifest["dropped"]
    assert "is too narrow; sides may differ 100 fold" in dropped["reason"]


def test_does_not_run_postscript(make):
    data = make([png(Image.new("RGB", (9, 9)), format="EPS"), *IMAGES[:2]], max_dropped=0.5)
    assert [d["row"] for d in data.manifest["dropped"]] == [0]


MODES = {
    "PNG": ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"],
    "JPEG": ["L", "RGB", "CMYK"],
    "WEBP": ["RGB", "RGBA"],
    "GIF": ["L", "P", "RGB", "RGBA"],
    "TIFF": ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "F", "LAB"],
    "BMP": ["1", "L", "P", "RGB", "RGBA"],
    "JPEG2000": ["L", "LA", "RGB", "RGBA"],
    "TGA": ["L", "P", "RGB", "RGBA"],
    "PPM": ["1", "L", "RGB", "I;16"],
    "ICO": ["RGBA"],
    "AVIF": ["RGB", "RGBA"],
}


def odd_file(chance):
    """An image file of a random kind and size, usually damaged."""
    form = chance.choice(list(MODES))
    mode = chance.choice(MODES[form])
    size = chance.choice([(1, 1), (1, 7), (40, 1), (9, 13), (33, 32), (600, 1), (64, 48)])
    noise = chance.randbytes(size[0] * size[1] * 8)
    if mode in {"I;16", "I", "F"}:
        kind = {"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]
        picture = Image.fromarray(np.frombuffer(noise, kind)[: size[0] * size[1]].reshape(size[::-1]).copy())
    elif mode == "P":
        picture = Image.frombytes("RGB", size, noise[: size[0] * size[1] * 3]).quantize(16)
    elif mode == "LAB":
        picture = Image.frombytes("LAB", size, noise[: size[0] * size[1] * 3])
    else:
        picture = Image.frombytes("RGBA", size, noise[: size[0] * size[1] * 4]).convert(
            "RGB" if mode == "CMYK" else mode
        )
        picture = picture.convert(mode)
    options = {"exif": Image.Exif()} if form in {"PNG", "JPEG", "WEBP"} else {}
    if options:
        options["exif"][0x0112] = chance.randrange(12)
    if form == "ICO":
        options["sizes"] = [(16, 16)]
        picture = picture.resize((16, 16))
    content = bytearray(png(picture, format=form, **options))
    damage = chance.choice(["none", "cut", "flip", "flip", "both"])
    if damage in {"cut", "both"}:
        del content[chance.randrange(len(content)) :]
    if damage in {"flip", "both"} and content:
        for _ in range(chance.randint(1, 9)):
            content[chance.randrange(min(len(content), chance.choice([40, 10**9])))] = chance.randrange(256)
    return bytes(content)


def test_any_file_gives_an_image_or_a_dropped_row_deterministically(make):
    chance = random.Random(0)
    images = [odd_file(chance) for _ in range(1500)]
    captions = [f"caption {n}" for n in range(len(images))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first, second = (make(images, captions, name=name, max_dropped=1.0, max_pixels=100_000) for name in "ab")
        assert first.content_hash == second.content_hash
        own = {key: first.manifest[key] for key in ("settings", "source", "digest")}
        assert first.manifest == second.manifest | own
        kept, dropped = first.ids(), {d["row"]: d["reason"] for d in first.manifest["dropped"]}
        assert sorted([*(int(id_) for id_ in kept), *dropped]) == list(range(1500))
        assert min(len(kept), len(dropped)) > 300
        assert all(dropped.values())
        for row in range(len(kept)):
            found = first.image(row)
            assert found.mode == "RGB"
            assert min(found.size) >= 1
