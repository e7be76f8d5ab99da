"""The tables and figures of a study: a line each.

From a line follow its command, its rule, its files, its place in the report, and the names that no other analysis may
have. The report's caption is `workflow/report/NAME.rst` for a figure, and `NAME_table.rst` for a table.
"""

from importlib import import_module
from typing import Any, Literal, NamedTuple

When = Literal["always", "encoders", "modalities", "seeds", "paper", "overlapping"]
"""When it is made: always, for a matrix of different encoders, for one of both modalities, for one with an encoder of
several seeds, for one that is compared with the paper, or for a study with two rankings of one source."""


class Table(NamedTuple):
    """A table, which `conceptshare metrics NAME` writes as CSV and Parquet."""

    name: str
    file: str
    """Its file without an ending, in the folder of a data set and an SAE setting; ``{name}`` is an analysis."""
    shows: str
    """Its label in the report."""
    inputs: tuple[str, ...]
    """What it is made from, by names that `workflow/rules/products.smk` maps to files and options."""
    table: str = ""
    """The table that it is made from, if any."""
    when: When = "always"
    code: tuple[str, ...] = ()
    """Its modules, if that is not `analysis/tables.py` alone."""
    marks: bool = False
    """Whether it marks unexplained layers, which depend on ``max_fvu_global``."""
    gpu: bool = False
    """Whether it computes on a GPU if there is one, in a job like those of stages."""
    memory_mb: int = 2000


class Figure(NamedTuple):
    """A figure, which `conceptshare figures COMMAND` draws from a table, as PNG and PDF."""

    name: str
    table: str
    """The table that it is drawn from."""
    file: str
    """As for `Table`."""
    shows: str
    """Its label in the report."""
    help: str = ""
    """What its command says of it, for a figure that is drawn from its table only; others have commands of their own.
    """
    inputs: tuple[str, ...] = ()
    """As for `Table`."""
    when: When = "always"
    command: str = ""
    """Its command, if that is another figure's with options of its own."""
    memory_mb: int = 2000

    def draw(self, *arguments: Any) -> None:
        """Draw it by ``draw_NAME`` in `figures/_NAME.py`, which imports Matplotlib."""
        getattr(import_module(f"conceptshare.figures._{self.name}"), f"draw_{self.name}")(*arguments)


_STORES = ("study", "features", "correlations")

TABLES = (
    Table("matrix", "matrices/{name}", "wMPPC", (*_STORES, "similarity"), marks=True),
    Table("averages", "matrices/{name}.averages", "averages by modality", ("correlations",), "matrix"),
    Table(
        "seeds",
        "matrices/{name}.seeds",
        "wMPPC by seeds",
        _STORES,
        when="seeds",
        code=("analysis/seeds.py",),
        marks=True,
    ),
    Table(
        "retrieval",
        "matrices/{name}.retrieval",
        "retrieval by matched features",
        ("study", "features"),
        when="modalities",
        code=("analysis/retrieval.py", "correlations/*.py", "io/sizes.py"),
        gpu=True,
        memory_mb=8000,
        marks=True,
    ),
    Table("paper", "matrices/{name}.paper", "compared with the paper", ("published",), "matrix", "paper"),
    Table("agreement", "matrices/{name}.paper-agreement", "agreement with the paper", (), "paper", "paper"),
    Table("layerwise", "layerwise/{name}", "all cells", (*_STORES, "similarity"), marks=True),
    Table("sharedness", "sharedness/{name}", "ranking", _STORES, marks=True),
    Table(
        "topics",
        "sharedness/{name}.topics",
        "frequent words",
        ("source", "data"),
        "sharedness",
        code=("concepts/topics.py", "concepts/names.py"),
    ),
    Table(
        "samples",
        "samples/{name}",
        "fit of samples",
        ("study", "features", "data"),
        code=("analysis/samples.py", "analysis/retrieval.py", "correlations/*.py", "io/sizes.py"),
        gpu=True,
        memory_mb=8000,
        marks=True,
    ),
    Table("overlaps", "overlaps", "overlaps of rankings", ("rankings",), when="overlapping"),
    Table("saes", "saes", "quality", ("study", "features", "seeds", "saes"), code=("analysis/seeds.py",), marks=True),
)

FIGURES = (
    Figure("matrix", "matrix", "matrices/{name}", "wMPPC", inputs=("codes",)),
    Figure(
        "averages",
        "averages",
        "matrices/{name}.averages",
        "averages by modality",
        "Mean wMPPC from each modality to each.",
        when="encoders",
    ),
    Figure(
        "intervals",
        "matrix",
        "matrices/{name}.intervals",
        "intervals",
        "Each cell of a wMPPC matrix with its interval, null and ceiling.",
    ),
    Figure(
        "similarity",
        "matrix",
        "matrices/{name}.similarity",
        "similarity",
        "CKA and mutual nearest neighbours next to wMPPC.",
        when="encoders",
    ),
    Figure("strength", "matrix", "matrices/{name}.strength", "strength of features", inputs=("pairs",), memory_mb=4000),
    Figure(
        "paper",
        "paper",
        "matrices/{name}.paper",
        "compared with the paper",
        "This study's wMPPC against the paper's.",
        when="paper",
    ),
    Figure("layerwise", "layerwise", "layerwise/{name}", "heatmaps", inputs=("study",)),
    Figure(
        "sharedness", "sharedness", "sharedness/{name}", "top features", inputs=("source", "names", "data", "shown")
    ),
    # The first feature of a ranking, as the paper's Figure 4 shows one.
    Figure(
        "top_samples",
        "sharedness",
        "sharedness/{name}.top",
        "first feature",
        inputs=("source", "names", "data", "first"),
        command="sharedness",
    ),
    Figure(
        "scatter",
        "sharedness",
        "sharedness/{name}.scatter",
        "all features",
        "Every feature of a ranking by how much either group shares it.",
    ),
    Figure("samples", "samples", "samples/{name}", "worst and best fit", inputs=("data",)),
    Figure("saes", "saes", "saes", "training and quality", inputs=("saes",)),
)


def table(name: str) -> Table:
    """The table of a name."""
    return next(one for one in TABLES if one.name == name)


def taken_by(folder: str, name: str) -> set[str]:
    """The names that the files of an analysis take, and that no other analysis in its folder can have."""
    files = {one.file for one in (*TABLES, *FIGURES) if one.file.startswith(f"{folder}/{{name}}.")}
    return {file.removeprefix(f"{folder}/").format(name=name) for file in files}
