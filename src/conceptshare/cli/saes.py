"""Commands that train SAEs, exchange them, and record their features."""

from pathlib import Path
from typing import Annotated, Literal

import typer

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
from conceptshare.config.catalog import EncoderSpec, parse, parse_yaml
from conceptshare.config.settings import SAESettings
from conceptshare.io.files import SAE, SAES, SPARSIFY, store_kind

app = typer.Typer()
sae_app = typer.Typer(help="Train, inspect, import and export SAEs.", no_args_is_help=True)
app.add_typer(sae_app, name="sae")


@sae_app.command("train")
def sae_train(
    tokens: Annotated[Path, typer.Option(help="A store of all tokens.")],
    layer: Annotated[int, typer.Option(help="The layer to train on, from 0.")],
    out: Annotated[Path, out_option(SAE)],
    settings: Annotated[str, typer.Option(help="SAE settings as JSON; missing keys are set as in the paper.")] = "{}",
    seed: Annotated[int, typer.Option(help="Seed of the initial weights.", min=0)] = 0,
    threads: Threads = 1,
    gpus: GPUs = None,
) -> None:
    """Train a sparse autoencoder on one layer."""
    from conceptshare.sae import train_sae

    use_threads(threads)
    use_gpus(gpus)
    train_sae(tokens, layer, parse(SAESettings, parse_yaml(settings, "--settings"), "settings"), seed, out)


Folder = Annotated[Path, typer.Argument(help="The folder of an SAE.")]


@sae_app.command("info")
def sae_info(folder: Folder) -> None:
    """Print an SAE's size, training settings and quality."""
    from conceptshare.sae.folder import describe_sae

    typer.echo(describe_sae(folder))


@sae_app.command("export")
def sae_export(
    folder: Folder,
    to: Annotated[Literal["sparsify"], typer.Option(help="The library; SAELens can read the folder unchanged.")],
    out: Annotated[Path, out_option(SPARSIFY)],
) -> None:
    """Convert an SAE to the format of another library."""
    from conceptshare.sae.exchange import export_to_sparsify

    export_to_sparsify(folder, out)


@sae_app.command("import")
def sae_import(folder: Folder, out: Annotated[Path, out_option(SAE)]) -> None:
    """Convert a TopK SAE of SAELens or sparsify to our format."""
    from conceptshare.sae.exchange import import_sae

    import_sae(folder, out)


@app.command()
def stream(
    encoder: Entry,
    weights: Weights,
    data: DataFolder,
    saes: Annotated[Path, out_option(SAES, text="The folder to write, with layer-NN/seed-S/ in it.")],
    activations: Annotated[
        Path, second_out_option(store_kind("activations"), text="The store of global tokens to write.")
    ],
    settings: Annotated[str, typer.Option(help="SAE settings as JSON; missing keys are set as in the paper.")] = "{}",
    seeds: Annotated[list[int], typer.Option("--seed", help="Seed of the initial weights (repeatable).", min=0)] = [0],  # noqa: B006 - typer copies it
    workers: Annotated[
        int,
        typer.Option(help="Number of threads that prepare images and, without a GPU, of SAEs trained at once.", min=1),
    ] = 1,
    threads: Threads = 1,
    gpus: GPUs = None,
) -> None:
    """Train the SAEs of all layers and seeds of an encoder during its forward passes, without storing tokens."""
    from conceptshare.data.dataset import Data
    from conceptshare.encoders import load_encoder
    from conceptshare.sae import train_stream

    use_threads(threads)
    use_gpus(gpus)
    spec = entry(EncoderSpec, "encoders", encoder)
    chosen = parse(SAESettings, parse_yaml(settings, "--settings"), "settings")
    train_stream(load_encoder(spec, weights), Data(data), chosen, sorted(set(seeds)), saes, activations, workers)


@app.command()
def features(
    activations: Annotated[Path, typer.Option(help="The encoder's activation store.")],
    saes: Annotated[Path, typer.Option(help="The folder that holds layer-NN/seed-S/.")],
    out: Annotated[Path, out_option(store_kind("features"))],
    seed: Annotated[int, typer.Option(help="The seed of the SAEs.")] = 0,
    threads: Threads = 1,
    gpus: GPUs = None,
) -> None:
    """Record the SAE features of every sample's global token."""
    from conceptshare.sae.features import record_features

    use_threads(threads)
    use_gpus(gpus)
    record_features(activations, saes, seed, out)
