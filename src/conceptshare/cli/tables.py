"""Commands that write a study's tables from its stores: `conceptshare metrics`."""

from collections.abc import Iterable
from itertools import combinations
from pathlib import Path
from typing import Annotated, Literal

import typer

from conceptshare.cli.options import (
    DataFolder,
    GPUs,
    MaxFVUGlobal,
    StudyFile,
    TableOut,
    Threads,
    compute_on,
    out_option,
)
from conceptshare.config.members import as_member
from conceptshare.config.settings import MAX_FVU_GLOBAL
from conceptshare.config.study import load_study
from conceptshare.io.files import MATRICES
from conceptshare.io.progress import warn

app = typer.Typer(help="Tables of a study, from its stores.", no_args_is_help=True)

Features = Annotated[Path, typer.Option(help="The folder of feature stores.")]
Correlations = Annotated[Path, typer.Option(help="The folder of correlation stores.")]
Similarity = Annotated[
    Path | None,
    typer.Option(help="The folder of similarity tables; without it, their columns are empty.", show_default=False),
]
Matrix = Annotated[Path, typer.Option("--table", help="The matrix, as Parquet.")]
Analysis = Annotated[str, typer.Argument(help="Name of the analysis in the study.", show_default=False)]


def _warn_without(similarity: Path | None, pairs: Iterable[tuple[str, str]]) -> None:
    if similarity is None and any(as_member(a).encoder != as_member(b).encoder for a, b in pairs):
        warn("without --similarity, the columns of CKA and mutual nearest neighbours are empty")


@app.command()
def matrix(
    analysis: Analysis,
    study: StudyFile,
    features: Features,
    correlations: Correlations,
    out: TableOut,
    similarity: Similarity = None,
    max_fvu_global: MaxFVUGlobal = MAX_FVU_GLOBAL,
) -> None:
    """The wMPPC between all members, with intervals, floors, ceilings and similarities."""
    from conceptshare.analysis.tables import Stores, matrix_table, write_table

    members = load_study(study).grouped_members(analysis)
    _warn_without(similarity, combinations([entry.member for entry in members], 2))
    write_table(matrix_table(members, Stores(features, correlations, similarity, max_fvu_global)), out)


@app.command()
def averages(table: Matrix, correlations: Correlations, out: TableOut) -> None:
    """The mean wMPPC between modalities, with intervals."""
    from conceptshare.analysis.tables import averages_table, read_table, write_table

    write_table(averages_table(read_table(table, "matrix"), correlations), out)


@app.command()
def seeds(
    analysis: Analysis,
    study: StudyFile,
    features: Features,
    correlations: Correlations,
    out: TableOut,
    max_fvu_global: MaxFVUGlobal = MAX_FVU_GLOBAL,
) -> None:
    """The wMPPC of every pair of seeds, with intervals over seeds and samples."""
    from conceptshare.analysis.seeds import seeds_table
    from conceptshare.analysis.tables import Stores, write_table

    write_table(
        seeds_table(
            load_study(study).grouped_members(analysis), Stores(features, correlations, max_fvu_global=max_fvu_global)
        ),
        out,
    )


@app.command()
def retrieval(
    analysis: Analysis,
    study: StudyFile,
    features: Features,
    out: TableOut,
    threads: Threads = 1,
    gpus: GPUs = None,
    max_fvu_global: MaxFVUGlobal = MAX_FVU_GLOBAL,
) -> None:
    """How often matched features find a sample's caption, or its image, among those of other samples."""
    from conceptshare.analysis.retrieval import retrieval_table
    from conceptshare.analysis.tables import write_table

    compute_on(gpus, threads)
    write_table(retrieval_table(load_study(study).grouped_members(analysis), features, max_fvu_global), out)


@app.command()
def samples(
    analysis: Analysis,
    study: StudyFile,
    features: Features,
    data: DataFolder,
    out: TableOut,
    threads: Threads = 1,
    gpus: GPUs = None,
    max_fvu_global: MaxFVUGlobal = MAX_FVU_GLOBAL,
) -> None:
    """How well each sample's image and caption fit by matched features, the worst first."""
    from conceptshare.analysis.samples import fit_table
    from conceptshare.analysis.tables import write_table
    from conceptshare.data.dataset import Data

    compute_on(gpus, threads)
    sides = load_study(study).samples_sides(analysis)
    image, text = (features / f"{sides[side]}.zarr" for side in ("image", "text"))
    layers = sides["image_layers"], sides["text_layers"]
    write_table(fit_table(image, text, Data(data), *layers, max_fvu_global), out)


@app.command()
def formats(
    table: Matrix,
    out: Annotated[Path, out_option(MATRICES, text="The folder to write.")],
    dataset: Annotated[
        str | None,
        typer.Option(help="The paper's name for the data set, to write its Table 3 too.", show_default=False),
    ] = None,
    size: Annotated[Literal["large", "base"], typer.Option(help="The size of the paper's encoders.")] = "large",
) -> None:
    """The matrix of each reading, and its averages by modality, as CSV, Markdown and LaTeX."""
    from conceptshare.analysis import paper
    from conceptshare.analysis.formats import write_matrices
    from conceptshare.analysis.tables import modality_means, read_table

    matrix = read_table(table, "matrix")
    table_3 = None if dataset is None else paper.table_3(matrix, dataset, size)
    write_matrices(matrix, modality_means(matrix), out, table_3)


