"""The command line: one subcommand a stage. The workflow's rules call these, and so can anyone without Snakemake."""

import os
import re
import sys
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import Annotated, Any, Literal, NoReturn

import typer
from filelock import FileLock
from pydantic import Field, TypeAdapter, ValidationError

from conceptshare.config.catalog import (
    CATALOG,
    DatasetSpec,
    EncoderSpec,
    ModelSpec,
    complete,
    parse,
    parse_yaml,
    read_catalog,
)
from conceptshare.config.study import PagesKey, PairSettings, SAESettings, SharednessGroups, load_study, study_of
from conceptshare.io import provenance
from conceptshare.io.errors import ConceptshareError, MadeMeanwhileError, StoreError, StudyError, refusal
from conceptshare.io.files import (
    ACCOUNT,
    ACCOUNT_BESIDE,
    ACCOUNT_PAGE,
    CSV,
    DATASET,
    EXAMPLES,
    MATRICES,
    MEMBER_PAGES,
    PAIR_PAGES,
    PARQUET,
    PDF,
    PNG,
    SAE,
    SAE_FIGURES,
    SAES,
    SAMPLE_PAGES,
    SITE,
    SPARSIFY,
    WEIGHTS,
    Kind,
    alone,
    check_replaceable,
    store_kind,
)
from conceptshare.preflight.differences import differences, in_words
from conceptshare.preflight.plan import Rates, make_plan, plan_as_json, plan_as_text

app = typer.Typer(
    help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None
)
metrics_app = typer.Typer(help="Tables of a study, from its stores.", no_args_is_help=True)
pages_app = typer.Typer(help="A site of a study's features.", no_args_is_help=True)
figures_app = typer.Typer(help="Figures of a study, from its tables.", no_args_is_help=True)
sae_app = typer.Typer(help="Train an SAE, look at one, or exchange one with another library.", no_args_is_help=True)
app.add_typer(sae_app, name="sae")
app.add_typer(metrics_app, name="metrics")
app.add_typer(figures_app, name="figures")
app.add_typer(pages_app, name="pages")

# The commands that may ask a hub; compute nodes often have no internet, and what a run reads is on record by then.
_FETCHING = {"check", "dataset", "weights", "doctor"}
_OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


def _out(kind: Kind, *beside: Kind, text: str = "What to write.") -> Any:
    """The option that names what a command makes, which nothing else makes from the command's beginning on.

    Args:
        kind: what is made.
        beside: what is made with it, under the same name with another suffix.
        text: the option's help.
    """

    def begin(context: typer.Context, path: Path | None) -> Path | None:
        if path is not None:
            _check(path, kind, *beside)
            if path.parent.is_dir():  # else nobody is at it
                context.with_resource(alone(path))
        return path

    return typer.Option(help=text, callback=begin, show_default=False)


def _out_too(*kinds: Kind, text: str) -> Any:
    """The option that names what else a command makes."""

    def begin(path: Path | None) -> Path | None:
        if path is not None:
            _check(path, *kinds)
        return path

    return typer.Option(help=text, callback=begin, show_default=False)


def _check(path: Path, *kinds: Kind) -> None:
    for n, kind in enumerate(kinds):
        check_replaceable(path.with_suffix(kind.suffix) if n else path, kind)


Entry = Annotated[str, typer.Option(help="A name in the catalog, or keys and values as JSON.")]
Weights = Annotated[Path, typer.Option(help="The record of the weights stage.")]
DataFolder = Annotated[Path, typer.Option(help="The folder of the dataset stage.")]
FeatureStore = Annotated[Path, typer.Option(help="The member's feature store.")]
TableOut = Annotated[Path, _out(CSV, PARQUET)]
FigureOut = Annotated[Path, _out(PNG, PDF)]
Threads = Annotated[int, typer.Option(help="CPU threads; the last digits of results depend on it.", min=1)]
GPUs = Annotated[
    int | None,
    typer.Option(
        "--gpus", help="GPUs that the job asked its scheduler for; 0: compute on the CPU.", show_default=False
    ),
]


@app.callback()
def _start(context: typer.Context) -> None:
    provenance.begin(sys.argv[1:])
    # The libraries read these when they are imported, which each command does for itself.
    if context.invoked_subcommand not in _FETCHING:
        os.environ.update(_OFFLINE)


