"""Matrices as CSV, Markdown and LaTeX, parsed back independently, with names that look like markup in each format."""

import csv
import re

import numpy as np
import pandas as pd
import pytest

from conceptshare.analysis.formats import short_labels, write_matrices

READINGS = ("pooled", "layer_mean", "last")
MEMBERS = ("clip_image@0", "dino.v2@0", "dino.v2@1", "bert-base@0")
MARKUP = (r"a&b%c@0", r"d_e#f$g@0", r"h{i}j~k^l@0", r"m\n@0", r"o|p@0")


def matrix(members, rng):
    rows = [
        {"source": source, "target": target, "reading": reading, "wmppc": rng.uniform(0, 1)}
        for source in members
        for target in reversed(members)  # the columns still follow the order of the sources
        if source != target
        for reading in reversed(READINGS)
    ]
    return pd.DataFrame(rows)


def averages(rng, modalities=("text", "image")):
    rows = [
        {"reading": reading, "source_modality": a, "target_modality": b, "wmppc": rng.uniform(0, 1)}
        for reading in READINGS
        for a in modalities
        for b in modalities
    ]
    return pd.DataFrame(rows)


def from_csv(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.reader(file))


def from_markdown(path):
    """The cells of a Markdown table, split at unescaped pipes."""
    lines = path.read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    assert all(re.fullmatch(":?-+:?", cell) for cell in rows[1])
    return [[cell.replace(r"\|", "|") for cell in row] for row in [rows[0], *rows[2:]]]


LATEX = {
    r"\textbackslash ": "\\",
    r"\textasciitilde ": "~",
    r"\textasciicircum ": "^",
    **{f"\\{letter}": letter for letter in "&%$#_{}"},
}


def from_latex(path):
    """The cells of a LaTeX table, after checking that its environments, rules and braces are balanced."""
    text = path.read_text(encoding="utf-8")
    begin, *body, end = text.splitlines()
    columns = re.fullmatch(r"\\begin\{tabular\}\{(lr+)\}", begin).group(1)
    assert end == r"\end{tabular}"
    assert [line for line in body if line.endswith("rule")] == [r"\toprule", r"\midrule", r"\bottomrule"]
    assert (body[0], body[2], body[-1]) == (r"\toprule", r"\midrule", r"\bottomrule")
    rows = []
    for line in (line for line in body if not line.endswith("rule")):
        assert line.endswith(r" \\")
        cells = [cell.strip() for cell in re.split(r"(?<!\\)&", line.removesuffix(r"\\"))]
        assert len(cells) == len(columns)
        plain = re.compile("|".join(re.escape(code) for code in LATEX))
        for cell in cells:
            assert not re.search(r"[&%$#_{}~^\\]", plain.sub("", cell)), cell  # no unescaped LaTeX
        rows.append([plain.sub(lambda found: LATEX[found.group()], cell) for cell in cells])
    return rows


def values(table, members, reading):
    of = table[table.reading == reading].set_index(["source", "target"]).wmppc
    return [[None if a == b else of[a, b] for b in members] for a in members]


def test_writes_each_reading_as_a_matrix_in_each_format(tmp_path, rng):
    table = matrix(MEMBERS, rng)
    write_matrices(table, averages(rng), tmp_path / "all")
    names = [*READINGS, "averages"]
    expected = {f"{name}.{kind}" for name in names for kind in ("csv", "md", "tex")}
    assert {path.name for path in (tmp_path / "all").iterdir()} == expected
    labels = ["clip_image", "dino.v2@0", "dino.v2@1", "bert-base"]
    for reading in READINGS:
        cells = values(table, MEMBERS, reading)
        path = tmp_path / "all" / reading
        exact = [
            [label, *("" if v is None else f"{v:.6g}" for v in row)] for label, row in zip(labels, cells, strict=True)
        ]
        printed = [
            [label, *("-" if v is None else f"{v:.3f}" for v in row)] for label, row in zip(labels, cells, strict=True)
        ]
        assert from_csv(path.with_suffix(".csv")) == [["source", *labels], *exact]
        assert from_markdown(path.with_suffix(".md")) == [["source", *labels], *printed]
        assert from_latex(path.with_suffix(".tex")) == [["", *labels], *printed]


