"""Commands of the stages that make data sets, activations, SAEs, features, names and examples."""

import os
import re
from pathlib import Path
from tempfile import gettempdir
from typing import Annotated, Literal

import typer
from filelock import FileLock

from conceptshare.cli.options import (
    DataFolder,
    Entry,
    FeatureStore,
    GPUs,
    Threads,
    Weights,
    compute_on,
    entry,
    go_offline,
    out_option,
)
from conceptshare.config.catalog import DatasetSpec, EncoderSpec, ModelSpec, parse, parse_yaml
from conceptshare.config.settings import SAESettings
from conceptshare.io.errors import StudyError
from conceptshare.io.files import (
    CSV,
    DATASET,
    EXAMPLES,
    PARQUET,
    PROVENANCE_SIDECAR,
    SAE_FOLDER,
    SAES,
    SPARSIFY_FOLDER,
    WEIGHTS,
    store_kind,
)
from conceptshare.io.layout import sae_place

app = typer.Typer()
sae_app = typer.Typer(help="Train, inspect, import and export SAEs.", no_args_is_help=True)

SAEFolders = Annotated[Path, typer.Option(help="The folder that holds layer-NN/seed-S/.")]
Settings = Annotated[str, typer.Option(help="SAE settings as JSON; missing keys are set as in the paper.")]


Pretrained = Annotated[
    Path | None,
    typer.Option(
        help="A folder that holds layer-NN/seed-S/ of `sae import`: measure these instead of training.",
        show_default=False,
    ),
]


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
    data: Annotated[
        Path | None,
        typer.Option(help="For library: arrays, the folder of the dataset stage, whose ids theirs must be."),
    ] = None,
) -> None:
    """Find or fetch an encoder's files, check that they can be loaded, and record exactly which they are."""
    from conceptshare.encoders.weights import fetch_weights

    if not load:
        fetch_weights(entry(ModelSpec, "encoders", encoder), out)
        return
    compute_on(0)  # a GPU of this machine may be in use by a job
    spec: EncoderSpec = entry(EncoderSpec, "encoders", encoder)

    def check(location: Path) -> None:
        from conceptshare.data.dataset import Data
        from conceptshare.encoders import try_encoder

        # Snakemake runs several of these jobs at once; loading one encoder at a time limits the memory.
        with FileLock(Path(gettempdir()) / f"conceptshare-{os.getuid()}-loading.lock"):
            try_encoder(spec, location, None if data is None else Data(data))

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
        out_option(
            store_kind("tokens"), text="The store of all tokens to write, if wanted; not with --part.", first=False
        ),
    ] = None,
    part: Annotated[
        str | None,
        typer.Option(help="PART/PARTS, such as 2/4: record one part of the samples, for `join`.", show_default=False),
    ] = None,
    global_only: Annotated[
        bool,
        typer.Option("--global-only", help="For --part: record global tokens alone."),
    ] = False,
    threads: Threads = 1,
    gpus: GPUs = None,
) -> None:
    """Record every layer of an encoder over a data set in one forward pass."""
    from conceptshare.activations.extraction import extract_activations
    from conceptshare.activations.parts import extract_part
    from conceptshare.data.dataset import Data
    from conceptshare.encoders import load_encoder, load_source

    compute_on(gpus, threads)
    numbers = _numbers_of_part(part)
    if tokens is not None and numbers is not None:
        raise StudyError("activations: give either --tokens, for all samples, or --part, for some of them")
    if tokens is not None and global_only:
        raise StudyError("activations: give either --tokens or --global-only")
    spec, samples = entry(EncoderSpec, "encoders", encoder), Data(data)
    if numbers is not None:
        extract_part(load_encoder(spec, weights), samples, out, *numbers, threads, tokens=not global_only)
    else:
        extract_activations(load_source(spec, weights, samples), samples, out, tokens, threads)


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
    tokens: Annotated[
        Path | None, out_option(store_kind("tokens"), text="The store of all tokens to write, if wanted.", first=False)
    ] = None,
) -> None:
    """Join the parts of an extraction; their files are hard-linked, or copied if that is not possible."""
    from conceptshare.activations.parts import join_parts

    join_parts(parts, out, tokens)


app.add_typer(sae_app, name="sae")


@sae_app.callback()
def _start(context: typer.Context) -> None:
    if context.invoked_subcommand != "import":
        go_offline()


