"""Estimate what a study will cost from the study alone: disk, arithmetic, memory and hours on one GPU.

It models each stage without running it: no torch and no models are loaded, and only the rows of tables are counted.
Sizes are those of uncompressed arrays; features, half of which are zero, compress to about half.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Literal

from tabulate import tabulate

from conceptshare.config.catalog import DatasetSpec, EncoderSpec, is_path, local_path
from conceptshare.config.members import Member
from conceptshare.config.pretrained import Source, read_foreign
from conceptshare.config.settings import CorrelationSettings, SAESettings
from conceptshare.config.study import Study
from conceptshare.correlations.blocks import plan_blocks
from conceptshare.io import layout
from conceptshare.io.errors import StudyError
from conceptshare.io.files import read_object
from conceptshare.io.layout import path, sae_place
from conceptshare.io.sizes import (
    CHUNK_BYTES,
    CKA_SAMPLES,
    EVALUATED_SAMPLES,
    FEATURE_REPAIRINGS,
    FEATURE_ROWS,
    FIT_SAMPLES,
    FLOOR_FEATURES,
    HISTOGRAM_BINS,
    IN_MEMORY_BYTES,
    MEASURED_SAMPLES,
    NEAR,
    NEIGHBOUR_SAMPLES,
    NULL_FEATURES,
    QUANTILES,
    REPAIRINGS,
    RESAMPLES,
    SHARD_BYTES,
    SHOWN_SAMPLES,
    SLAB_BYTES,
    TOP_SAMPLES,
)

RESULTS = Path("results")
"""The folder of existing data sets."""

GPU_MEMORY_BYTES = 64 * 10**9
"""Memory of correlations if the study sets no limit: four fifths of a GPU with 80 GB."""

# A photograph like those of COCO, if the data set neither exists nor is a file on this machine.
_SAMPLE_BYTES = 160_000
# Side of images and patches, and length of captions, for entries without `tokens`.
_IMAGE_SIZE, _PATCH = 224, 14
_CAPTION_TOKENS = 16
# Letters per token of a template.
_TOKEN_LETTERS = 4
# Python with torch and a model library, before a model is loaded.
_PROCESS_BYTES = 1_000_000_000
# A thumbnail of a photograph, with its caption.
_THUMBNAIL_BYTES = 5_000
# Data in a site per sample of a feature, per bar of its histogram, and per best match.
_SHOWN_BYTES, _BAR_BYTES, _MATCH_BYTES = 16, 4, 16
# Samples shown per feature in addition to the strongest.
_WEAKER_SAMPLES = len(QUANTILES) * NEAR
# Python's overhead for the activations of a feature in a sample.
_FIRES_BYTES = 400
# A pair of layers in a table of similarities.
_SIMILARITY_BYTES = 32
# Adam's operations per parameter and step.
_ADAM_FLOPS = 12
# Active latents of the sample with most, relative to k, for BatchTopK; measured in the last layer of minilm.
_MOST_ACTIVE = 5
# Work of one core that is not a product, as operations at the default rate of the CPU. Measured on an AMD EPYC: 10 us
# per candidate for a one-to-one match (1 to 20, more for more features), 20 ns per value standardised for retrieval.
_ASSIGNING_FLOPS, _STANDARDISING_FLOPS = 10e-6 * 200e9, 20e-9 * 200e9


Stored = Literal["dense", "sparse", "none"]
"""How a store holds features: all before TopK, those after TopK, or none, if those before TopK are not kept."""


@dataclass(frozen=True)
class Rates:
    """Speed of the machine, averaged over a stage."""

    tflops: float = 15
    """GPU speed in 10^12 float32 operations per second; the default is about what an A100 sustains."""
    half_tflops: float = 150
    """GPU speed in 10^12 operations per second for products of float16 values."""
    disk_mb_per_s: float = 500
    """Read and write speed, in 10^6 bytes per second."""
    cpu_gflops: float = 200
    """CPU speed per job, in 10^9 float32 operations per second, for work that never runs on a GPU."""


@dataclass(frozen=True)
class Cost:
    """Cost of one job, or of all jobs of a rule."""

    written: float = 0
    """Bytes that stay on disk."""
    read: float = 0
    """Bytes read, counting repeated reads."""
    flops: float = 0
    """Floating-point operations on the GPU, or on the CPU without one."""
    half_flops: float = 0
    """Floating-point operations of products in float16 on the GPU."""
    cpu_flops: float = 0
    """Floating-point operations that always run on the CPU."""
    memory: float = 0
    """Peak memory of the largest job in bytes, including GPU memory."""

    def hours(self, rates: Rates) -> float:
        """Hours on one GPU, without overlap of computing and I/O."""
        on_gpu = self.flops / (rates.tflops * 1e12) + self.half_flops / (rates.half_tflops * 1e12)
        computing = on_gpu + self.cpu_flops / (rates.cpu_gflops * 1e9)
        return (computing + (self.read + self.written) / (rates.disk_mb_per_s * 1e6)) / 3600


@dataclass(frozen=True)
class Plan:
    """Estimated cost of a study."""

    study: str
    samples: dict[str, int]
    """Number of samples per data set."""
    guessed: list[str]
    """Encoders whose entry does not set the number of tokens per sample."""
    jobs: dict[str, int]
    """Jobs per rule that takes more than seconds, in the workflow's order, as if no results existed."""
    costs: dict[str, Cost]
    """Cost of all jobs of each of these rules."""
    rates: Rates

    def total(self) -> Cost:
        """Total cost of the study."""
        return _sum(self.costs.values())