@app.command()
def check(
    config: Annotated[Path, typer.Argument(help="A study.")] = Path("config.yaml"),
    load: Annotated[
        bool,
        typer.Option("--load", help="Find or fetch each encoder too, load it, and let it read two samples."),
    ] = False,
) -> None:
    """Check a study and say what it needs."""
    study = load_study(config)
    typer.echo(f"{config}: study {study.study!r} is sound")
    typer.echo(f"  data sets: {', '.join(study.datasets)}")
    typer.echo(f"  encoders:  {', '.join(study.encoders)}")
    typer.echo(f"  SAE settings: {', '.join(study.saes)}")
    typer.echo(f"  {len(study.members())} members, {len(study.pairs())} pairs to correlate")
    if load:
        _try_encoders(study.encoders)


def _try_encoders(encoders: dict[str, EncoderSpec]) -> None:
    """Load every encoder, and exit with 1 if one cannot be read, after all have been tried."""
    from conceptshare.encoders import try_encoder
    from conceptshare.encoders.weights import locate

    faults = 0
    for name, spec in encoders.items():
        try:
            with TemporaryDirectory() as folder:
                try_encoder(spec, locate(spec, made=Path(folder) / "model"))
        except ConceptshareError as error:
            faults += 1
            print(f"error: encoders.{name}: {error}", file=sys.stderr)
    if faults:
        raise typer.Exit(1)


@app.command()
def plan(
    config: Annotated[Path, typer.Option(help="A study.")] = Path("config.yaml"),
    samples: Annotated[int | None, typer.Option(help="Samples of each data set, whatever it has.", min=2)] = None,
    tflops: Annotated[float, typer.Option(help="Float32 TFLOP/s of the GPU.", min=1e-6)] = Rates.tflops,
    disk_mb_per_s: Annotated[float, typer.Option(help="MB/s from and to disk.", min=1e-6)] = Rates.disk_mb_per_s,
    cpu_gflops: Annotated[float, typer.Option(help="Float32 GFLOP/s of a job's cores.", min=1e-6)] = Rates.cpu_gflops,
    as_json: Annotated[bool, typer.Option("--json", help="For machines: bytes, operations and hours.")] = False,
) -> None:
    """Say what a study will cost: jobs, disk, memory and hours. Reckoned from the study alone; nothing is run."""
    found = make_plan(load_study(config), Rates(tflops, disk_mb_per_s, cpu_gflops), samples)
    typer.echo(plan_as_json(found) if as_json else plan_as_text(found))


