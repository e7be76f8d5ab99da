"""Commands for a whole study."""

import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from conceptshare.cli.options import StudyFile, out_option
from conceptshare.config.catalog import EncoderSpec
from conceptshare.config.study import load_study
from conceptshare.io import provenance
from conceptshare.io.errors import ConceptshareError, StoreError
from conceptshare.io.files import PROVENANCE_RECORD
from conceptshare.io.progress import about
from conceptshare.preflight.differences import differences, in_words
from conceptshare.preflight.plan import Rates, make_plan, plan_as_json, plan_as_text

app = typer.Typer()


@app.command()
def check(
    study: StudyFile = Path("config.yaml"),
    load: Annotated[
        bool,
        typer.Option("--load", help="Also find or fetch each encoder, load it, and test it on two samples."),
    ] = False,
) -> None:
    """Check a study and list its data sets, encoders, members and pairs."""
    read = load_study(study)
    typer.echo(f"{study}: study {read.study!r} is valid")
    typer.echo(f"  data sets: {', '.join(read.datasets)}")
    typer.echo(f"  encoders:  {', '.join(read.encoders)}")
    typer.echo(f"  SAE settings: {', '.join(read.saes)}")
    typer.echo(f"  members: {len(read.members())}, pairs to correlate: {len(read.pairs())}")
    if load:
        _try_encoders(read.encoders)


def _try_encoders(encoders: dict[str, EncoderSpec]) -> None:
    """Load every encoder, and exit with 1 in the end if any cannot be loaded."""
    from conceptshare.encoders import try_encoder
    from conceptshare.encoders.weights import locate

    faults = 0
    for name, spec in encoders.items():
        try:
            with TemporaryDirectory() as folder, about(f"encoders.{name}"):
                try_encoder(spec, locate(spec, made=Path(folder) / "model"))
        except ConceptshareError as error:
            faults += 1
            print(f"error: encoders.{name}: {error}", file=sys.stderr)
    if faults:
        raise typer.Exit(1)


@app.command()
def plan(
    study: StudyFile = Path("config.yaml"),
    samples: Annotated[int | None, typer.Option(help="Number of samples to assume per data set.", min=2)] = None,
    tflops: Annotated[float, typer.Option(help="Float32 TFLOP/s of the GPU.", min=1e-6)] = Rates.tflops,
    disk_mb_per_s: Annotated[float, typer.Option(help="MB/s of the disk.", min=1e-6)] = Rates.disk_mb_per_s,
    cpu_gflops: Annotated[float, typer.Option(help="Float32 GFLOP/s of a job's cores.", min=1e-6)] = Rates.cpu_gflops,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON: bytes, operations and hours.")] = False,
) -> None:
    """Estimate the cost of a study: jobs, disk, memory and hours. Uses only the study; nothing is run."""
    estimate = make_plan(load_study(study), Rates(tflops, disk_mb_per_s, cpu_gflops), samples)
    typer.echo(plan_as_json(estimate) if as_json else plan_as_text(estimate))


@app.command()
def doctor(
    study: Annotated[
        Path | None, typer.Option(help="A study; by default config.yaml, if it exists.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check this machine; exit 1 if something required is missing."""
    from conceptshare.preflight.doctor import as_json as in_json
    from conceptshare.preflight.doctor import as_text, examine

    default = Path("config.yaml")
    findings = examine(study or (default if default.is_file() else None))
    typer.echo(in_json(findings) if as_json else as_text(findings))
    if any(finding.status == "missing" for finding in findings):
        raise typer.Exit(1)


@app.command("provenance")
def study_provenance(
    study: StudyFile,
    out: Annotated[Path, out_option(PROVENANCE_RECORD)],
    results: Annotated[
        Path, typer.Option(help="The folder of all results. Those with other settings than the study's are an error.")
    ] = Path("results"),
) -> None:
    """Write down a study with the versions and the machine it is run on, as JSON."""
    read = load_study(study)
    if found := in_words(differences(read, results)):
        raise StoreError(f"results were made with other settings than the study's:\n{found}")
    provenance.record_study(read.study_key(), out)
