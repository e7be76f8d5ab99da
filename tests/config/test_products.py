"""Tables and figures by their lines: what has to be there for each."""

import typer.main
from typer.testing import CliRunner

from conceptshare.cli import app
from conceptshare.config.products import FIGURES, TABLES, taken_by
from tests.workflow.conftest import CLONE


def test_every_table_and_figure_has_a_command_a_caption_and_a_name_of_its_own():
    commands = typer.main.get_command(app).commands
    assert {table.name for table in TABLES} <= commands["metrics"].commands.keys()
    assert {figure.command or figure.name for figure in FIGURES} == commands["figures"].commands.keys()
    captions = CLONE / "workflow" / "report"
    assert all((captions / f"{table.name}_table.rst").is_file() for table in TABLES)
    assert all((captions / f"{figure.name}.rst").is_file() for figure in FIGURES)
    assert len({one.file for one in TABLES}) == len(TABLES)
    assert len({one.file for one in FIGURES}) == len(FIGURES)


def test_the_tables_that_products_are_made_from_are_there():
    names = {table.name for table in TABLES}
    assert {figure.table for figure in FIGURES} <= names
    assert {table.table for table in TABLES if table.table} <= names


def test_functions_of_figures_are_found():
    for figure in FIGURES:
        module, _, function = figure.function.partition(":")
        assert hasattr(__import__(f"conceptshare.figures.{module}", fromlist=["_"]), function)


def test_an_analysis_takes_the_names_of_its_files():
    assert taken_by("matrices", "all") == {
        f"all.{part}" for part in ("averages", "intervals", "similarity", "strength", "paper", "paper-agreement")
    }
    assert taken_by("sharedness", "seen") == {"seen.top", "seen.scatter"}
    assert taken_by("layerwise", "seeds") == set()


def test_help_of_a_figure_names_what_it_shows():
    shown = CliRunner().invoke(app, ["figures", "intervals", "--help"]).stdout
    assert "interval, floor and ceiling" in " ".join(shown.split())