@app.command()
def doctor(
    config: Annotated[
        Path | None, typer.Option(help="A study: config.yaml, where it is there.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """Check this machine, and say what is missing; exit with 1 where no run can do without it."""
    from conceptshare.preflight.doctor import as_json as in_json
    from conceptshare.preflight.doctor import as_text, examine

    default = Path("config.yaml")
    findings = examine(config or (default if default.is_file() else None))
    typer.echo(in_json(findings) if as_json else as_text(findings))
    if any(finding.status == "missing" for finding in findings):
        raise typer.Exit(1)


@app.command()
def dataset(dataset: Entry, out: Annotated[Path, _out(DATASET)]) -> None:
    """Read a data set, drop what is unusable and fix its order."""
    from conceptshare.data.dataset import make_dataset

    make_dataset(_spec(DatasetSpec, "datasets", dataset), out)


@app.command()
def weights(
    encoder: Entry,
    out: Annotated[Path, _out(WEIGHTS, ACCOUNT_BESIDE)],
    load: Annotated[
        bool, typer.Option(help="Whether to load the encoder, on the CPU, and let it read two samples first.")
    ] = True,
) -> None:
    """Find or fetch an encoder's files, see that they can be read, and record exactly which they are."""
    from conceptshare.encoders.weights import fetch_weights

    if not load:
        fetch_weights(_spec(ModelSpec, "encoders", encoder), out)
        return
    _use_gpus(0)  # a GPU of this machine may be at work for a job
    spec: EncoderSpec = _spec(EncoderSpec, "encoders", encoder)

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
        Path, _out(store_kind("activations", "part"), text="The store of global tokens to write, or that of a part.")
    ],
    tokens: Annotated[
        Path | None,
        _out_too(store_kind("tokens"), text="The store of all tokens to write, but for a part."),
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

    _use_threads(threads)
    _use_gpus(gpus)
    numbers = _numbers_of_part(part)
    if (tokens is None) == (numbers is None):
        raise StudyError("activations: give --tokens for all samples, or --part for some, and not both")
    loaded = load_encoder(_spec(EncoderSpec, "encoders", encoder), weights)
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
    out: Annotated[Path, _out(store_kind("activations"), text="The store of global tokens to write.")],
    tokens: Annotated[Path, _out_too(store_kind("tokens"), text="The store of all tokens to write.")],
) -> None:
    """Put the parts of an extraction together, which shares their files: the stores of one go."""
    from conceptshare.activations.parts import join_parts

    join_parts(parts, out, tokens)


@sae_app.command("train")
def sae_train(
    tokens: Annotated[Path, typer.Option(help="A store of all tokens.")],
    layer: Annotated[int, typer.Option(help="The layer to train on, from 0.")],
    out: Annotated[Path, _out(SAE)],
    settings: Annotated[str, typer.Option(help="Keys and values as JSON; what is left out is the paper's.")] = "{}",
    seed: Annotated[int, typer.Option(help="Of the initial weights.", min=0)] = 0,
    threads: Threads = 1,
    gpus: GPUs = None,
) -> None:
    """Train a sparse autoencoder on one layer."""
    from conceptshare.sae import train_sae

    _use_threads(threads)
    _use_gpus(gpus)
    train_sae(tokens, layer, parse(SAESettings, parse_yaml(settings, "--settings"), "settings"), seed, out)


Folder = Annotated[Path, typer.Argument(help="The folder of an SAE.")]


@sae_app.command("info")
def sae_info(folder: Folder) -> None:
    """Say what an SAE is, how it was trained and how good it is."""
    from conceptshare.sae.folder import describe_sae

    typer.echo(describe_sae(folder))


@sae_app.command("export")
def sae_export(
    folder: Folder,
    to: Annotated[Literal["sparsify"], typer.Option(help="Whose layout; SAELens reads the folder as it is.")],
    out: Annotated[Path, _out(SPARSIFY)],
) -> None:
    """Write an SAE in the layout of another library."""
    from conceptshare.sae.exchange import export_to_sparsify

    export_to_sparsify(folder, out)


@sae_app.command("import")
def sae_import(folder: Folder, out: Annotated[Path, _out(SAE)]) -> None:
    """Write a TopK SAE of SAELens's or sparsify's in our layout."""
    from conceptshare.sae.exchange import import_sae

    import_sae(folder, out)


@app.command()
def stream(
    encoder: Entry,
    weights: Weights,
    data: DataFolder,
    saes: Annotated[Path, _out(SAES, text="The folder to write, with layer-NN/seed-S/ in it.")],
    activations: Annotated[Path, _out_too(store_kind("activations"), text="The store of global tokens to write.")],
    settings: Annotated[str, typer.Option(help="Keys and values as JSON; what is left out is the paper's.")] = "{}",
    seeds: Annotated[
        list[int], typer.Option("--seed", help="Of the initial weights; more than one by giving it again.", min=0)
    ] = [0],  # noqa: B006 - typer copies it
    workers: Annotated[
        int,
        typer.Option(help="Threads that prepare pictures, and SAEs trained side by side where there is no GPU.", min=1),
    ] = 1,
    threads: Threads = 1,
    gpus: GPUs = None,
) -> None:
    """Train an encoder's SAEs of all layers and seeds while it reads a data set, and store no tokens."""
    from conceptshare.data.dataset import Data
    from conceptshare.encoders import load_encoder
    from conceptshare.sae import train_stream

    _use_threads(threads)
    _use_gpus(gpus)
    spec = _spec(EncoderSpec, "encoders", encoder)
    chosen = parse(SAESettings, parse_yaml(settings, "--settings"), "settings")
    train_stream(load_encoder(spec, weights), Data(data), chosen, sorted(set(seeds)), saes, activations, workers)


@app.command()
def features(
    activations: Annotated[Path, typer.Option(help="The encoder's activation store.")],
    saes: Annotated[Path, typer.Option(help="The folder that holds layer-NN/seed-S/.")],
    out: Annotated[Path, _out(store_kind("features"))],
    seed: Annotated[int, typer.Option(help="The seed of the SAEs.")] = 0,
    threads: Threads = 1,
    gpus: GPUs = None,
) -> None:
    """Record the SAE features of every sample's global token."""
    from conceptshare.sae.features import record_features

    _use_threads(threads)
    _use_gpus(gpus)
    record_features(activations, saes, seed, out)


@app.command()
def names(
    features: FeatureStore,
    data: DataFolder,
    out: Annotated[Path, _out(PARQUET, CSV._replace(suffix=".clearest.csv"), ACCOUNT_BESIDE)],
    command: Annotated[
        str | None, typer.Option(help="A program that names features, such as one that asks a language model.")
    ] = None,
) -> None:
    """Name features by the captions of the samples that they are strongest on."""
    from conceptshare.concepts.names import name_features

    name_features(features, data, out, command)


@app.command()
def examples(
    encoder: Entry,
    weights: Weights,
    data: DataFolder,
    features: FeatureStore,
    saes: Annotated[Path, typer.Option(help="The folder that holds layer-NN/seed-S/.")],
    out: Annotated[Path, _out(EXAMPLES)],
    threads: Annotated[int, typer.Option(help="Threads that prepare pictures.", min=1)] = 1,
    gpus: GPUs = None,
) -> None:
    """Find what shows a feature: weaker samples too, and where in the strongest ones it fires."""
    from conceptshare.concepts.examples import record_examples
    from conceptshare.data.dataset import Data
    from conceptshare.encoders import load_encoder

    _use_gpus(gpus)
    loaded = load_encoder(_spec(EncoderSpec, "encoders", encoder), weights)
    record_examples(loaded, Data(data), features, saes, out, threads)


Precision = Annotated[
    Literal["float32", "bfloat16"],
    typer.Option(help="What features are rounded to in the product; bfloat16 errs by less than 2e-3."),
]
MemoryMB = Annotated[
    int | None,
    typer.Option(
        help="Bound of the working memory, in MB: 1024 on a CPU, and most of what a GPU has free.",
        min=1,
        show_default=False,
    ),
]


@app.command()
def correlations(
    a: Annotated[Path, typer.Argument(help="A feature store.")],
    b: Annotated[Path, typer.Argument(help="Another of the same samples.")],
    out: Annotated[Path, _out(store_kind("correlations"))],
    precision: Precision = "float32",
    full: Annotated[
        list[str],
        typer.Option(help="LAYER_A:LAYER_B, whose whole matrix is stored; more than one by giving it again."),
    ] = [],  # noqa: B006 - typer copies it
    settings: Annotated[str, typer.Option(help="Both as keys and values, in JSON; they go before the options.")] = "{}",
    memory_mb: MemoryMB = None,
    threads: Threads = 1,
    gpus: GPUs = None,
) -> None:
    """Find each feature's best match in the other encoder, for every pair of layers, in both directions."""
    from conceptshare.correlations import correlate_stores

    _use_threads(threads)
    _use_gpus(gpus)
    for entry in full:
        if not re.fullmatch(r"\d+:\d+", entry):
            raise StudyError(f"--full {entry}: write LAYER_A:LAYER_B, such as 3:5")
    given = {"precision": precision, "full": [entry.split(":") for entry in full]}
    chosen = parse(PairSettings, given | parse_yaml(settings, "--settings"), "settings")
    correlate_stores(a, b, out, _bytes(memory_mb), chosen.precision, chosen.full)


@app.command()
def similarity(
    a: Annotated[Path, typer.Argument(help="An activation store.")],
    b: Annotated[Path, typer.Argument(help="Another of the same samples.")],
    out: Annotated[Path, _out(CSV, PARQUET, ACCOUNT_BESIDE)],
    threads: Threads = 1,
    gpus: GPUs = None,
) -> None:
    """Compare the global tokens of two encoders, for every pair of layers: CKA and mutual nearest neighbours."""
    from conceptshare.analysis.similarity import compare_stores

    _use_threads(threads)
    _use_gpus(gpus)
    compare_stores(a, b, out)


@app.command()
def wmppc(
    a: Annotated[Path, typer.Argument(help="A feature store.")],
    b: Annotated[Path, typer.Argument(help="Another of the same samples.")],
    memory_mb: MemoryMB = None,
    precision: Precision = "float32",
    threads: Threads = 1,
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """Say how much two encoders share, in both directions, from their features alone.

    For each reading: the wMPPC with its 95% interval over samples (low, high), the floor that shuffled samples give,
    the MPPC, and how many of the features match better than with shuffled samples.
    """
    from conceptshare.analysis.ask import wmppc_between

    _use_threads(threads)
    table = wmppc_between(a, b, _bytes(memory_mb), precision)
    typer.echo(table.to_json(orient="records") if as_json else table.to_string(index=False, float_format="%.4f"))


@app.command()
def sharedness(
    source: Annotated[Path, typer.Option(help="The feature store whose features are ranked.")],
    shared_with: Annotated[
        list[Path], typer.Option(help="A store that should share them; more than one by giving it again.")
    ],
    not_shared_with: Annotated[
        list[Path], typer.Option(help="A store that should not; more than one by giving it again.")
    ],
    top: Annotated[
        int | None,
        typer.Option(help="How many features to print: 1% without it.", min=1, show_default=False),
    ] = None,
    out: Annotated[Path | None, _out(CSV, PARQUET, text="Where to write all of them, as CSV and Parquet.")] = None,
    threads: Threads = 1,
) -> None:
    """Rank an encoder's last-layer features by Comparative Sharedness, from features alone."""
    from conceptshare.analysis.ask import sharedness_of
    from conceptshare.analysis.tables import write_table

    _use_threads(threads)
    table = sharedness_of(source, shared_with, not_shared_with)
    if out is not None:
        write_table(table, out)
    shown = table.head(top) if top else table[table.top]
    columns = ["rank", "feature", "delta", "strength", "density", "rho_g", "rho_h"]
    typer.echo(shown[columns].to_string(index=False, float_format="%.4g"))


Features = Annotated[Path, typer.Option(help="The folder of feature stores.")]
Correlations = Annotated[Path, typer.Option(help="The folder of correlation stores.")]
Similarity = Annotated[
    Path | None,
    typer.Option(help="The folder of the similarity stage; without it, its columns are empty.", show_default=False),
]
Members = Annotated[str, typer.Option(help="JSON list of members.")]


@app.command("provenance")
def study_provenance(
    out: Annotated[Path, _out(ACCOUNT, ACCOUNT_PAGE)],
    results: Annotated[
        Path, typer.Option(help="The folder of all results. Those with other settings than the study's are an error.")
    ] = Path("results"),
) -> None:
    """Write down a study, which is read as JSON from standard input, with the versions and the machine it is run on.

    Beside the file, a page of the same is written to read, with the suffix .html.
    """
    key = sys.stdin.read()
    if found := in_words(differences(study_of(key), results)):
        raise StoreError(f"results were made with other settings than the study's:\n{found}")
    provenance.record_study(key, out)


@metrics_app.command("matrix")
def metrics_matrix(
    members: Annotated[str, typer.Option(help="JSON list of [member, modality, kind, other seed or null].")],
    features: Features,
    correlations: Correlations,
    out: TableOut,
    similarity: Similarity = None,
) -> None:
    """The wMPPC from every member to every other, with intervals, floors, ceilings and similarities."""
    from conceptshare.analysis.tables import GroupedMember, Stores, matrix_table, write_table

    example = '[["vit@0", "image", "vision", null], ["bert@0", "text", "language", "bert@1"]]'
    grouped = _json(members, "--members", Annotated[list[GroupedMember], Field(min_length=2)], example)
    write_table(matrix_table(grouped, Stores(features, correlations, similarity)), out)


@metrics_app.command("averages")
def metrics_averages(
    table: Annotated[Path, typer.Option(help="The matrix, as Parquet.")], correlations: Correlations, out: TableOut
) -> None:
    """The mean wMPPC from each modality to each, with its interval."""
    from conceptshare.analysis.tables import Stores, averages_table, made_from, read_table, write_table

    matrix = read_table(table, "matrix")
    made_from(table, matrix, "metrics")
    write_table(averages_table(matrix, Stores(correlations, correlations)), out)


@metrics_app.command("formats")
def metrics_formats(
    table: Annotated[Path, typer.Option(help="The matrix, as Parquet.")],
    averages: Annotated[Path, typer.Option(help="Its modality averages, as Parquet.")],
    out: Annotated[Path, _out(MATRICES, text="The folder to write.")],
    dataset: Annotated[
        str | None,
        typer.Option(help="The paper's name of the data set, to write its Table 3 too.", show_default=False),
    ] = None,
    size: Annotated[Literal["large", "base"], typer.Option(help="Which of the paper's encoders.")] = "large",
) -> None:
    """The matrix of each reading, and the averages, as CSV, Markdown and LaTeX."""
    from conceptshare.analysis import paper
    from conceptshare.analysis.formats import write_matrices
    from conceptshare.analysis.tables import check_averages, read_table

    matrix, means = read_table(table, "matrix"), read_table(averages, "averages")
    check_averages(averages, means, matrix)
    table_3 = None if dataset is None else paper.table_3(matrix, dataset, size)
    write_matrices(matrix, means, out, table_3)


@metrics_app.command("paper")
def metrics_paper(
    table: Annotated[Path, typer.Option(help="The matrix, as Parquet.")],
    dataset: Annotated[str, typer.Option(help="The data set, as the paper has it.")],
    size: Annotated[Literal["large", "base"], typer.Option(help="The size of the encoders.")],
    out: TableOut,
    agreement: Annotated[Path, _out_too(CSV, PARQUET, text="Where to write how well they agree.")],
) -> None:
    """A matrix beside the paper's numbers, cell by cell, and how well they agree."""
    from conceptshare.analysis import paper
    from conceptshare.analysis.tables import read_table, write_table

    cells = paper.compare(read_table(table, "matrix"), dataset, size)
    write_table(cells, out)
    write_table(paper.agreement(cells), agreement)


@metrics_app.command("layerwise")
def metrics_layerwise(
    pairs: Annotated[str, typer.Option(help="JSON list of pairs of members.")],
    features: Features,
    correlations: Correlations,
    out: TableOut,
    similarity: Similarity = None,
) -> None:
    """The wMPPC from every layer of one member to every layer of another."""
    from conceptshare.analysis.tables import Stores, layerwise_table, write_table

    write_table(layerwise_table(_pairs(pairs), Stores(features, correlations, similarity)), out)


@metrics_app.command("pair")
def metrics_pair(
    a: Annotated[str, typer.Argument(help="A member.")],
    b: Annotated[str, typer.Argument(help="Another.")],
    features: Features,
    correlations: Correlations,
    out: TableOut,
) -> None:
    """Every feature of two members with its best match in the other."""
    from conceptshare.analysis.tables import Stores, pair_table, write_table

    write_table(pair_table(a, b, Stores(features, correlations)), out)


@metrics_app.command("sharedness")
def metrics_sharedness(
    analysis: Annotated[str, typer.Option(help="JSON with source, shared_with and not_shared_with.")],
    features: Features,
    correlations: Correlations,
    out: TableOut,
) -> None:
    """A member's features by Comparative Sharedness."""
    from conceptshare.analysis.tables import Stores, sharedness_table, write_table

    example = '{"source": "vit@0", "shared_with": ["bert@0"], "not_shared_with": ["dinov2@0"]}'
    groups = _json(analysis, "--analysis", SharednessGroups, example)
    write_table(sharedness_table(**dict(groups), stores=Stores(features, correlations)), out)


@metrics_app.command("overlaps")
def metrics_overlaps(
    rankings: Annotated[list[Path], typer.Argument(help="Rankings by Comparative Sharedness, as Parquet.")],
    out: TableOut,
) -> None:
    """How many top features every two rankings of one source have in common."""
    from conceptshare.analysis.tables import check_rankings, overlap_table, read_table, write_table

    found = {path: read_table(path, "ranking") for path in rankings}
    check_rankings(found)
    write_table(overlap_table({path.stem: table for path, table in found.items()}), out)


@metrics_app.command("saes")
def metrics_saes(
    members: Members, saes: Annotated[Path, typer.Option(help="The folder of SAEs.")], features: Features, out: TableOut
) -> None:
    """Size and quality of every SAE."""
    from conceptshare.analysis.tables import Stores, sae_table, write_table

    chosen = _json(members, "--members", Annotated[list[str], Field(min_length=1)], '["vit@0", "bert@0"]')
    write_table(sae_table(chosen, saes, Stores(features, features)), out)


Table = Annotated[Path, typer.Option(help="The table to draw, as Parquet or CSV.")]


@figures_app.command("matrix")
def figures_matrix(table: Table, out: FigureOut) -> None:
    """Annotated wMPPC matrices."""
    from conceptshare.analysis.tables import read_table
    from conceptshare.figures import draw_matrix

    draw_matrix(read_table(table, "matrix"), out)


@figures_app.command("averages")
def figures_averages(table: Table, out: FigureOut) -> None:
    """Mean wMPPC from each modality to each."""
    from conceptshare.analysis.tables import read_table
    from conceptshare.figures import draw_averages

    draw_averages(read_table(table, "averages"), out)


@figures_app.command("intervals")
def figures_intervals(table: Table, out: FigureOut) -> None:
    """Each cell of a wMPPC matrix with its interval, floor and ceiling."""
    from conceptshare.analysis.tables import read_table
    from conceptshare.figures import draw_intervals

    draw_intervals(read_table(table, "matrix"), out)


@figures_app.command("similarity")
def figures_similarity(table: Table, out: FigureOut) -> None:
    """CKA and mutual nearest neighbours beside wMPPC."""
    from conceptshare.analysis.tables import read_table
    from conceptshare.figures import draw_similarity

    draw_similarity(read_table(table, "matrix"), out)


@figures_app.command("strength")
def figures_strength(
    table: Annotated[Path, typer.Option(help="The matrix, as Parquet or CSV, for the order of its cells.")],
    pairs: Annotated[Path, typer.Option(help="The folder of the tables of pairs.")],
    out: FigureOut,
) -> None:
    """How strong each member's features are, and how that goes with their best correlations."""
    from conceptshare.analysis.tables import read_direction, read_table
    from conceptshare.figures import draw_strength

    cells = read_table(table, "matrix")[["source", "target"]].drop_duplicates().itertuples(index=False, name=None)
    draw_strength([(source, target, read_direction(pairs, source, target)) for source, target in cells], out)


@figures_app.command("paper")
def figures_paper(table: Table, out: FigureOut) -> None:
    """This study's wMPPC against the paper's."""
    from conceptshare.analysis.tables import read_table
    from conceptshare.figures import draw_paper

    draw_paper(read_table(table, "paper"), out)


@figures_app.command("layerwise")
def figures_layerwise(
    table: Table, pairs: Annotated[str, typer.Option(help="JSON list of pairs of members.")], out: FigureOut
) -> None:
    """Layerwise heatmaps."""
    from conceptshare.analysis.tables import read_table
    from conceptshare.figures import draw_layerwise

    chosen = _pairs(pairs)
    draw_layerwise(read_table(table, "layerwise"), chosen, out)


@figures_app.command("sharedness")
def figures_sharedness(
    table: Table,
    features: Annotated[Path, typer.Option(help="The source's feature store.")],
    data: DataFolder,
    out: FigureOut,
    pictured: Annotated[int, typer.Option(help="How many of the ranking's first features to show.", min=1)] = 6,
    samples: Annotated[int, typer.Option(help="How many samples of each, at most.", min=1)] = 9,
    feature: Annotated[
        list[int] | None,
        typer.Option(help="A feature to show in place of the first ones (repeatable).", min=0, show_default=False),
    ] = None,
    also_top_of: Annotated[
        Path | None,
        typer.Option(help="Another ranking, to show all features in the first 1% of both.", show_default=False),
    ] = None,
    names: Annotated[Path | None, typer.Option(help="The source's table of names.", show_default=False)] = None,
) -> None:
    """Grids of the top samples of a ranking's top features, or of features that are named."""
    from conceptshare.analysis.tables import check_made_from, check_ranking, named_features, read_table
    from conceptshare.data.dataset import Data
    from conceptshare.figures import draw_sharedness
    from conceptshare.io.readers import check_samples, read_modality, read_statistics

    modality, statistics, shown = read_modality(features), read_statistics(features), Data(data)
    check_samples(features, data, shown.content_hash)
    ranking = read_table(table, "ranking")
    check_ranking(table, ranking, features, statistics)
    other = None
    if also_top_of is not None:
        other = read_table(also_top_of, "ranking")
        check_ranking(also_top_of, other, features, statistics)
    ranking = named_features(ranking, feature or [], other)
    if feature or also_top_of:
        pictured = len(ranking)
    called = None if names is None else read_table(names, "names")
    if names is not None and called is not None:
        check_made_from(names, called, features, "names")
    draw_sharedness(ranking, statistics, shown, pictured, out, samples, modality, called)


@figures_app.command("scatter")
def figures_scatter(table: Table, out: FigureOut) -> None:
    """Every feature of a ranking by how much either group shares it."""
    from conceptshare.analysis.tables import read_table
    from conceptshare.figures import draw_sharedness_scatter

    draw_sharedness_scatter(read_table(table, "ranking"), out)


@figures_app.command("saes")
def figures_saes(
    table: Table,
    saes: Annotated[Path, typer.Option(help="The folder of SAEs.")],
    out: Annotated[Path, _out(PNG, PDF, SAE_FIGURES)],
) -> None:
    """Loss curves, densities, FVU and dead latents of every SAE: an overview, and a folder beside it, by member."""
    from conceptshare.analysis.tables import read_table
    from conceptshare.figures import draw_saes

    draw_saes(read_table(table, "saes"), saes, out)


Place = Annotated[str, typer.Option(help="Where in the site this lies.")]


@pages_app.command("samples")
def pages_samples(
    data: DataFolder,
    place: Place,
    out: Annotated[Path, _out(SAMPLE_PAGES)],
    threads: Annotated[int, typer.Option(help="Threads that make thumbnails.", min=1)] = 1,
) -> None:
    """Thumbnails and captions of a data set."""
    from conceptshare.data.dataset import Data
    from conceptshare.pages import write_samples

    write_samples(Data(data), place, out, threads)


@pages_app.command("member")
def pages_member(
    features: FeatureStore,
    examples: Annotated[Path, typer.Option(help="Its folder of examples.")],
    names: Annotated[Path, typer.Option(help="Its table of names.")],
    pairs: Annotated[Path, typer.Option(help="The folder of the tables of pairs.")],
    compared_with: Annotated[str, typer.Option(help="JSON list of the members in these tables.")],
    place: Place,
    out: Annotated[Path, _out(MEMBER_PAGES)],
    rankings: Annotated[
        list[Path] | None, typer.Option("--ranking", help="A ranking of its features, as Parquet.", show_default=False)
    ] = None,
) -> None:
    """Every feature of a member."""
    from conceptshare.pages import write_member

    ranked = {path.stem: path for path in rankings or []}
    others = _json(compared_with, "--compared-with", list[str], '["vit@0", "bert@0"]')
    write_member(features, examples, names, pairs, others, ranked, place, out)


@pages_app.command("pair")
def pages_pair(
    correlations: Annotated[Path, typer.Option(help="The pair's store.")],
    source: Annotated[str, typer.Option(help="A member.")],
    target: Annotated[str, typer.Option(help="The other.")],
    place: Place,
    out: Annotated[Path, _out(PAIR_PAGES)],
) -> None:
    """Every feature of a member with its best match in each layer of another."""
    from conceptshare.pages import write_pair

    write_pair(correlations, source, target, place, out)


@pages_app.command("index")
def pages_index(
    study: Annotated[str, typer.Option(help="JSON of what the study compares.")],
    results: Annotated[Path, typer.Option(help="The folder of all results.")],
    out: Annotated[Path, _out(SITE)],
) -> None:
    """The page itself, and what it shows first."""
    from conceptshare.pages import write_index

    example = (
        '{"study": "mine", "datasets": ["coco"], "saes": ["paper"], "members": [], "matrices": {}, "layerwise": {}, '
        '"sharedness": {}, "overlapping": false}'
    )
    write_index(_json(study, "--study", PagesKey, example).model_dump(), results, out)


def main() -> NoReturn:
    """Run the command line; an error of the user's is one message, and not a traceback."""
    try:
        app(standalone_mode=True)
    except MadeMeanwhileError as message:
        print(message, file=sys.stderr)
    except ConceptshareError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except Exception as error:
        refused = refusal(error)
        if refused is None:
            raise
        print(f"error: {refused}", file=sys.stderr)
        sys.exit(1)
    sys.exit(0)


def _spec(model: type[Any], what: Any, text: str) -> Any:
    """A specification from its name in the catalog, or from JSON, which may name a ``base`` in the catalog."""
    if text.lstrip().startswith("{"):
        values = parse_yaml(text, what)
        entries = read_catalog(what, CATALOG) if "base" in values else {}
        return parse(model, complete("", values, entries, what), what)
    return parse(model, complete(text, None, read_catalog(what, CATALOG), what), f"{what}.{text}")


def _json(text: str, option: str, of: Any, example: str) -> Any:
    """What an option holds as JSON.

    Raises:
        StudyError: if it is not JSON, or its values are not those of the type ``of``.
    """
    try:
        return TypeAdapter(of).validate_json(text)
    except ValidationError as error:
        fault = error.errors()[0]
        place = "".join(f"[{part!r}]" for part in fault["loc"])
        raise StudyError(f"{option}{place}: {fault['msg']}; give JSON such as {example}") from None


def _pairs(text: str) -> list[tuple[str, str]]:
    of = Annotated[list[tuple[str, str]], Field(min_length=1)]
    pairs: list[tuple[str, str]] = _json(text, "--pairs", of, '[["vit@0", "bert@0"]]')
    return pairs


def _bytes(megabytes: int | None) -> int | None:
    return None if megabytes is None else megabytes * 2**20


def _use_threads(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)


def _use_gpus(gpus: int | None) -> None:
    """Let a job compute on the device that `conceptshare.device` chooses, or on the CPU for 0 GPUs, and log it."""
    from conceptshare.device import DEVICE, log_device

    if gpus == 0:
        os.environ[DEVICE] = "cpu"
    log_device()
