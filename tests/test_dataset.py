"""Reading image-caption pairs from every kind of source, in order, dropping and saying what is unusable."""

import io
import json

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from conceptshare.catalog import DatasetSpec
from conceptshare.dataset import Data, decode, make_dataset
from conceptshare.errors import DatasetError

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
    """With the features that Hugging Face's library notes in the file, by which it would decode the images."""
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


def image_folder(folder):
    (folder / "set" / "train").mkdir(parents=True)
    pictures(folder / "set" / "train")
    names = [f"pictures/{n}.png" for n in range(len(IMAGES))]
    metadata = datasets.Dataset.from_dict({"file_name": names, "caption": CAPTIONS})
    metadata.to_csv(folder / "set" / "train" / "metadata.csv")
    return folder / "set"


SOURCES = [
    parquet_of_structs,
    parquet_of_the_hub,
    parquet_of_bytes,
    arrow,
    csv_of_paths,
    csv_of_absolute_paths,
    json_lines_of_paths,
    image_folder,
]


@pytest.fixture
def make(tmp_path):
    """Writes a Parquet source of the given columns, makes the data set of it, and opens that."""

    def made(images=None, captions=None, name="made", ids=None, **keys):
        images = IMAGES if images is None else images
        columns = {"image": pa.array(images, pa.binary()), "caption": captions or CAPTIONS[: len(images)]}
        if ids:
            columns["key"], keys["id"] = ids, "key"
        pq.write_table(pa.table(columns), tmp_path / f"{name}.parquet")
        make_dataset(DatasetSpec(source=str(tmp_path / f"{name}.parquet"), **keys), tmp_path / name)
        return Data(tmp_path / name)

    return made


@pytest.mark.parametrize("source", SOURCES)
def test_every_kind_of_source_gives_the_same_samples_in_order(source, tmp_path, make):
    make_dataset(DatasetSpec(source=str(source(tmp_path))), tmp_path / "data")
    data = Data(tmp_path / "data")
    assert len(data) == 5
    assert [data.caption(i) for i in range(5)] == CAPTIONS
    assert [data.image(i).getpixel((1, 1)) for i in range(5)] == RGB
    assert data.image(0).mode == "RGB"
    assert data.image(0).size == (4, 3)
    assert data.ids() == ["00000000", "00000001", "00000002", "00000003", "00000004"]
    assert data.manifest["rows"] == data.manifest["rows_read"] == 5
    assert data.manifest["dropped"] == []
    assert data.content_hash == make().content_hash


def test_the_samples_are_an_arrow_file_as_documented(make, tmp_path):
    make(ids=list("abcde"))
    with pa.memory_map(str(tmp_path / "made" / "samples.arrow")) as source:
        table = pa.ipc.open_file(source).read_all()
    assert table.schema == pa.schema([("id", pa.string()), ("image", pa.binary()), ("caption", pa.string())])
    assert table["image"].to_pylist() == IMAGES
    assert table["id"].to_pylist() == list("abcde")


def test_order_is_kept_over_many_batches(make):
    count = 600
    captions = [f"caption {n}" for n in np.random.default_rng(0).permutation(count)]
    data = make([IMAGES[n % 5] for n in range(count)], captions, ids=[f"id {n}" for n in range(count)])
    assert [data.caption(i) for i in range(count)] == captions
    assert data.ids() == [f"id {n}" for n in range(count)]
    assert data.image(599).getpixel((0, 0)) == RGB[599 % 5]


def test_ids_of_numbers_become_strings(make):
    assert make(ids=[30, 10, 20, 50, 40]).ids() == ["30", "10", "20", "50", "40"]


def test_the_content_hash_tells_what_differs(make):
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


def test_the_content_hash_tells_where_a_caption_ends_and_the_next_id_begins(make):
    one = make(IMAGES[:2], ["a", "b"], ids=["1", "x2"], name="one")
    two = make(IMAGES[:2], ["ax", "b"], ids=["1", "2"], name="two")
    assert one.content_hash != two.content_hash


def test_the_content_hash_depends_neither_on_the_form_nor_on_the_place_of_the_source(make, tmp_path):
    (tmp_path / "deep").mkdir()
    make_dataset(DatasetSpec(source=str(csv_of_paths(tmp_path / "deep"))), tmp_path / "from csv")
    assert Data(tmp_path / "from csv").content_hash == make().content_hash


@pytest.mark.parametrize(("key", "column"), [("image", "picture"), ("caption", "text"), ("id", "key")])
def test_a_missing_column_is_named_with_those_there_are(make, tmp_path, key, column):
    with pytest.raises(DatasetError, match=rf"no column '{column}'; the columns are image, caption: set {key} to"):
        make(**{key: column})
    assert not (tmp_path / "made").exists()


def test_columns_can_have_any_name(tmp_path):
    pq.write_table(pa.table({"jpg": IMAGES, "txt": CAPTIONS, "n": range(5)}), tmp_path / "pairs.parquet")
    spec = DatasetSpec(source=str(tmp_path / "pairs.parquet"), image="jpg", caption="txt", id="n")
    make_dataset(spec, tmp_path / "data")
    assert Data(tmp_path / "data").ids() == ["0", "1", "2", "3", "4"]


def test_unusable_rows_are_dropped_and_listed(make):
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


