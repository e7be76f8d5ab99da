"""Every line of the table of products has the command, caption and function it needs."""

import typer.main
from typer.testing import CliRunner

from conceptshare.cli import app
from conceptshare.config.products import FIGURES, TABLES, taken_by
from tests.workflow.conftest import CLONE


def test_every_table_and_figure_has_a_command_a_caption_and_a_unique_name():
    commands = typer.main.get_command(app).commands
    assert {table.name for table in TABLES} <= commands["metrics"].commands.keys()
    assert {figure.command or figure.name for figure in FIGURES} == commands["figures"].commands.keys()
    captions = CLONE / "workflow" / "report"
    assert all((captions / f"{table.name}_table.rst").is_file() for table in TABLES)
    assert all((captions / f"{figure.name}.rst").is_file() for figure in FIGURES)
    assert len({one.file for one in TABLES}) == len(TABLES)
    assert len({one.file for one in FIGURES}) == len(FIGURES)


def test_the_input_tables_of_products_exist():
    names = {table.name for table in TABLES}
    assert {figure.table for figure in FIGURES} <= names
    assert {table.table for table in TABLES if table.table} <= names


def test_figure_functions_exist():
    for figure in FIGURES:
        module = __import__(f"conceptshare.figures._{figure.command or figure.name}", fromlist=["_"])
        assert hasattr(module, f"draw_{figure.command or figure.name}")


def test_file_names_of_analyses_are_reserved():
    assert taken_by("matrices", "all") == {
        f"all.{part}"
        for part in (
            "averages",
            "intervals",
            "similarity",
            "strength",
            "seeds",
            "retrieval",
            "paper",
            "paper-agreement",
        )
    }
    assert taken_by("sharedness", "seen") == {"seen.top", "seen.scatter", "seen.topics"}
    assert taken_by("layerwise", "seeds") == set()


def test_the_help_of_a_figure_describes_it():
    shown = CliRunner().invoke(app, ["figures", "intervals", "--help"]).stdout
    assert "interval, null and ceiling" in " ".join(shown.split())
