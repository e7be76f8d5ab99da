"""A study through `snakemake --profile slurm`: what is queued, what it is given, and what a change costs."""

from .conftest import contents, jobs_done

LOCAL = {"dataset", "weights", "metrics_pair", "metrics_layerwise", "metrics_saes", "figures_layerwise", "figures_saes"}
# CPUs of the profile, memory in MB and minutes of the rule.
ASKED = {
    "activations": (8, 16_000, 480),
    "sae": (4, 8_000, 720),
    "features": (4, 8_000, 120),
    "correlations": (4, 9_000, 720),
    "similarity": (4, 4_000, 120),
}


def test_every_rule_that_computes_is_queued_with_what_it_asks_for_and_no_other_is(first_run):
    _, jobs, output = first_run
    counts = {"activations": 2, "sae": 3, "features": 3, "correlations": 2, "similarity": 1}
    assert {rule: sum(job.rule == rule for job in jobs) for rule in {job.rule for job in jobs}} == counts
    for job in jobs:
        assert (job.cpus, job.memory_mb, job.minutes) == ASKED[job.rule]
        assert (job.state, job.gpus) == ("COMPLETED", 1)
    ran = jobs_done(output)
    assert set(ran) - set(counts) == LOCAL | {"all"}


def test_results_are_those_of_a_run_without_a_cluster(first_run, new_pocket, tmp_path):
    alone = new_pocket.copy(tmp_path / "clone")
    # The last digits depend on the threads, which are no more than the machine has, on a cluster too.
    threads = [f"{rule}={cpus}" for rule, (cpus, _, _) in ASKED.items()]
    result = alone.run("--cores", "all", "--set-threads", *threads)
    assert result.returncode == 0, result.stdout + result.stderr
    found, expected = ({name: digest for name, (digest, _) in contents(p).items()} for p in (first_run[0], alone))
    assert found == expected