def make_plan(study: Study, rates: Rates, samples: int | None = None, results: Path = RESULTS) -> Plan:
    """Estimate the cost of a study, as if no results existed.

    Args:
        study: the study.
        rates: the speed of the machine.
        samples: number of samples per data set; by default, the actual numbers.
        results: the folder of existing data sets, whose actual sizes are used.

    Raises:
        StudyError: if the number of samples of a data set is unknown.
        DatasetError: if a table cannot be read to count its rows.
    """
    counts = {name: samples or _samples(name, spec, results) for name, spec in study.datasets.items()}
    rules: tuple[str, ...] = ("dataset", "activations", "activations_part", "sae", "stream", "features")
    rules += ("correlations", "similarity", "metrics_retrieval", "metrics_samples")
    rules += ("names", "examples", "pages_samples", "pages_member")
    parts: dict[str, list[Cost]] = {rule: [] for rule in rules}
    members, pairs, comparisons = study.members(), study.pairs(), study.comparisons()
    needed = {member.encoder: study.encoders[member.encoder] for member in members}
    for name, N in counts.items() if members else ():
        data_bytes = _data_bytes(name, study.datasets[name], N, results)
        copies = 1 if study.datasets[name].image_url is None else 2  # downloaded files are kept
        parts["dataset"].append(Cost(written=copies * data_bytes, read=data_bytes, memory=_PROCESS_BYTES))
        parts["pages_samples"].append(Cost(written=N * _THUMBNAIL_BYTES, read=data_bytes, memory=_PROCESS_BYTES))
        parts["similarity"] += [similarity_cost(needed[a], needed[b], N) for a, b in study.similarity_pairs()]
        if not study.stream:
            for spec in needed.values():
                rule = "activations" if spec.parts == 1 else "activations_part"
                parts[rule].append(activations_cost(spec, N, data_bytes, study.stores_tokens()))
        for sae in study.saes:
            own = {encoder: _own_settings(study, sae, encoder, results) for encoder in needed}
            if study.stream:
                parts["stream"] += [
                    stream_cost(spec, own[encoder], N, len(spec.seeds), data_bytes) for encoder, spec in needed.items()
                ]
            for member in members:
                spec, settings = needed[member.encoder], own[member.encoder]
                if not study.stream:
                    layers = [spec.model_copy(update={"width": spec.width_of(n)}) for n in spec.layer_numbers()]
                    parts["sae"] += [sae_cost(layer, settings, N) for layer in layers]
                parts["pages_member"].append(member_pages_cost(spec, settings, len(comparisons[member])))
            for code in study.features:
                stored: Stored = "sparse" if code == "after_topk" else "dense" if study.keep_features else "none"
                shown = code == study.features[0]
                for member in members:
                    spec, settings = needed[member.encoder], own[member.encoder]
                    parts["features"].append(features_cost(spec, settings, N, stored))
                    if shown or study.rankings_of(member):
                        parts["names"].append(names_cost(spec, settings, N, stored))
                    if shown:
                        parts["examples"].append(examples_cost(spec, settings, N, data_bytes, stored))
                parts["correlations"] += [
                    correlations_cost(
                        needed[a.encoder], needed[b.encoder], _larger(own, needed, a, b), N, study.correlations, stored
                    )
                    for a, b in pairs
                ]
                for matrix in study.analyses.matrices:
                    compared = study.matrix_members(matrix)
                    images, texts = (
                        [member for member in compared if needed[member.encoder].modality == one]
                        for one in ("image", "text")
                    )
                    if costs := [
                        retrieval_cost(needed[a.encoder], needed[b.encoder], _larger(own, needed, a, b), N, stored)
                        for a in images
                        for b in texts
                    ]:
                        parts["metrics_retrieval"].append(_sum(costs))
                for fit in study.analyses.samples:
                    sides, pair = study.samples_sides(fit), study.samples_pair(fit)
                    image, text = (
                        needed[member.encoder].model_copy(update={"use_layers": sides[f"{side}_layers"]})
                        for side, member in zip(("image", "text"), pair, strict=True)
                    )
                    parts["metrics_samples"].append(samples_cost(image, text, _larger(own, needed, *pair), N, stored))
    jobs = {rule: len(costs) for rule, costs in parts.items() if costs}
    if "activations_part" in jobs:  # one cost covers all parts of an encoder
        jobs["activations_part"] = len(counts) * sum(spec.parts for spec in needed.values() if spec.parts > 1)
    return Plan(
        study=study.study,
        samples=counts,
        guessed=[
            study.name_in_config(name)
            for name, spec in needed.items()
            if spec.tokens is None and spec.library != "arrays"
        ],
        jobs=jobs,
        costs={rule: _sum(costs) for rule, costs in parts.items() if costs},
        rates=rates,
    )


