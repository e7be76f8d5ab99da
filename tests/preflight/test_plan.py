"""The estimated cost of a study, against Snakemake, the stages themselves and known numbers."""

import csv
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from conceptshare import analysis, sae
from conceptshare.analysis import retrieval, similarity
from conceptshare.analysis.samples import fits
from conceptshare.cli import app
from conceptshare.config.catalog import EncoderSpec
from conceptshare.config.settings import CorrelationSettings, SAESettings
from conceptshare.config.study import build_study, load_study
from conceptshare.correlations import _store
from conceptshare.io import readers, store
from conceptshare.io.errors import StudyError
from conceptshare.io.sizes import FEATURE_REPAIRINGS, NULL_FEATURES, REPAIRINGS, SHOWN_SAMPLES
from conceptshare.io.store import open_store
from conceptshare.preflight import plan
from conceptshare.preflight.plan import Rates, make_plan
from conceptshare.sae.features import record_features
from tests.workflow.conftest import CLONE, Project

COCO = 118_287
PAPER = SAESettings()
CONFIGS = ["config.yaml", *sorted(f"config/{path.name}" for path in (CLONE / "config").glob("*.yaml"))]
# The tables of the paper whose cells are all in a study.
TABLES = {
    "coco-large": {"6", "7", "8", "9"},
    "coco-base": {"10", "11", "12", "13"},
    "laion-large": {"14", "15", "16", "17"},
    "flowers-large": {"18", "19", "20", "21"},
}


@pytest.fixture(autouse=True)
def _in_the_clone(monkeypatch):
    monkeypatch.chdir(CLONE)


@pytest.fixture
def elsewhere(tmp_path):
    """An empty results folder."""
    return tmp_path / "results"


def encoder(**changes):
    described = {
        "library": "transformers",
        "model": "hub/x",
        "modality": "image",
        "kind": "vision",
        "layers": 2,
        "width": 64,
        "global_token": "first",
        "tokens": 17,
    }
    return EncoderSpec(**(described | changes))


def study_of(**changes):
    given = {
        "study": "test",
        "datasets": {"openclipart": None},
        "encoders": {"minilm": {"seeds": [0, 1]}, "dinov2-small": {"use_layers": "last"}, "tiny-clip-text": None},
        "saes": {"small": {"k": 4}, "paper": None},
        "analyses": {"matrices": {"all": None}, "layerwise": {"seeds": {"pairs": [["minilm@0", "minilm@1"]]}}},
    }
    return given | changes


