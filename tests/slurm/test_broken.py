"""Failures on a cluster: the study ends with the bytes of an undisturbed run."""

import json
import os
import re
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests.helpers.forks import run_forked

from .conftest import LAYER, LONG_ENOUGH

LONG = {"expansion": 2, "k": 4, "learning_rate": 1e-3, "batch_captions": 16, "epochs": 500}
FOLDER = Path(f"results/squares/saes/long/reader/layer-{LAYER:02d}/seed-0")
TARGET = str(FOLDER / "sae_weights.safetensors")
LOG = Path(f"results/logs/squares/saes/long/reader/layer-{LAYER:02d}/seed-0.log")
TOKENS = "results/squares/tokens/reader.zarr"


@pytest.fixture(scope="module")
def undisturbed(first_run, tmp_path_factory):
    """The files of the SAE that takes long to train, trained outside the workflow."""
    project, _, _ = first_run
    out = tmp_path_factory.mktemp("undisturbed") / "seed-0"
    options = {"--layer": LAYER, "--settings": json.dumps(LONG), "--out": out}
    store = project.folder / TOKENS
    command = [text for option in options.items() for text in option]
    code = "from conceptshare.cli import main; main()"
    assert run_forked(code, "sae", "train", "--tokens", store, *command).returncode == 0
    return read(out)


@pytest.fixture
def training(pocket):
    """A finished study with one more SAE setting, which takes long to train."""
    pocket.python = sys.executable  # as for users; signals and Slurm's memory accounting do not reach forks
    pocket.config = pocket.config | {"saes": pocket.config["saes"] | {"long": LONG}}
    profile = pocket.folder / "profiles/slurm/config.yaml"
    profile.write_text(re.sub(r"\n  sae: \d+", "\n  sae: 1", profile.read_text()))  # affects the last digits
    return pocket


def read(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "provenance.json"}


def until(condition):
    deadline = time.monotonic() + LONG_ENOUGH
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def wait_until_it_trains(project):
    """Wait until the job has locked its output, and return the job."""
    until((project.folder / FOLDER.with_name(".seed-0.lock")).exists)
    return project.cluster.jobs()[-1]


def paused(project):
    """The training job and its process, stopped so that it neither finishes nor computes meanwhile.

    ``scontrol suspend`` returns before the node has stopped the processes, which may then happen after ``scancel``.
    """
    job = wait_until_it_trains(project)
    process = trainer(project, job.id)
    os.kill(process, signal.SIGSTOP)
    return job, process


def trainer(project, job):
    """The process of a Slurm job that trains."""
    lines = project.cluster.run("scontrol", "listpids", str(job)).splitlines()[1:]
    commands = {int(line.split()[0]): Path(f"/proc/{line.split()[0]}/cmdline").read_bytes() for line in lines}
    # A shell would end at SIGTERM, and Slurm then kills what is left, before it has saved.
    assert not [command for command in commands.values() if b"-m conceptshare " in command]
    return next(process for process, command in commands.items() if b"\0conceptshare\0" in command)


def has_been_asked_to_end(process):
    """Whether SIGTERM waits for a stopped process, or none is left of it."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except FileNotFoundError:
        return True
    pending = int(re.search(r"^ShdPnd:\s*(\w+)", status, re.MULTILINE)[1], 16)
    return bool(pending >> (signal.SIGTERM - 1) & 1) or "State:\tT" not in status


def resume_when_asked_to_end(process):
    until(lambda: has_been_asked_to_end(process))
    with suppress(ProcessLookupError):
        os.kill(process, signal.SIGCONT)


def log_contains(project, text, log=LOG):
    """Whether a job's log, which Snakemake deletes before each attempt, contains the text."""
    log = project.folder / log
    return log.exists() and text in log.read_text()


def states(jobs):
    return [job.state for job in jobs]


def finish(process):
    output, _ = process.communicate(timeout=LONG_ENOUGH)
    assert process.returncode == 0, output
    return output


def test_a_cancelled_job_is_resubmitted_with_more_memory_and_resumes(training, undisturbed):
    snakemake = training.start(TARGET)
    job, process = paused(training)
    training.cluster.run("scancel", str(job.id))
    resume_when_asked_to_end(process)
    finish(snakemake)
    first, second = training.submitted()
    assert states([first, second]) == ["CANCELLED", "COMPLETED"]
    assert (second.memory_mb, second.minutes) == (2 * first.memory_mb, 2 * first.minutes)
    assert read(training.folder / FOLDER) == undisturbed


