"""Sources are read completely: their files, splits and configurations, and every row."""

import csv
import io
import json
import os
import re
import shlex
import subprocess
import tarfile
import zipfile

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from typer.testing import CliRunner

from conceptshare.cli import app
from conceptshare.config.catalog import DatasetSpec
from conceptshare.data import sources
from conceptshare.data.dataset import make_dataset
from conceptshare.data.rows import check_columns, inputs
from conceptshare.io.errors import DatasetError
from tests.helpers.samples import AsRead


def png(number):
    buffer = io.BytesIO()
    Image.new("RGB", (4, 3), (number % 256, 7, 7)).save(buffer, "PNG")
    return buffer.getvalue()


def parquet(path, *captions):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"image": [png(n) for n in range(len(captions))], "caption": captions}), path)


def table(path, *captions, header=("image", "caption"), encoding="utf-8"):
    """A CSV file, with its images next to it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding=encoding) as file:
        rows = csv.writer(file, delimiter="\t" if ".tsv" in path.name else ",")
        rows.writerow(header)
        for n, caption in enumerate(captions):
            (path.parent / f"{n}.png").write_bytes(png(n))
            rows.writerow((f"{n}.png", caption))


def tar(path, *captions):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as file:
        for n, caption in enumerate(captions):
            for name, content in ((f"{caption}{n}.image", png(n)), (f"{caption}{n}.caption", caption.encode())):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                file.addfile(member, io.BytesIO(content))


def read(source, out=None, **keys):
    """The captions of a source in order, and the manifest."""
    out = out or source.parent / "made"
    make_dataset(DatasetSpec(source=str(source), **keys), out)
    data = AsRead(out)
    return [data.caption(row) for row in range(len(data))], data.manifest


def captions(source, **keys):
    return read(source, **keys)[0]


ODD = ["a[0-9]", "b*", "c?", "d::e", "{f,g}", "100%", "zip:", "h i", "[!j]", "**", "naïve", "~k", "$HOME", "#l?m=n"]


@pytest.mark.parametrize("name", ODD)
def test_paths_are_not_patterns(name, tmp_path):
    for other in ("a5", "bb", "cc", "f", "x"):
        parquet(tmp_path / other / "rows.parquet", "another", "folder's", "rows")
    parquet(tmp_path / name / "rows.parquet", "one", "two")
    parquet(tmp_path / name / f"{name}.parquet", "three")
    assert sorted(captions(tmp_path / name)) == ["one", "three", "two"]
    assert captions(tmp_path / name / "rows.parquet") == ["one", "two"]


@pytest.mark.parametrize(
    "names",
    [
        ["train.csv", "more.csv"],
        ["test-a.csv", "train-b.csv", "c.csv"],
        ["test.csv", "test-2.csv"],
        ["train/a.csv", "cars/a.csv"],
        ["validation/a.csv", "cars/test.csv", "c.csv"],
        ["part-10.csv", "part-2.csv", "part-test.csv"],
        ["deep/deeper/a.csv", "a.csv"],
        ["test-00000-of-00002.csv", "test-00001-of-00002.csv"],
        ["A.CSV", "b.csv.gz"],
    ],
    ids=" ".join,
)
def test_reads_every_row_of_every_file_in_path_order(names, tmp_path):
    for name in names:
        table(tmp_path / "set" / name.removesuffix(".gz"), f"{name} 0", f"{name} 1")
        if name.endswith(".gz"):
            plain = tmp_path / "set" / name.removesuffix(".gz")
            with pa.CompressedOutputStream(str(plain) + ".gz", "gzip") as packed:
                packed.write(plain.read_bytes())
            plain.unlink()
    found, manifest = read(tmp_path / "set")
    assert found == [f"{name} {row}" for name in sorted(names) for row in range(2)]
    assert "not_read" not in manifest


SHARDS = ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet", "data/test-00000-of-00001.parquet"]
FOLDERS = ["train/a.parquet", "train/b.parquet", "test/a.parquet"]
SAVED = ["train/data-00000-of-00002.parquet", "train/data-00001-of-00002.parquet", "test/data-00000-of-00001.parquet"]
NAMES = ["train-0.parquet", "train.parquet", "test.parquet"]


@pytest.mark.parametrize("names", [SHARDS, FOLDERS, SAVED], ids=["shards", "folders", "shards in folders"])
def test_chooses_declared_splits_and_reports_unread_files(names, tmp_path, capsys):
    for name in names:
        parquet(tmp_path / "set" / name, f"{name} 0", f"{name} 1")
    found, manifest = read(tmp_path / "set")
    assert found == [f"{name} {row}" for name in names[:2] for row in range(2)]
    assert manifest["split"] == "train"
    assert manifest["not_read"] == [{"reason": "split test", "files": 1, "first": [names[2]]}]
    assert f"not read: 1 file (split test), such as {names[2]}" in capsys.readouterr().err
    assert captions(tmp_path / "set", split="test") == [f"{names[2]} {row}" for row in range(2)]
    assert len(captions(tmp_path / "set", split="all")) == 6
    with pytest.raises(DatasetError, match="no split 'dev'; it has test, train: set split to one, or to all"):
        read(tmp_path / "set", split="dev")


def test_files_named_like_splits_need_the_split_setting(tmp_path):
    for name in NAMES:
        parquet(tmp_path / "set" / name, f"{name} 0", f"{name} 1")
    with pytest.raises(DatasetError, match=r"named like splits \(test: test.parquet; train: .*set split to one of"):
        read(tmp_path / "set")
    assert captions(tmp_path / "set", split="test") == ["test.parquet 0", "test.parquet 1"]
    assert len(captions(tmp_path / "set", split="train")) == 4
    assert len(captions(tmp_path / "set", split="all")) == 6


def test_a_data_set_without_splits_is_its_train_split(tmp_path):
    for n in range(2):
        parquet(tmp_path / "set" / f"part-{n:05d}-of-00002.parquet", f"{n}")
    assert captions(tmp_path / "set", split="train") == captions(tmp_path / "set") == ["0", "1"]


DEEP = "/".join(["a" * 50] * 80)


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("a/*.csv", ["a/x.csv"]),
        ("**/*.csv", ["x.csv", "a/x.csv", "a/b/x.csv"]),
        ("a/**", ["a/x.csv", "a/b/x.csv", "a/[y].tsv"]),
        ("**", ["x.csv", "a/x.csv", "a/b/x.csv", "a/[y].tsv", DEEP]),
        ("a/**/b/x.csv", ["a/b/x.csv"]),
        ("a/[y].tsv", ["a/[y].tsv"]),
        ("a/[[]y].?sv", ["a/[y].tsv"]),
        ("*", ["x.csv"]),
        ("**.csv", ["x.csv"]),
        ("**/" * 80 + "*a" * 40, [DEEP]),
        ("**/" * 80 + "*a" * 40 + "b", []),
    ],
)
def test_readme_patterns_match_quickly_and_as_on_the_hub(pattern, names):
    every = ["x.csv", "a/x.csv", "a/b/x.csv", "a/[y].tsv", DEEP]
    assert [name for name in every if sources._matches(name, pattern)] == names


def readme(folder, text):
    (folder / "README.md").write_text(f"---\n{text}\n---\n# A data set\n", encoding="utf-8")


def test_configurations_and_splits_come_from_the_readme(tmp_path):
    for name in ("en/a-test.parquet", "en/b.parquet", "de/a.parquet", "de/c[1].parquet", "stray.parquet"):
        parquet(tmp_path / "set" / name, f"{name} 0", f"{name} 1")
    readme(
        tmp_path / "set",
        "license: mit\nconfigs:\n- {config_name: en, data_files: 'en/*'}\n- config_name: de\n  data_files:\n"
        "  - {split: train, path: 'de/c[1].parquet'}\n  - {split: held.out, path: [de/a.*]}",
    )
    with pytest.raises(DatasetError, match="has several configurations; there are en, de: set configuration to one"):
        read(tmp_path / "set")
    with pytest.raises(DatasetError, match="no configuration 'fr'; there are en, de"):
        read(tmp_path / "set", configuration="fr")
    found, manifest = read(tmp_path / "set", configuration="en")
    assert found == [f"{name} {row}" for name in ("en/a-test.parquet", "en/b.parquet") for row in range(2)]
    assert (manifest["configuration"], manifest["split"]) == ("en", "train")
    found, manifest = read(tmp_path / "set", configuration="de")
    assert found == ["de/c[1].parquet 0", "de/c[1].parquet 1"]
    assert manifest["not_read"][0]["reason"] == "split held.out"
    assert captions(tmp_path / "set", configuration="de", split="held.out")[0] == "de/a.parquet 0"
    with pytest.raises(DatasetError, match=r"no split 'test'; it has train, held\.out"):
        read(tmp_path / "set", configuration="de", split="test")
    readme(tmp_path / "set", "configs:\n- {config_name: en, data_files: 'en/*', default: true}\n- {config_name: de}")
    assert len(captions(tmp_path / "set")) == 4
    readme(
        tmp_path / "set", "configs:\n- {config_name: 2024, data_files: 'en/*'}\n- {config_name: no, data_files: 'de/*'}"
    )
    with pytest.raises(DatasetError, match="there are 2024, False: set configuration"):
        read(tmp_path / "set")
    assert captions(tmp_path / "set", configuration="2024")[0] == "en/a-test.parquet 0"
    twice = "configs:\n- config_name: a\n  data_files: [{split: train, path: x}, {split: train, path: y}]"
    for text in ("configs: [", "configs: 3", "configs: [{name: a}]", twice):
        readme(tmp_path / "set", text)
        with pytest.raises(DatasetError, match=r"the metadata at the top of README\.md cannot be read"):
            read(tmp_path / "set")
    with pytest.raises(DatasetError, match="a single file has no configurations"):
        read(tmp_path / "set" / "stray.parquet", configuration="en")


def test_tables_named_readme_or_metadata_and_hidden_ones_are_not_mixed_in(tmp_path):
    parquet(tmp_path / "set" / "rows.parquet", "one", "two")
    for name in (".hidden.parquet", "__MACOSX/rows.parquet", ".cache/rows.parquet"):
        parquet(tmp_path / "set" / name, "hidden")
    for name in ("dataset_info.json", "README.md", "notes.txt"):
        (tmp_path / "set" / name).write_text("{}")
    os.mkfifo(tmp_path / "set" / "pipe.parquet")
    (tmp_path / "set" / "loop").symlink_to(tmp_path / "set")
    assert captions(tmp_path / "set") == ["one", "two"]
    parquet(tmp_path / "elsewhere" / "z.parquet", "three")
    (tmp_path / "set" / "linked").symlink_to(tmp_path / "elsewhere")
    assert captions(tmp_path / "set") == ["three", "one", "two"]
    (tmp_path / "set" / "gone.parquet").symlink_to(tmp_path / "gone")
    with pytest.raises(DatasetError, match=r"gone\.parquet: cannot be read \(FileNotFoundError"):
        read(tmp_path / "set")
    with pytest.raises(DatasetError, match="no such file or folder"):
        read(tmp_path / ("x" * 5000))
    with pytest.raises(DatasetError, match="neither a regular file nor a folder"):
        read(tmp_path / "set" / "pipe.parquet")


def test_names_files_of_several_kinds(tmp_path):
    parquet(tmp_path / "set" / "a.parquet", "one", "two")
    table(tmp_path / "set" / "b.csv", "three")
    with pytest.raises(DatasetError, match=r"several kinds: parquet \(a\.parquet\), csv \(b\.csv\)\. Set source"):
        read(tmp_path / "set")
    (tmp_path / "set" / "b.csv").unlink()
    tar(tmp_path / "set" / "c.tar", "four")
    with pytest.raises(DatasetError, match=r"several kinds: tar \(c\.tar\), parquet"):
        read(tmp_path / "set")


def test_reads_tars_next_to_img2dataset_tables(tmp_path):
    for shard in ("00000", "00001"):
        tar(tmp_path / "set" / f"{shard}.tar", f"{shard} a", f"{shard} b")
        pq.write_table(pa.table({"url": ["http://x"], "caption": ["x"]}), tmp_path / "set" / f"{shard}.parquet")
        (tmp_path / "set" / f"{shard}_stats.json").write_text("{}")
    found, manifest = read(tmp_path / "set")
    assert found == ["00000 a", "00000 b", "00001 a", "00001 b"]
    assert [(entry["reason"], entry["files"]) for entry in manifest["not_read"]] == [
        ("statistics of img2dataset", 2),
        ("next to tars", 2),
    ]


def test_names_the_table_of_a_lost_img2dataset_shard(tmp_path):
    tar(tmp_path / "set" / "00000.tar", "a", "b")
    for shard in ("00000", "00001"):
        pq.write_table(pa.table({"caption": ["x"]}), tmp_path / "set" / f"{shard}.parquet")
    with pytest.raises(DatasetError, match=r"several kinds: tar \(00000\.tar\), parquet \(00001\.parquet\)"):
        read(tmp_path / "set")


def test_the_remedy_for_images_with_files_of_their_own_works(tmp_path):
    """As img2dataset writes them by default."""
    shard = tmp_path / "set" / "00000"
    parquet(tmp_path / "set" / "00000.parquet", "x")
    shard.mkdir()
    for key in ("000000001", "000000000"):
        (shard / f"{key}.png").write_bytes(png(0))
        (shard / f"{key}.txt").write_text(key)
        (shard / f"{key}.json").write_text(json.dumps({"caption": key}))
    with pytest.raises(DatasetError, match=r"captions are read from a metadata.csv") as error:
        read(tmp_path / "set")
    command = re.search("`(tar .*)`", str(error.value))[1]
    (tmp_path / "tars").mkdir()
    command = command.replace("SHARD.tar", str(tmp_path / "tars/0.tar")).replace("FOLDER", str(shard))
    subprocess.run(shlex.split(command), check=True)
    assert captions(tmp_path / "tars", image="png", caption="txt") == ["000000000", "000000001"]


def test_ignores_the_statistics_that_img2dataset_writes_next_to_tables(tmp_path):
    parquet(tmp_path / "set" / "00000.parquet", "one", "two")
    (tmp_path / "set" / "00000_stats.json").write_text("{}")
    assert captions(tmp_path / "set") == ["one", "two"]


# The cells of text tables


TEXTS = [
    "NA",
    "null",
    "None",
    "nan",
    "n/a",
    "1984",
    "1e5",
    "true",
    "000000391895",
    "-0",
    "2020-01-01",
    " a ",
    'say "x"',
]


@pytest.mark.parametrize(
    "name", ["a.csv", "a.tsv", "set/a.csv", "set/metadata.csv", "a.csv.zst", "bom.csv", "utf16.csv"]
)
def test_reads_cells_of_text_tables_verbatim(name, tmp_path):
    first = "file_name" if "metadata" in name else "image"
    encoding = {"bom.csv": "utf-8-sig", "utf16.csv": "utf-16"}.get(name, "utf-8")
    path = tmp_path / name.removesuffix(".zst")
    table(path, *TEXTS, header=(first, "caption"), encoding=encoding)
    if name.endswith(".zst"):
        with pa.CompressedOutputStream(str(tmp_path / name), "zstd") as packed:
            packed.write(path.read_bytes())
    source = (tmp_path / name).parent if "/" in name else tmp_path / name
    make_dataset(DatasetSpec(source=str(source), id="caption"), tmp_path / "made")
    data = AsRead(tmp_path / "made")
    assert data.ids() == [data.caption(row) for row in range(len(data))] == TEXTS


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("image,caption\n0.png,one, two\n", "line 2 has 3 cells, the header 2; quote cells that contain ','"),
        ("image,caption\n0.png,a,\n", "line 2 has 3 cells, the header 2; "),
        ("image,caption\n0.png,a\n\n1.png\n", "line 4 has 1 cells, the header 2; complete the line"),
        ("caption,image\na\n", "line 2 has 1 cells, the header 2; complete"),
        ('image,caption\n0.png,"open\n1.png,b\n', "line 3 is not valid CSV"),
        ("", "the file is empty"),
        ("image;caption\n0.png;a\n", "its cells are separated by ';' instead of ','; save it with commas"),
        ("image,caption,caption\n0.png,a,b\n", "2 columns are called 'caption'; rename all but one"),
    ],
)
def test_names_the_line_of_an_ambiguous_csv_file(text, fault, tmp_path):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(DatasetError, match=rf"a\.csv: {fault}"):
        read(tmp_path / "a.csv")


def test_text_that_is_no_utf_8_costs_its_row_alone(tmp_path):
    table(tmp_path / "a.csv", "one", "caf\xe9", "three", encoding="latin-1")
    found, manifest = read(tmp_path / "a.csv", max_dropped=0.5)
    assert found == ["one", "three"]
    assert "caption cannot be encoded as UTF-8" in manifest["dropped"][0]["reason"]


@pytest.mark.parametrize(
    "text",
    [
        '[{"image": "0.png", "caption": "a"}, {"image": "1.png", "caption": "b"}]',
        '{"image": "0.png", "caption": "a"}\n{"image": "1.png", "caption": "b"}\n',
        '{\n"image": ["0.png", "1.png"],\n"caption": ["a", "b"]}',
        '\ufeff[\n{"image": "0.png", "caption": "a"}\n,\n{"image": "1.png", "caption": "b", "more": {}}]\n',
    ],
    ids=["list", "lines", "columns", "byte order mark"],
)
def test_json_may_be_a_list_of_rows_rows_or_columns(text, tmp_path):
    for n in range(2):
        (tmp_path / f"{n}.png").write_bytes(png(n))
    (tmp_path / "a.json").write_text(text, encoding="utf-8")
    assert captions(tmp_path / "a.json") == ["a", "b"]
    (tmp_path / "a.json").write_text(text[:-3], encoding="utf-8")
    with pytest.raises(DatasetError, match="not valid JSON"):
        read(tmp_path / "a.json")


def test_json_is_read_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr("conceptshare.data.rows._BUFFER", 7)
    (tmp_path / "0.png").write_bytes(png(0))
    rows = [{"image": "0.png", "caption": f"{n} ] , é"} for n in range(50)]
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=2))
    assert captions(tmp_path / "a.json") == [row["caption"] for row in rows]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_byte_order_mark_is_no_part_of_a_text(encoding, tmp_path):
    for n in range(2):
        (tmp_path / f"{n}.png").write_bytes(png(n))
    lines = "".join(json.dumps({"image": f"{n}.png", "caption": f"c {n}"}) + "\n" for n in range(2))
    (tmp_path / "a.jsonl").write_text(lines, encoding=encoding)
    assert captions(tmp_path / "a.jsonl") == ["c 0", "c 1"]
    with tarfile.open(tmp_path / "b.tar", "w") as file:
        for n in range(2):
            for name, content in (
                (f"{n}.png", png(n)),
                (f"{n}.txt", f"c {n}".encode(encoding)),
                (f"{n}.json", json.dumps(f"c {n}").encode(encoding)),
            ):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                file.addfile(member, io.BytesIO(content))
    for caption in ("txt", "json"):
        assert captions(tmp_path / "b.tar", image="png", caption=caption) == ["c 0", "c 1"]


def test_only_the_named_columns_are_read(tmp_path):
    """Of the others, the pages hold no data that could be decoded."""
    rows = {"image": [png(0), png(1)], "caption": ["a", "b"], "other": [b"x" * 3000, b"y" * 3000]}
    pq.write_table(pa.table(rows), tmp_path / "a.parquet", compression="none", use_dictionary=False)
    content = (tmp_path / "a.parquet").read_bytes()
    column = pq.read_metadata(tmp_path / "a.parquet").row_group(0).column(2)
    start, size = column.data_page_offset, column.total_compressed_size
    (tmp_path / "a.parquet").write_bytes(content[:start] + b"\xff" * size + content[start + size :])
    with pytest.raises(OSError, match=r"Thrift|page"):
        pq.read_table(tmp_path / "a.parquet")
    assert captions(tmp_path / "a.parquet") == ["a", "b"]


# Image folders and zips


def image_folder(folder, count=3, name="metadata.csv"):
    folder.mkdir(parents=True)
    for n in range(count):
        (folder / f"{n}.png").write_bytes(png(n))
    if name.endswith("csv"):
        table(folder / name, *(f"c {n}" for n in range(count)), header=("file_name", "caption"))
    return folder


def test_each_row_of_an_image_folder_is_a_sample_or_dropped_and_each_image_without_one_is_reported(tmp_path, capsys):
    folder = image_folder(tmp_path / "set")
    image_folder(folder / "train")
    (folder / "1.png").unlink()
    for name in ("alone.png", "train/alone.jpeg", "no image.txt"):
        (folder / name).write_bytes(png(9))
    found, manifest = read(folder, max_dropped=0.5)
    assert found == ["c 0", "c 2", "c 0", "c 1", "c 2"]
    assert [(row["row"], "1.png" in row["reason"]) for row in manifest["dropped"]] == [(1, True)]
    (entry,) = manifest["not_read"]
    assert (entry["reason"], entry["files"], sorted(entry["first"])) == (
        "image without a row",
        2,
        ["alone.png", "train/alone.jpeg"],
    )
    assert "not read: 2 files (image without a row)" in capsys.readouterr().err


def zipped(folder, path):
    with zipfile.ZipFile(path, "w") as packed:
        for file in sorted(folder.rglob("*")):
            packed.write(file, file.relative_to(folder))
    return path


@pytest.mark.parametrize("inside", [True, False], ids=["a folder of zips", "a zip"])
def test_zips_of_images_are_read_where_they_lie(inside, tmp_path):
    image_folder(tmp_path / "a" / "deep")
    (tmp_path / "a" / "deep" / "alone.png").write_bytes(png(9))
    (tmp_path / "set").mkdir()
    path = zipped(tmp_path / "a", tmp_path / "set" / "train.zip")
    found, manifest = read(path.parent if inside else path, tmp_path / "made")
    assert found == ["c 0", "c 1", "c 2"]
    assert manifest["not_read"][0]["first"] == ["train.zip/deep/alone.png"]
    assert {file.name for file in tmp_path.rglob("*.png")} == {"0.png", "1.png", "2.png", "alone.png"}


def test_a_zip_reads_nothing_but_its_members_and_no_more_than_is_allowed(tmp_path):
    rows = ["../../secret.png", "/etc/passwd", "large.png", "fine.png", "fine too.png"]
    (tmp_path / "secret.png").write_bytes(png(0))
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("metadata.csv", "file_name,caption\n" + "".join(f"{row},c\n" for row in rows))
        packed.writestr("large.png", b"\0" * 5_000_000)
        for name in rows[3:]:
            packed.writestr(name, png(1))
    found, manifest = read(tmp_path / "a.zip", max_dropped=0.9, max_mb=1)
    assert len(found) == 2
    reasons = [row["reason"] for row in manifest["dropped"]]
    assert ["in the zip" in reason for reason in reasons] == [True, True, False]
    assert "5.0 MB, more than max_mb = 1" in reasons[2]
    zipped(tmp_path / "made", tmp_path / "b.zip")
    with pytest.raises(DatasetError, match=r"a zip without a metadata\.csv, \.jsonl or \.parquet; unpack it"):
        read(tmp_path / "b.zip")


def test_two_files_of_metadata_for_the_same_images_are_an_error(tmp_path):
    folder = image_folder(tmp_path / "set")
    (folder / "metadata.jsonl").write_text('{"file_name": "0.png", "caption": "again"}')
    with pytest.raises(DatasetError, match=r"metadata\.csv and metadata\.jsonl name the same images; remove one"):
        read(folder)


def test_images_without_captions_are_an_error_with_a_remedy(tmp_path):
    image_folder(tmp_path / "set", name="none")
    with pytest.raises(DatasetError, match=r"captions are read from a metadata\.csv"):
        read(tmp_path / "set")


def test_reports_image_folder_metadata_without_file_names(tmp_path):
    image_folder(tmp_path / "set", name="none")
    table(tmp_path / "set" / "metadata.csv", "a", "b")
    with pytest.raises(
        DatasetError,
        match="no column 'file_name'; the columns are image, caption: rename the column with the image paths",
    ):
        read(tmp_path / "set")


# Images that are not regular files or too large


def test_only_regular_files_of_limited_size_are_read_as_images(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with (tmp_path / "sparse.png").open("wb") as file:
        file.truncate(3 * 10**9)
    rows = [
        "/dev/zero",
        "pipe.png",
        "sparse.png",
        ".",
        "/dev/stdin",
        "x" * 5000,
        "nul\0",
        "http://x/y.png",
        "0.png",
        "1.png",
    ]
    pq.write_table(pa.table({"image": rows, "caption": ["c"] * len(rows)}), tmp_path / "a.parquet")
    for n in range(2):
        (tmp_path / f"{n}.png").write_bytes(png(n))
    found, manifest = read(tmp_path / "a.parquet", max_dropped=0.9)
    assert len(found) == 2
    reasons = [row["reason"] for row in manifest["dropped"]]
    for n in (0, 1, 3, 4):
        assert "no regular file" in reasons[n], reasons[n]
    assert "3,000.0 MB, more than max_mb = 200" in reasons[2]
    assert "5,000 letters that look like base64" in reasons[5]
    assert "image_url" in reasons[7]
    assert max(map(len, reasons)) < 300


def test_paths_are_relative_to_their_table_or_the_data_sets_folder(tmp_path):
    table(tmp_path / "set" / "tables" / "a.csv", "one", "two")
    (tmp_path / "set" / "tables" / "1.png").rename(tmp_path / "set" / "1.png")
    assert captions(tmp_path / "set") == ["one", "two"]


@pytest.fixture
def coco(tmp_path):
    """COCO's folders, with captions that are not in the order of their images."""
    (tmp_path / "val").mkdir()
    (tmp_path / "annotations").mkdir()
    images = [{"id": 10 * n, "file_name": f"{n:012d}.png", "width": 4} for n in (3, 1, 2)]
    for image in images:
        (tmp_path / "val" / image["file_name"]).write_bytes(png(image["id"]))
    annotations = [
        {"id": 900 - n, "image_id": image, "caption": caption}
        for n, (image, caption) in enumerate([(10, "dogs"), (30, "cat"), (10, "a dog"), (20, "bird"), (30, "a cat")])
    ]
    file = tmp_path / "annotations" / "captions_val.json"
    file.write_text(json.dumps({"info": {}, "licenses": [], "images": images, "annotations": annotations}))
    return file


