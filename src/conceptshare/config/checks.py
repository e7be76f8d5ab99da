"""What a study's parts, each valid by itself, must be to each other: checked before any work.

Each check raises a ValueError, or a StudyError, that names the key and the remedy.
"""

from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

from conceptshare.config.catalog import local_path, suggest
from conceptshare.config.pretrained import Source, check_fit, read_foreign
from conceptshare.config.products import taken_by
from conceptshare.config.settings import paper_encoders
from conceptshare.io.errors import StoreError, StudyError

if TYPE_CHECKING:
    from conceptshare.config.study import Study

# What `results/` and a study's folder hold next to the folders of data sets, in lower case, as some disks have it.
_NOT_DATASETS = {"weights", "pretrained", "studies", "releases", "logs"}
_NOT_DATASETS |= {"readme.md", "pages", "provenance.json", "report.zip"}

_READS = {"image": "images", "text": "text"}

# Bytes that most disks allow in a file's name. Slurm's logs join all names of a job, by an underscore each.
_MAX_FILE_NAME_LENGTH = 255

# Features are numbered by int32.
_MAX_LATENTS = 2**31 - 1


def check_study(study: "Study") -> None:
    """Make sure that a study's parts fit each other.

    Raises:
        ValueError: naming the key and the remedy.
    """
    _check_members(study)
    _check_matrices(study)
    _check_layerwise(study)
    _check_sharedness(study)
    _check_samples(study)
    _check_analysis_names(study)
    _check_names(study)
    _check_features(study)
    _check_encoders(study)
    _check_saes(study)


def check_files(study: "Study") -> None:
    """Make sure that what the study reads from this machine is there.

    Raises:
        StudyError: naming the key and the path.
    """
    sources = [(f"datasets.{name}.source", spec.source, False) for name, spec in study.datasets.items()]
    models = [
        (f"encoders.{study.name_in_config(name)}.model", spec.model, spec.library == "arrays")
        for name, spec in study.encoders.items()
    ]
    folders = [
        (f"datasets.{name}.image_folder", spec.image_folder, True)
        for name, spec in study.datasets.items()
        if spec.image_folder is not None
    ]
    for key, text, is_folder in sources + folders + models:
        path = Path(text).expanduser() if is_folder else local_path(text)
        if path is not None and not path.exists():
            raise StudyError(f"{key}: {text} does not exist; paths are relative to the working directory")
    for sae, encoder in product(study.saes, study.encoders):
        for (layer, _), text in study.pretrained(sae, encoder).items():
            source = Source.parse(text)
            if source.repository is None:
                _check_local_sae(study, sae, encoder, layer, Path(source.place).expanduser())


def _check_local_sae(study: "Study", sae: str, encoder: str, layer: int, place: Path) -> None:
    try:
        check_fit(place, read_foreign(place), study.encoders[encoder].width_of(layer), layer)
    except StoreError as error:
        raise StudyError(f"saes.{sae}.pretrained.{study.name_in_config(encoder)}: {error}") from None


def _named_members(study: "Study") -> Iterator[tuple[str, str]]:
    """Each place of the config that names a member, with the text it holds."""
    for name, matrix in study.analyses.matrices.items():
        yield from ((f"analyses.matrices.{name}.members", text) for text in matrix.members or [])
    for name, layerwise in study.analyses.layerwise.items():
        yield from ((f"analyses.layerwise.{name}.pairs", text) for pair in layerwise.pairs for text in pair)
    for name, analysis in study.analyses.sharedness.items():
        yield f"analyses.sharedness.{name}.source", analysis.source
        yield from ((f"analyses.sharedness.{name}.shared_with", text) for text in analysis.shared_with)
        yield from ((f"analyses.sharedness.{name}.not_shared_with", text) for text in analysis.not_shared_with)
    for name, fit in study.analyses.samples.items():
        yield from ((f"analyses.samples.{name}.{side}", getattr(fit, side)) for side in ("image", "text"))


def _check_members(study: "Study") -> None:
    for where, text in _named_members(study):
        try:
            study.member(text)
        except StudyError as error:
            raise ValueError(f"{where}: {error}") from None