@sae_app.command("train")
def sae_train(
    tokens: Annotated[Path, typer.Option(help="A store of all tokens; for train_on: global, one of global tokens.")],
    layer: Annotated[int, typer.Option(help="The layer to train on, from 0.")],
    out: Annotated[Path, out_option(SAE_FOLDER)],
    settings: Settings = "{}",
    seed: Annotated[int, typer.Option(help="Seed of the initial weights.", min=0)] = 0,
    pretrained: Pretrained = None,
    threads: Threads = 1,
    gpus: GPUs = None,
) -> None:
    """Train a sparse autoencoder on one layer."""
    from conceptshare.sae import train_sae

    compute_on(gpus, threads)
    imported = None if pretrained is None else pretrained / sae_place(layer, seed)
    train_sae(tokens, layer, parse(SAESettings, parse_yaml(settings, "--settings"), "settings"), seed, out, imported)


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
    out: Annotated[Path, out_option(SPARSIFY_FOLDER)],
) -> None:
    """Convert an SAE to the format of another library."""
    from conceptshare.sae.exchange import export_to_sparsify

    export_to_sparsify(folder, out)


@sae_app.command("import")
def sae_import(
    source: Annotated[
        str, typer.Argument(help="The folder of an SAE, or saev's file; on a hub, OWNER/NAME or OWNER/NAME:FOLDER.")
    ],
    out: Annotated[Path, out_option(SAE_FOLDER)],
    width: Annotated[
        int | None, typer.Option(help="D of the encoder that it is for; others are refused.", show_default=False)
    ] = None,
    layer: Annotated[
        int | None, typer.Option(help="The layer that it is for, from 0; others are refused.", show_default=False)
    ] = None,
) -> None:
    """Convert an SAE of SAELens, sparsify or saev to our format."""
    from conceptshare.sae.exchange import import_sae

    import_sae(source, out, width, layer)


@app.command()
def stream(
    encoder: Entry,
    weights: Weights,
    data: DataFolder,
    saes: Annotated[Path, out_option(SAES, text="The folder to write, with layer-NN/seed-S/ in it.")],
    activations: Annotated[
        Path, out_option(store_kind("activations"), text="The store of global tokens to write.", first=False)
    ],
    settings: Settings = "{}",
    seeds: Annotated[list[int], typer.Option("--seed", help="Seed of the initial weights (repeatable).", min=0)] = [0],  # noqa: B006 - typer copies it
    workers: Annotated[
        int,
        typer.Option(help="Number of threads that prepare images and, without a GPU, of SAEs trained at once.", min=1),
    ] = 1,
    pretrained: Pretrained = None,
    threads: Threads = 1,
    gpus: GPUs = None,
) -> None:
    """Train the SAEs of all layers and seeds of an encoder during its forward passes, without storing tokens."""
    from conceptshare.data.dataset import Data
    from conceptshare.encoders import load_source
    from conceptshare.sae import train_stream

    compute_on(gpus, threads)
    samples = Data(data)
    source = load_source(entry(EncoderSpec, "encoders", encoder), weights, samples)
    chosen = parse(SAESettings, parse_yaml(settings, "--settings"), "settings")
    train_stream(source, samples, chosen, sorted(set(seeds)), saes, activations, workers, pretrained)


@app.command()
def features(
    activations: Annotated[Path, typer.Option(help="The encoder's activation store.")],
    saes: SAEFolders,
    out: Annotated[Path, out_option(store_kind("features"))],
    seed: Annotated[int, typer.Option(help="The seed of the SAEs.")] = 0,
    keep: Annotated[bool, typer.Option(help="Store features before TopK, not only their statistics.")] = True,
    code: Annotated[Literal["before_topk", "after_topk"], typer.Option(help="Features before or after TopK.")] = (
        "before_topk"
    ),
    threads: Threads = 1,
    gpus: GPUs = None,
) -> None:
    """Record the SAE features of every sample's global token."""
    from conceptshare.sae.features import record_features

    compute_on(gpus, threads)
    record_features(activations, saes, seed, out, keep, code)


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
    saes: SAEFolders,
    out: Annotated[Path, out_option(EXAMPLES)],
    threads: Annotated[int, typer.Option(help="Number of threads that prepare images.", min=1)] = 1,
    gpus: GPUs = None,
) -> None:
    """Find examples of each feature: weaker samples, and its activation at each token of the strongest ones."""
    from conceptshare.concepts.examples import record_examples
    from conceptshare.data.dataset import Data
    from conceptshare.encoders import load_source

    compute_on(gpus)
    samples = Data(data)
    source = load_source(entry(EncoderSpec, "encoders", encoder), weights, samples)
    record_examples(source, samples, features, saes, out, threads)
