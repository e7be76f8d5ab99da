"""The study: which data sets, encoders, SAEs and analyses, read from `config.yaml` and checked before any work.

A *member* is an encoder with the seed of its SAEs, written ``encoder@seed``. The study lists the members and the
pairs of members that its analyses need; the workflow makes those and nothing else.
"""

import csv
import json
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator, model_validator

from conceptshare.config.catalog import (
    CATALOG,
    TOLD_ONLY,
    DatasetSpec,
    EncoderSpec,
    Name,
    Positive,
    Spec,
    canonical,
    complete,
    local_path,
    parse,
    read_catalog,
    read_yaml,
    suggest,
)
from conceptshare.config.products import FIGURES, TABLES, Figure, Table, taken_by
from conceptshare.io.errors import StudyError
from conceptshare.io.files import STUDY, atomic_output

# Groups of a matrix, in the order of the paper's tables: what reads images first, then what reads text.
_GROUPS = [("image", "vlm"), ("image", "vision"), ("text", "vlm"), ("text", "language")]

# What `results/` and a study's folder hold next to the folders of data sets, in lower case, as some disks have it.
_NOT_DATASETS = {"weights", "studies", "logs", "readme.md", "pages", "provenance.json", "report.zip"}

# Bytes that most disks allow in a file's name. Slurm's logs join all names of a job, by an underscore each.
_LONGEST_FILE_NAME = 255

# Features are numbered by int32.
_MOST_LATENTS = 2**31 - 1

# What the reference preset adds to an encoder's name, so that neither choice of token overwrites the other.
_REFERENCE_SUFFIX = ".reference"


class Member(NamedTuple):
    """An encoder with the seed of the SAEs trained on it."""

    encoder: str
    seed: int

    def __str__(self) -> str:
        return f"{self.encoder}@{self.seed}"


Pair = tuple[Member, Member]


class GroupedMember(NamedTuple):
    """A member of a matrix with its group."""

    member: str
    modality: str
    kind: str
    ceiling: str | None = None
    """The same encoder with another seed, if it has one."""


