"""Commands that compare encoders by their features or activations."""

import re
from pathlib import Path
from typing import Annotated, Literal

import typer

from conceptshare.cli.options import (
    DataFolder,
    GPUs,
    MaxFVUGlobal,
    TableOut,
    Threads,
    compute_on,
    in_bytes,
    out_option,
    use_threads,
)
from conceptshare.config.settings import MAX_FVU_GLOBAL
from conceptshare.io.errors import StudyError
from conceptshare.io.files import CSV, PARQUET, PROVENANCE_SIDECAR, store_kind

app = typer.Typer()

Precision = Annotated[
    Literal["float32", "float16"],
    typer.Option(help="Precision of the product on a GPU; float16 is faster, with an error below 5e-4."),
]
UnexplainedLayers = Annotated[
    Literal["mark", "leave_out"],
    typer.Option(
        help="leave_out: leave layers whose SAE has an FVU above --max-fvu-global at global tokens out of the readings "
        "pooled and layer_mean."
    ),
]
MemoryMB = Annotated[
    int | None,
    typer.Option(
        help="Limit of the working memory in MB; by default 1024 on a CPU, and most of the free memory on a GPU.",
        min=1,
        show_default=False,
    ),
]


@app.command()
def correlations(
    a: Annotated[Path, typer.Argument(help="A feature store.")],
    b: Annotated[Path, typer.Argument(help="Another feature store of the same samples.")],
    out: Annotated[Path, out_option(store_kind("correlations"))],
    precision: Precision = "float32",
    full: Annotated[
        list[str],
        typer.Option(help="LAYER_A:LAYER_B, whose full correlation matrix is stored (repeatable)."),
    ] = [],  # noqa: B006 - typer copies it
    unexplained_layers: UnexplainedLayers = "mark",
    max_fvu_global: MaxFVUGlobal = MAX_FVU_GLOBAL,
    memory_mb: MemoryMB = None,
    threads: Threads = 1,
    gpus: GPUs = None,
) -> None:
    """Find each feature's best match in the other encoder, for every pair of layers, in both directions."""
    from conceptshare.correlations import correlate_stores

    compute_on(gpus, threads)
    for entry in full:
        if not re.fullmatch(r"\d+:\d+", entry):
            raise StudyError(f"--full {entry}: write LAYER_A:LAYER_B, such as 3:5")
    layers = [(int(layer_a), int(layer_b)) for layer_a, layer_b in (entry.split(":") for entry in full)]
    correlate_stores(a, b, out, in_bytes(memory_mb), precision, layers, _bound(unexplained_layers, max_fvu_global))


@app.command()
def similarity(
    a: Annotated[Path, typer.Argument(help="An activation store.")],
    b: Annotated[Path, typer.Argument(help="Another activation store of the same samples.")],
    out: Annotated[Path, out_option(CSV, PARQUET, PROVENANCE_SIDECAR)],
    threads: Threads = 1,
    gpus: GPUs = None,
) -> None:
    """Compare the global tokens of two encoders, for every pair of layers: CKA and mutual nearest neighbours."""
    from conceptshare.analysis.similarity import compare_stores

    compute_on(gpus, threads)
    compare_stores(a, b, out)


@app.command()
def wmppc(
    a: Annotated[Path, typer.Argument(help="A feature store.")],
    b: Annotated[Path, typer.Argument(help="Another feature store of the same samples.")],
    memory_mb: MemoryMB = None,
    precision: Precision = "float32",
    unexplained_layers: UnexplainedLayers = "mark",
    max_fvu_global: MaxFVUGlobal = MAX_FVU_GLOBAL,
    threads: Threads = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compute the wMPPC of two encoders in both directions from their feature stores.

    For each reading: the wMPPC with its 95% interval over samples (low, high), its null from re-paired samples and its
    excess over that, its cross-fitted form with an interval, the MPPC, and the number of features that match better
    than with shuffled samples.
    """
    from conceptshare.analysis.ask import wmppc_between

    use_threads(threads)
    bound = _bound(unexplained_layers, max_fvu_global)
    table = wmppc_between(a, b, in_bytes(memory_mb), precision, bound)
    typer.echo(table.to_json(orient="records") if as_json else table.to_string(index=False, float_format="%.4f"))


def _bound(unexplained_layers: str, max_fvu_global: float) -> float | None:
    """The FVU above which layers are left out, if they are."""
    return max_fvu_global if unexplained_layers == "leave_out" else None


@app.command()
def sharedness(
    source: Annotated[Path, typer.Option(help="The feature store whose features are ranked.")],
    shared_with: Annotated[
        list[Path], typer.Option(help="A feature store of group G, which should share them (repeatable).")
    ],
    not_shared_with: Annotated[
        list[Path], typer.Option(help="A feature store of group H, which should not (repeatable).")
    ],
    top: Annotated[
        int | None,
        typer.Option(help="Number of features to print; by default 1% of them.", min=1, show_default=False),
    ] = None,
    out: Annotated[
        Path | None, out_option(CSV, PARQUET, text="Write the whole ranking to this path, as CSV and Parquet.")
    ] = None,
    max_fvu_global: MaxFVUGlobal = MAX_FVU_GLOBAL,
    threads: Threads = 1,
) -> None:
    """Rank an encoder's last-layer features by Comparative Sharedness, from feature stores."""
    from conceptshare.analysis.ask import sharedness_of
    from conceptshare.analysis.tables import write_table

    use_threads(threads)
    table = sharedness_of(source, shared_with, not_shared_with, max_fvu_global)
    if out is not None:
        write_table(table, out)
    shown = table.head(top) if top else table[table.top]
    columns = ["rank", "feature", "delta", "strength", "density", "rho_g", "rho_h"]
    typer.echo(shown[columns].to_string(index=False, float_format="%.4g"))


@app.command()
def samples(
    image: Annotated[Path, typer.Argument(help="A feature store of an image encoder.")],
    text: Annotated[Path, typer.Argument(help="A feature store of a text encoder, of the same samples.")],
    data: DataFolder,
    out: TableOut,
    image_layer: Annotated[
        list[int] | None,
        typer.Option(help="A layer whose features are matched (repeatable); by default the last.", show_default=False),
    ] = None,
    text_layer: Annotated[list[int] | None, typer.Option(help="Likewise, of the other.", show_default=False)] = None,
    threads: Threads = 1,
    gpus: GPUs = None,
) -> None:
    """Score how well each sample's image and caption fit by matched features, and list the worst."""
    from conceptshare.analysis.samples import fit_table
    from conceptshare.analysis.tables import write_table
    from conceptshare.data.dataset import Data

    compute_on(gpus, threads)
    table = fit_table(image, text, Data(data), image_layer, text_layer)
    write_table(table, out)
    typer.echo(table.head(10).to_string(index=False, float_format="%.2f", max_colwidth=60))


@app.command("filter")
def filter_samples(
    fit: Annotated[Path, typer.Argument(help="A table of `conceptshare samples`, as Parquet.")],
    data: DataFolder,
    keep: Annotated[float, typer.Option(help="The share of samples to keep, those with the best fit.", min=0, max=1)],
    out: Annotated[Path, out_option(PARQUET, text="The data set to write: a Parquet file that a study can read.")],
) -> None:
    """Write a data set of the samples whose image and caption fit best."""
    from conceptshare.analysis.samples import write_best
    from conceptshare.analysis.tables import read_table
    from conceptshare.data.dataset import Data

    typer.echo(f"{out}: {write_best(read_table(fit, 'samples'), Data(data), keep, out):,} samples")
