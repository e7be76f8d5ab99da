"""Commands on a study as a whole."""

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
from conceptshare.preflight.differences import differences, in_words
from conceptshare.preflight.plan import Rates, make_plan, plan_as_json, plan_as_text

app = typer.Typer()


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
