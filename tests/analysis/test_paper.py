"""Comparison with the paper: catalog encoders map to the paper's names, and agreement equals SciPy's."""

import csv
from importlib.resources import files

import numpy as np
import pandas as pd
import pytest
import yaml
from scipy import stats

from conceptshare.analysis.formats import write_matrices
from conceptshare.analysis.paper import agreement, compare, modality, table_3
from conceptshare.config.catalog import CATALOG
from conceptshare.io.errors import StudyError

READINGS = {"all": "layer_mean", "last": "last"}


def read_paper(name):
    with files("conceptshare.analysis").joinpath("paper", name).open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


CELLS = read_paper("wmppc.csv")
SETTINGS = [("coco", "large"), ("coco", "base"), ("laion", "large"), ("flowers", "large")]


def printed(dataset, size):
    """The paper's values by reading, source and target, without the diagonal."""
    return {
        (READINGS[cell["layers"]], cell["source"], cell["target"]): float(cell["wmppc"])
        for cell in CELLS
        if (cell["dataset"], cell["size"]) == (dataset, size) and cell["source"] != cell["target"]
    }


def catalog(size):
    """The catalog's encoders of a size, with their modalities."""
    entries = yaml.safe_load((CATALOG / "encoders.yaml").read_text(encoding="utf-8"))
    return {name: entry["modality"] for name, entry in entries.items() if name.endswith(f"-{size}")}


def matrix(members):
    rows = [
        {"source": source, "target": target, "reading": reading}
        for source in members
        for target in members
        if source != target
        for reading in ("pooled", "layer_mean", "last")
    ]
    numbers = np.random.default_rng(0).uniform(0.1, 0.6, len(rows))
    return pd.DataFrame(rows).assign(wmppc=numbers, low=numbers - 0.01, high=numbers + 0.02, floor=0.05, left_out=0)


def keys(cells):
    return list(zip(cells.reading, cells.source, cells.target, strict=True))


@pytest.mark.parametrize(("dataset", "size"), SETTINGS)
@pytest.mark.parametrize("suffix", ["@0", ".reference@3"])
def test_compares_the_catalogs_encoders_in_every_cell_of_the_paper(dataset, size, suffix):
    expected = printed(dataset, size)
    table = matrix([f"{name}{suffix}" for name in catalog(size)])
    cells = compare(table, dataset, size)
    columns = ["reading", "source", "target", "ours", "low", "high", "paper", "difference", "left_out"]
    assert list(cells.columns) == columns
    assert len(cells) == len(expected)
    assert dict(zip(keys(cells), cells.paper, strict=True)) == expected
    ours = table.set_index(["reading", "source", "target"])
    for cell in cells.itertuples():
        own = ours.loc[cell.reading, f"{cell.source}-{size}{suffix}", f"{cell.target}-{size}{suffix}"]
        assert (cell.ours, cell.low, cell.high) == (own.wmppc, own.low, own.high)
        assert cell.difference == own.wmppc - cell.paper


@pytest.mark.parametrize("size", ["large", "base"])
def test_catalog_encoders_have_the_papers_names_and_modalities(size):
    names = {cell["source"] for cell in CELLS if cell["size"] == size}
    of_catalog = {name.removesuffix(f"-{size}"): reads for name, reads in catalog(size).items()}
    # No table of the paper includes the base MambaVision.
    assert set(of_catalog) - names == ({"mambavision"} if size == "base" else set())
    assert names <= set(of_catalog)
    assert {name: modality(name) for name in of_catalog} == of_catalog


def test_directions_match_the_papers():
    cells = compare(matrix(["clip-image-large@0", "bert-large@0"]), "coco", "large").set_index("reading")
    assert list(cells.loc["layer_mean"].source) == ["clip-image", "bert"]
    expected = printed("coco", "large")
    forth, back = (expected["layer_mean", *pair] for pair in (("clip-image", "bert"), ("bert", "clip-image")))
    assert forth != back
    assert list(cells.loc["layer_mean"].paper) == [forth, back]


def test_excludes_further_seeds_and_other_sizes():
    """The first in the table's order counts, even if its seed is larger."""
    members = ["bert-large@1", "bert-large@0", "vit-base@0", "vit-large@2", "bert-large.reference@0", "vit@0"]
    table = matrix(members)
    cells = compare(table, "coco", "large")
    assert set(keys(cells)) == {
        (reading, *pair) for reading in ("layer_mean", "last") for pair in (("bert", "vit"), ("vit", "bert"))
    }
    ours = table.set_index(["reading", "source", "target"]).wmppc
    assert cells.set_index(["reading", "source"]).ours["last", "bert"] == ours["last", "bert-large@1", "vit-large@2"]


def test_compares_encoders_named_as_in_the_paper():
    assert len(compare(matrix(["vit@0", "bert@0"]), "laion", "large")) == 4


@pytest.mark.parametrize("members", [["minilm@0", "dinov2-small@0"], ["vit-large@0", "minilm@0"], ["vit-large@0"] * 2])
def test_a_table_without_cells_of_the_paper_is_an_error_that_lists_its_names(members):
    table = matrix(["a@0", "b@0"]).replace({"a@0": members[0], "b@0": members[1]})
    with pytest.raises(StudyError, match=f"(?s){members[0]}.*siglip2-image.*deberta.*-large"):
        compare(table, "coco", "large")


@pytest.mark.parametrize(("dataset", "size"), [("openclipart", "large"), ("laion", "base"), ("coco", "small")])
def test_a_data_set_or_size_absent_from_the_paper_is_an_error_that_lists_those_present(dataset, size):
    table = matrix(["vit@0", "bert@0"])
    with pytest.raises(
        StudyError, match=f"no {size} encoders on {dataset}; it has large encoders on coco, base encoders"
    ):
        compare(table, dataset, size)