class SAESettings(Spec):
    """Training of sparse autoencoders. The defaults are the paper's; the preset `gao` follows Gao et al. (2024)."""

    preset: Literal["paper", "gao"] = "paper"
    """Source of the defaults: ``gao`` sets ``auxk: 0.03125``, ``initial_b_dec: mean``, ``unit_norm_decoder: true`` and
    a learning rate of 2e-4 / sqrt(F / 16384)."""
    expansion: int = Field(default=8, ge=1, le=10_000)
    """Latents per dimension of the residual stream: F = expansion x D."""
    k: Positive = 32
    """Latents that TopK keeps per token."""
    learning_rate: float | None = Field(default=5e-5, gt=0, le=100)
    """Adam's learning rate; none means 2e-4 / sqrt(F / 16384)."""
    warmup_steps: int = Field(default=0, ge=0, le=10**9)
    """Steps of linear warm-up of the learning rate."""
    decay_share: float = Field(default=0, ge=0, le=1)
    """Fraction of the steps, at the end, over which the learning rate decays to 0."""
    clip_norm: float | None = Field(default=None, gt=0, le=10**9)
    """Maximum global gradient norm; larger gradients are clipped."""
    epochs: int = Field(default=1, ge=1, le=10_000)
    """Passes over the data set."""
    batch_samples: int = Field(default=16, ge=1, le=10**6)
    """Images per step; a batch has all their tokens."""
    batch_captions: int = Field(default=256, ge=1, le=10**6)
    """Captions per step, for text encoders."""
    held_out: float = Field(default=0, ge=0, lt=1)
    """Fraction of samples (the last ones) held out from training and used for the metrics."""
    precision: Literal["float32", "tf32", "bfloat16"] = "float32"
    """Precision of x and W_enc in the product that selects the k latents; everything else is float32. ``tf32`` is for
    NVIDIA GPUs and stored tokens; other devices use float32 instead."""
    initial_b_dec: Literal["zeros", "mean"] = "zeros"
    """Initial b_dec: zeros, or the mean of the first batch."""
    encoder_bias: bool = False
    """Train an encoder bias."""
    unit_norm_decoder: bool = False
    """Keep each latent's decoder row at length 1."""
    scale_inputs: bool = False
    """Train on tokens scaled to a mean length of sqrt(D); the scale is folded into the saved weights."""
    auxk: float = Field(default=0, ge=0, le=10**6)
    """Weight of the auxiliary loss that trains dead latents to reconstruct the residual (Gao et al. 2024, A.2)."""
    auxk_latents: Positive = 512
    """Dead latents per token in the auxiliary loss."""
    dead_after: int = Field(default=10_000_000, ge=1, le=10**15)
    """Tokens without activation after which a latent counts as dead, for ``auxk``."""
    max_dead: float = Field(default=0.5, ge=0, le=1)
    """Log a warning if a larger fraction of latents is active on no token."""

    @model_validator(mode="before")
    @classmethod
    def _with_preset(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("preset") == "gao":
            return _GAO | values
        return values

    def held_out_samples(self, samples: int) -> int:
        """How many of so many samples, the last ones, are not trained on."""
        return int(samples * self.held_out)

    def samples_a_step(self, modality: str) -> int:
        """How many samples of a modality one step trains on."""
        return self.batch_captions if modality == "text" else self.batch_samples

    def rate(self, latents: int) -> float:
        """The learning rate for F latents."""
        return 2e-4 / (latents / 2**14) ** 0.5 if self.learning_rate is None else self.learning_rate


_GAO = {"auxk": 1 / 32, "initial_b_dec": "mean", "unit_norm_decoder": True, "learning_rate": None}


class PairSettings(Spec):
    """Correlation settings of one pair of members."""

    precision: Literal["float32", "bfloat16"] = "float32"
    """Precision of standardised features in the product."""
    full: list[tuple[int, int]] = Field(default=[])
    """Pairs of layers, of the first and of the second member, whose complete correlation matrix is stored."""


class CorrelationSettings(Spec):
    """Correlations of features."""

    precision: Literal["float32", "bfloat16"] = "float32"
    """Precision of standardised features in the product, which is summed in float32. ``bfloat16`` is faster on NVIDIA
    GPUs, with an error below 2e-3 in any correlation; CPUs use float32 instead, so the same config works on both."""
    memory_mb: Positive | None = None
    """Working memory of a job in MB; none means 1 GiB on a CPU, and most of the free memory of a GPU."""
    full: list[tuple[str, int, str, int]] = Field(default=[])
    """Pairs of layers whose complete correlation matrix is stored in addition to the best matches: member, layer,
    member, layer. An analysis must compare the two members."""


class Matrix(Spec):
    """wMPPC between all pairs of members, over all layers and for the last layers."""

    members: list[str] | None = None
    """The members, as ``encoder`` or ``encoder@seed``; by default, every encoder of the study with its first seed."""
    paper: Literal["large", "base"] | None = None
    """Compare with the paper's numbers for encoders of this size, which exist for ``large`` on coco, laion and flowers,
    and for ``base`` on coco."""


class Layerwise(Spec):
    """wMPPC between each layer of one member and each layer of another: one heatmap per pair, in one figure."""

    pairs: list[tuple[str, str]] = Field(min_length=1)
    """Pairs of members: rows first, then columns."""


class Sharedness(Spec):
    """Comparative Sharedness (Eq. 7 and 8): last-layer features that one group shares and another does not."""

    source: str
    """The member whose features are ranked."""
    shared_with: list[str] = Field(min_length=1)
    """The group G of members that should share them."""
    not_shared_with: list[str] = Field(min_length=1)
    """The group H of members that should not."""
    pictured: int = Field(default=6, ge=1, le=1000)
    """Number of top features in the figure of their samples."""


def _or_empty(value: Any) -> Any:
    return {} if value is None else value


class NameSettings(Spec):
    """Names of features."""

    command: str | None = None
    """A program that names features instead of the words of their captions, such as one that queries a language model.
    For each feature, it reads a line of JSON with captions of samples on which it is strong, and of others, and prints
    a line with its name; docs/formats.md describes both."""


class Analyses(Spec):
    """The analyses, by name. Each is done for every data set and SAE setting."""

    matrices: dict[Name, Annotated[Matrix, BeforeValidator(_or_empty)]] = Field(default={})
    """wMPPC between all pairs of encoders."""
    layerwise: dict[Name, Layerwise] = Field(default={})
    """wMPPC between all layers of two encoders."""
    sharedness: dict[Name, Sharedness] = Field(default={})
    """Rankings of features by Comparative Sharedness."""


class Study(Spec):
    """One study, complete: every entry has been merged with its catalog entry."""

    study: Name
    """Name of the folder under `results/studies/`."""
    preset: Literal["own", "reference"] = "own"
    """The global token: each encoder's own ``global_token``, or, for every encoder, that of the paper's published code
    (``global_token: reference``), under names that end in ``.reference``."""
    datasets: dict[Name, DatasetSpec] = Field(min_length=1)
    """Data sets by name. Every analysis is done for each."""
    encoders: dict[Name, EncoderSpec] = Field(min_length=1)
    """Encoders by name."""
    saes: dict[Name, Annotated[SAESettings, BeforeValidator(_or_empty)]] = Field(min_length=1)
    """SAE settings by name. Every analysis is done for each."""
    stream: bool = False
    """Train all SAEs of an encoder during its forward pass and store no tokens. The SAEs are the same, but each epoch
    needs another forward pass, and adding a seed retrains all SAEs of the encoder."""
    keep_tokens: bool = True
    """Keep an encoder's tokens on disk after its SAEs are trained. Without them, adding a seed or an SAE setting
    extracts the tokens again and retrains all SAEs of the encoder; adding encoders, analyses or data sets costs the
    same. A stream keeps none."""
    correlations: Annotated[CorrelationSettings, BeforeValidator(_or_empty)] = CorrelationSettings()
    """Correlations of features."""
    names: Annotated[NameSettings, BeforeValidator(_or_empty)] = NameSettings()
    """Names of features."""
    analyses: Annotated[Analyses, BeforeValidator(_or_empty)] = Analyses()
    """The analyses."""

    @field_validator("encoders", mode="after")
    @classmethod
    def _with_preset(cls, encoders: dict[str, EncoderSpec], info: ValidationInfo) -> dict[str, EncoderSpec]:
        if info.data.get("preset") != "reference":
            return encoders
        return {
            name + _REFERENCE_SUFFIX: spec.model_copy(update={"global_token": "reference"})
            for name, spec in encoders.items()
        }

    @model_validator(mode="after")
    def _check(self) -> Self:
        for where, text in self._named_members():
            try:
                self.member(text)
            except StudyError as error:
                raise ValueError(f"{where}: {error}") from None
        for name, matrix in self.analyses.matrices.items():
            if len(self.matrix_members(name)) < 2:
                raise ValueError(f"analyses.matrices.{name}: a matrix needs two members at least; name more, or none")
            if matrix.paper:
                self._check_paper(name, matrix.paper)
        for name, layerwise in self.analyses.layerwise.items():
            for a, b in layerwise.pairs:
                if self.member(a) == self.member(b):
                    raise ValueError(
                        f"analyses.layerwise.{name}: {a} is paired with itself, where every feature has a perfect "
                        f"match; pair two seeds or two encoders"
                    )
        for name, analysis in self.analyses.sharedness.items():
            if self.member(analysis.source) in self._group(analysis):
                raise ValueError(
                    f"analyses.sharedness.{name}: the source {analysis.source} is also in a group it is compared "
                    f"with, where every feature has a perfect match; leave it out there"
                )
            both = {self.member(m) for m in analysis.shared_with} & {self.member(m) for m in analysis.not_shared_with}
            if both:
                raise ValueError(
                    f"analyses.sharedness.{name}: {min(both)} is in both groups, and cannot share a feature and not "
                    f"share it; leave it out of one"
                )
        for kind, analyses in self.analyses:
            for name in analyses:
                taken = taken_by(kind, name) & analyses.keys()
                if taken:
                    raise ValueError(
                        f"analyses.{kind}.{min(taken)}: a file of {name} has that name; choose another name"
                    )
        self._check_full()
        self._check_paths()
        for encoder, spec in self.encoders.items():
            if encoder.endswith(".provenance"):
                raise ValueError(
                    f"encoders.{encoder}: a file of that name tells how the weights of another came about; choose "
                    f"another name"
                )
            if self.stream and spec.parts > 1:
                raise ValueError(
                    f"encoders.{self.name_in_config(encoder)}.parts: a stream is one job, as its SAEs learn from all "
                    f"samples in turn; leave parts out, or set stream: false"
                )
        for name, settings in self.saes.items():
            for encoder, spec in self.encoders.items():
                latents = settings.expansion * spec.width
                if settings.precision == "tf32" and self.stream:
                    raise ValueError(
                        f"saes.{name}.precision: tf32 would also round the products of the encoder that a stream runs; "
                        f"take bfloat16, or set stream: false"
                    )
                if latents > _MOST_LATENTS:
                    raise ValueError(
                        f"saes.{name}.expansion: {settings.expansion} gives {self.name_in_config(encoder)} {latents} "
                        f"latents, and more than {_MOST_LATENTS} cannot be numbered; lower it"
                    )
                if settings.k > latents:
                    raise ValueError(
                        f"saes.{name}.k: {settings.k} is more than the {latents} latents that "
                        f"{self.name_in_config(encoder)} has; lower k, or raise expansion"
                    )
        return self

    def _check_paths(self) -> None:
        """Refuse names whose folders or log files would clash, or be too long for a disk."""
        for dataset in self.datasets:
            if dataset.casefold() in _NOT_DATASETS:
                raise ValueError(f"datasets.{dataset}: results/ has something else of that name; choose another name")
        members = sorted((str(member) for pair in self.pairs() for member in pair), key=len)
        kinds = self.analyses.matrices, self.analyses.layerwise, self.analyses.sharedness
        analyses = sorted((name for names in kinds for name in names), key=len)
        named = [self.study, max(self.datasets, key=len), max(self.saes, key=len)]
        for last in (members[-2:], analyses[-1:]):
            joined = "_".join([*named, *last])
            if len(joined) > _LONGEST_FILE_NAME:
                raise ValueError(
                    f"the names {', '.join([*named, *last])} have {len(joined)} letters together, and Slurm's logs "
                    f"join them in the name of one folder, which has {_LONGEST_FILE_NAME} at most; shorten one"
                )

    def _check_paper(self, name: str, size: str) -> None:
        place, known = (
            f"analyses.matrices.{name}.paper",
            [data for data, of_size in paper_encoders() if of_size == size],
        )
        datasets = self.paper_datasets(name)
        if not datasets:
            raise ValueError(
                f"{place}: the paper has {size} encoders on {', '.join(known)}, and none of them is a data set of this "
                f"study; add one, or leave paper out"
            )
        members = {self.name_in_config(encoder).removesuffix(f"-{size}") for encoder, _ in self.matrix_members(name)}
        for dataset in datasets:
            names = paper_encoders()[dataset, size]
            if len(members & set(names)) < 2:
                raise ValueError(
                    f"{place}: fewer than two members are among the paper's {size} encoders on {dataset}, which are "
                    f"{', '.join(f'{own}-{size}' for own in names)}; add more of them, or leave paper out"
                )

    def _check_full(self) -> None:
        compared = self.pairs()
        for entry in self.correlations.full:
            text_a, layer_a, text_b, layer_b = entry
            for text, layer in ((text_a, layer_a), (text_b, layer_b)):
                layers = self.encoders[self.member(text).encoder].layer_numbers()
                if layer not in layers:
                    raise ValueError(
                        f"correlations.full: {list(entry)}: layer {layer} of {text} is not recorded; its "
                        f"layers are {', '.join(map(str, layers))}"
                    )
            if sorted_pair(self.member(text_a), self.member(text_b)) not in compared:
                raise ValueError(
                    f"correlations.full: {list(entry)}: no analysis compares {text_a} with {text_b}; name a pair that "
                    f"one does, or add an analysis"
                )

    def name_in_config(self, encoder: str) -> str:
        """The name that the config calls an encoder by, where ``encoder`` is the one in paths and tables."""
        return encoder.removesuffix(_REFERENCE_SUFFIX) if self.preset == "reference" else encoder

    def member(self, text: str) -> Member:
        """The member that ``encoder`` or ``encoder@seed`` names; without a seed, the encoder's first.

        Under the reference preset an encoder goes by its name in the config, and by the one in paths and tables.

        Raises:
            StudyError: where the study has no such encoder, or the encoder no such seed.
        """
        encoder, at, seed = text.partition("@")
        known = {self.name_in_config(name): name for name in self.encoders}
        name = known.get(encoder, encoder)
        if name not in self.encoders:
            raise StudyError(f"{text!r}: the study has no encoder {encoder!r}; {suggest(encoder, list(known))}")
        seeds = self.encoders[name].seeds
        if not at:
            return Member(name, seeds[0])
        if not seed:
            raise StudyError(f"{text!r}: no seed after '@'; write {encoder}, or {encoder}@{seeds[0]}")
        if not seed.isdecimal() or int(seed) not in seeds:
            own = self.name_in_config(name)
            raise StudyError(f"{text!r}: {own} has the seeds {seeds}; add {seed!r} to encoders.{own}.seeds")
        return Member(name, int(seed))

    def matrix_members(self, name: str) -> list[Member]:
        """A matrix's members, grouped by modality and kind, then by name: the config's order changes nothing."""
        named = self._analysis("matrices", name).members
        members = {self.member(text) for text in (self.encoders if named is None else named)}
        return sorted(members, key=self._rank)

    def matrix_pairs(self, name: str) -> list[Pair]:
        """The pairs that a matrix needs."""
        return list(combinations(sorted(self.matrix_members(name)), 2))

    def ceiling_of(self, member: Member) -> Member | None:
        """The same encoder with the first of its other seeds, where it lists more than one.

        What two trainings on the same activations share bounds what two encoders can be seen to share.
        """
        others = (seed for seed in self.encoders[member.encoder].seeds if seed != member.seed)
        seed = next(others, None)
        return None if seed is None else Member(member.encoder, seed)

    def ceiling_pairs(self, name: str) -> list[Pair]:
        """The pairs of a matrix's members with their own other seeds, each sorted."""
        found = ((member, self.ceiling_of(member)) for member in self.matrix_members(name))
        return sorted({sorted_pair(member, other) for member, other in found if other is not None})

    def paper_datasets(self, name: str) -> list[str]:
        """The data sets on which a matrix is compared with the paper's numbers."""
        size = self.analyses.matrices[name].paper
        return [dataset for dataset in self.datasets if (dataset, size) in paper_encoders()]

    def layerwise_pairs(self, name: str) -> list[Pair]:
        """The pairs of a layerwise analysis, in its order."""
        return [(self.member(a), self.member(b)) for a, b in self._analysis("layerwise", name).pairs]

    def layerwise_names(self, name: str) -> list[tuple[str, str]]:
        """The pairs of a layerwise analysis, in its order, as text."""
        return [(str(a), str(b)) for a, b in self.layerwise_pairs(name)]

    def sharedness_source(self, name: str) -> Member:
        """The member whose features a Comparative Sharedness analysis ranks."""
        return self.member(self.analyses.sharedness[name].source)

    def sharedness_names(self, name: str) -> tuple[str, list[str], list[str]]:
        """The source of a ranking, and its groups, each sorted, as text."""
        analysis = self._analysis("sharedness", name)
        shared, not_shared = (
            sorted(str(self.member(text)) for text in group)
            for group in (analysis.shared_with, analysis.not_shared_with)
        )
        return str(self.member(analysis.source)), shared, not_shared

    def sharedness_pairs(self, name: str) -> list[Pair]:
        """The pairs that a Comparative Sharedness analysis needs: its source with each of both groups."""
        source = self.sharedness_source(name)
        return [(source, other) for other in self._group(self.analyses.sharedness[name])]

    def overlapping(self) -> list[str]:
        """The names of Comparative Sharedness analyses that rank the features of the same member as another one."""
        sources = {name: self.sharedness_source(name) for name in self.analyses.sharedness}
        return sorted(name for name, source in sources.items() if list(sources.values()).count(source) > 1)

    def rankings_of(self, member: Member) -> list[str]:
        """The names of Comparative Sharedness analyses that rank the features of a member."""
        return sorted(name for name in self.analyses.sharedness if self.sharedness_source(name) == member)

    def comparisons(self) -> dict[Member, list[Member]]:
        """For each member the members that some analysis compares it with, in sorted order."""
        compared: dict[Member, list[Member]] = {member: [] for member in self.members()}
        for a, b in self.pairs():
            compared[a].append(b)
            compared[b].append(a)
        return {member: sorted(others) for member, others in compared.items()}

    def directed_pairs(self) -> list[Pair]:
        """The pairs of layerwise analyses, each in both directions, in sorted order."""
        pairs = {pair for name in self.analyses.layerwise for pair in self.layerwise_pairs(name)}
        return sorted(pairs | {(b, a) for a, b in pairs})

    def similarity_pairs(self) -> list[tuple[str, str]]:
        """The pairs of different encoders that matrices and layerwise analyses compare, in sorted order."""
        compared = [pair for name in self.analyses.matrices for pair in self.matrix_pairs(name)]
        compared += [pair for name in self.analyses.layerwise for pair in self.layerwise_pairs(name)]
        return encoder_pairs(compared)

    def pairs(self) -> list[Pair]:
        """Every unordered pair of members that some analysis needs, each sorted, in sorted order."""
        needed = [pair for name in self.analyses.matrices for pair in self.matrix_pairs(name)]
        needed += [pair for name in self.analyses.matrices for pair in self.ceiling_pairs(name)]
        needed += [pair for name in self.analyses.layerwise for pair in self.layerwise_pairs(name)]
        needed += [pair for name in self.analyses.sharedness for pair in self.sharedness_pairs(name)]
        return sorted({sorted_pair(*pair) for pair in needed})

    def members(self) -> list[Member]:
        """Every member that some analysis needs, in sorted order."""
        alone = [member for name in self.analyses.matrices for member in self.matrix_members(name)]
        return sorted({*alone, *(member for pair in self.pairs() for member in pair)})

    def grouped_members(self, matrix: str) -> list["GroupedMember"]:
        """The members of a matrix with their groups and other seeds."""
        members = [(member, self.ceiling_of(member)) for member in self.matrix_members(matrix)]
        return [GroupedMember(str(m), *_GROUPS[self._rank(m)[0]], other and str(other)) for m, other in members]

    def makes(self, product: Table | Figure, dataset: str, analysis: str) -> bool:
        """Whether a table or figure is made for a data set and an analysis, as its `products.When` says."""
        if product.when == "encoders":
            return bool(encoder_pairs(self.matrix_pairs(analysis)))
        if product.when == "paper":
            return dataset in self.paper_datasets(analysis)
        return product.when == "always" or bool(self.overlapping())

    def products(self, dataset: str) -> Iterator[tuple[Table | Figure, str]]:
        """The tables and figures for a data set and an SAE setting, each with its file without an ending."""
        for product in (*TABLES, *FIGURES):
            folder, _, rest = product.file.partition("/")
            analyses = getattr(self.analyses, folder) if rest else [""] * bool(self.members())
            for name in analyses:
                if self.makes(product, dataset, name):
                    yield product, product.file.format(name=name)

    def members_key(self) -> str:
        """All needed members, as canonical JSON."""
        return _json([str(member) for member in self.members()])

    def parted_encoders(self) -> list[str]:
        """The encoders whose forward pass several jobs share."""
        return sorted(name for name, spec in self.encoders.items() if spec.parts > 1)

    def stream_seeds(self, encoder: str) -> list[int]:
        """The seeds of the SAEs that a stream trains: all that the encoder's entry lists, needed or not.

        So studies with the same entry share a stream, whatever they analyse.
        """
        return sorted(self.encoders[encoder].seeds)

    def matrix_key(self, name: str) -> str:
        """What a matrix depends on beside its inputs, as canonical JSON: its members, their groups and other seeds."""
        return _json(self.grouped_members(name))

    def layerwise_key(self, name: str) -> str:
        """What a layerwise analysis depends on beside its inputs, as canonical JSON: its pairs in order."""
        return _json(self.layerwise_names(name))

    def sharedness_key(self, name: str) -> str:
        """What a ranking depends on beside its inputs, as canonical JSON: its source and its groups."""
        return _json(dict(zip(("source", "shared_with", "not_shared_with"), self.sharedness_names(name), strict=True)))

    def pages_key(self) -> str:
        """What the frame of the pages depends on besides tables, as canonical JSON."""
        return _json(self.shown_on_pages())

    def shown_on_pages(self) -> dict[str, Any]:
        """What the frame of the pages shows besides tables: the study's parts, members and analyses."""
        return {
            "study": self.study,
            "datasets": sorted(self.datasets),
            "saes": sorted(self.saes),
            "members": [self._described(member) for member in sorted(self.members(), key=self._rank)],
            "matrices": {n: [str(m) for m in self.matrix_members(n)] for n in self.analyses.matrices},
            "layerwise": {n: json.loads(self.layerwise_key(n)) for n in self.analyses.layerwise},
            "sharedness": {n: json.loads(self.sharedness_key(n)) for n in self.analyses.sharedness},
            "overlapping": bool(self.overlapping()),
        }

    def _described(self, member: Member) -> dict[str, Any]:
        spec = self.encoders[member.encoder]
        features = {name: settings.expansion * spec.width for name, settings in self.saes.items()}
        named = {"name": str(member), "encoder": member.encoder, "seed": member.seed, "layers": spec.layer_numbers()}
        return named | {"modality": spec.modality, "kind": spec.kind, "features": features}

    def correlations_key(self, a: Member, b: Member) -> str:
        """What the correlations of a pair depend on beside its features, as canonical JSON.

        Layers stand in the pair's sorted order, ``[layer of the first, layer of the second]``.
        """
        full = set()
        for text_a, layer_a, text_b, layer_b in self.correlations.full:
            (first, layer), (second, other) = sorted([(self.member(text_a), layer_a), (self.member(text_b), layer_b)])
            if (first, second) == sorted_pair(a, b):
                full.add((layer, other))
        return canonical(PairSettings(precision=self.correlations.precision, full=sorted(full)))

    def sae_key(self, name: str) -> str:
        """What an SAE depends on beside its activations and seed, as canonical JSON."""
        return canonical(self.saes[name])

    def dataset_key(self, name: str) -> str:
        """What a data set depends on, as canonical JSON."""
        return canonical(self.datasets[name], set(DatasetSpec.model_fields) - TOLD_ONLY)

    def study_key(self) -> str:
        """The whole study as completed by the catalog, but for what changes no result, as canonical JSON."""
        told = {"encoders": {"__all__": TOLD_ONLY}, "datasets": {"__all__": TOLD_ONLY}}
        return _json(self.model_dump(mode="json", exclude=told))

    def _analysis(self, kind: str, name: str) -> Any:
        analyses = getattr(self.analyses, kind)
        if name not in analyses:
            raise StudyError(f"analyses.{kind}: the study has no {name!r}; {suggest(name, list(analyses))}")
        return analyses[name]

    def _rank(self, member: Member) -> tuple[int, Member]:
        spec = self.encoders[member.encoder]
        return _GROUPS.index((spec.modality, spec.kind)), member

    def _group(self, analysis: Sharedness) -> list[Member]:
        return [self.member(text) for text in [*analysis.shared_with, *analysis.not_shared_with]]

    def _named_members(self) -> list[tuple[str, str]]:
        """Each place of the config that names a member, with the text it holds."""
        named = [
            (f"analyses.matrices.{name}.members", text)
            for name, matrix in self.analyses.matrices.items()
            for text in matrix.members or []
        ]
        for name, layerwise in self.analyses.layerwise.items():
            named += [(f"analyses.layerwise.{name}.pairs", text) for pair in layerwise.pairs for text in pair]
        for name, analysis in self.analyses.sharedness.items():
            named.append((f"analyses.sharedness.{name}.source", analysis.source))
            named += [(f"analyses.sharedness.{name}.shared_with", text) for text in analysis.shared_with]
            named += [(f"analyses.sharedness.{name}.not_shared_with", text) for text in analysis.not_shared_with]
        named += [("correlations.full", text) for a, _, b, _ in self.correlations.full for text in (a, b)]
        return named


def load_study(path: Path | str = "config.yaml", catalog: Path = CATALOG) -> Study:
    """Read a study, and check it: a config file, or the ``study.json`` among its results, which is complete.

    Raises:
        StudyError: naming the file, the key and the remedy.
    """
    if Path(path).suffix == ".json":
        return study_of(read_yaml(Path(path)))
    return build_study(read_yaml(Path(path)), origin=str(path), catalog=catalog)


def build_study(config: dict[str, Any], origin: str, catalog: Path = CATALOG) -> Study:
    """Check a configuration and complete it from the catalog.

    Args:
        config: the mapping that a config file holds.
        origin: where it comes from, for messages.
        catalog: the folder with `encoders.yaml` and `datasets.yaml`.

    Raises:
        StudyError: naming the key and the remedy.
    """
    completed = dict(config)
    try:
        for what in ("datasets", "encoders"):
            given = config.get(what)
            if isinstance(given, dict):
                entries = read_catalog(what, catalog)
                completed[what] = {name: complete(name, value, entries, what) for name, value in given.items()}
        study: Study = parse(Study, completed, "")
        _check_paths(study)
    except StudyError as error:
        raise StudyError("\n".join(f"{origin}: {line}" for line in str(error).splitlines())) from None
    return study


def write_study(study: Study, out: Path) -> None:
    """Write a study, completed by the catalog, as JSON that `load_study` reads on any machine."""
    with atomic_output(out, STUDY) as partial:
        partial.write_text(json.dumps(json.loads(study.study_key()), indent=1) + "\n", encoding="utf-8")


def study_of(given: dict[str, Any]) -> Study:
    """The study that `Study.study_key` is of."""
    if given.get("preset") == "reference":
        given["encoders"] = {name.removesuffix(_REFERENCE_SUFFIX): spec for name, spec in given["encoders"].items()}
    study: Study = parse(Study, given, "")
    return study


def sorted_pair(a: Member, b: Member) -> tuple[Member, Member]:
    """Two members in their one order, whichever way round they were named."""
    return (a, b) if a <= b else (b, a)


@cache
def paper_encoders() -> dict[tuple[str, str], list[str]]:
    """The names of the encoders that the paper has numbers for, by data set and size."""
    with (Path(__file__).parents[1] / "analysis" / "paper" / "wmppc.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return {
        (dataset, size): list(dict.fromkeys(r["source"] for r in rows if (r["dataset"], r["size"]) == (dataset, size)))
        for dataset, size in dict.fromkeys((row["dataset"], row["size"]) for row in rows)
    }


def encoder_pairs(pairs: Iterable[Pair]) -> list[tuple[str, str]]:
    """The different encoders of pairs of members: each two names sorted, once, in sorted order."""
    return sorted({(min(x, y), max(x, y)) for (x, _), (y, _) in pairs if x != y})


def as_member(text: str) -> Member:
    """The member that ``encoder@seed`` names.

    Raises:
        StudyError: if the text names none.
    """
    encoder, _, seed = text.rpartition("@")
    if not (encoder and seed.isdecimal()):
        raise StudyError(f"{text!r} is no member; give its encoder and seed, such as vit@0")
    return Member(encoder, int(seed))


def pair_name(a: Member, b: Member) -> str:
    """The name of a pair's store, the same whichever way round the two were named."""
    first, second = sorted_pair(a, b)
    return f"{first}__{second}"


def _check_paths(study: Study) -> None:
    sources = [(f"datasets.{name}.source", spec.source) for name, spec in study.datasets.items()]
    models = [(f"encoders.{study.name_in_config(name)}.model", spec.model) for name, spec in study.encoders.items()]
    for key, text in sources + models:
        path = local_path(text)
        if path is not None and not path.exists():
            raise StudyError(f"{key}: {text} does not exist; paths are relative to the working directory")


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True)