def _check_matrices(study: "Study") -> None:
    for name, matrix in study.analyses.matrices.items():
        if len(study.matrix_members(name)) < 2:
            raise ValueError(f"analyses.matrices.{name}: a matrix needs two members at least; name more, or none")
        if matrix.paper:
            _check_paper(study, name, matrix.paper)


def _check_paper(study: "Study", name: str, size: str) -> None:
    place = f"analyses.matrices.{name}.paper"
    known = [data for data, of_size in paper_encoders() if of_size == size]
    datasets = study.paper_datasets(name)
    if not datasets:
        raise ValueError(
            f"{place}: the paper has {size} encoders on {', '.join(known)}, and none of them is a data set of this "
            f"study; add one, or leave paper out"
        )
    members = {study.name_in_config(encoder).removesuffix(f"-{size}") for encoder, _ in study.matrix_members(name)}
    for dataset in datasets:
        names = paper_encoders()[dataset, size]
        if len(members & set(names)) < 2:
            raise ValueError(
                f"{place}: fewer than two members are among the paper's {size} encoders on {dataset}, which are "
                f"{', '.join(f'{own}-{size}' for own in names)}; add more of them, or leave paper out"
            )


def _check_layerwise(study: "Study") -> None:
    for name, layerwise in study.analyses.layerwise.items():
        for a, b in layerwise.pairs:
            if study.member(a) == study.member(b):
                raise ValueError(
                    f"analyses.layerwise.{name}: {a} is paired with itself, so every feature has a perfect match; "
                    f"pair two seeds or two encoders"
                )


def _check_sharedness(study: "Study") -> None:
    for name, analysis in study.analyses.sharedness.items():
        shared = {study.member(text) for text in analysis.shared_with}
        not_shared = {study.member(text) for text in analysis.not_shared_with}
        if study.member(analysis.source) in shared | not_shared:
            raise ValueError(
                f"analyses.sharedness.{name}: the source {analysis.source} is also in a group it is compared with, "
                f"so every feature has a perfect match; leave it out of that group"
            )
        if both := shared & not_shared:
            raise ValueError(
                f"analyses.sharedness.{name}: {min(both)} is in both groups, and cannot share a feature and not share "
                f"it; leave it out of one"
            )


def _check_samples(study: "Study") -> None:
    for name in study.analyses.samples:
        sides = study.samples_sides(name)
        for side, (encoder, _) in zip(("image", "text"), study.samples_pair(name), strict=True):
            spec, own = study.encoders[encoder], study.name_in_config(encoder)
            if spec.modality != side:
                raise ValueError(
                    f"analyses.samples.{name}.{side}: {own} reads {_READS[spec.modality]}; name an encoder that reads "
                    f"{_READS[side]}"
                )
            recorded = spec.layer_numbers()
            if absent := [layer for layer in sides[f"{side}_layers"] if layer not in recorded]:
                raise ValueError(
                    f"analyses.samples.{name}.{side}_layers: {own} has no recorded layer {absent[0]}; it has "
                    f"{', '.join(map(str, recorded))}"
                )


def _check_analysis_names(study: "Study") -> None:
    for kind, analyses in study.analyses:
        for name in analyses:
            if taken := taken_by(kind, name) & analyses.keys():
                raise ValueError(f"analyses.{kind}.{min(taken)}: a file of {name} has that name; choose another name")


def _check_names(study: "Study") -> None:
    """Refuse names whose folders or log files would clash, or be too long for a disk."""
    for dataset in study.datasets:
        if dataset.casefold() in _NOT_DATASETS:
            raise ValueError(f"datasets.{dataset}: results/ has something else of that name; choose another name")
    members = sorted((str(member) for pair in study.pairs() for member in pair), key=len)
    analyses = sorted((name for _, named in study.analyses for name in named), key=len)
    first = [study.study, max(study.datasets, key=len), max(study.coded(), key=len)]
    for last in (members[-2:], analyses[-1:]):
        joined = "_".join([*first, *last])
        if len(joined) > _MAX_FILE_NAME_LENGTH:
            raise ValueError(
                f"the names {', '.join([*first, *last])} have {len(joined)} letters together, and Slurm's logs join "
                f"them in the name of one folder, which has {_MAX_FILE_NAME_LENGTH} at most; shorten one"
            )


def _check_features(study: "Study") -> None:
    if len(set(study.features)) < len(study.features):
        raise ValueError(f"features: {study.features[0]} is listed twice; leave one out")