def test_reads_the_captions_of_coco(coco, tmp_path):
    keys = {"image_folder": str(tmp_path / "val"), "id": "id", "several_captions": "joined"}
    found = captions(coco, **keys)
    assert found == ["a cat cat", "a dog dogs", "bird"]  # in the order of images, and of captions' ids
    data = AsRead(tmp_path / "annotations" / "made")
    assert [data.ids()[row] for row in range(3)] == ["30", "10", "20"]
    assert [np.asarray(data.image(row))[0, 0, 0] for row in range(3)] == [30, 10, 20]
    spec = DatasetSpec(source=str(coco), **keys)
    assert inputs(spec) == ([str(coco), *(str(tmp_path / "val" / f"{n:012d}.png") for n in (1, 2, 3))], "")
    with pytest.raises(DatasetError, match="image_folder names the folder it is in"):
        read(coco, tmp_path / "again")


def test_an_image_of_coco_without_a_caption_is_dropped(coco, tmp_path):
    content = json.loads(coco.read_text())
    content["annotations"] = [one for one in content["annotations"] if one["image_id"] != 20]
    coco.write_text(json.dumps(content))
    found, manifest = read(coco, image_folder=str(tmp_path / "val"), max_dropped=0.5)
    assert (len(found), manifest["rows_read"]) == (2, 3)


