"""The study: which data sets, encoders, SAEs and analyses, read from `config.yaml` and checked before any work.

A *member* is an encoder with the seed of its SAEs, written ``encoder@seed``. The study lists the members and the
pairs of members that its analyses need; the workflow makes those and nothing else.
"""

import json
from collections.abc import Callable, Iterator
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator, model_validator

from conceptshare.config.catalog import (
    CATALOG,
    INFORMATIVE_KEYS,
    DatasetSpec,
    EncoderSpec,
    Name,
    Spec,
    canonical,
    complete,
    parse,
    read_catalog,
    read_yaml,
    suggest,
)
from conceptshare.config.checks import check_files, check_study
from conceptshare.config.members import GroupedMember, Member, Pair, encoder_pairs, sorted_pair
from conceptshare.config.pretrained import filled
from conceptshare.config.products import FIGURES, TABLES, Figure, Table
from conceptshare.config.settings import (
    NOT_OF_TRAINING,
    Analyses,
    CorrelationSettings,
    NameSettings,
    SAESettings,
    or_empty,
    paper_encoders,
)
from conceptshare.io.errors import StudyError
from conceptshare.io.files import STUDY, atomic_output
from conceptshare.io.layout import Code, coded, uncoded

# Groups of a matrix, in the order of the paper's tables: what reads images first, then what reads text, then controls.
_GROUPS = [("image", "vlm"), ("image", "vision"), ("text", "vlm"), ("text", "language")]
_GROUPS += [("image", "untrained"), ("text", "untrained")]

