"""A study with `snakemake --profile slurm`: the queued jobs and their resources."""

import json
from itertools import combinations

import pytest
import torch

from .conftest import LONG_ENOUGH, contents, jobs_done

LOCAL = {
    "dataset",
    "weights",
    "metrics_pair",
    "metrics_layerwise",
    "metrics_saes",
    "figures_layerwise",
    "figures_saes",
}
# CPUs of the profile, memory in MB and minutes of the rule.
ASKED = {
    "activations": (8, 16_000, 480),
    "sae": (4, 8_000, 720),
    "features": (4, 8_000, 120),
    "correlations": (4, 16_000, 720),
    "similarity": (4, 4_000, 120),
}


def test_exactly_the_compute_rules_are_queued_with_their_resources(first_run):
    _, jobs, output = first_run
    counts = {"activations": 2, "sae": 2, "features": 2, "correlations": 1, "similarity": 1}
    assert {rule: sum(job.rule == rule for job in jobs) for rule in {job.rule for job in jobs}} == counts
    for job in jobs:
        assert (job.cpus, job.memory_mb, job.minutes) == ASKED[job.rule]
        assert (job.state, job.gpus) == ("COMPLETED", 1)
    ran = jobs_done(output)
    assert set(ran) - set(counts) == LOCAL


def test_a_cpu_job_gets_no_device(pocket):
    pocket.submit("results/squares/names/tiny/reader@0.parquet", "results/studies/pocket/pages/samples/squares")
    jobs = pocket.submitted()
    assert {job.rule: (job.state, job.gpus) for job in jobs} == {
        "names": ("COMPLETED", 0),
        "pages_samples": ("COMPLETED", 0),
    }


def test_two_jobs_at_once_get_two_devices(first_run):
    project, jobs, _ = first_run
    records = (json.loads(path.read_text()) for path in (project.folder / "results").rglob("*provenance.json"))
    devices = {
        int(one["slurm"]["SLURM_JOB_ID"]): one["hardware"]["cuda_visible_devices"] for one in records if one["slurm"]
    }
    assert set(devices) == {job.id for job in jobs}
    assert set(devices.values()) == {"0", "1"}
    at_once = [(a, b) for a, b in combinations(jobs, 2) if a.start < b.end and b.start < a.end]
    assert at_once
    assert all(devices[a.id] != devices[b.id] for a, b in at_once)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_job_with_a_gpu_invisible_to_torch_fails_unless_the_cpu_is_chosen(pocket):
    similarity = (
        "--forcerun",
        "similarity",
        "--retries",
        "0",
        "--",
        "results/squares/similarity/reader__viewer.csv",
    )
    pocket.choice = {"DEVICE_OF_NODES": ""}
    output, _ = pocket.start(*similarity).communicate(timeout=LONG_ENOUGH)
    assert "error: a GPU was requested (CONCEPTSHARE_DEVICE=cuda), but torch" in output
    pocket.choice = {"CONCEPTSHARE_DEVICE": "cpu"}
    pocket.submit(*similarity)
    assert [(job.rule, job.state, job.gpus) for job in pocket.submitted()] == [
        ("similarity", "FAILED", 1),
        ("similarity", "COMPLETED", 0),
    ]


def test_short_jobs_in_one_slurm_job_need_one_device(pocket):
    before = contents(pocket)
    stores = [f"results/squares/features/tiny/{member}@0.zarr" for member in ("reader", "viewer")]
    pocket.submit(
        "--groups", "features=short", "--group-components", "short=2", "--forcerun", "features", "--", *stores
    )
    (job,) = pocket.submitted()
    assert (job.state, job.gpus) == ("COMPLETED", 1)
    assert {name: digest for name, (digest, _) in contents(pocket).items()} == {
        name: digest for name, (digest, _) in before.items()
    }