def _check_encoders(study: "Study") -> None:
    for encoder, spec in study.encoders.items():
        if encoder.endswith(".provenance"):
            raise ValueError(
                f"encoders.{encoder}: a file of that name tells how the weights of another came about; choose another "
                f"name"
            )
        if spec.library == "arrays":
            _check_arrays(study, encoder)
        if isinstance(spec.width, list):
            _check_widths(study, encoder)
        if spec.parts > 1 and study.stream:
            raise ValueError(
                f"encoders.{study.name_in_config(encoder)}.parts: a stream is one job, as its SAEs learn from all "
                f"samples in turn; leave parts out, or set stream: false"
            )


def _check_arrays(study: "Study", encoder: str) -> None:
    """Refuse what arrays do not have: a second data set, another global token, and other tokens."""
    place = f"encoders.{study.name_in_config(encoder)}: library: arrays"
    if len(study.datasets) > 1:
        raise ValueError(f"{place} has one data set, but the study {len(study.datasets)}; make a study of each")
    if study.preset == "reference":
        raise ValueError(f"{place} has no token at position 0; leave preset: reference out")
    if other := next((name for name, settings in study.saes.items() if settings.train_on == "all"), None):
        raise ValueError(
            f"{place} has one vector per sample, but saes.{other} trains on all tokens; set saes.{other}.train_on: "
            f"global, or preset: global"
        )


def _check_widths(study: "Study", encoder: str) -> None:
    """Refuse SAEs that layers of several widths cannot have."""
    place = f"encoders.{study.name_in_config(encoder)} has layers of several widths"
    for name, settings in study.saes.items():
        if settings.train_on == "all":
            raise ValueError(
                f"{place}, of which only global tokens are stored, but saes.{name} trains on all tokens; set "
                f"saes.{name}.train_on: global, or preset: global"
            )
        if settings.features is None:
            raise ValueError(
                f"{place}, but features of one number are compared; set saes.{name}.features in place of expansion"
            )


def _check_saes(study: "Study") -> None:
    for name, settings in study.saes.items():
        if settings.precision == "tf32" and study.stream:
            raise ValueError(
                f"saes.{name}.precision: tf32 would also round the products of the encoder that a stream runs; take "
                f"bfloat16, or set stream: false"
            )
        _check_pretrained(study, name)
        for encoder, spec in study.encoders.items():
            if study.pretrained(name, encoder):
                continue
            latents = settings.latents(spec.mean_width)
            if latents > _MAX_LATENTS:
                raise ValueError(
                    f"saes.{name}.expansion: {settings.expansion} gives {study.name_in_config(encoder)} {latents} "
                    f"latents, and more than {_MAX_LATENTS} cannot be numbered; lower it"
                )
            if settings.k > latents:
                raise ValueError(
                    f"saes.{name}.k: {settings.k} is more than the {latents} latents that "
                    f"{study.name_in_config(encoder)} has; lower k, or raise expansion or features"
                )
            if settings.matryoshka and settings.matryoshka[-1] > latents:
                raise ValueError(
                    f"saes.{name}.matryoshka: {settings.matryoshka[-1]} is more than the {latents} latents that "
                    f"{study.name_in_config(encoder)} has; leave it out, or raise expansion or features"
                )


def _check_pretrained(study: "Study", sae: str) -> None:
    given = study.saes[sae].pretrained or {}
    known = [study.name_in_config(encoder) for encoder in study.encoders]
    for name in given.keys() - set(known):
        raise ValueError(f"saes.{sae}.pretrained.{name}: the study has no such encoder; {suggest(name, known)}")
    for encoder, name in zip(study.encoders, known, strict=True):
        place = f"saes.{sae}.pretrained.{name}"
        try:
            sources = study.pretrained(sae, encoder)
            for source in sources.values():
                Source.parse(source)
        except (ValueError, StoreError) as error:
            raise ValueError(f"{place}: {error}") from None
        if len(set(sources.values())) < len(sources):
            seeds = study.encoders[encoder].seeds
            apart = f", and {{seed}} for the seeds {seeds}, or leave all but one of these out" if seeds[1:] else ""
            raise ValueError(f"{place}: the same SAE for several layers or seeds; write {{layer}}{apart}")