@app.command()
def paper(
    table: Matrix,
    dataset: Annotated[str, typer.Option(help="The paper's name for the data set.")],
    size: Annotated[Literal["large", "base"], typer.Option(help="The size of the paper's encoders.")],
    out: TableOut,
) -> None:
    """A matrix next to the paper's values, cell by cell."""
    from conceptshare.analysis import paper
    from conceptshare.analysis.tables import read_table, write_table

    write_table(paper.compare(read_table(table, "matrix"), dataset, size), out)


@app.command()
def agreement(
    table: Annotated[Path, typer.Option(help="The output of `metrics paper`, as Parquet.")], out: TableOut
) -> None:
    """Agreement of a matrix with the paper's values."""
    from conceptshare.analysis import paper
    from conceptshare.analysis.tables import read_table, write_table

    write_table(paper.agreement(read_table(table, "paper")), out)


@app.command()
def layerwise(
    analysis: Analysis,
    study: StudyFile,
    features: Features,
    correlations: Correlations,
    out: TableOut,
    similarity: Similarity = None,
    max_fvu_global: MaxFVUGlobal = MAX_FVU_GLOBAL,
) -> None:
    """The wMPPC between all layers of two members."""
    from conceptshare.analysis.tables import Stores, layerwise_table, write_table

    pairs = load_study(study).layerwise_names(analysis)
    _warn_without(similarity, pairs)
    write_table(layerwise_table(pairs, Stores(features, correlations, similarity, max_fvu_global)), out)


@app.command()
def pair(
    a: Annotated[str, typer.Argument(help="A member.")],
    b: Annotated[str, typer.Argument(help="Another member.")],
    features: Features,
    correlations: Correlations,
    out: TableOut,
) -> None:
    """Every feature of two members with its best match in the other."""
    from conceptshare.analysis.tables import Stores, pair_table, write_table

    write_table(pair_table(a, b, Stores(features, correlations)), out)


@app.command()
def sharedness(
    analysis: Analysis,
    study: StudyFile,
    features: Features,
    correlations: Correlations,
    out: TableOut,
    max_fvu_global: MaxFVUGlobal = MAX_FVU_GLOBAL,
) -> None:
    """A member's features, ranked by Comparative Sharedness."""
    from conceptshare.analysis.tables import Stores, sharedness_table, write_table

    loaded = load_study(study)
    groups, seeds = loaded.sharedness_groups(analysis), loaded.sharedness_seeds(analysis)
    stores = Stores(features, correlations, max_fvu_global=max_fvu_global)
    write_table(sharedness_table(**groups, stores=stores, seeds=seeds), out)


@app.command()
def topics(
    table: Annotated[Path, typer.Option(help="The ranking, as Parquet.")],
    features: Annotated[Path, typer.Option(help="The source's feature store.")],
    data: DataFolder,
    out: TableOut,
) -> None:
    """Caption words that are more frequent among a ranking's top features than among all."""
    from conceptshare.analysis.tables import check_ranking, read_table, write_table
    from conceptshare.concepts.topics import topics_table
    from conceptshare.data.dataset import Data
    from conceptshare.io.readers import check_samples, read_statistics

    ranking, samples = read_table(table, "sharedness"), Data(data)
    check_ranking(table, ranking, features)
    check_samples(features, data, samples.content_hash)
    write_table(topics_table(ranking, read_statistics(features), samples), out)


@app.command()
def overlaps(
    rankings: Annotated[list[Path], typer.Argument(help="Rankings by Comparative Sharedness, as Parquet.")],
    out: TableOut,
) -> None:
    """The number of top features that every two rankings of one source have in common."""
    from conceptshare.analysis.tables import check_rankings, overlap_table, read_table, write_table

    tables = {path: read_table(path, "sharedness") for path in rankings}
    check_rankings(tables)
    write_table(overlap_table({path.stem: table for path, table in tables.items()}), out)


@app.command()
def saes(
    study: StudyFile,
    features: Features,
    saes: Annotated[Path, typer.Option(help="The folder of SAEs.")],
    out: TableOut,
    correlations: Annotated[
        Path | None,
        typer.Option(help="The folder of correlation stores, for studies with several seeds.", show_default=False),
    ] = None,
    max_fvu_global: MaxFVUGlobal = MAX_FVU_GLOBAL,
) -> None:
    """Size, quality and stability of every SAE."""
    from conceptshare.analysis.seeds import with_stability
    from conceptshare.analysis.tables import Stores, sae_table, write_table

    described = load_study(study)
    pairs = described.seed_pairs()
    if correlations is None and pairs:
        warn("without --correlations, the column of stable features is empty")
        pairs = []
    stores = Stores(features, correlations or Path(), max_fvu_global=max_fvu_global)
    write_table(with_stability(sae_table(described.members(), saes, stores), pairs, stores), out)