def test_other_annotations_of_coco_are_an_error_with_a_remedy(coco, tmp_path):
    content = json.loads(coco.read_text())
    for annotation in content["annotations"]:
        del annotation["caption"]
    coco.write_text(json.dumps(content))
    with pytest.raises(DatasetError, match=r"KeyError: 'caption'.*name one of COCO's captions_"):
        read(coco, image_folder=str(tmp_path / "val"))


def test_only_a_table_on_this_machine_has_an_image_folder():
    with pytest.raises(ValueError, match="image_folder is for a table on this machine"):
        DatasetSpec(source="owner/name", image_folder="./images")


@pytest.mark.parametrize("form", ["parquet", "arrow"])
def test_the_names_of_class_labels_are_captions(form, tmp_path):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a cat", "a dog"])})
    rows = {"image": [{"bytes": png(n), "path": None} for n in range(4)], "label": [1, 0, 1, -1]}
    made = datasets.Dataset.from_dict(rows, features)
    if form == "arrow":
        made.save_to_disk(str(tmp_path / "set"))
    else:
        (tmp_path / "set").mkdir()
        made.to_parquet(tmp_path / "set" / "a.parquet")
    assert captions(tmp_path / "set", caption="label", max_dropped=0.5) == ["a dog", "a cat", "a dog"]


