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
    out_option,
    second_out_option,
    use_gpus,
    use_threads,
)
from conceptshare.config.catalog import DatasetSpec, EncoderSpec, ModelSpec
from conceptshare.io.errors import StudyError
from conceptshare.io.files import DATASET, PROVENANCE_SIDECAR, WEIGHTS, store_kind

app = typer.Typer()


@app.command()
def dataset(dataset: Entry, out: Annotated[Path, out_option(DATASET)]) -> None:
    """Read a data set, drop unusable rows and shuffle the rest."""
    from conceptshare.data.dataset import make_dataset

    make_dataset(entry(DatasetSpec, "datasets", dataset), out)


@app.command()
def weights(
    encoder: Entry,
    out: Annotated[Path, out_option(WEIGHTS, PROVENANCE_SIDECAR)],
    load: Annotated[
        bool, typer.Option(help="Whether to load the encoder first, on the CPU, and test it on two samples.")
    ] = True,
) -> None:
    """Find or fetch an encoder's files, check that they can be loaded, and record exactly which they are."""
    from conceptshare.encoders.weights import fetch_weights

    if not load:
        fetch_weights(entry(ModelSpec, "encoders", encoder), out)
        return
    use_gpus(0)  # a GPU of this machine may be in use by a job
    spec: EncoderSpec = entry(EncoderSpec, "encoders", encoder)

    def check(location: Path) -> None:
        from conceptshare.encoders import try_encoder

        # Snakemake runs several of these jobs at once; loading one encoder at a time limits the memory.
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
        out_option(store_kind("activations", "part"), text="The store of global tokens to write, or of a part."),
    ],
    tokens: Annotated[
        Path | None,
        second_out_option(store_kind("tokens"), text="The store of all tokens to write; not with --part."),
    ] = None,
    part: Annotated[
        str | None,
        typer.Option(help="PART/PARTS, such as 2/4: record one part of the samples, for `join`.", show_default=False),
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
        raise StudyError("activations: give either --tokens, for all samples, or --part, for some of them")
    loaded = load_encoder(entry(EncoderSpec, "encoders", encoder), weights)
    if numbers is not None:
        extract_part(loaded, Data(data), out, *numbers, threads)
    elif tokens is not None:
        extract_activations(loaded, Data(data), out, tokens, threads)


def _numbers_of_part(part: str | None) -> tuple[int, int] | None:
    if part is None:
        return None
    match = re.fullmatch(r"(\d+)/(\d+)", part)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise StudyError(f"--part {part}: write PART/PARTS, such as 2/4; parts are counted from 1")
    return int(match[1]), int(match[2])


@app.command()
def join(
    parts: Annotated[list[Path], typer.Argument(help="All parts of an extraction.")],
    out: Annotated[Path, out_option(store_kind("activations"), text="The store of global tokens to write.")],
    tokens: Annotated[Path, second_out_option(store_kind("tokens"), text="The store of all tokens to write.")],
) -> None:
    """Join the parts of an extraction; their files are hard-linked, or copied if that is not possible."""
    from conceptshare.activations.parts import join_parts

    join_parts(parts, out, tokens)