def test_an_out_of_memory_job_is_resubmitted_with_more_memory(training, undisturbed):
    output = training.submit("--set-resources", "sae:mem_mb=300*10**(attempt-1)", "--", TARGET)
    first, second = training.submitted()
    assert (first.memory_mb, second.memory_mb) == (300, 3000)
    assert first.state != second.state == "COMPLETED", output
    assert read(training.folder / FOLDER) == undisturbed


def test_a_job_that_outlives_its_snakemake_and_its_replacement_both_succeed(training, undisturbed):
    killed = training.start(TARGET)
    orphan, process = paused(training)
    killed.kill()
    killed.communicate()
    refused = training.run("--profile", "slurm", TARGET)
    assert refused.returncode == 1
    assert "--unlock" in refused.stdout + refused.stderr
    assert training.run("--unlock").returncode == 0
    snakemake = training.start(TARGET)
    until(lambda: log_contains(training, f"Slurm job {orphan.id}), which is making it"))
    os.kill(process, signal.SIGCONT)
    finish(snakemake)
    until(lambda: all(job.state == "COMPLETED" for job in training.cluster.jobs()[-2:]))
    assert len(training.submitted()) == 2
    assert log_contains(training, f"(Slurm job {orphan.id}) while this process waited")
    assert read(training.folder / FOLDER) == undisturbed
    assert "Nothing to be done" in training.submit(TARGET)


def test_jobs_that_reach_their_time_limits_save_and_are_resumed(training, tmp_path):
    """An SAE and a stream at the same time, because Slurm checks limits only every 30 seconds."""
    endless = training.config | {"saes": {"long": LONG | {"batch_captions": 1, "epochs": 10_000}}}
    streaming = training.copy(tmp_path / "streaming")
    training.config, streaming.config = endless, endless | {"stream": True}
    stream = "results/squares/streams/long/saes/reader", "results/logs/squares/streams/long/saes/reader.log"
    # The stream gets less than the notice that the profile asks for: it ends by itself, before its limit.
    jobs = {"sae": (training, TARGET, LOG, 1, "TIMEOUT"), "stream": (streaming, *stream, 240, "FAILED")}
    stopped = []
    try:
        for project, target, *_ in jobs.values():
            project.start(target)
        for rule, (project, _, log, seconds, _) in jobs.items():
            until(lambda project=project, log=log: log_contains(project, " steps, ", log))
            job = next(str(job.id) for job in training.cluster.jobs()[::-1] if job.rule == rule)
            training.cluster.run("scontrol", "update", f"JobId={job}", f"EndTime=now+{seconds}")
            stopped.append(trainer(training, job))
            os.kill(stopped[-1], signal.SIGSTOP)  # so that it does not compute all the while
        for process in stopped:
            resume_when_asked_to_end(process)
        for project, _, log, *_ in jobs.values():
            until(lambda project=project, log=log: log_contains(project, ": resuming at step ", log))
        submitted = training.submitted()
        for rule, (*_, state) in jobs.items():
            assert states(job for job in submitted if job.rule == rule) == [state, "RUNNING"]
    finally:
        streaming.kill()


def test_survives_an_outage_of_the_controller(training, undisturbed):
    without_accounting = training.folder / "profiles/slurm/without-accounting"
    path = os.pathsep.join([str(without_accounting), training.cluster.environment["PATH"]])
    training.choice = {"PATH": path}
    process = training.start(TARGET)
    wait_until_it_trains(training)
    training.cluster.stop_controller()
    time.sleep(3)  # during which Snakemake polls
    training.cluster.start_controller()
    finish(process)
    training.cluster.run("scontrol", "reconfigure")  # counts devices wrong if the job ended before the node registered
    assert states(training.submitted()) == ["COMPLETED"]
    assert read(training.folder / FOLDER) == undisturbed


def test_an_interrupted_snakemake_cancels_its_jobs_and_resumes_when_restarted(training, undisturbed):
    # While polling, it has no list of jobs to cancel, so it is interrupted before the first poll.
    training.choice = {"ASK_NOTHING": "yes"}
    snakemake = training.start(TARGET, separate=True)
    _, process = paused(training)
    snakemake.send_signal(signal.SIGINT)
    snakemake.communicate(timeout=LONG_ENOUGH)
    resume_when_asked_to_end(process)
    until(lambda: training.cluster.jobs()[-1].state == "CANCELLED")
    training.choice = {}
    training.submit(TARGET)
    assert states(training.submitted()) == ["CANCELLED", "COMPLETED"]
    assert read(training.folder / FOLDER) == undisturbed