def test_captions_may_be_lists_as_older_versions_of_datasets_noted_them(tmp_path):
    noted = {"info": {"features": {"caption": [{"dtype": "string", "_type": "Value"}]}}}
    columns = {"image": [png(n) for n in range(2)], "caption": [["a cat", "cats"], ["a dog"]]}
    made = pa.table(columns).replace_schema_metadata({"huggingface": json.dumps(noted)})
    pq.write_table(made, tmp_path / "a.parquet")
    assert captions(tmp_path / "a.parquet") == ["a cat", "a dog"]


def test_a_table_can_name_images_whose_names_are_not_utf_8(tmp_path):
    for name in (b"caf\xe9.png", b"0.png"):
        (tmp_path / os.fsdecode(name)).write_bytes(png(0))
    (tmp_path / "a.csv").write_bytes(b"image,caption\ncaf\xe9.png,one\n0.png,two\n")
    assert captions(tmp_path / "a.csv") == ["one", "two"]


def test_reports_base64_like_text_and_truncates_it(tmp_path):
    import base64

    rng = np.random.default_rng(0)
    cells = [base64.b64encode(rng.bytes(60_000)).decode() for _ in range(4)]
    cells[1] = f"data:image/png;base64,{cells[1]}"
    pq.write_table(pa.table({"image": cells, "caption": cells, "id": cells}), tmp_path / "a.parquet")
    with pytest.raises(DatasetError, match="80,000 letters that look like base64") as failed:
        read(tmp_path / "a.parquet", id="id")
    assert len(str(failed.value)) < 2000


