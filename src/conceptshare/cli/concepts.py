"""Commands that name features and find examples of them."""

from pathlib import Path
from typing import Annotated

import typer

from conceptshare.cli.options import DataFolder, Entry, FeatureStore, GPUs, Weights, entry, out_option, use_gpus
from conceptshare.config.catalog import EncoderSpec
from conceptshare.io.files import CSV, EXAMPLES, PARQUET, PROVENANCE_SIDECAR

app = typer.Typer()


@app.command()
def names(
    features: FeatureStore,
    data: DataFolder,
    out: Annotated[Path, out_option(PARQUET, CSV._replace(suffix=".clearest.csv"), PROVENANCE_SIDECAR)],
    command: Annotated[
        str | None, typer.Option(help="A command that names features, such as one that asks a language model.")
    ] = None,
) -> None:
    """Name features by the captions of their strongest samples."""
    from conceptshare.concepts.names import name_features

    name_features(features, data, out, command)


@app.command()
def examples(
    encoder: Entry,
    weights: Weights,
    data: DataFolder,
    features: FeatureStore,
    saes: Annotated[Path, typer.Option(help="The folder that holds layer-NN/seed-S/.")],
    out: Annotated[Path, out_option(EXAMPLES)],
    threads: Annotated[int, typer.Option(help="Number of threads that prepare images.", min=1)] = 1,
    gpus: GPUs = None,
) -> None:
    """Find examples of each feature: weaker samples, and its activation at each token of the strongest ones."""
    from conceptshare.concepts.examples import record_examples
    from conceptshare.data.dataset import Data
    from conceptshare.encoders import load_encoder

    use_gpus(gpus)
    loaded = load_encoder(entry(EncoderSpec, "encoders", encoder), weights)
    record_examples(loaded, Data(data), features, saes, out, threads)
