"""Only complete stores can be opened."""

import json
import os
import re

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

import conceptshare.io.store as store_module
from conceptshare.io.errors import NumericsError, StoreError
from conceptshare.io.layout import layer_name
from conceptshare.io.store import (
    RowWriter,
    StoredArray,
    as_float16,
    layer_array,
    new_array,
    new_store,
    open_store,
    save_array,
)

FLIPS = 40
"""Bytes changed in each file, one at a time."""


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def store(tmp_path):
    """A small complete store with one sharded array of several chunks, one plain one, and one of zeros."""
    path = tmp_path / "some.zarr"
    with new_store(path, "numbers", {"of": "nothing", "layers": [0]}) as group:
        rows = np.arange(24).reshape(6, 4)
        new_array(group, "sharded", (6, 4), np.float16, chunks=(1, 4), shards=(2, 4), compress=False)[...] = rows
        save_array(group.create_group(layer_name(0)), "plain", np.arange(5.0))
        new_array(group, "zeros", (7, 3), np.int32, chunks=(2, 2))[...] = 0
    return path


def chunks(path):
    return sorted(p for p in path.rglob("*") if p.is_file() and p.name not in {"zarr.json", "provenance.json"})


def test_a_store_survives_a_round_trip(store):
    group = open_store(store, "numbers")
    assert group.attrs["spec"] == {"of": "nothing", "layers": [0]}
    assert group.attrs["complete"] is True
    assert (group["sharded"][:] == np.arange(24).reshape(6, 4)).all()
    assert group["sharded"].dtype == np.float16
    assert (group["layer-00/plain"][:] == np.arange(5)).all()
    assert zarr.open_group(store, mode="r").metadata.zarr_format == 3


def test_chunks_of_zeros_are_written_to_disk(store):
    assert len(chunks(store / "zeros")) == 4 * 2
    assert len(chunks(store / "sharded")) == 3


def test_a_store_is_incomplete_while_written_and_absent_after_a_failure(tmp_path):
    path = tmp_path / "some.zarr"

    def fail():
        with new_store(path, "numbers", {}) as group:
            save_array(group, "x", np.ones(3))
            partial = tmp_path / "some.zarr.partial"
            assert json.loads((partial / "zarr.json").read_text())["attributes"]["complete"] is False
            raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011 - raised just above
        fail()
    assert names_in(tmp_path) == []


def test_refuses_a_missing_store(tmp_path):
    with pytest.raises(StoreError, match=r"absent\.zarr: no numbers store"):
        open_store(tmp_path / "absent.zarr", "numbers")


def test_refuses_a_store_of_another_kind(store):
    with pytest.raises(StoreError, match="'numbers', but one of 'features' is needed"):
        open_store(store, "features")


@pytest.mark.parametrize(
    ("key", "value", "message"), [("version", 999, "version 999"), ("complete", False, "incomplete")]
)
def test_refuses_an_unfinished_store_or_one_of_another_version(store, key, value, message):
    zarr.open_group(store, mode="r+").attrs[key] = value
    with pytest.raises(StoreError, match=message):
        open_store(store, "numbers")


def test_refuses_a_foreign_zarr_group(tmp_path):
    zarr.open_group(tmp_path / "other.zarr", mode="w", zarr_format=3)
    with pytest.raises(StoreError, match="a store of None"):
        open_store(tmp_path / "other.zarr", "numbers")


def test_detects_any_missing_chunk(store):
    assert len(chunks(store)) == 8 + 3 + 1
    for chunk in chunks(store):
        kept = chunk.read_bytes()
        chunk.unlink()
        with pytest.raises(StoreError, match="is missing"):
            open_store(store, "numbers")
        chunk.write_bytes(kept)
    open_store(store, "numbers")


def test_detects_any_truncated_chunk(store):
    for chunk in chunks(store):
        kept = chunk.read_bytes()
        chunk.write_bytes(kept[:-1])
        with pytest.raises(StoreError, match=rf"{len(kept) - 1} bytes, not {len(kept)}"):
            open_store(store, "numbers")
        chunk.write_bytes(kept)
    open_store(store, "numbers")