def script(name):
    spec = importlib.util.spec_from_file_location(name, CLONE / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("config", ["config.yaml", "config/coco-base.yaml"])
def test_planned_jobs_equal_snakemakes(config, elsewhere):
    """``--forceall`` plans as for an empty results folder."""
    found = make_plan(load_study(config), Rates(), results=elsewhere)
    planned = Project(CLONE).plan("--forceall", "--configfile", config)
    assert found.jobs == {rule: planned[rule] for rule in found.jobs}
    assert list(found.costs) == list(found.jobs)


def test_planned_jobs_of_two_codes_equal_snakemakes(elsewhere, tmp_path):
    config = tmp_path / "both.yaml"
    config.write_text(Path("config.yaml").read_text() + "\nfeatures: [after_topk, before_topk]\n")
    found = make_plan(load_study(config), Rates(), results=elsewhere)
    planned = Project(CLONE).plan("--forceall", "--configfile", str(config))
    assert found.jobs == {rule: planned[rule] for rule in found.jobs}
    assert found.jobs["features"] < found.jobs["names"] + found.jobs["examples"] < 2 * found.jobs["features"]


def test_sizes_for_large_clip_on_coco(elsewhere):
    study = load_study("config/coco-large.yaml")
    clip = study.encoders["clip-image-large"]
    assert plan.tokens_bytes(clip, COCO) == pytest.approx(62e9, rel=0.01)
    assert plan.global_bytes(clip, COCO) == pytest.approx(0.24e9, rel=0.01)
    assert plan.features_bytes(8 * 1024, COCO) == pytest.approx(1.9e9, rel=0.03)
    assert make_plan(study, Rates(), results=elsewhere).samples == {"coco": COCO}


def test_operations_for_a_pair_of_large_encoders_on_coco():
    large = encoder(layers=24, width=1024)
    cost = plan.correlations_cost(large, large, PAPER, COCO, stored="none")
    of_last_layers = FEATURE_REPAIRINGS / 24**2
    assert cost.half_flops == pytest.approx(9.14e15 * (2 + 2 * (512 + 1280) / 8192 + of_last_layers), rel=1e-3)
    # Once each for the matches, those of halves, both floors, both nulls, and four times for influences and halves: all
    # of A fits in memory. Twice for the last layers.
    once = 24 * 2 * COCO * 1024 * 8192
    assert cost.flops == pytest.approx(2 * (10 + 2 / 24) * once)
    assert cost.read == 2 * 24 * (COCO * 1024 * 2 + 4 * (2 * 1024 * 8192 + 1024 + 8192))
    exact = plan.correlations_cost(large, large, PAPER, COCO, CorrelationSettings(precision="float32"), stored="none")
    assert exact.half_flops == 0
    assert exact.flops > cost.flops + cost.half_flops  # panels of A do not all fit, so B is computed more often
    kept = plan.correlations_cost(large, large, PAPER, COCO)
    assert kept.read == pytest.approx((2 * 10 * 24 + (1 + FEATURE_REPAIRINGS) + (1 + 1)) * COCO * 8192 * 2)
    assert kept.flops == 0


def test_a_forward_pass_counts_the_operations_of_transformer_blocks():
    spec = encoder()
    block = torch.nn.TransformerEncoderLayer(64, nhead=2, dim_feedforward=4 * 64, batch_first=True)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counted:
        block(torch.randn(1, 17, 64))
    assert plan.activations_cost(spec, N=5).flops == 5 * spec.layers * counted.get_total_flops()


def test_uses_the_numbers_of_operations_and_parameters_in_an_entry():
    cost, blocks = plan.activations_cost(encoder(gflops=30, parameters=5), N=7), plan.activations_cost(encoder(), N=7)
    assert cost.flops == 7 * 30e9
    assert cost.memory - blocks.memory == 4 * (5e6 - 2 * 12 * 64**2)


@pytest.mark.parametrize(
    ("changes", "tokens"),
    [
        ({}, 17),
        ({"global_token": "mean"}, 18),
        ({"global_token": "max"}, 18),
        ({"max_tokens": 5}, 5),
        ({"max_tokens": 500}, 17),
        ({"use_layers": "last"}, 17),
        ({"modality": "text", "kind": "vlm", "library": "open_clip", "context_length": 77}, 17),
        (
            {
                "modality": "text",
                "kind": "vlm",
                "library": "open_clip",
                "context_length": 77,
                "global_token": "reference",
            },
            77,
        ),
        ({"tokens": None, "image_size": 98}, 50),
        ({"tokens": None, "modality": "text", "kind": "language"}, 16),
        ({"tokens": None, "image_size": None, "template": "{image} what is this?"}, 257 + 5),
    ],
    ids=str,
)
def test_training_tokens_equal_those_of_the_activations_stage(changes, tokens):
    spec = encoder(**changes)
    cost = plan.activations_cost(spec, N=3)
    assert cost.written == len(spec.layer_numbers()) * 3 * (tokens + 1) * 64 * 2 + 8 * (3 + 4)


def test_counts_padding_for_text_towers_that_attend_to_it():
    def of(**changes):
        text = {"modality": "text", "kind": "vlm", "tokens": 14, "context_length": 77}
        return plan.activations_cost(encoder(**(text | changes)), N=1).flops

    assert of(library="open_clip") == of(global_token="last_position") == of(tokens=77) > of()


def test_arrays_are_read_and_written_without_a_forward_pass():
    spec = EncoderSpec(
        library="arrays", model="given", modality="image", kind="vision", layers=3, width=64, use_layers=[0, 2]
    )
    cost = plan.activations_cost(spec, N=1000, data_bytes=10**9, tokens=False)
    assert (cost.flops, cost.read, cost.written) == (0, 2 * 1000 * 64 * 4, 2 * 1000 * 64 * 2)


def test_parts_of_a_forward_pass_are_jobs_with_the_same_total_cost(elsewhere):
    def plan_with(preset="paper", **entry):
        encoders = {"minilm": entry, "dinov2-small": None}
        saes, analyses = {"small": {"preset": preset}}, {"matrices": {"all": None}}
        given = study_of(encoders=encoders, saes=saes, analyses=analyses)
        return make_plan(build_study(given, "test"), Rates(), results=elsewhere)

    whole, parted = plan_with(seeds=[0, 1]), plan_with(seeds=[0, 1], parts=4)
    jobs = {"activations": 1, "activations_part": 4}
    assert whole.jobs == whole.jobs | {"activations": 2}
    assert parted.jobs == whole.jobs | jobs
    assert parted.total() == whole.total()
    of_globals = plan_with("global", parts=4)
    assert of_globals.costs["activations_part"].written == 6 * plan.global_bytes(encoder(width=384), 1637)


def test_correlations_of_features_not_kept_have_the_estimated_operations(rng, tmp_path, write_features, monkeypatch):
    N = 16 * 1024
    a, b = encoder(layers=2, width=40), encoder(layers=3, width=60)
    settings = SAESettings(expansion=1, k=1)
    paths = []
    for name, spec in (("a@0", a), ("b@0", b)):
        layers = {n: rng.random((N, spec.width)) for n in range(spec.layers)}
        paths.append(write_features(tmp_path, name, layers, keep=False))
    encode, done = sae.SAE.encode, []

    def counting(self, x):
        done.append(2 * len(x) * self.W_enc.numel())
        return encode(self, x)

    monkeypatch.setattr(sae.SAE, "encode", counting)
    _store.correlate_stores(*paths, tmp_path / "a@0__b@0.zarr")
    cost = plan.correlations_cost(a, b, settings, N, stored="none")
    # Finding out the dtype of a layer and shuffling samples computes single blocks of 1,024 samples again.
    assert 1 <= sum(done) / cost.flops < 1.1
    drawn = REPAIRINGS * NULL_FEATURES
    # Floors of layers below 512 features use all of them.
    all_pairs = (2 * 40) * (3 * 60)
    expected = 4 * all_pairs + drawn * (2 * (3 * 60) + 3 * (2 * 40)) + FEATURE_REPAIRINGS * 40 * 60
    assert cost.half_flops == 2 * N * expected
    store = open_store(tmp_path / "a@0__b@0.zarr", readers.CORRELATIONS)
    assert cost.written == pytest.approx(sum(store[name].nbytes for name in store.array_keys()), abs=200)
    candidates = store["rho_ab"].size + store["rho_ba"].size
    assert cost.cpu_flops == plan._ASSIGNING_FLOPS * candidates


def test_retrieval_has_the_estimated_operations(rng):
    N, widths = 600, (40, 60)
    a, b = (rng.random((N, width)).astype(np.float32) for width in widths)
    with FlopCounterMode(display=False) as counted:
        matches, _ = retrieval.matched_retrieval(a, b)
    cosines = 2 * 300**2 * matches
    assert counted.get_total_flops() == 2 * 300 * 40 * 60 + cosines
    # Every feature has a match of its own at most, and float64 counts twice.
    assert 0 < matches <= sum(widths)
    images, texts = encoder(width=40), encoder(width=60, modality="text", kind="language")
    cost = plan.retrieval_cost(images, texts, SAESettings(expansion=1, k=1), N)
    assert cost.flops == 2 * 300 * 40 * 60 + 2 * 2 * 300**2 * 100
    assert cost.read == N * 100 * 2  # of last layers alone
    computed = plan.retrieval_cost(images, texts, SAESettings(expansion=1, k=1), N, stored="none")
    assert computed.flops - cost.flops == 2 * N * (40**2 + 60**2)


def test_the_fit_of_samples_has_the_estimated_operations(rng):
    N, image, texts = 600, encoder(layers=1, width=40), encoder(layers=2, width=30, modality="text", kind="language")
    layers = [[rng.random((N, width)).astype(np.float32) for width in widths] for widths in ((40,), (30, 30))]
    with FlopCounterMode(display=False) as counted:
        fits(*layers)
    cost = plan.samples_cost(image, texts, SAESettings(expansion=1, k=1), N)
    matching = 2 * 2 * 300 * 40 * 60
    # Cosines are of the pairs of features that match: at most as many as there are features.
    assert matching < counted.get_total_flops() <= cost.flops == matching + 2 * 2 * N * 300 * 100
    assert cost.read == 2 * N * 100 * 2


@pytest.mark.parametrize(("tokens", "width"), [(257, 1024), (14, 768), (1, 64)])
@pytest.mark.parametrize("at_once", [1, 16])
def test_reading_samples_counts_whole_chunks(tokens, width, at_once):
    rows, together = 2**18 // (2 * width), at_once * tokens
    starts = np.arange(20_000) * together
    chunks = (starts + together - 1) // rows - starts // rows + 1
    expected = chunks.mean() * rows * 2 * width / at_once
    assert plan._sample_read(encoder(width=width), at_once, tokens) == pytest.approx(expected, rel=0.01)


def test_an_sae_has_the_estimated_size(tmp_path):
    spec, settings = encoder(width=32), SAESettings(expansion=4, k=3)
    sae.save_sae(sae.SAE(32, 128, sae.TopK(3), torch.Generator()), tmp_path, "x", "layer 0")
    weights = (tmp_path / "sae_weights.safetensors").stat().st_size
    assert plan.sae_cost(spec, settings, N=10).written == pytest.approx(weights, abs=500)


def test_training_an_sae_counts_the_operations_of_its_products():
    spec, settings = encoder(width=32, tokens=5), SAESettings(expansion=4, k=3, epochs=2, batch_samples=4)
    model = sae.SAE(32, 128, sae.TopK(3), torch.Generator())
    with FlopCounterMode(display=False) as counted:
        model(torch.randn(5, 32))
    dense = counted.get_total_flops()
    sparse = 5 * 2 * 5 * 3 * 32
    steps = 2 * 3
    training = 2 * 10 * (dense + sparse) + steps * 12 * (2 * 32 * 128 + 32)
    measuring = 10 * (5 + 1) * (2 * 32 * 128 + 2 * 3 * 32)  # all tokens, and the global ones
    assert plan.sae_cost(spec, settings, N=10).flops == training + measuring


def test_an_sae_of_global_tokens_costs_as_one_of_a_token_per_sample_and_needs_no_others():
    both = SAESettings(expansion=4, k=3, epochs=2, batch_samples=4)
    alone = both.model_copy(update={"train_on": "global"})
    assert plan.sae_cost(encoder(tokens=5), alone, N=10) == plan.sae_cost(encoder(tokens=1), both, N=10)
    written = [plan.activations_cost(encoder(tokens=5), 10, tokens=tokens).written for tokens in (True, False)]
    assert written[1] == 2 * plan.global_bytes(encoder(), 10)
    assert written[0] - written[1] == 2 * plan.tokens_bytes(encoder(tokens=5), 10) + 8 * 21


def test_an_sae_reads_a_layer_once_if_it_fits_memory_and_else_every_epoch(monkeypatch):
    spec = encoder(tokens=5, width=32)
    once, thrice = (SAESettings(expansion=4, k=3, epochs=epochs) for epochs in (1, 3))
    N, size = 10, 10 * 5 * 32 * 2
    small = plan.sae_cost(spec, thrice, N)
    assert small.read == size
    assert plan.sae_cost(spec, once, N).read == small.read
    monkeypatch.setattr(plan, "IN_MEMORY_BYTES", size - 1)
    large = plan.sae_cost(spec, thrice, N)
    each_pass = N * plan._sample_read(spec, once.batch_samples, spec.tokens)
    chunk = 2**18  # global tokens, once more
    assert large.read == pytest.approx((3 + 1) * each_pass + 10 * chunk)  # all samples are also evaluated
    assert plan.sae_cost(spec, once, N).read == pytest.approx((1 + 1) * each_pass + 10 * chunk)
    assert small.memory - large.memory == size


@pytest.mark.parametrize(("held_out", "reads"), [(0.2, 2 * 8 + 2), (0, 2 * 10 + 10)])
def test_a_stream_costs_its_passes_and_all_its_trainings(held_out, reads):
    """Each epoch reads the training samples; held-out samples, or all if none are held out, are read once more."""
    spec = encoder(width=32, tokens=5)
    settings = SAESettings(expansion=4, k=3, epochs=2, batch_samples=4, held_out=held_out)
    one = plan.sae_cost(spec, settings, N=10)
    found = plan.stream_cost(spec, settings, N=10, seeds=3, data_bytes=1000)
    assert found.flops == pytest.approx(reads * plan.forward_flops(spec) + 2 * 3 * one.flops)
    assert found.read == pytest.approx(reads / 10 * 1000)
    assert found.written == 2 * 10 * 32 * 2 + 2 * 3 * one.written


def test_streaming_large_clip_on_coco_stores_no_tokens():
    spec = load_study("config/coco-large.yaml").encoders["clip-image-large"]
    stored = plan.activations_cost(spec, COCO).written + 24 * plan.sae_cost(spec, PAPER, COCO).written
    found = plan.stream_cost(spec, PAPER, COCO, seeds=1)
    assert stored - found.written == pytest.approx(24 * COCO * 257 * 1024 * 2, rel=1e-3)
    assert found.written < 10e9
    # Weights, gradients and moments of 24 SAEs, the model, a batch and its latents fit one GPU.
    assert 24 * 4 * 4 * 2 * 8192 * 1024 < found.memory < 16e9


def test_features_have_the_estimated_size(tmp_path, rng, write_features):
    spec, settings = encoder(layers=2, width=8), SAESettings(expansion=1, k=1)
    path = write_features(tmp_path, "x@0", {layer: rng.random((5, 8)) for layer in range(2)})
    recorded = store.open_store(path, readers.FEATURES)
    arrays = [array for name in recorded.group_keys() for _, array in recorded[name].arrays()]
    cost = plan.features_cost(spec, settings, N=5)
    assert cost.written == sum(array.nbytes for array in arrays)
    assert (cost.flops, cost.cpu_flops) == (2 * 2 * 5 * 2 * 8 * 8, 2 * 5 * 2 * 8 * 8)
    without = plan.features_cost(spec, settings, N=5, stored="none")
    assert cost.written - without.written == 2 * 5 * 8 * 2
    assert without.cpu_flops == 0
    record_features(tmp_path / "made/x@0/x.zarr", tmp_path / "made/x@0", 0, tmp_path / "after.zarr", code="after_topk")
    recorded = store.open_store(tmp_path / "after.zarr", readers.FEATURES)
    arrays = [array for name in recorded.group_keys() for _, array in recorded[name].arrays()]
    assert plan.features_cost(spec, settings, N=5, stored="sparse").written == sum(array.nbytes for array in arrays)


def test_a_second_code_costs_features_and_comparisons_alone():
    first, second = (
        make_plan(build_study(study_of(features=features), "test"), Rates(), samples=1000)
        for features in ("before_topk", ["before_topk", "after_topk"])
    )
    twice = {"features", "correlations", "metrics_retrieval"}
    assert second.jobs == {rule: (1 + (rule in twice)) * count for rule, count in first.jobs.items()}
    for rule in first.jobs.keys() - twice:
        assert second.costs[rule] == first.costs[rule]
    written, read = (
        [getattr(plan.costs[rule], of) for plan in (first, second)]
        for rule, of in (("features", "written"), ("correlations", "read"))
    )
    for one, both in (written, read):
        assert one < both < 1.5 * one


def test_similarity_has_the_estimated_operations_and_bytes(tmp_path, rng, monkeypatch, write_activations):
    specs = encoder(layers=2, width=6), encoder(layers=3, width=8)
    for module, names in (
        (plan, ("CKA_SAMPLES", "NEIGHBOUR_SAMPLES")),
        (similarity, ("CKA_SAMPLES", "NEIGHBOUR_SAMPLES")),
    ):
        for name, samples in zip(names, (30, 20), strict=True):
            monkeypatch.setattr(module, name, samples)
    paths = [
        write_activations(
            tmp_path / f"{name}.zarr",
            {layer: list(rng.standard_normal((40, 1, spec.width))) for layer in range(spec.layers)},
        )
        for name, spec in zip("ab", specs, strict=True)
    ]
    with FlopCounterMode(display=False) as counted:
        similarity.compare_stores(*paths, tmp_path / "a__b.csv")
    cost = plan.similarity_cost(*specs, N=40)
    assert cost.flops == counted.get_total_flops()
    assert cost.read == 30 * 2 * (2 * 6 + 3 * 8)
    assert cost.written == pytest.approx((tmp_path / "a__b.csv").stat().st_size, rel=0.4)


def test_examples_cost_a_forward_pass_and_the_features_activations():
    spec, settings = encoder(layers=2, width=8, tokens=5), SAESettings(expansion=2, k=3)
    cost = plan.examples_cost(spec, settings, N=100, data_bytes=1000)
    fires = 2 * 16 * SHOWN_SAMPLES * 5
    assert cost.flops == plan.activations_cost(spec, N=100).flops + fires * 2 * 8
    assert cost.read == 1000 + 2 * 100 * 16 * 2 + 2 * 4 * (2 * 8 * 16 + 8)
    without, computed = (
        plan.examples_cost(spec, settings, N=100, stored="none"),
        plan.computed_features(spec, settings, 100),
    )
    assert without.flops - cost.flops == computed.flops == 2 * 2 * 100 * 8 * 16
    shorter = plan.examples_cost(spec.model_copy(update={"tokens": 4}), settings, N=100)
    assert cost.written - shorter.written == 2 * 16 * SHOWN_SAMPLES
    most = 2 * 16 * SHOWN_SAMPLES
    many = plan.examples_cost(spec, settings, N=10 * most, data_bytes=1000)
    assert many.flops == plan.activations_cost(spec, N=most).flops + fires * 2 * 8
    assert many.read == 100 + 2 * 10 * most * 16 * 2 + 2 * 4 * (2 * 8 * 16 + 8)


@pytest.mark.parametrize("config", CONFIGS)
def test_rules_request_enough_memory_for_every_study_of_the_paper(config, elsewhere):
    study = load_study(config)
    costs = [
        make_plan(study.model_copy(update={"stream": stream}), Rates(), results=elsewhere).costs
        for stream in (True, False)
    ]
    for stage in ("activations", "sae", "stream", "features", "similarity", "names", "examples"):
        rule = (CLONE / "workflow" / "rules" / f"{stage}.smk").read_text(encoding="utf-8")
        given, *_ = re.findall(r"mem_mb=grown\((.*)\),\n", rule)
        asked = eval(given, {"STUDY": study}) * 1e6
        assert all(of_rule[stage].memory < asked for of_rule in costs if stage in of_rule), stage


def test_correlations_request_enough_host_memory_on_a_gpu():
    """The global tokens of two large encoders on COCO, and the result; the rest is on the GPU."""
    rule = (CLONE / "workflow" / "rules" / "correlations.smk").read_text(encoding="utf-8")
    (given,) = re.findall(r"mem_mb=grown\((.*)\),\n", rule)
    asked = eval(given, {"STUDY": load_study("config/coco-large.yaml")}) * 1e6
    result = 2 * 2 * 24 * 24 * 8192 * 4
    assert asked > plan._PROCESS_BYTES + 2 * 24 * plan.global_bytes(encoder(width=1024), COCO) + 2 * result


def test_layers_of_several_widths_cost_the_sum_of_layers(elsewhere):
    """For all that is proportional to the width, with one number of latents."""
    settings, shared = SAESettings(preset="global", features=96), {"global_token": "mean", "tokens": 1, "gflops": 1}
    several = encoder(width=[32, 96], **shared)
    alone = [encoder(width=width, layers=1, **shared) for width in several.width]

    def written(cost, *more):
        each = sum(cost(spec, *more).written for spec in alone)
        assert cost(several, *more).written == each

    written(plan.features_cost, settings, 100)
    written(plan.stream_cost, settings, 100, 1)
    written(plan.activations_cost, 100, 0, False)
    pairs = [plan.similarity_cost(a, b, 100) for a in alone for b in alone]
    assert plan.similarity_cost(several, several, 100).read == sum(pair.read for pair in pairs) / 2
    encoders = dict.fromkeys(("x", "y"), several.model_dump(exclude_defaults=True))
    saes = {"s": {"preset": "global", "features": 96}}
    study = build_study(study_of(encoders=encoders, saes=saes, analyses={"matrices": {"all": None}}), "test")
    found = make_plan(study, Rates(), 100, elsewhere).costs["sae"]
    narrow, wide = (plan.sae_cost(spec, settings, 100) for spec in alone)
    assert (found.written, found.memory) == (2 * (narrow.written + wide.written), wide.memory)


def test_a_number_of_latents_costs_as_much_as_the_expansion_that_gives_it():
    spec, wide, given = encoder(), SAESettings(expansion=5), SAESettings(features=5 * 64)
    for cost in (plan.sae_cost, plan.features_cost, plan.names_cost, plan.examples_cost):
        assert cost(spec, given, 1000) == cost(spec, wide, 1000)
    assert plan.stream_cost(spec, given, 1000, 2) == plan.stream_cost(spec, wide, 1000, 2)
    assert plan.correlations_cost(spec, spec, given, 1000) == plan.correlations_cost(spec, spec, wide, 1000)
    assert plan.retrieval_cost(spec, spec, given, 1000) == plan.retrieval_cost(spec, spec, wide, 1000)
    assert plan.member_pages_cost(spec, given, 3) == plan.member_pages_cost(spec, wide, 3)


def test_the_rule_requests_enough_time_for_the_largest_pair():
    rule = (CLONE / "workflow" / "rules" / "correlations.smk").read_text(encoding="utf-8")
    (asked,) = re.findall(r"runtime=grown\((.*)\),\n", rule)
    large = load_study("config/coco-large.yaml").encoders["clip-image-large"]
    hours = plan.correlations_cost(large, large, PAPER, COCO, stored="none").hours(Rates())
    assert hours < int(asked) / 60
    guide = (CLONE / "docs" / "reproducing-the-paper.md").read_text(encoding="utf-8")
    assert f"up to {60 * hours:.0f} minutes" in guide


def sizes(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_sizes_for_the_default_study_match_its_stores():
    """Activations are not compressed; compression saves up to four fifths of features.

    SAEs come with logs, a tenth of the size of the smallest.
    """
    made, study = CLONE / "results" / "openclipart", load_study()
    stores = {path.stem: path for path in made.glob("streams/small/activations/*.zarr")}
    if set(stores) != set(study.encoders):
        pytest.skip("the default study has no results here")
    N = make_plan(study, Rates()).samples["openclipart"]
    settings = study.saes["small"]
    for name, path in stores.items():
        spec = study.encoders[name]
        written = sizes(path) + sizes(made / "streams" / "small" / "saes" / name)
        assert written / plan.stream_cost(spec, settings, N, len(spec.seeds)).written == pytest.approx(1, abs=0.12)
        for recorded in (made / "features" / "small").glob(f"{name}@*.zarr"):
            assert 0.2 < sizes(recorded) / plan.features_cost(spec, settings, N).written < 1.01, recorded
        for recorded in (made / "examples" / "small").glob(f"{name}@*"):
            assert 0.2 < sizes(recorded) / plan.examples_cost(spec, settings, N).written < 1.01, recorded
    for member in study.members():
        cost = plan.member_pages_cost(study.encoders[member.encoder], settings, len(study.comparisons()[member]))
        shown = CLONE / "results/studies/openclipart/pages/data/openclipart/small" / str(member)
        assert 0.2 < sizes(shown) / cost.written < 1.01, member


def test_uses_the_actual_size_of_an_existing_data_set(elsewhere):
    study = build_study(study_of(), "test")
    assert make_plan(study, Rates(), results=elsewhere).samples == {"openclipart": 1637}
    folder = elsewhere / "openclipart" / "data"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text('{"rows": 77}')
    (folder / "samples.arrow").write_bytes(b"x" * 1234)
    found = make_plan(study, Rates(), results=elsewhere)
    assert found.samples == {"openclipart": 77}
    assert found.costs["dataset"].written == 1234
    assert make_plan(study, Rates(), samples=500, results=elsewhere).samples == {"openclipart": 500}


def test_downloaded_images_are_on_disk_twice(elsewhere):
    def written(**entry):
        datasets = {"mine": {"source": "hub/mine", "samples": 100, **entry}}
        study = build_study(study_of(datasets=datasets), "test")
        return make_plan(study, Rates(), results=elsewhere).costs["dataset"].written

    assert written(image_url="url") == 2 * written() == 2 * 100 * 160_000


def test_a_data_set_of_unknown_size_is_an_error_with_a_remedy(elsewhere):
    def plan_with(**entry):
        datasets = {"mine": {"source": "hub/mine", **entry}}
        return make_plan(build_study(study_of(datasets=datasets), "test"), Rates(), results=elsewhere)

    with pytest.raises(StudyError, match=r"datasets\.mine: nothing says how many samples it has; give --samples"):
        plan_with()
    assert plan_with(limit=40).samples == plan_with(limit=40, samples=50).samples == {"mine": 40}
    assert plan_with(limit=60, samples=50).samples == {"mine": 50}


def test_counts_the_rows_of_a_local_table(elsewhere, tmp_path):
    (tmp_path / "mine.csv").write_text('image,caption\n1.png,"two\nlines"\n2.png,NA\n3.png,c\n')
    datasets = {"mine": {"source": str(tmp_path / "mine.csv")}}
    assert make_plan(build_study(study_of(datasets=datasets), "test"), Rates(), results=elsewhere).samples == {
        "mine": 3
    }


def test_hours_are_operations_and_bytes_over_their_rates():
    cost = plan.Cost(written=1e9, read=2e9, flops=30e12, half_flops=300e12, cpu_flops=400e9)
    rates = Rates(tflops=15, half_tflops=100, disk_mb_per_s=500, cpu_gflops=200)
    assert cost.hours(rates) == pytest.approx((2 + 3 + 2 + 6) / 3600)


def test_the_total_is_the_sum_of_rules_with_the_memory_of_the_largest_job(elsewhere):
    found = make_plan(load_study("config/coco-base.yaml"), Rates(), results=elsewhere)
    for field in ("written", "read", "flops", "half_flops", "cpu_flops"):
        assert getattr(found.total(), field) == pytest.approx(sum(getattr(c, field) for c in found.costs.values()))
    assert found.total().memory == max(cost.memory for cost in found.costs.values())


def test_the_reference_preset_costs_more_because_of_padding(elsewhere):
    changes = {"encoders": {"clip-text-large": None, "dinov2-large": None}, "analyses": {"matrices": {"m": None}}}
    own, reference = (
        make_plan(build_study(study_of(preset=preset, **changes), "test"), Rates(), results=elsewhere)
        for preset in ("own", "reference")
    )
    assert reference.jobs == own.jobs
    more = reference.costs["activations"].written - own.costs["activations"].written
    assert more == 12 * 1637 * (77 - 14) * 768 * 2


def run(*arguments):
    return CliRunner().invoke(app, ["plan", *arguments])


def test_the_command_prints_an_aligned_table_and_its_assumptions():
    output = run("--study", "config/coco-large.yaml", "--samples", "1000", "--tflops", "50").output
    head, table, below = output.split("\n\n", 2)
    assert head == "study coco-large"
    lines = table.splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[0].split() == ["rule", "jobs", "disk", "read", "FLOP", "memory", "hours"]
    jobs = make_plan(load_study("config/coco-large.yaml"), Rates()).jobs
    assert [line.split()[:2] for line in lines[1:-1]] == [[rule, str(count)] for rule, count in jobs.items()]
    assert lines[-1].split()[0] == "total"
    for text in ("coco 1,000", "50 TFLOP/s", "150 for products of float16", "500 MB/s", "200\nGFLOP/s"):
        assert text in below
    assert "guessed" not in below


def test_the_command_lists_encoders_with_guessed_token_counts(tmp_path):
    config = yaml.safe_load((CLONE / "config.yaml").read_text())
    config["encoders"]["minilm"] = {"tokens": None}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    assert "guessed, as these entries have no `tokens`: minilm." in run("--study", str(tmp_path / "config.yaml")).output
    assert "guessed" not in run().output


def test_the_command_prints_json():
    found = json.loads(run("--study", "config/coco-base.yaml", "--json").output)
    assert found["study"] == "coco-base"
    assert found["jobs"]["stream"] == 10
    assert found["total"]["written"] == pytest.approx(sum(cost["written"] for cost in found["costs"].values()))
    assert found["total"]["hours"] == pytest.approx(sum(cost["hours"] for cost in found["costs"].values()))
    fast = json.loads(run("--study", "config/coco-base.yaml", "--json", "--disk-mb-per-s", "1e9").output)
    assert fast["total"]["hours"] < found["total"]["hours"]
    assert fast["total"]["read"] == found["total"]["read"]


def test_planning_does_not_import_torch():
    code = "import sys, conceptshare.cli, conceptshare.preflight.plan; print('torch' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": str(CLONE / "src")}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


@pytest.mark.parametrize(
    ("size", "shown"), [(0, "0 B"), (999, "999 B"), (62_258e6, "62.3 GB"), (999.9e9, "1.0 TB"), (2614e12, "2,614 TB")]
)
def test_sizes_have_suitable_units(size, shown):
    assert plan.format_bytes(size) == shown


@pytest.mark.parametrize("study", TABLES)
def test_studies_of_the_papers_tables_compare_their_encoders(study):
    with (Path(analysis.__file__).parent / "paper" / "wmppc.csv").open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["table"] in TABLES[study]]
    (dataset,), (size,) = {row["dataset"] for row in rows}, {row["size"] for row in rows}
    found = load_study(f"config/{study}.yaml")
    assert found.study == study
    assert list(found.datasets) == [dataset]
    assert set(found.encoders) == {f"{row[side]}-{size}" for row in rows for side in ("source", "target")}
    assert found.encoders == {member.encoder: found.encoders[member.encoder] for member in found.members()}
    everywhere = {row["source"] for row in rows if row["layers"] == "all"}
    for name, spec in found.encoders.items():
        assert spec.use_layers == ("all" if name.removesuffix(f"-{size}") in everywhere else "last")
    (matrix,) = (name for name, analysis in found.analyses.matrices.items() if analysis.paper)
    assert found.paper_datasets(matrix) == [dataset]
    assert found.analyses.matrices[matrix].paper == size
    assert {member.encoder for member in found.matrix_members(matrix)} == set(found.encoders)
    assert found.sae_key("paper") == "{}"