def as_ours(dataset, size):
    """The paper's cells in a study's format, including MambaVision's, plus a reading absent from the paper."""
    cells = pd.DataFrame(
        [
            (reading, f"{a}-{size}@0", f"{b}-{size}@0", value)
            for (reading, a, b), value in printed(dataset, size).items()
        ],
        columns=["reading", "source", "target", "wmppc"],
    )
    return pd.concat([cells, cells[cells.reading == "last"].assign(reading="pooled", wmppc=7.0)])


# The means of the printed cells equal Table 3 to the last digit, with two exceptions. In `coco, base` Table 10 lacks a
# cell. In `laion` the mean is 0.12256, computed from rounded cells.
OTHERWISE = {("coco", "base", "layer_mean", "text to image"): 0.176, ("laion", "large", "last", "text to image"): 0.123}


@pytest.mark.parametrize(("dataset", "size"), SETTINGS)
def test_table_3_follows_from_the_papers_cells_to_printed_precision(dataset, size):
    found = table_3(as_ours(dataset, size), dataset, size)
    assert list(found.index) == ["layer_mean", "layer_mean (paper)", "last", "last (paper)"]
    of_paper = [row for row in read_paper("modality_averages.csv") if (row["dataset"], row["size"]) == (dataset, size)]
    for row in of_paper:
        reading = READINGS[row["layers"]]
        for direction in ("image to image", "image to text", "text to image", "text to text"):
            value = float(row[direction.replace(" ", "_")])
            assert found.loc[f"{reading} (paper)", direction] == value
            expected = OTHERWISE.get((dataset, size, reading, direction), value)
            assert round(found.loc[reading, direction], 3) == expected, direction


def test_table_3_averages_only_ordered_pairs_of_the_papers_encoders():
    """Excludes MambaVision, an encoder absent from the paper, a second seed and a missing value."""
    table = matrix(
        ["clip-image-large@0", "bert-large@0", "mambavision-large@0", "vit-large@0", "bert-large@1", "own@0"]
    )
    missing = table.reading.eq("last") & table.source.eq("vit-large@0") & table.target.eq("clip-image-large@0")
    table.loc[missing, "wmppc"] = np.nan
    found = table_3(table, "coco", "large")
    value = table.set_index(["reading", "source", "target"]).wmppc
    clip, vit, bert = "clip-image-large@0", "vit-large@0", "bert-large@0"
    assert found.loc["last", "image to image"] == value["last", clip, vit]
    layers = "layer_mean"
    assert found.loc[layers, "image to image"] == pytest.approx(
        np.mean([value[layers, clip, vit], value[layers, vit, clip]])
    )
    assert found.loc[layers, "text to image"] == pytest.approx(
        np.mean([value[layers, bert, clip], value[layers, bert, vit]])
    )
    # With three encoders, the means are over other pairs than the paper's.
    assert found.loc[["layer_mean (paper)", "last (paper)"]].isna().all(axis=None)
    assert np.isnan(found.loc[layers, "text to text"])


def test_table_3_is_written_with_the_matrices(tmp_path):
    table = as_ours("coco", "large")
    averages = pd.DataFrame(columns=["reading", "source_modality", "target_modality", "wmppc"])
    write_matrices(table, averages, tmp_path / "all", table_3(table, "coco", "large"))
    lines = (tmp_path / "all" / "table-3.md").read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert rows[0] == ["reading", "image to image", "image to text", "text to image", "text to text"]
    assert rows[2][1:] == rows[3][1:] == ["0.463", "0.204", "0.168", "0.367"]
    latex = (tmp_path / "all" / "table-3.tex").read_text(encoding="utf-8")
    assert r"last (paper) & 0.265 & 0.213 & 0.173 & 0.249 \\" in latex
    with (tmp_path / "all" / "table-3.csv").open(encoding="utf-8") as file:
        assert [row["reading"] for row in csv.DictReader(file)] == [row[0] for row in rows[2:]]
    write_matrices(table, averages, tmp_path / "none")
    assert not list((tmp_path / "none").glob("table-3*"))


def test_agreement_equals_scipys_for_each_reading():
    cells = compare(matrix([f"{name}@0" for name in catalog("large")]), "coco", "large")
    cells["ours"] = cells.ours.round(2)  # ties
    cells["difference"] = cells.ours - cells.paper
    found = agreement(cells)
    assert list(found.columns) == ["reading", "cells", "spearman", "pearson", "mean_absolute_difference"]
    assert list(found.reading) == ["layer_mean", "last"]
    for row in found.itertuples():
        of = cells[cells.reading == row.reading]
        assert row.cells == len(of)
        assert row.spearman == pytest.approx(stats.spearmanr(of.ours, of.paper).statistic)
        assert row.pearson == pytest.approx(stats.pearsonr(of.ours, of.paper).statistic)
        assert row.mean_absolute_difference == pytest.approx(sum(abs(of.ours - of.paper)) / len(of))
        assert row.spearman != pytest.approx(row.pearson, abs=1e-3)


def test_agreement_ignores_cells_missing_from_our_results():
    cells = compare(matrix([f"{name}@0" for name in catalog("base")]), "coco", "base")
    missing = cells.assign(ours=cells.ours.where(cells.index >= 20))
    pd.testing.assert_frame_equal(agreement(missing), agreement(cells[20:]))


def test_agreement_of_no_cells_is_nan():
    cells = compare(matrix(["vit@0", "bert@0"]), "coco", "large").assign(ours=np.nan, difference=np.nan)
    found = agreement(cells)
    assert list(found.cells) == [0, 0]
    assert found[["spearman", "pearson", "mean_absolute_difference"]].isna().all(axis=None)