def test_a_caption_of_blanks_is_no_caption(make):
    data = make(captions=["a", " \t\n", "c", "d", "e"], max_dropped=0.5)
    assert [d["reason"] for d in data.manifest["dropped"]] == ["no caption"]


def test_a_row_without_an_id_is_dropped(make):
    data = make(ids=["a", None, "c", None, "e"], max_dropped=0.5)
    assert data.ids() == ["a", "c", "e"]
    assert [(d["row"], d["reason"]) for d in data.manifest["dropped"]] == [(1, "no id"), (3, "no id")]


def test_a_missing_picture_is_dropped_by_name(tmp_path):
    csv_of_paths(tmp_path)
    (tmp_path / "pictures" / "2.png").unlink()
    make_dataset(DatasetSpec(source=str(tmp_path / "pairs.csv"), max_dropped=0.5), tmp_path / "data")
    (dropped,) = Data(tmp_path / "data").manifest["dropped"]
    assert dropped["row"] == 2
    assert "2.png" in dropped["reason"]


def test_captions_that_are_numbers_are_said_to_be_no_text(make, tmp_path):
    with pytest.raises(DatasetError, match="caption is int, not text"):
        make(captions=[1, 2, 3, 4, 5])


def test_more_unusable_rows_than_allowed_are_an_error_and_leave_nothing(make, tmp_path):
    images = [*IMAGES[:4], b"broken"]
    with pytest.raises(
        DatasetError, match=r"1 of 5 rows are unusable, more than max_dropped = 0\.1.*row 4 \(00000004\)"
    ):
        make(images, max_dropped=0.1)
    assert not [path for path in tmp_path.iterdir() if path.name != "made.parquet"]
    assert len(make(images, max_dropped=0.2)) == 4


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


def test_limit_reads_the_first_rows_alone(make):
    data = make([*IMAGES[:3], b"never read", b"nor this"], limit=3)
    assert [data.caption(i) for i in range(len(data))] == CAPTIONS[:3]
    assert len(make(name="more", limit=99)) == 5


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DatasetError, match=r"absent\.parquet: no such file"):
        make_dataset(DatasetSpec(source=str(tmp_path / "absent.parquet")), tmp_path / "data")


def test_a_file_that_is_no_table_is_refused_with_the_suffixes_that_are(tmp_path):
    (tmp_path / "pairs.xlsx").touch()
    with pytest.raises(DatasetError, match=r"cannot read '\.xlsx' files; use \.parquet, \.csv"):
        make_dataset(DatasetSpec(source=str(tmp_path / "pairs.xlsx")), tmp_path / "data")


def test_a_damaged_table_is_named(tmp_path):
    path = parquet_of_bytes(tmp_path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DatasetError, match=r"pairs\.parquet: cannot be read"):
        make_dataset(DatasetSpec(source=str(path)), tmp_path / "data")


def test_making_it_again_gives_the_same_bytes(make, tmp_path):
    make()
    first = {path.name: path.read_bytes() for path in (tmp_path / "made").iterdir()}
    make()
    assert {path.name: path.read_bytes() for path in (tmp_path / "made").iterdir()} == first
    assert set(first) == {"samples.arrow", "manifest.json"}


def test_data_that_is_missing_or_damaged_is_refused(make, tmp_path):
    with pytest.raises(DatasetError, match="no readable data set"):
        Data(tmp_path / "absent")
    make()
    samples, manifest = tmp_path / "made" / "samples.arrow", tmp_path / "made" / "manifest.json"
    content = samples.read_bytes()
    samples.write_bytes(content[:-30])
    with pytest.raises(DatasetError, match="no readable data set"):
        Data(tmp_path / "made")
    samples.write_bytes(content)
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "rows": 6}))
    with pytest.raises(DatasetError, match="5 rows, where the manifest says 6"):
        Data(tmp_path / "made")


def test_transparency_is_laid_on_white():
    picture = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    picture.putpixel((1, 0), (0, 0, 0, 0))
    found = decode(png(picture))
    assert [found.getpixel((x, 0)) for x in range(2)] == [(255, 0, 0), (255, 255, 255)]
    half = decode(png(Image.new("RGBA", (1, 1), (0, 0, 0, 128)))).getpixel((0, 0))
    assert half == pytest.approx((127, 127, 127), abs=1)
    assert decode(png(Image.new("LA", (1, 1), (0, 0)))).getpixel((0, 0)) == (255, 255, 255)


def test_a_palette_with_a_transparent_colour_is_laid_on_white():
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
def test_every_kind_of_picture_becomes_rgb(picture, form, expected):
    found = decode(png(picture, format=form))
    assert (found.mode, found.size) == ("RGB", picture.size)
    assert found.getpixel((0, 0)) == pytest.approx(expected, abs=4)


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_16_bit_greys_keep_their_brightness(form):
    values = np.array([[0, 256 * 64, 256 * 128, 65535]], np.uint16)
    found = decode(png(Image.fromarray(values), format=form))
    assert found.mode == "RGB"
    assert np.asarray(found, int)[0, :, 0] == pytest.approx([0, 64, 128, 255], abs=1)


def test_a_picture_that_cannot_be_decoded_raises():
    with pytest.raises(OSError, match="cannot identify"):
        decode(b"not a picture")