def test_every_table_of_the_paper_is_in_exactly_one_study():
    with (Path(analysis.__file__).parent / "paper" / "wmppc.csv").open(encoding="utf-8") as file:
        tables = {row["table"] for row in csv.DictReader(file)}
    assert sorted(table for held in TABLES.values() for table in held) == sorted(tables)


@pytest.mark.parametrize(("config", "size"), [("config/figure1.yaml", "large"), ("config.yaml", None)])
def test_figure_1_compares_two_seeds_of_a_clips_encoders(config, size):
    study = load_study(config)
    image, text = (f"clip-{of}-{size}" if size else f"tiny-clip-{of}" for of in ("image", "text"))
    pairs = [(str(a), str(b)) for a, b in study.layerwise_pairs("layers")]
    assert pairs == [(f"{encoder}@0", f"{encoder}@1") for encoder in (image, text)]


def test_the_studies_of_figure_1_and_the_typology_reuse_results_of_coco_large():
    large = load_study("config/coco-large.yaml")
    for name in ("figure1", "typology"):
        study = load_study(f"config/{name}.yaml")
        for encoder_name, spec in study.encoders.items():
            assert spec.activations_key() == large.encoders[encoder_name].activations_key()
            # A stream trains all seeds of its encoder, so other seeds would retrain them.
            assert spec.seeds == large.encoders[encoder_name].seeds
        assert study.dataset_key("coco") == large.dataset_key("coco")
        assert study.sae_key("paper") == large.sae_key("paper")


@pytest.mark.parametrize("config", CONFIGS[1:])
def test_config_comments_have_the_planned_cost(config):
    text = (CLONE / config).read_text(encoding="utf-8")
    plans = script("write_plans")
    assert text == plans.with_headline(text, plans.plan_of(CLONE / config)), "run python docs/write_plans.py"
    assert "\n# conceptshare plan: " in text
    assert load_study(config).study == Path(config).stem


def test_the_guides_table_of_costs_matches_the_plan():
    guide = CLONE / "docs" / "reproducing-the-paper.md"
    text = guide.read_text(encoding="utf-8")
    assert text == script("write_plans").with_costs(text), "run python docs/write_plans.py"
    for config in {*CONFIGS[1:]} - {"config/decoder.yaml"}:  # not a study of the paper
        assert text.count(f"](../{config})") >= 1