# What the reference preset adds to an encoder's name, so that neither choice of token overwrites the other.
_REFERENCE_SUFFIX = ".reference"


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


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
    saes: dict[Name, Annotated[SAESettings, BeforeValidator(or_empty)]] = Field(min_length=1)
    """SAE settings by name. Every analysis is done for each."""
    stream: bool = False
    """Train all SAEs of an encoder during its forward pass and store no tokens. The SAEs are the same, but each epoch
    needs another forward pass, and adding a seed retrains all SAEs of the encoder. SAEs with ``train_on: global`` need
    one pass in any case: one job makes it and trains them all."""
    keep_tokens: bool = True
    """Keep an encoder's tokens on disk after its SAEs are trained. Without them, adding a seed or an SAE setting
    extracts the tokens again and retrains all SAEs of the encoder; adding encoders, analyses or data sets costs the
    same. A stream keeps none."""
    features: Annotated[list[Code], BeforeValidator(_as_list)] = Field(default=["before_topk"], min_length=1)
    """What is compared: latents ``before_topk``, as in the paper, or ``after_topk``, those that reach the decoder and 0
    for all others; or both as a list. Every analysis is done for each, and pages show the first."""
    keep_features: bool = True
    """Store the features before TopK of all samples. Without them, a feature store holds their statistics and strongest
    samples, a hundredth of the size, and stages that need all features recompute them, which a GPU does faster than
    reading. Features after TopK are few and always stored."""
    correlations: Annotated[CorrelationSettings, BeforeValidator(or_empty)] = CorrelationSettings()
    """Correlations of features."""
    names: Annotated[NameSettings, BeforeValidator(or_empty)] = NameSettings()
    """Names of features."""
    analyses: Annotated[Analyses, BeforeValidator(or_empty)] = Analyses()
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
        check_study(self)
        return self

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
            raise StudyError(f"{text!r}: {own} has the seeds {seeds}; add {seed} to encoders.{own}.seeds")
        return Member(name, int(seed))

    def matrix_members(self, name: str) -> list[Member]:
        """A matrix's members, grouped by modality and kind, then by name: the config's order changes nothing."""
        matrix = self._analysis("matrices", name)
        members = {self.member(text) for text in (self.encoders if matrix.members is None else matrix.members)}
        if matrix.seeds == "all":
            unseeded = [text for text in matrix.members or self.encoders if "@" not in text]
            members |= {other for text in unseeded for other in self.other_seeds(self.member(text))}
        return sorted(members, key=self._rank)

    def matrix_pairs(self, name: str) -> list[Pair]:
        """The pairs that a matrix needs."""
        return list(combinations(sorted(self.matrix_members(name)), 2))

    def other_seeds(self, member: Member) -> list[Member]:
        """The same encoder with each of its other seeds, in ascending order.

        What two trainings on the same activations share bounds what two encoders can be seen to share.
        """
        seeds = sorted(self.encoders[member.encoder].seeds)
        return [Member(member.encoder, seed) for seed in seeds if seed != member.seed]

    def ceiling_pairs(self, name: str) -> list[Pair]:
        """The pairs of all seeds of each of a matrix's encoders, each sorted."""
        members = self.matrix_members(name)
        seeds = {other for member in members for other in (member, *self.other_seeds(member))}
        return [(a, b) for a, b in combinations(sorted(seeds), 2) if a.encoder == b.encoder]

    def seed_pairs(self) -> list[Pair]:
        """The pairs of two seeds of one encoder that some analysis needs, each sorted, in sorted order."""
        return [(a, b) for a, b in self.pairs() if a.encoder == b.encoder]

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

    def sharedness_groups(self, name: str) -> dict[str, Any]:
        """The ``source`` of a ranking, and its groups ``shared_with`` and ``not_shared_with``, each sorted, as text."""
        analysis = self._analysis("sharedness", name)
        groups = ((key, getattr(analysis, key)) for key in ("shared_with", "not_shared_with"))
        sorted_groups = {key: sorted({str(self.member(text)) for text in group}) for key, group in groups}
        return {"source": str(self.member(analysis.source)), **sorted_groups}

    def sharedness_seeds(self, name: str) -> dict[str, list[str]]:
        """For each member of both groups of a ranking, the seeds of its encoder as members, without the source."""
        source, analysis = self.sharedness_source(name), self.analyses.sharedness[name]
        members = sorted(self.member(text) for text in (*analysis.shared_with, *analysis.not_shared_with))
        seeds = {
            member: [Member(member.encoder, seed) for seed in self.encoders[member.encoder].seeds] for member in members
        }
        return {
            str(member): [str(seed) for seed in of_encoder if seed != source] for member, of_encoder in seeds.items()
        }

    def sharedness_pairs(self, name: str) -> list[Pair]:
        """The pairs that a Comparative Sharedness analysis needs: its source with each seed of both groups."""
        source = self.sharedness_source(name)
        members = {self.member(seed) for seeds in self.sharedness_seeds(name).values() for seed in seeds}
        return [(source, member) for member in sorted(members)]

    def samples_sides(self, name: str) -> dict[str, Any]:
        """The ``image`` and ``text`` members of an analysis of samples, as text, and the layers of each."""
        analysis = self._analysis("samples", name)
        sides: dict[str, Any] = {}
        for side in ("image", "text"):
            member, chosen = self.member(getattr(analysis, side)), getattr(analysis, f"{side}_layers")
            recorded = self.encoders[member.encoder].layer_numbers()
            of_name = {"last": recorded[-1:], "all": recorded}
            layers = of_name[chosen] if isinstance(chosen, str) else sorted(set(chosen))
            sides |= {side: str(member), f"{side}_layers": layers}
        return sides

    def samples_pair(self, name: str) -> Pair:
        """The members of an analysis of samples."""
        analysis = self.analyses.samples[name]
        return self.member(analysis.image), self.member(analysis.text)

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
        needed = [
            pair for name in self.analyses.matrices for pair in self.matrix_pairs(name) + self.ceiling_pairs(name)
        ]
        needed += [pair for name in self.analyses.layerwise for pair in self.layerwise_pairs(name)]
        needed += [pair for name in self.analyses.sharedness for pair in self.sharedness_pairs(name)]
        return sorted({sorted_pair(*pair) for pair in needed})

    def members(self) -> list[Member]:
        """Every member that some analysis needs, in sorted order."""
        alone = [member for name in self.analyses.matrices for member in self.matrix_members(name)]
        alone += [member for name in self.analyses.samples for member in self.samples_pair(name)]
        return sorted({*alone, *(member for pair in self.pairs() for member in pair)})

    def grouped_members(self, matrix: str) -> list[GroupedMember]:
        """The members of a matrix with their groups and other seeds."""
        return [
            GroupedMember(str(member), *_GROUPS[self._rank(member)[0]], tuple(map(str, self.other_seeds(member))))
            for member in self.matrix_members(matrix)
        ]

    def makes(self, product: Table | Figure, dataset: str, analysis: str) -> bool:
        """Whether a table or figure is made for a data set and an analysis, as its `products.When` says."""
        if product.when == "encoders":
            return bool(encoder_pairs(self.matrix_pairs(analysis)))
        if product.when == "modalities":
            return len({self.encoders[member.encoder].modality for member in self.matrix_members(analysis)}) > 1
        if product.when == "seeds":
            return bool(self.ceiling_pairs(analysis))
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

    def coded(self, code: Code | None = None) -> dict[str, str]:
        """The SAE settings by their names in paths of features, see `layout.coded`: of all codes, or of one."""
        return {coded(sae, each): sae for each in self.features if code in {None, each} for sae in self.saes}

    def stores_tokens(self) -> bool:
        """Whether some SAEs are trained on stored tokens of all positions."""
        return not self.stream and any(settings.train_on == "all" for settings in self.saes.values())

    def parted_encoders(self) -> list[str]:
        """The encoders whose forward pass several jobs share."""
        return sorted(name for name, spec in self.encoders.items() if spec.parts > 1)

    def table_key(self, table: str, name: str = "") -> str:
        """What a table, or the frame of the ``pages``, depends on besides files, as canonical JSON."""
        parts: dict[str, Callable[[], Any]] = {
            "matrix": lambda: self.grouped_members(name),
            "seeds": lambda: self.grouped_members(name),
            "retrieval": lambda: [(str(m), self.encoders[m.encoder].modality) for m in self.matrix_members(name)],
            "layerwise": lambda: self.layerwise_names(name),
            "sharedness": lambda: self.sharedness_groups(name) | {"seeds": self.sharedness_seeds(name)},
            "samples": lambda: self.samples_sides(name),
            "saes": lambda: [self.members(), self.seed_pairs()],
            "pages": self.shown_on_pages,
        }
        return _json(parts[table]())

    def shown_on_pages(self) -> dict[str, Any]:
        """What the frame of the pages shows besides tables: the study's parts, members and analyses."""
        return {
            "study": self.study,
            "datasets": sorted(self.datasets),
            "saes": sorted(self.coded(self.features[0])),
            "codes": self.features,
            "unexplained_layers": self.correlations.unexplained_layers,
            "max_fvu_global": {
                name: self.saes[sae].max_fvu_global for name, sae in self.coded(self.features[0]).items()
            },
            "members": [self._described(member) for member in sorted(self.members(), key=self._rank)],
            "matrices": {n: [str(m) for m in self.matrix_members(n)] for n in self.analyses.matrices},
            "layerwise": {n: self.layerwise_names(n) for n in self.analyses.layerwise},
            "sharedness": {n: self.sharedness_groups(n) for n in self.analyses.sharedness},
            "overlapping": bool(self.overlapping()),
            "samples": {n: self.samples_sides(n) for n in self.analyses.samples},
        }

    def _described(self, member: Member) -> dict[str, Any]:
        spec = self.encoders[member.encoder]
        saes = self.coded(self.features[0])
        width = spec.width_of(spec.layer_numbers()[-1])
        features = {
            name: None if self.pretrained(sae, member.encoder) else self.saes[sae].latents(width)
            for name, sae in saes.items()
        }
        named = {"name": str(member), "encoder": member.encoder, "seed": member.seed, "layers": spec.layer_numbers()}
        return named | {"modality": spec.modality, "kind": spec.group[1], "features": features}

    def pretrained(self, sae: str, encoder: str) -> dict[tuple[int, int], str]:
        """The sources of an encoder's SAEs by layer and seed, if they are imported; empty if they are trained.

        Raises:
            ValueError: if there is none for a layer, or one has other braces than `filled` replaces.
        """
        spec, own = self.encoders[encoder], self.name_in_config(encoder)
        given = (self.saes[sae].pretrained or {}).get(own)
        if given is None:
            return {}
        layers = given if isinstance(given, dict) else dict.fromkeys(spec.layer_numbers(), given)
        if lacking := [layer for layer in spec.layer_numbers() if layer not in layers]:
            raise ValueError(f"no SAE for layer {lacking[0]}; add it, or leave it out of encoders.{own}.use_layers")
        return {(n, seed): filled(layers[n], n, seed) for n in spec.layer_numbers() for seed in spec.seeds}

    def sae_key(self, name: str, *sources: str) -> str:
        """What SAEs depend on, as canonical JSON: settings of training, or for imported ones, their sources."""
        if not sources:
            return canonical(self.saes[name], set(SAESettings.model_fields) - NOT_OF_TRAINING)
        return _json([self.saes[name].of_training(source) for source in sources])

    def sae_settings(self, name: str) -> str:
        """All settings of SAEs that a training or measurement needs, as canonical JSON."""
        return canonical(self.saes[name], set(SAESettings.model_fields) - {"pretrained"})

    def features_options(self, sae: str) -> str:
        """Options of the job that records features of SAEs and their code, ``NAME`` or ``NAME+after_topk``."""
        code = uncoded(sae)[1]
        return ("--keep" if self.keep_features else "--no-keep") if code == "before_topk" else f"--code {code}"

    def bound_option(self, sae: str) -> str:
        """The option of the bound above which layers are unexplained, for SAEs as in `features_options`."""
        return f"--max-fvu-global {self.saes[uncoded(sae)[0]].max_fvu_global}"

    def unexplained_options(self, sae: str) -> str:
        """What the job that correlates features of SAEs does with unexplained layers; a bound only if it uses it."""
        chosen = self.correlations.unexplained_layers
        bound = f" {self.bound_option(sae)}" if chosen == "leave_out" else ""
        return f"--unexplained-layers {chosen}{bound}"

    def dataset_key(self, name: str) -> str:
        """What a data set depends on, as canonical JSON."""
        return canonical(self.datasets[name], set(DatasetSpec.model_fields) - INFORMATIVE_KEYS)

    def study_key(self) -> str:
        """The whole study as completed by the catalog, but for what changes no result, as canonical JSON."""
        excluded = {"encoders": {"__all__": INFORMATIVE_KEYS}, "datasets": {"__all__": INFORMATIVE_KEYS}}
        return _json(self.model_dump(mode="json", exclude=excluded))

    def _analysis(self, kind: str, name: str) -> Any:
        analyses = getattr(self.analyses, kind)
        if name not in analyses:
            raise StudyError(f"analyses.{kind}: the study has no {name!r}; {suggest(name, list(analyses))}")
        return analyses[name]

    def _rank(self, member: Member) -> tuple[int, Member]:
        return _GROUPS.index(self.encoders[member.encoder].group), member


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
                completed[what] = {name: complete(name, value, entries, what, given) for name, value in given.items()}
        study: Study = parse(Study, completed, "")
        check_files(study)
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


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True)
