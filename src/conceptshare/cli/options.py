"""Options shared by several commands."""

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from conceptshare.config.catalog import CATALOG, complete, parse, parse_yaml, read_catalog
from conceptshare.io.files import CSV, PARQUET, PDF, PNG, Kind, check_replaceable, output_lock


def out_option(kind: Kind, *also: Kind, text: str = "The output path.", first: bool = True) -> Any:
    """Option for an output of a command.

    Args:
        kind: kind of the output.
        also: kinds of further outputs with the same name and another suffix.
        text: the option's help.
        first: whether it is the command's first output, which is locked until the command ends.
    """

    def begin(context: typer.Context, path: Path | None) -> Path | None:
        if path is not None:
            check_replaceable(path, kind)
            for other in also:
                check_replaceable(path.with_suffix(other.suffix), other)
            if first and path.parent.is_dir():  # otherwise no other process is writing there
                context.with_resource(output_lock(path))
        return path

    return typer.Option(help=text, callback=begin, show_default=False)


Entry = Annotated[str, typer.Option(help="A name in the catalog, or keys and values as JSON.")]
Weights = Annotated[Path, typer.Option(help="The record of the weights stage.")]
DataFolder = Annotated[Path, typer.Option(help="The folder of the dataset stage.")]
FeatureStore = Annotated[Path, typer.Option(help="The member's feature store.")]
TableOut = Annotated[Path, out_option(CSV, PARQUET)]
FigureOut = Annotated[Path, out_option(PNG, PDF)]
Threads = Annotated[int, typer.Option(help="Number of CPU threads; affects the last digits of results.", min=1)]
GPUs = Annotated[
    int | None,
    typer.Option(
        "--gpus", help="Number of GPUs requested from the scheduler; 0 computes on the CPU.", show_default=False
    ),
]
MaxFVUGlobal = Annotated[
    float,
    typer.Option(help="Largest FVU of an SAE at global tokens; layers of others are marked as unexplained.", min=0),
]
StudyFile = Annotated[
    Path, typer.Option("--study", help="A study: its config file, or the study.json among its results.")
]


def entry(model: type[Any], what: Any, text: str) -> Any:
    """Parse a catalog entry, given by its name or as JSON, which may name a ``base`` in the catalog."""
    if text.lstrip().startswith("{"):
        values = parse_yaml(text, what)
        entries = read_catalog(what, CATALOG) if "base" in values else {}
        return parse(model, complete("", values, entries, what), what)
    return parse(model, complete(text, None, read_catalog(what, CATALOG), what), f"{what}.{text}")


_OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


def go_offline() -> None:
    """Let the libraries fetch nothing; call it before they are imported."""
    os.environ.update(_OFFLINE)


def in_bytes(megabytes: int | None) -> int | None:
    """Convert MiB to bytes."""
    return None if megabytes is None else megabytes * 2**20


def use_threads(threads: int) -> None:
    """Set the number of CPU threads of torch."""
    import torch

    torch.set_num_threads(threads)


def compute_on(gpus: int | None, threads: int = 0) -> None:
    """Choose the device by `conceptshare.device`, or the CPU for 0 GPUs, and the number of threads; log the device."""
    from conceptshare.device import DEVICE, log_device

    if threads:
        use_threads(threads)
    if gpus == 0:
        os.environ[DEVICE] = "cpu"
    log_device()
