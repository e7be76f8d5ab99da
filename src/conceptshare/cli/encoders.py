"""Commands that read data sets and encoders."""

import os
import re
from pathlib import Path
from tempfile import gettempdir
from typing import Annotated

import typer
from filelock import FileLock

from conceptshare.cli.options import (
    DataFolder,
    Entry,
    GPUs,
    Threads,
    Weights,
    entry,
    further_out,
    out_option,
    use_gpus,
    use_threads,
)
from conceptshare.config.catalog import DatasetSpec, EncoderSpec, ModelSpec
from conceptshare.io.errors import StudyError
from conceptshare.io.files import DATASET, PROVENANCE_SIDECAR, WEIGHTS, store_kind

app = typer.Typer()


@app.command()
def dataset(dataset: Entry, out: Annotated[Path, out_option(DATASET)]) -> None:
    """Read a data set, drop what is unusable and fix its order."""
    from conceptshare.data.dataset import make_dataset

    make_dataset(entry(DatasetSpec, "datasets", dataset), out)


@app.command()
def weights(
    encoder: Entry,
    out: Annotated[Path, out_option(WEIGHTS, PROVENANCE_SIDECAR)],
    load: Annotated[
        bool, typer.Option(help="Whether to load the encoder, on the CPU, and let it read two samples first.")
    ] = True,
) -> None:
    """Find or fetch an encoder's files, see that they can be read, and record exactly which they are."""
    from conceptshare.encoders.weights import fetch_weights

    if not load:
        fetch_weights(entry(ModelSpec, "encoders", encoder), out)
        return
    use_gpus(0)  # a GPU of this machine may be at work for a job
    spec: EncoderSpec = entry(EncoderSpec, "encoders", encoder)

    def check(location: Path) -> None:
        from conceptshare.encoders import try_encoder

        # Snakemake runs several of these at once, and each takes this machine's memory.
        with FileLock(Path(gettempdir()) / f"conceptshare-{os.getuid()}-loading.lock"):
            try_encoder(spec, location)

    fetch_weights(spec, out, check)


@app.command()
def activations(
    encoder: Entry,
    weights: Weights,
    data: DataFolder,
    out: Annotated[
        Path,
        out_option(store_kind("activations", "part"), text="The store of global tokens to write, or that of a part."),
    ],
    tokens: Annotated[
        Path | None,
        further_out(store_kind("tokens"), text="The store of all tokens to write, but for a part."),
    ] = None,
    part: Annotated[
        str | None,
        typer.Option(help="PART/PARTS, such as 2/4: record that part of the samples, for `join`.", show_default=False),
    ] = None,
    threads: Threads = 1,
    gpus: GPUs = None,
) -> None:
    """Record every layer of an encoder over a data set in one forward pass."""
    from conceptshare.activations.extraction import extract_activations
    from conceptshare.activations.parts import extract_part
    from conceptshare.data.dataset import Data
    from conceptshare.encoders import load_encoder

    use_threads(threads)
    use_gpus(gpus)
    numbers = _numbers_of_part(part)
    if (tokens is None) == (numbers is None):
        raise StudyError("activations: give --tokens for all samples, or --part for some, and not both")
    loaded = load_encoder(entry(EncoderSpec, "encoders", encoder), weights)
    if numbers is not None:
        extract_part(loaded, Data(data), out, *numbers, threads)
    elif tokens is not None:
        extract_activations(loaded, Data(data), out, tokens, threads)


def _numbers_of_part(part: str | None) -> tuple[int, int] | None:
    if part is None:
        return None
    found = re.fullmatch(r"(\d+)/(\d+)", part)
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise StudyError(f"--part {part}: write PART/PARTS, such as 2/4; parts are counted from 1")
    return int(found[1]), int(found[2])


@app.command()
def join(
    parts: Annotated[list[Path], typer.Argument(help="All parts of an extraction.")],
    out: Annotated[Path, out_option(store_kind("activations"), text="The store of global tokens to write.")],
    tokens: Annotated[Path, further_out(store_kind("tokens"), text="The store of all tokens to write.")],
) -> None:
    """Put the parts of an extraction together, which shares their files: the stores of one go."""
    from conceptshare.activations.parts import join_parts

    join_parts(parts, out, tokens)