# Tars


def add(file, name, content=b"", size=None, kind=tarfile.REGTYPE):
    member = tarfile.TarInfo(name)
    member.size, member.type = len(content) if size is None else size, kind
    file.addfile(member, io.BytesIO(content))


@pytest.mark.parametrize("ending", ["\n", "\r\n", "\n\n", ""])
def test_strips_the_final_line_break_of_a_text_file(ending, tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as file:
        for n in range(2):
            add(file, f"{n}.png", png(n))
            add(file, f"{n}.txt", f" two\nlines {n}{ending}".encode())
    after = "\n" if ending == "\n\n" else ""
    assert captions(tmp_path / "a.tar", image="png", caption="txt") == [f" two\nlines {n}{after}" for n in range(2)]


@pytest.mark.parametrize("order", ["images first", "json last"])
def test_scattered_members_of_a_sample_are_an_error_with_a_remedy(order, tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as file:
        for n in range(4):
            add(file, f"{n}.image", png(n))
            if order == "json last":
                add(file, f"{n}.caption", b"text")
        for n in range(4):
            add(file, f"{n}.json" if order == "json last" else f"{n}.caption", b"{}")
    with pytest.raises(DatasetError, match=r"a sample are not adjacent.*tar --sort=name"):
        read(tmp_path / "a.tar", max_dropped=1)


def test_drops_the_row_of_an_oversized_member_without_reading_it(tmp_path):
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as file:
        add(file, "0.image", b"\0" * 3_000_000)
        add(file, "0.caption", b"large")
        for n in (1, 2):
            add(file, f"{n}.image", png(n))
            add(file, f"{n}.caption", b"fine")
        add(file, "3.image", png(n))
        add(file, "3.caption", b"x" * 3_000_000)
    found, manifest = read(tmp_path / "a.tar.gz", max_mb=2, max_dropped=0.5)
    assert found == ["fine", "fine"]
    assert [row["reason"] for row in manifest["dropped"]] == [
        "image cannot be read (3.0 MB, more than max_mb = 2)",
        "caption cannot be read (3.0 MB, more than max_mb = 2)",
    ]


def test_damaged_or_oversized_tar_headers_are_errors(tmp_path):
    tar(tmp_path / "a.tar", "one", "two", "three")
    content = bytearray((tmp_path / "a.tar").read_bytes())
    place = content.index(b"two1.image")
    content[place + 100] ^= 1
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(DatasetError, match=r"a\.tar: cannot be read \(ReadError: damaged header"):
        read(tmp_path / "a.tar")
    tar(tmp_path / "c.tar", "one", "two")
    (tmp_path / "c.tar").write_bytes((tmp_path / "c.tar").read_bytes() * 2)
    with pytest.raises(DatasetError, match="data after the end of the tar; join tars with tar -A"):
        read(tmp_path / "c.tar")
    with tarfile.open(tmp_path / "b.tar", "w") as file:
        add(file, "0.image", b"x" * 2_000_000, kind=tarfile.XHDTYPE)
    with pytest.raises(DatasetError, match=r"b\.tar: cannot be read .*an extended header of 2,000,000 bytes"):
        read(tmp_path / "b.tar")


# Inputs for Snakemake


def test_images_named_by_a_table_are_inputs_or_for_many_a_digest(tmp_path, monkeypatch):
    table(tmp_path / "a.csv", "one", "two", "three")
    spec = DatasetSpec(source=str(tmp_path / "a.csv"))
    (tmp_path / "2.png").unlink()
    listed = [str(tmp_path / name) for name in ("a.csv", "0.png", "1.png")]
    assert inputs(spec) == (listed, "")
    monkeypatch.setattr("conceptshare.data.rows.LISTED", 1)
    files, digest = inputs(spec)
    assert files == listed[:1]
    assert digest
    assert inputs(spec)[1] == digest
    (tmp_path / "0.png").write_bytes(png(9))
    os.utime(tmp_path / "0.png", (1, 1))
    assert inputs(spec)[1] != digest


@pytest.mark.parametrize("name", ["{0}.png", os.fsdecode(b"caf\xe9.png")])
def test_image_names_unsupported_by_snakemake_are_in_the_digest(name, tmp_path):
    folder = image_folder(tmp_path / "set")
    (folder / name).write_bytes(png(0))
    files, digest = inputs(DatasetSpec(source=str(folder)))
    assert files == [str(folder / "metadata.csv")]
    assert digest


def rows_of(form, path):
    """A data set of two rows, in one of the forms that are read, with columns `name`, `image` and `caption`."""
    cells = {"name": ["a", "b"], "image": ["0.png", "1.png"], "caption": ["one", "two"]}
    objects = [dict(zip(cells, row, strict=True)) for row in zip(*cells.values(), strict=True)]
    match form:
        case "csv":
            path.write_text("name,image,caption\n" + "".join(",".join(row.values()) + "\n" for row in objects))
        case "parquet":
            pq.write_table(pa.table(cells), path)
        case "arrow":
            with pa.ipc.new_file(str(path), pa.table(cells).schema) as file:
                file.write_table(pa.table(cells))
        case "jsonl":  # whose first rows may lack a column
            path.write_text("\n".join(json.dumps(row) for row in [{"name": "c"}, *objects]))
        case "json":
            path.write_text(json.dumps(objects))
        case "tar":
            tar(path, "one", "two")
        case "zip":
            with zipfile.ZipFile(path, "w") as packed:
                packed.writestr("metadata.csv", "file_name,caption\n0.png,one\n1.png,two\n")


@pytest.mark.parametrize("form", ["csv", "parquet", "arrow", "jsonl", "json", "tar", "zip"])
def test_a_wrong_column_fails_the_check_with_the_words_of_the_stage(form, tmp_path):
    path = tmp_path / f"rows.{form}"
    rows_of(form, path)

    def check(name, **keys):
        study = {"study": "s", "datasets": {"d": {"source": str(path), **keys}}, "saes": {"a": {"k": 4}}}
        study |= {"encoders": {"minilm": {}, "tiny-clip-text": {}}, "analyses": {"matrices": {"a": {}}}}
        (tmp_path / name).write_text(json.dumps(study))
        return CliRunner().invoke(app, ["check", "--study", str(tmp_path / name)])

    assert check("right.yaml").exit_code == 0
    for key in ("caption", "image", "image_url", "id"):
        ended = check("wrong.yaml", **{key: "Text"})
        assert ended.exit_code == 1
        with pytest.raises(DatasetError) as caught:
            read(path, **{key: "Text"})
        assert f"error: datasets.d: {caught.value}\n" == ended.stderr
        assert f"no column '{'Text_file_name' if (form, key) == ('zip', 'image') else 'Text'}'; the " in ended.stderr


def test_a_check_of_columns_reads_no_further_than_it_takes(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("image,caption\n0.png,one\n1.png,two,three\n")
    check_columns(DatasetSpec(source=str(path)))
    (tmp_path / "other.csv").write_text("image,text\n0.png,one\n")
    with pytest.raises(
        DatasetError, match=r"other\.csv: no column 'caption'; the columns are image, text: set caption"
    ):
        check_columns(DatasetSpec(source=str(tmp_path)))
    check_columns(DatasetSpec(source=str(tmp_path), caption="text", limit=1))
