"""Commands for a whole study."""

import re
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, TypeVar

import typer

from conceptshare.cli.options import StudyFile, out_option
from conceptshare.config.catalog import DatasetSpec, EncoderSpec, is_path
from conceptshare.config.study import Study, load_study
from conceptshare.io import layout, provenance
from conceptshare.io.errors import ConceptshareError, StoreError, StudyError
from conceptshare.io.files import PROVENANCE_RECORD
from conceptshare.io.layout import path
from conceptshare.io.progress import about
from conceptshare.preflight.differences import differences, in_words
from conceptshare.preflight.plan import Rates, make_plan, plan_as_json, plan_as_text

app = typer.Typer()

T = TypeVar("T")


@app.command()
def check(
    study: StudyFile = Path("config.yaml"),
    load: Annotated[
        bool,
        typer.Option(
            "--load",
            help="Also find or fetch each encoder and imported SAE, load it, and test encoders on two samples.",
        ),
    ] = False,
) -> None:
    """Check a study and the columns of its local data sets, and list its data sets, encoders, members and pairs."""
    read = load_study(study)
    typer.echo(f"{study}: study {read.study!r} is valid")
    typer.echo(f"  data sets: {', '.join(read.datasets)}")
    typer.echo(f"  encoders:  {', '.join(read.encoders)}")
    typer.echo(f"  SAE settings: {', '.join(read.saes)}")
    typer.echo(f"  members: {len(read.members())}, pairs to correlate: {len(read.pairs())}")
    local = {name: spec for name, spec in read.datasets.items() if is_path(spec.source)}
    sound = _all_pass("datasets", local, _check_columns)
    if load:
        sound &= _all_pass("encoders", read.encoders, partial(_try_encoder, read))
        pretrained = {
            f"{sae}.pretrained.{read.name_in_config(encoder)}": (spec, read.pretrained(sae, encoder))
            for sae in read.saes
            for encoder, spec in read.encoders.items()
        }
        sound &= _all_pass("saes", pretrained, _try_saes)
    if not sound:
        raise typer.Exit(1)


def _all_pass(part: str, specs: dict[str, T], check: Callable[[T], None]) -> bool:
    """Whether all entries of a part of the study pass a check; prints what each of the others raises."""
    faults = 0
    for name, spec in specs.items():
        try:
            with about(f"{part}.{name}"):
                check(spec)
        except ConceptshareError as error:
            faults += 1
            print(f"error: {part}.{name}: {error}", file=sys.stderr)
    return not faults


def _check_columns(spec: DatasetSpec) -> None:
    from conceptshare.data.rows import check_columns

    check_columns(spec)


def _try_encoder(study: Study, spec: EncoderSpec) -> None:
    from conceptshare.data.dataset import Data
    from conceptshare.encoders import try_encoder
    from conceptshare.encoders.weights import find

    made = path(layout.DATA, dataset=min(study.datasets))  # the only one, for arrays
    data = Data(made) if spec.library == "arrays" and made.exists() else None
    with TemporaryDirectory() as folder:
        try_encoder(spec, find(spec, made=Path(folder) / "model").location, data)


def _try_saes(pretrained: tuple[EncoderSpec, dict[tuple[int, int], str]]) -> None:
    from conceptshare.sae.exchange import import_sae

    spec, sources = pretrained
    for (layer, _), source in sources.items():
        with TemporaryDirectory() as folder:
            import_sae(source, Path(folder) / "sae", spec.width_of(layer), layer)


@app.command()
def plan(
    study: StudyFile = Path("config.yaml"),
    samples: Annotated[int | None, typer.Option(help="Number of samples to assume per data set.", min=2)] = None,
    tflops: Annotated[float, typer.Option(help="Float32 TFLOP/s of the GPU.", min=1e-6)] = Rates.tflops,
    half_tflops: Annotated[
        float, typer.Option(help="TFLOP/s of the GPU for float16 products.", min=1e-6)
    ] = Rates.half_tflops,
    disk_mb_per_s: Annotated[float, typer.Option(help="MB/s of the disk.", min=1e-6)] = Rates.disk_mb_per_s,
    cpu_gflops: Annotated[float, typer.Option(help="Float32 GFLOP/s of a job's cores.", min=1e-6)] = Rates.cpu_gflops,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON: bytes, operations and hours.")] = False,
) -> None:
    """Estimate the cost of a study: jobs, disk, memory and hours. Uses only the study; nothing is run."""
    estimate = make_plan(load_study(study), Rates(tflops, half_tflops, disk_mb_per_s, cpu_gflops), samples)
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
    _check_settings(read, results)
    provenance.record_study(read.study_key(), out)


def _check_settings(study: Study, results: Path) -> None:
    if found := in_words(differences(study, results)):
        raise StoreError(f"results were made with other settings than the study's:\n{found}")


@app.command()
def publish(
    repository: Annotated[
        str, typer.Argument(help="The repository on the hub, OWNER/NAME; made if it does not exist.")
    ],
    study: StudyFile = Path("config.yaml"),
    results: Annotated[Path, typer.Option(help="The folder of all results.")] = Path("results"),
    features: Annotated[bool, typer.Option("--features", help="Also publish feature stores and names.")] = False,
    licence: Annotated[str, typer.Option(help="Licence of the SAEs, by its identifier on the hub.")] = "unknown",
    push: Annotated[bool, typer.Option("--push", help="Upload; by default, only write and list the files.")] = False,
) -> None:
    """Publish the SAEs of a finished study on a model hub, with a model card."""
    from conceptshare.analysis.release import check_licence, write_release
    from conceptshare.io.hub import upload

    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise StudyError(f"{repository}: write the repository as OWNER/NAME")
    check_licence(licence)
    read = load_study(study)
    _check_settings(read, results)
    out = path(layout.RELEASE, results, study=read.study)
    write_release(read, results, repository, licence, features, out)
    sizes: Counter[Path] = Counter()
    for file in out.rglob("*"):
        if file.is_file():  # the files of a store together
            sizes[next((folder for folder in file.parents if folder.suffix == ".zarr"), file)] += file.stat().st_size
    for place, size in sorted(sizes.items()):
        typer.echo(f"{size:>17,}  {place.relative_to(out)}")
    typer.echo(f"{sizes.total():>17,}  bytes at {out}")
    if push:
        typer.echo(f"uploaded: {upload(repository, out)}")
    else:
        typer.echo(f"nothing was uploaded; read {out / 'README.md'}, then run again with --push")