def _own_settings(study: Study, sae: str, encoder: str, results: Path) -> SAESettings:
    """The settings of an encoder's SAEs: imported ones have no epochs and, on this machine, a size of their own."""
    settings, sources = study.saes[sae], study.pretrained(sae, encoder)
    if not sources:
        return settings
    latents = []
    for place, text in sources.items():
        source = Source.parse(text)
        if source.repository is None:
            latents.append(read_foreign(Path(source.place).expanduser()).latents)
        else:
            copy = path(layout.PRETRAINED, results, sae=sae, encoder=encoder) / sae_place(*place)
            latents.append(read_object(copy / "cfg.json").get("d_sae", 0))
    return settings.model_copy(update={"epochs": 0, "features": max(latents) or settings.features})


def _larger(own: dict[str, SAESettings], needed: dict[str, EncoderSpec], a: Member, b: Member) -> SAESettings:
    """The settings of the larger SAEs of two members."""
    return own[max((a.encoder, b.encoder), key=lambda name: own[name].latents(needed[name].mean_width))]


def activations_cost(spec: EncoderSpec, N: int, data_bytes: float = 0, tokens: bool = True) -> Cost:
    """One forward pass over N samples, with all tokens stored, or only global ones."""
    kept, token_bytes = len(spec.layer_numbers()), tokens * tokens_bytes(spec, N)
    pending = kept * min(SHARD_BYTES, token_bytes)
    return Cost(
        written=kept * (token_bytes + global_bytes(spec, N)) + tokens * 8 * (2 * N + 1),
        read=_inputs_bytes(spec, N, data_bytes),
        flops=N * forward_flops(spec),
        memory=_PROCESS_BYTES + pending + _forward_bytes(spec),
    )


def forward_flops(spec: EncoderSpec) -> float:
    """Operations per sample of a forward pass: 24 L T D^2 + 4 L T^2 D, or the number in the entry."""
    D, T = spec.mean_width, positions(spec)
    return 24 * spec.layers * T * D**2 + 4 * spec.layers * T**2 * D if spec.gflops is None else spec.gflops * 1e9


def _inputs_bytes(spec: EncoderSpec, N: int, data_bytes: float) -> float:
    """Bytes read for a forward pass: the images, or arrays in float32; captions are negligible."""
    if spec.library == "arrays":
        return 4 * N * spec.mean_width * len(spec.layer_numbers())
    return data_bytes if spec.modality == "image" else 0


def _forward_bytes(spec: EncoderSpec) -> int:
    """Bytes of the model, of one batch of activations in float32, and of prefetched ones in float16."""
    batch = spec.batch_size * positions(spec) * spec.mean_width * len(spec.layer_numbers())
    parameters = 12 * spec.layers * spec.mean_width**2 if spec.parameters is None else int(spec.parameters * 1e6)
    return 4 * parameters + (4 + 4 * 2) * batch


def sae_cost(spec: EncoderSpec, settings: SAESettings, N: int) -> Cost:
    """Training on one layer's stored tokens."""
    F = settings.latents(spec.mean_width)
    size = N * trained_tokens(spec, settings) * spec.mean_width * 2
    in_memory = size <= IN_MEMORY_BYTES
    samples = settings.epochs * (N - settings.held_out_samples(N)) + measured(N, settings)
    return Cost(
        written=4 * (sae_parameters(spec, settings) + F),
        read=size
        if in_memory
        else samples * _sample_read(spec, settings.samples_per_step(spec.modality), trained_tokens(spec, settings))
        + measured(N, settings) * chunk_bytes(spec),
        flops=training_flops(spec, settings, N),
        memory=_PROCESS_BYTES + in_memory * size + _optimised_bytes(spec, settings) + _latents_bytes(spec, settings),
    )


