"""Commands that draw a study's figures from its tables: `conceptshare figures`."""

from pathlib import Path
from typing import Annotated

import typer

from conceptshare.cli.options import DataFolder, FigureOut, StudyFile, out_option
from conceptshare.config.products import FIGURES, Figure
from conceptshare.config.study import load_study
from conceptshare.io.files import PDF, PNG, SAE_FIGURES

app = typer.Typer(help="Figures of a study, from its tables.", no_args_is_help=True)

Table = Annotated[Path, typer.Option(help="The table to draw, as Parquet.")]


def _add_command(figure: Figure) -> None:
    """Add the command of a figure that is drawn from a table only."""

    @app.command(figure.name, help=figure.help)
    def draw(table: Table, out: FigureOut) -> None:
        from conceptshare.analysis.tables import read_table

        figure.draw(read_table(table, figure.table), out)


for _figure in FIGURES:
    if not _figure.inputs:
        _add_command(_figure)


@app.command("matrix")
def matrix(
    table: Annotated[list[Path], typer.Option(help="The table to draw, as Parquet; or one per code of the features.")],
    out: FigureOut,
) -> None:
    """Annotated wMPPC matrices."""
    import pandas as pd

    from conceptshare.analysis.tables import read_table
    from conceptshare.figures import draw_matrix

    tables = [read_table(path, "matrix") for path in table]
    shown = pd.concat(tables, ignore_index=True)
    shown.attrs = tables[0].attrs
    draw_matrix(shown, out)


@app.command("strength")
def strength(
    table: Annotated[Path, typer.Option(help="The matrix, as Parquet, for the order of its cells.")],
    pairs: Annotated[Path, typer.Option(help="The folder of pair tables.")],
    out: FigureOut,
) -> None:
    """Strengths of each member's features, and their relation to the best correlations."""
    from conceptshare.analysis.tables import read_direction, read_table
    from conceptshare.figures import draw_strength

    matrix = read_table(table, "matrix")
    cells = matrix[["source", "target"]].drop_duplicates().itertuples(index=False, name=None)
    directions = [(source, target, read_direction(pairs, source, target)) for source, target in cells]
    draw_strength(directions, out, matrix.attrs.get("max_fvu_global"))


@app.command("layerwise")
def layerwise(
    analysis: Annotated[str, typer.Argument(help="Name of the analysis in the study.", show_default=False)],
    table: Table,
    study: StudyFile,
    out: FigureOut,
) -> None:
    """Layerwise heatmaps."""
    from conceptshare.analysis.tables import read_table
    from conceptshare.figures import draw_layerwise

    draw_layerwise(read_table(table, "layerwise"), load_study(study).layerwise_names(analysis), out)


@app.command("sharedness")
def sharedness(
    table: Table,
    features: Annotated[Path, typer.Option(help="The source's feature store.")],
    data: DataFolder,
    out: FigureOut,
    features_shown: Annotated[int, typer.Option(help="Number of top features to show.", min=1)] = 6,
    samples: Annotated[int, typer.Option(help="Maximum number of samples per feature.", min=1)] = 9,
    feature: Annotated[
        list[int] | None,
        typer.Option(help="A feature to show instead of the top ones (repeatable).", min=0, show_default=False),
    ] = None,
    also_top_of: Annotated[
        Path | None,
        typer.Option(help="Another ranking; show the features in the top 1% of both.", show_default=False),
    ] = None,
    names: Annotated[Path | None, typer.Option(help="The source's table of names.", show_default=False)] = None,
) -> None:
    """Grids of the top samples of a ranking's top features, or of chosen features."""
    from conceptshare.analysis.tables import check_made_from, check_ranking, named_features, read_table
    from conceptshare.data.dataset import Data
    from conceptshare.figures import draw_sharedness
    from conceptshare.io.readers import FEATURES, check_samples, read_spec, read_statistics

    modality, statistics = read_spec(features, FEATURES)["encoder"]["modality"], read_statistics(features)
    shown = Data(data)
    check_samples(features, data, shown.content_hash)
    ranking = read_table(table, "sharedness")
    check_ranking(table, ranking, features)
    other = None
    if also_top_of is not None:
        other = read_table(also_top_of, "sharedness")
        check_ranking(also_top_of, other, features)
    ranking = named_features(ranking, feature or [], other)
    if feature or also_top_of:
        features_shown = len(ranking)
    called = None
    if names is not None:
        called = read_table(names, "names")
        check_made_from(names, called, features, "names")
    draw_sharedness(ranking, statistics, shown, features_shown, out, samples, modality, called)


@app.command("samples")
def samples(table: Table, data: DataFolder, out: FigureOut) -> None:
    """The samples whose image and caption fit worst and best."""
    from conceptshare.analysis.tables import check_fit, read_table
    from conceptshare.data.dataset import Data
    from conceptshare.figures import draw_samples

    fit, shown = read_table(table, "samples"), Data(data)
    check_fit(fit, shown.ids())
    draw_samples(fit, shown, out)


@app.command("saes")
def saes(
    table: Table,
    saes: Annotated[Path, typer.Option(help="The folder of SAEs.")],
    out: Annotated[Path, out_option(PNG, PDF, SAE_FIGURES)],
) -> None:
    """Loss curves, densities, FVU and dead latents of every SAE: an overview, and one figure per member."""
    from conceptshare.analysis.tables import check_saes, read_table
    from conceptshare.figures import draw_saes

    trained = read_table(table, "saes")
    check_saes(table, trained, saes)
    draw_saes(trained, saes, out)