def everything(path):
    """The full content of a store, as a reader gets it."""
    group = open_store(path, "numbers")
    names = sorted(name for name, member in group.members(max_depth=None) if hasattr(member, "shape"))
    return [group.attrs["spec"], names, *(StoredArray(group, name, path)[:].tolist() for name in names)]


def outcome(path):
    """The full content, or the message of the error."""
    try:
        return everything(path)
    except StoreError as error:
        return str(error)


def test_detects_any_flipped_bit_that_matters(store, rng):
    whole = everything(store)
    for path in sorted(store.rglob("*")):
        if not path.is_file() or path.name == "provenance.json":
            continue
        kept = path.read_bytes()
        for place in rng.choice(len(kept), min(len(kept), FLIPS), replace=False):
            damaged = bytearray(kept)
            damaged[place] ^= 1 << rng.integers(8)
            path.write_bytes(damaged)
            found = outcome(store)
            assert found == whole or re.fullmatch(rf"{store}.*: .*delete.* and run the numbers stage again", found)
        path.write_bytes(kept)
    assert everything(store) == whole


def test_detects_swapped_files(store):
    """Two chunks of one array, the metadata of two arrays, and a chunk moved to another's place."""
    for one, other in [("sharded/c/0/0", "sharded/c/1/0"), ("sharded/zarr.json", "zeros/zarr.json")]:
        exchange(store / one, store / other)
        with pytest.raises(StoreError, match=rf"some\.zarr: {one}.*run the numbers stage again"):
            open_store(store, "numbers")
        exchange(store / one, store / other)
    open_store(store, "numbers")


def exchange(one, other):
    temporary = one.with_name("temporary")
    one.rename(temporary)
    other.rename(one)
    temporary.rename(other)


def test_detects_swapped_stores(store, tmp_path):
    with new_store(tmp_path / "another.zarr", "numbers", {"of": "something else"}) as group:
        save_array(group, "plain", np.arange(3.0))
    exchange(store, tmp_path / "another.zarr")
    with pytest.raises(StoreError, match=r"some\.zarr: holds the store 'another'; rename it back"):
        open_store(store, "numbers")


def test_reading_a_layer_opens_no_files_of_others(store):
    (store / "layer-00" / "plain" / "c" / "0").unlink()
    open_store(store, "numbers", layer=1)
    with pytest.raises(StoreError, match="is missing"):
        open_store(store, "numbers", layer=0)


def test_detects_missing_array_metadata(store):
    (store / "zeros" / "zarr.json").unlink()
    with pytest.raises(StoreError, match=r"zeros/zarr\.json is missing"):
        open_store(store, "numbers")


@pytest.mark.parametrize("content", ["", "{", "{}"])
def test_refuses_damaged_root_metadata(store, content):
    (store / "zarr.json").write_text(content)
    with pytest.raises(StoreError, match=r"some\.zarr"):
        open_store(store, "numbers")


def test_ignores_files_of_snakemake_and_nfs_in_a_store(tmp_path):
    store = tmp_path / "some.zarr"
    with new_store(store, "numbers", {}) as group:
        new_array(group, "sharded", (6, 4), np.float16)[...] = 0
        silly = tmp_path / "some.zarr.partial" / "sharded" / ".nfs0001"  # NFS: a deleted file that is still open
        silly.touch()
    silly = store / "sharded" / ".nfs0001"
    silly.unlink()
    (store / ".snakemake_timestamp").touch()
    assert len(open_store(store, "numbers")["sharded"][:]) == 6