def training_flops(spec: EncoderSpec, settings: SAESettings, N: int) -> float:
    """Operations of an SAE's training: for a token x W_enc, 2 D F, and five products over k latents, 2 k D each.

    Those five are decoding, its gradients for weights and latents, and the encoder's for inputs and weights.
    """
    D, F, k = spec.mean_width, settings.latents(spec.mean_width), settings.k
    trained, tokens = N - settings.held_out_samples(N), trained_tokens(spec, settings)
    steps = settings.epochs * -(-trained // settings.samples_per_step(spec.modality))
    return (
        settings.epochs * trained * tokens * (2 * D * F + 10 * k * D)
        + steps * sae_parameters(spec, settings) * _ADAM_FLOPS
        + measured(N, settings) * (tokens + 1) * (2 * D * F + 2 * k * D)
    )


def stream_cost(spec: EncoderSpec, settings: SAESettings, N: int, seeds: int, data_bytes: float = 0) -> Cost:
    """A forward pass per epoch, and one over the samples for metrics, with training of all SAEs of an encoder.

    SAEs of global tokens need one pass, and are trained one after the other.
    """
    kept, F = len(spec.layer_numbers()), settings.latents(spec.mean_width)
    last = settings.held_out_samples(N) or measured(N, settings)
    passes = max(1, (settings.epochs * (N - settings.held_out_samples(N)) + last) / N)
    saes = at_once = kept * seeds
    if settings.train_on == "global":
        passes, at_once = 1, 1
    return Cost(
        written=kept * global_bytes(spec, N) + saes * 4 * (sae_parameters(spec, settings) + F),
        read=passes * _inputs_bytes(spec, N, data_bytes),
        flops=passes * N * forward_flops(spec) + saes * training_flops(spec, settings, N),
        memory=_PROCESS_BYTES
        + _forward_bytes(spec)
        + at_once * _optimised_bytes(spec, settings)
        + _latents_bytes(spec, settings),
    )


def sae_parameters(spec: EncoderSpec, settings: SAESettings) -> int:
    """Number of parameters of an SAE: W_enc, W_dec and b_dec."""
    return 2 * spec.mean_width * settings.latents(spec.mean_width) + spec.mean_width


def measured(N: int, settings: SAESettings) -> int:
    """Number of samples used for metrics."""
    return min(settings.held_out_samples(N) or N, EVALUATED_SAMPLES)


def _optimised_bytes(spec: EncoderSpec, settings: SAESettings) -> int:
    """Weights, gradients and both moments of an SAE."""
    return 4 * 4 * sae_parameters(spec, settings)


def _latents_bytes(spec: EncoderSpec, settings: SAESettings) -> int:
    """Latents of one batch before and after ReLU, and their order; and nested reconstructions, with gradients."""
    tokens = max(settings.samples_per_step(spec.modality), 32) * trained_tokens(spec, settings)
    width = spec.mean_width
    return 4 * tokens * (3 * settings.latents(width) + 4 * len(settings.matryoshka) * width)


def features_cost(spec: EncoderSpec, settings: SAESettings, N: int, stored: Stored = "dense") -> Cost:
    """Features of N global tokens in every layer, with their statistics and top samples."""
    F, kept = settings.latents(spec.mean_width), len(spec.layer_numbers())
    rows = min(FEATURE_ROWS, N)
    # A block of rows in float32, as computed, shifted and stored, and in float16, and values with their samples and
    # order while top samples are merged.
    working = F * (14 * rows + 16 * (rows + min(TOP_SAMPLES, N)))
    computed = computed_features(spec, settings, N, 2)
    return Cost(
        written=kept * (stored_bytes(F, settings, N, stored) + F * (28 + 8 * min(TOP_SAMPLES, N))),
        read=computed.read,
        flops=computed.flops,
        # Compression takes about as long as a product.
        cpu_flops=(stored == "dense") * computed.flops / 2,
        memory=_PROCESS_BYTES + computed.memory / kept + working,
    )


def computed_features(spec: EncoderSpec, settings: SAESettings, N: int, times: float = 1) -> Cost:
    """Features of all layers, computed ``times`` times from global tokens; memory is that of SAEs and tokens."""
    D, F, kept = spec.mean_width, settings.latents(spec.mean_width), len(spec.layer_numbers())
    sae, tokens = 4 * (2 * D * F + D + F), global_bytes(spec, N)
    in_memory = tokens <= IN_MEMORY_BYTES
    return Cost(
        read=kept * (sae + tokens * (1 if in_memory else times)),
        flops=kept * times * 2 * N * D * F,
        memory=kept * (sae + in_memory * tokens),
    )


def feature_access_cost(spec: EncoderSpec, settings: SAESettings, N: int, times: float, stored: Stored) -> Cost:
    """Features of all layers, ``times`` times: read if they are stored, else computed."""
    if stored == "none":
        return computed_features(spec, settings, N, times)
    size = len(spec.layer_numbers()) * stored_bytes(settings.latents(spec.mean_width), settings, N, stored)
    # Those after TopK stay in memory.
    return Cost(read=times * size) if stored == "dense" else Cost(read=size, memory=size)


def names_cost(spec: EncoderSpec, settings: SAESettings, N: int, stored: Stored = "dense") -> Cost:
    """Names of features, measured on the first samples, on the CPU."""
    n, computed = min(N, MEASURED_SAMPLES), stored == "none"
    slabs = -(-features_bytes(settings.latents(spec.mean_width), n) // SLAB_BYTES)
    features = feature_access_cost(spec, settings, n, slabs if computed else 1, stored)
    memory = _PROCESS_BYTES + features.memory + computed * SLAB_BYTES
    return Cost(read=features.read, cpu_flops=features.flops, memory=memory)


def examples_cost(
    spec: EncoderSpec, settings: SAESettings, N: int, data_bytes: float = 0, stored: Stored = "dense"
) -> Cost:
    """A forward pass over the strongest samples of all features, and their activations there: 2 D per token."""
    D, F, kept = spec.mean_width, settings.latents(spec.mean_width), len(spec.layer_numbers())
    shown = min(N, kept * F * SHOWN_SAMPLES)
    fires = kept * F * SHOWN_SAMPLES * usual_tokens(spec)
    saes = kept * 4 * sae_parameters(spec, settings)
    slabs = -(-features_bytes(F, N) // (GPU_MEMORY_BYTES // 4))
    features = feature_access_cost(spec, settings, N, slabs if stored == "none" else 1, stored)
    return Cost(
        written=fires + kept * F * (12 * SHOWN_SAMPLES + 8 * _WEAKER_SAMPLES + 4 * HISTOGRAM_BINS),
        read=features.read + saes + _inputs_bytes(spec, N, data_bytes) * shown / N,
        flops=features.flops + shown * forward_flops(spec) + 2 * D * fires,
        memory=_PROCESS_BYTES + _forward_bytes(spec) + saes + fires + kept * F * SHOWN_SAMPLES * _FIRES_BYTES,
    )


def member_pages_cost(spec: EncoderSpec, settings: SAESettings, others: int) -> Cost:
    """A site's data on a member's features: samples, token activations and best matches in other members."""
    F, kept = settings.latents(spec.mean_width), len(spec.layer_numbers())
    cell = 4 / 3 if spec.modality == "image" else 8  # in base64, or a number and a piece of text
    samples = SHOWN_SAMPLES * (cell * usual_tokens(spec) + _SHOWN_BYTES) + _WEAKER_SAMPLES * _SHOWN_BYTES
    return Cost(
        written=kept * F * (samples + HISTOGRAM_BINS * _BAR_BYTES + others * _MATCH_BYTES),
        read=kept * F * SHOWN_SAMPLES * usual_tokens(spec),
        memory=_PROCESS_BYTES + F * SHOWN_SAMPLES * (usual_tokens(spec) + _FIRES_BYTES),
    )


def correlations_cost(
    a: EncoderSpec,
    b: EncoderSpec,
    settings: SAESettings,
    N: int,
    correlations: CorrelationSettings | None = None,
    stored: Stored = "dense",
) -> Cost:
    """Best matches of two members: 2 N F_a F_b over all pairs of layers, once for both directions.

    As much again for matches chosen on halves of the samples, twice more for the first features of each layer with
    shuffled samples, twice for the drawn features of the nulls, once for the re-paired last layers. Features are read
    or computed for each, and more often if they do not fit the budget; then four times for influences and correlations
    within halves, and those of last layers for resamples.
    """
    correlations = correlations or CorrelationSettings()
    budget = (correlations.memory_mb or 0) * 2**20 or GPU_MEMORY_BYTES
    value = {"float16": 2, "float32": 4}[correlations.precision]
    sizes = [[settings.latents(spec.mean_width)] * len(spec.layer_numbers()) for spec in (a, b)]
    first = [[min(F, FLOOR_FEATURES) for F in side] for side in sizes]
    repaired = [[REPAIRINGS * NULL_FEATURES] * len(side) for side in sizes]
    # The last layers are read for the resamples, and A's last layer for each of its re-pairings, unless it is computed.
    readings = FEATURE_REPAIRINGS if stored == "dense" else 1, 1
    last = [(1 + each) / len(side) for side, each in zip(sizes, readings, strict=True)]
    times, product, memory = [4 + share for share in last], 0, 0
    for samples, one, other, order in (
        (N, sizes[0], sizes[1], (0, 1)),
        *((half, sizes[0], sizes[1], (0, 1)) for half in (N // 2, N - N // 2)),
        *((N, sample[0], sizes[1], (0, 1)) for sample in (first, repaired)),
        *((N, sample[1], sizes[0], (1, 0)) for sample in (first, repaired)),
    ):
        blocks = plan_blocks(samples, one, other, 2, budget, value, gpu=True)
        for side, count in zip(order, (blocks.times_a, blocks.times_b), strict=True):
            times[side] += count * samples / N
        product += 2 * samples * sum(one) * sum(other)
        memory = max(memory, blocks.bytes)
    widths = [side[-1] for side in sizes]
    product += 2 * N * FEATURE_REPAIRINGS * widths[0] * widths[1]
    features = [
        feature_access_cost(spec, settings, N, count, stored) for spec, count in zip((a, b), times, strict=True)
    ]
    # Each is a candidate for one-to-one matches.
    rhos = [len(sizes[1]) * sum(sizes[0]), len(sizes[0]) * sum(sizes[1])]
    floors = [len(sizes[1]) * sum(first[0]), len(sizes[0]) * sum(first[1])]
    cells = sum(len(one) * (len(other) + 1) for one, other in (sizes, sizes[::-1]))
    return Cost(
        written=8 * sum(rhos)
        + 4 * (sum(floors) + (REPAIRINGS + 1) * cells)
        + 8 * cells
        + 16 * (sum(sizes[0]) + sum(sizes[1]))
        + 2 * 2 * 3 * 4 * N
        + (4 + 2 * 2 * RESAMPLES) * sum(widths),
        read=sum(each.read for each in features),
        flops=sum(each.flops for each in features) + (product if value == 4 else 0),
        half_flops=product if value == 2 else 0,
        cpu_flops=_ASSIGNING_FLOPS * sum(rhos),
        memory=_PROCESS_BYTES + memory + sum(each.memory for each in features),
    )


def similarity_cost(a: EncoderSpec, b: EncoderSpec, N: int) -> Cost:
    """CKA and neighbours of the global tokens of two encoders, over the first samples; A's layers are all in memory.

    CKA has 2 n D_a D_b operations for a pair of layers and 2 n D^2 for each layer, neighbours 2 m^2 D for a layer.
    """
    n, m = min(N, CKA_SAMPLES), min(N, NEIGHBOUR_SAMPLES)
    of_a, of_b = ([spec.width_of(layer) for layer in spec.layer_numbers()] for spec in (a, b))
    widths, pairs = of_a + of_b, len(of_a) * len(of_b)
    return Cost(
        written=_SIMILARITY_BYTES * pairs,
        read=n * 2 * sum(widths),
        flops=2 * n * (sum(of_a) * sum(of_b) + sum(D**2 for D in widths)) + 2 * m**2 * sum(widths),
        memory=_PROCESS_BYTES + 4 * n * sum(of_a) + 3 * 8 * n * max(widths),
    )


def retrieval_cost(a: EncoderSpec, b: EncoderSpec, settings: SAESettings, N: int, stored: Stored = "dense") -> Cost:
    """Retrieval between the last layers of two members: matches on half of the first samples, cosines on the other.

    For n samples in each half, matches have 2 n F_a F_b operations. Cosines have 2 n^2 for each of at most F_a + F_b
    pairs of features, in float64, which count twice. Standardising their features is the CPU's.
    """
    n, widths = min(N, CKA_SAMPLES) // 2, [settings.latents(spec.mean_width) for spec in (a, b)]
    last = [spec.model_copy(update={"use_layers": "last"}) for spec in (a, b)]
    features = [feature_access_cost(spec, settings, 2 * n, 1, stored) for spec in last]
    return Cost(
        read=sum(each.read for each in features),
        flops=sum(each.flops for each in features) + 2 * n * widths[0] * widths[1] + 2 * 2 * n**2 * sum(widths),
        cpu_flops=_STANDARDISING_FLOPS * 2 * n * sum(widths),
        memory=_PROCESS_BYTES + sum(each.memory for each in features) + 4 * n * sum(widths) + 4 * 8 * n**2,
    )


def samples_cost(a: EncoderSpec, b: EncoderSpec, settings: SAESettings, N: int, stored: Stored = "dense") -> Cost:
    """Fit of all samples: two matches on half of the first samples, and cosines of each with up to 1,000 others.

    ``a`` and ``b`` have the layers whose features are used. Cosines are of at most F_a + F_b pairs of features, once
    for each direction.
    """
    n, others, sides = min(N, CKA_SAMPLES) // 2, min(N // 2, FIT_SAMPLES), (a, b)
    widths = [len(spec.layer_numbers()) * settings.latents(spec.mean_width) for spec in sides]
    features = [feature_access_cost(spec, settings, N, 2, stored) for spec in sides]
    return Cost(
        read=sum(each.read for each in features),
        flops=sum(each.flops for each in features)
        + 2 * 2 * n * widths[0] * widths[1]
        + 2 * 2 * N * others * sum(widths),
        cpu_flops=_STANDARDISING_FLOPS * N * sum(widths),
        memory=_PROCESS_BYTES
        + sum(each.memory for each in features)
        + 4 * (n + 2 * others + 2 * FEATURE_ROWS) * sum(widths),
    )


def positions(spec: EncoderSpec) -> int:
    """Positions per sample in a forward pass, including padding if the model always attends to it."""
    if spec.modality == "text" and spec.context_length is not None and _padded(spec):
        return spec.context_length
    return usual_tokens(spec)


def usual_tokens(spec: EncoderSpec) -> int:
    """Tokens of a typical sample without padding: the number in the entry, or a guess; none are computed of arrays."""
    if spec.library == "arrays":
        return 0
    if spec.tokens is not None:
        return spec.tokens
    prompt = len(spec.template or "") // _TOKEN_LETTERS
    if spec.modality == "image":
        return ((spec.image_size or _IMAGE_SIZE) // _PATCH) ** 2 + 1 + prompt
    return min(_CAPTION_TOKENS, spec.context_length or _CAPTION_TOKENS) + prompt


def stored_tokens(spec: EncoderSpec) -> int:
    """Training tokens of a sample: its own, with padding for ``reference``, and a global token that is none of them."""
    tokens = positions(spec) if spec.global_token == "reference" else usual_tokens(spec)
    tokens += spec.global_token in {"mean", "max", "last_position"}
    return tokens if spec.max_tokens is None else min(tokens, spec.max_tokens)


def trained_tokens(spec: EncoderSpec, settings: SAESettings) -> int:
    """Tokens per sample that SAEs are trained on."""
    return 1 if settings.train_on == "global" else stored_tokens(spec)


def tokens_bytes(spec: EncoderSpec, N: int) -> int:
    """Bytes of one layer's training tokens, in float16."""
    return N * stored_tokens(spec) * spec.mean_width * 2


def global_bytes(spec: EncoderSpec, N: int) -> int:
    """Bytes of one layer's global tokens, in float16."""
    return N * spec.mean_width * 2


def chunk_bytes(spec: EncoderSpec) -> int:
    """Bytes of one chunk of tokens, the smallest unit that can be read."""
    row = 2 * spec.mean_width
    return max(1, CHUNK_BYTES // row) * row


def features_bytes(F: int, N: int) -> int:
    """Bytes of one layer's F features, in float16."""
    return N * F * 2


def stored_bytes(F: int, settings: SAESettings, N: int, stored: Stored) -> int:
    """Bytes of one layer's features in a store: float16, and for those after TopK int32 places too."""
    most = settings.k * (1 if settings.activation == "topk" else _MOST_ACTIVE)
    return {"dense": features_bytes(F, N), "sparse": N * min(most, F) * 6, "none": 0}[stored]


def headline(plan: Plan) -> str:
    """The estimate in one line."""
    total = plan.total()
    disk, memory, hours = format_bytes(total.written), format_bytes(total.memory), _hours(total.hours(plan.rates))
    return f"{disk} of disk, {memory} of memory, {hours} hours on one GPU"


def plan_as_json(plan: Plan) -> str:
    """The estimate as JSON: bytes, operations and hours, per rule and in total."""
    costs = {rule: asdict(cost) | {"hours": cost.hours(plan.rates)} for rule, cost in plan.costs.items()}
    total = plan.total()
    return json.dumps(asdict(plan) | {"costs": costs, "total": asdict(total) | {"hours": total.hours(plan.rates)}})


def plan_as_text(plan: Plan) -> str:
    """The estimate as a table, followed by its assumptions."""
    rows = [[rule, f"{n:,}", *cost_cells(plan.costs[rule], plan.rates)] for rule, n in plan.jobs.items()]
    rows.append(["total", "", *cost_cells(plan.total(), plan.rates)])
    header = ["rule", "jobs", "disk", "read", "FLOP", "memory", "hours"]
    sides = ["left", *["right"] * 6]
    table = str(tabulate(rows, header, tablefmt="plain", colalign=sides, disable_numparse=True))
    return "\n".join([f"study {plan.study}", "", table, "", *_assumptions(plan)])


def cost_cells(cost: Cost, rates: Rates) -> list[str]:
    """Formatted cost: disk, read, FLOP, memory and hours."""
    flops = cost.flops + cost.half_flops + cost.cpu_flops
    return [
        format_bytes(cost.written),
        format_bytes(cost.read),
        f"{flops:.2e}" if flops else "-",
        format_bytes(cost.memory),
        _hours(cost.hours(rates)),
    ]


def _assumptions(plan: Plan) -> list[str]:
    samples = ", ".join(f"{name} {count:,}" for name, count in plan.samples.items())
    rates = plan.rates
    lines = [
        f"Samples: {samples}.",
        f"Rates: {rates.tflops:g} TFLOP/s on the GPU (--tflops), {rates.half_tflops:g} for products of float16 values",
        f"(--half-tflops), {rates.disk_mb_per_s:g} MB/s from and to disk (--disk-mb-per-s), {rates.cpu_gflops:g}",
        "GFLOP/s on the CPU (--cpu-gflops), which names and compresses features and assigns one-to-one matches.",
        "Hours: jobs run one after another on one GPU; computation and reading do not overlap.",
        "Disk: before compression; models in the hub's cache not counted. Memory: of the largest job, with the GPU's.",
        "Correlations: memory as in correlations.memory_mb, or 64 GB of a GPU.",
        "It assumes that there are no results yet and nothing is cached. Other rules take seconds; `snakemake -n`",
        "counts their jobs, and those that are left.",
    ]
    if plan.guessed:
        lines.append(f"Tokens per sample guessed, as these entries have no `tokens`: {', '.join(plan.guessed)}.")
    return lines


def format_bytes(count: float) -> str:
    """Formatted number of bytes, with three digits and powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.1f} TB" if count < 99.5 else f"{count:,.0f} TB"


def _hours(hours: float) -> str:
    return f"{hours:,.0f}" if hours >= 9.5 else f"{hours:.1f}" if hours >= 0.05 else "<0.1"


def _padded(spec: EncoderSpec) -> bool:
    return spec.library == "open_clip" or spec.global_token == "last_position"


def _samples(name: str, spec: DatasetSpec, results: Path) -> int:
    manifest = results / name / "data" / "manifest.json"
    if manifest.is_file():
        return int(json.loads(manifest.read_text(encoding="utf-8"))["rows"])
    known = [count for count in (spec.samples, spec.limit) if count is not None]
    if not known and is_path(spec.source):
        from conceptshare.data.rows import count_rows

        known = [count for count in [count_rows(spec)] if count is not None]
    if not known:
        raise StudyError(f"datasets.{name}: nothing says how many samples it has; give --samples, or set samples")
    return min(known)


def _data_bytes(name: str, spec: DatasetSpec, N: int, results: Path) -> float:
    made = results / name / "data" / "samples.arrow"
    path = made if made.is_file() else local_path(spec.source)
    if path is not None and path.is_file() and spec.limit is None:
        return path.stat().st_size
    return N * _SAMPLE_BYTES


def _sample_read(spec: EncoderSpec, at_once: int, tokens: int) -> float:
    """Bytes read per sample for so many tokens, from a layer too large for memory, with this many samples at once."""
    rows = chunk_bytes(spec) // (2 * spec.mean_width)
    return (1 + (at_once * tokens - 1) / rows) * chunk_bytes(spec) / at_once


def _sum(costs: Iterable[Cost]) -> Cost:
    written, read, flops, half_flops, cpu_flops, memory = zip(*map(astuple, [Cost(), *costs]), strict=True)
    return Cost(sum(written), sum(read), sum(flops), sum(half_flops), sum(cpu_flops), max(memory))