def test_names_that_look_like_markup_are_escaped(tmp_path, rng):
    write_matrices(matrix(MARKUP, rng), averages(rng), tmp_path / "all")
    labels = [name.removesuffix("@0") for name in MARKUP]
    for read, kind in ((from_csv, "csv"), (from_markdown, "md"), (from_latex, "tex")):
        rows = read(tmp_path / "all" / f"last.{kind}")
        assert rows[0][1:] == labels
        assert [row[0] for row in rows[1:]] == labels


def test_numbers_have_three_decimals(tmp_path, rng):
    table = matrix(MEMBERS[:2], rng).assign(wmppc=0.1)
    write_matrices(table, averages(rng).assign(wmppc=0.2004), tmp_path / "all")
    for read, kind in ((from_markdown, "md"), (from_latex, "tex")):
        assert [row[1:] for row in read(tmp_path / "all" / f"pooled.{kind}")[1:]] == [["-", "0.100"], ["0.100", "-"]]
        assert {cell for row in read(tmp_path / "all" / f"averages.{kind}")[1:] for cell in row[1:]} == {"0.200"}


def test_missing_values_differ_from_the_diagonal(tmp_path, rng):
    table = matrix(MEMBERS[:2], rng)
    table.loc[(table.source == MEMBERS[0]) & (table.reading == "last"), "wmppc"] = np.nan
    write_matrices(table, averages(rng), tmp_path / "all")
    assert from_csv(tmp_path / "all" / "last.csv")[1] == ["clip_image", "", "nan"]
    assert from_markdown(tmp_path / "all" / "last.md")[1] == ["clip_image", "-", "nan"]
    assert from_latex(tmp_path / "all" / "last.tex")[1] == ["clip_image", "-", "nan"]
    assert pd.read_csv(tmp_path / "all" / "last.csv", index_col=0).iloc[0].isna().all()


def test_averages_have_the_shape_of_table_3(tmp_path, rng):
    tidy = averages(rng)
    write_matrices(matrix(MEMBERS, rng), tidy, tmp_path / "all")
    directions = [("image", "image"), ("image", "text"), ("text", "image"), ("text", "text")]
    of = tidy.set_index(["reading", "source_modality", "target_modality"]).wmppc
    rows = from_csv(tmp_path / "all" / "averages.csv")
    assert rows[0] == ["reading", *(f"{a} to {b}" for a, b in directions)]
    assert rows[1:] == [[reading, *(f"{of[reading, a, b]:.6g}" for a, b in directions)] for reading in READINGS]


def test_averages_over_one_modality_have_one_column(tmp_path, rng):
    write_matrices(matrix(MEMBERS, rng), averages(rng, ("text",)), tmp_path / "all")
    for read, kind in ((from_csv, "csv"), (from_markdown, "md"), (from_latex, "tex")):
        rows = read(tmp_path / "all" / f"averages.{kind}")
        assert rows[0][1:] == ["text to text"]
        assert [row[0] for row in rows[1:]] == list(READINGS)


def test_averages_over_one_encoder_have_no_columns(tmp_path, rng):
    write_matrices(matrix(MEMBERS[1:3], rng), averages(rng)[:0], tmp_path / "all")
    assert from_csv(tmp_path / "all" / "averages.csv") == [["reading"], *([reading] for reading in READINGS)]
    assert from_markdown(tmp_path / "all" / "averages.md") == [["reading"], *([reading] for reading in READINGS)]


def test_replaces_all_files_of_an_earlier_run(tmp_path, rng):
    (tmp_path / "all").mkdir()
    (tmp_path / "all" / "table-3.csv").write_text("stale")
    table = matrix(MEMBERS, rng)
    with pytest.raises(AttributeError):
        write_matrices(table, averages(rng).drop(columns="source_modality"), tmp_path / "all")
    assert [path.name for path in tmp_path.rglob("*.csv")] == ["table-3.csv"]
    write_matrices(table, averages(rng), tmp_path / "all")
    assert not (tmp_path / "all" / "table-3.csv").exists()


def test_labels_omit_redundant_seeds():
    assert short_labels(["vit@0", "bert@3"]) == ["vit", "bert"]
    assert short_labels(["vit@0", "vit@1", "bert@3"]) == ["vit@0", "vit@1", "bert"]
