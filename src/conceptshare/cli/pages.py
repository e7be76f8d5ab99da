"""Commands that write the site of a study's features: `conceptshare pages`."""

from pathlib import Path
from typing import Annotated

import typer

from conceptshare.cli.options import DataFolder, FeatureStore, StudyFile, out_option
from conceptshare.config.members import as_member
from conceptshare.config.study import load_study
from conceptshare.io.files import MEMBER_PAGES, PAIR_PAGES, SAMPLE_PAGES, SITE, ZIP

app = typer.Typer(help="A site of a study's features.", no_args_is_help=True)

Place = Annotated[str, typer.Option(help="Path of the output within the site.")]


@app.command("samples")
def samples(
    data: DataFolder,
    place: Place,
    out: Annotated[Path, out_option(SAMPLE_PAGES)],
    threads: Annotated[int, typer.Option(help="Number of threads that make thumbnails.", min=1)] = 1,
) -> None:
    """Thumbnails and captions of a data set."""
    from conceptshare.data.dataset import Data
    from conceptshare.pages import write_samples

    write_samples(Data(data), place, out, threads)


@app.command("member")
def member(
    features: FeatureStore,
    examples: Annotated[Path, typer.Option(help="Its folder of examples.")],
    names: Annotated[Path, typer.Option(help="Its table of names.")],
    pairs: Annotated[Path, typer.Option(help="The folder of pair tables.")],
    study: StudyFile,
    place: Place,
    out: Annotated[Path, out_option(MEMBER_PAGES)],
    rankings: Annotated[
        list[Path] | None, typer.Option("--ranking", help="A ranking of its features, as Parquet.", show_default=False)
    ] = None,
) -> None:
    """Every feature of a member."""
    from conceptshare.pages import write_member

    ranked = {path.stem: path for path in rankings or []}
    others = [str(other) for other in load_study(study).comparisons()[as_member(features.stem)]]
    write_member(features, examples, names, pairs, others, ranked, place, out)


@app.command("pair")
def pair(
    correlations: Annotated[Path, typer.Option(help="The pair's correlation store.")],
    source: Annotated[str, typer.Option(help="A member of the pair.")],
    target: Annotated[str, typer.Option(help="The other member.")],
    place: Place,
    out: Annotated[Path, out_option(PAIR_PAGES)],
) -> None:
    """Every feature of a member with its best match in each layer of another."""
    from conceptshare.pages import write_pair

    write_pair(correlations, source, target, place, out)


@app.command("index")
def index(
    study: StudyFile,
    results: Annotated[Path, typer.Option(help="The folder of all results.")],
    out: Annotated[Path, out_option(SITE)],
) -> None:
    """The page itself, with the study's overview."""
    from conceptshare.pages import write_index

    write_index(load_study(study).shown_on_pages(), results, out)


@app.command("pack")
def pack(
    out: Annotated[Path, out_option(ZIP)],
    study: StudyFile = Path("config.yaml"),
    results: Annotated[Path, typer.Option(help="The folder of all results.")] = Path("results"),
    images: Annotated[
        bool, typer.Option(help="Include thumbnails; leave them out if the images may not be passed on.")
    ] = True,
) -> None:
    """The site of a finished study as one zip, to share or to put on a static web host."""
    from conceptshare.pages import pack_site

    pack_site(load_study(study), results, images, out)
    typer.echo(f"{out}: {out.stat().st_size:,} bytes")