def test_a_store_can_be_moved(store, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    os.rename(store, tmp_path / "elsewhere" / "some.zarr")  # noqa: PTH104 - what people do
    assert len(open_store(tmp_path / "elsewhere" / "some.zarr", "numbers")["sharded"][:]) == 6


def test_names_a_missing_layer_and_lists_the_existing_ones(store):
    group = open_store(store, "numbers")
    assert (layer_array(group, 0, "plain", store)[:] == np.arange(5)).all()
    with pytest.raises(StoreError, match="no layer 3; it has layer-00"):
        layer_array(group, 3, "plain", store)


def test_a_missing_layer_or_damaged_root_gives_no_warnings(store, recwarn):
    with pytest.raises(StoreError, match=r"no layer 3; it has layer-00$"):
        layer_array(open_store(store, "numbers"), 3, "plain", store)
    (store / ".zgroup").write_text('{"zarr_format": 2}')
    (store / "zarr.json").write_text("{")
    with pytest.raises(StoreError, match=r"some\.zarr"):
        open_store(store, "numbers")
    assert [str(warning.message) for warning in recwarn] == []


def test_layer_names_sort_numerically():
    assert layer_name(3) == "layer-03"
    assert sorted(layer_name(n) for n in range(100)) == [layer_name(n) for n in range(100)]


# Wide rows: a chunk has 8 of them, a shard 16.
WIDTH = 2**14


@settings(max_examples=15)
@given(st.lists(st.integers(0, 20), max_size=6))
def test_rows_keep_their_order_however_they_are_appended(tmp_path_factory, lengths):
    path = tmp_path_factory.mktemp("rows") / "rows.zarr"
    parts, start = [], 0
    for length in lengths:
        numbers = np.arange(start, start + length, dtype=np.float16)[:, None]
        parts.append(numbers + np.arange(WIDTH, dtype=np.float16)[None] / 2)
        start += length
    with new_store(path, "numbers", {}) as group:
        writer = RowWriter(group, "x", WIDTH, np.float16, shard_bytes=2**19)
        for part in parts:
            writer.append(part)
        writer.flush()
    found = open_store(path, "numbers")["x"]
    assert found.shards == (16, WIDTH)
    assert found.dtype == np.float16
    np.testing.assert_array_equal(found[:], np.concatenate([np.empty((0, WIDTH), np.float16), *parts]))


def test_rows_of_zeros_are_stored_on_disk(tmp_path):
    with new_store(tmp_path / "rows.zarr", "numbers", {}) as group:
        writer = RowWriter(group, "x", WIDTH, np.float16, shard_bytes=2**19)
        writer.append(np.zeros((40, WIDTH), np.float16))
        writer.flush()
    assert len(chunks(tmp_path / "rows.zarr")) == 3


def test_float16_accepts_values_in_range():
    values = np.array([[0.1, -65504.0], [65519.0, 1e-9]], np.float32)  # 65519 is rounded to the largest, 65504
    halves = as_float16(values, "vit, layer 3", np.array([0, 1]))
    assert halves.dtype == np.float16
    assert halves.tolist() == [[float(np.float16(0.1)), -65504], [65504, 0]]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (70000, "7e+04 is beyond float16's 65504"),
        (-65520, "6.55e+04 is beyond"),
        (np.inf, "not finite"),
        (-np.inf, "not finite"),
        (np.nan, "not finite"),
    ],
)
@pytest.mark.parametrize("shape", [(4, 3), (4, 2, 3)])
def test_float16_overflow_names_layer_and_sample(value, words, shape):
    values = np.ones(shape, np.float32)
    values[2, ..., 1] = value
    with pytest.raises(NumericsError) as caught:
        as_float16(values, "vit, layer 3", np.array([10, 10, 11, 12]))
    assert "vit, layer 3, sample 11: " in str(caught.value)
    assert words in str(caught.value)


def test_does_not_resume_a_store_of_another_version(tmp_path, monkeypatch):
    path = tmp_path / "resumed.zarr"

    def begin(version):
        monkeypatch.setattr(store_module, "version", lambda _: version)
        found = []

        def write(cut_off):
            with new_store(path, "numbers", {}, resume=True) as group:
                found.extend(group.array_keys())
                save_array(group, "numbers", np.arange(3)) if not found else None
                if cut_off:
                    raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            write(cut_off=True)
        return found, write

    assert begin("1.0")[0] == []
    assert begin("1.0")[0] == ["numbers"]
    found, write = begin("1.1")
    assert found == []
    write(cut_off=False)
    assert "1.1" not in (path / "zarr.json").read_text()
