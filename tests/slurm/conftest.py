"""A pocket study on a real Slurm: one layer of two small encoders, compared layer by layer."""

import hashlib
import os
import re
import subprocess
import sys

import pytest

from tests.helpers.forks import forked_python

from ..workflow.conftest import CLONE, Project, encoder_entry, fresh, new_clone  # noqa: F401 - a fixture of both folders
from .cluster import Cluster, missing

IMPATIENT = "tests.slurm.impatient_snakemake"
# Jobs run the Python that Snakemake runs in.
START = f"""
import runpy, sys
from tests.helpers.forks import reimport
reimport("conceptshare")
sys.executable = sys.argv.pop(1)
runpy.run_module("{IMPATIENT}", run_name="__main__")
"""
OFTEN = ("--max-status-checks-per-second", "10")
LAYER = 1
LONG_ENOUGH = 900  # seconds, for slow and busy machines
# Pages take as many jobs as everything else, and the tests of the workflow cover them.
WITHOUT_PAGES = ("--omit-from", "names", "examples", "pages_samples", "pages_pair", "pages_index")


class SlurmProject(Project):
    """A clone whose Snakemake submits to a cluster."""

    def __init__(self, folder, python, cluster):
        super().__init__(folder, python)
        self.cluster = cluster
        self.choice = {}  # user settings from environment variables
        self._started = []
        self._submitted_before = len(cluster.jobs())

    @property
    def environment(self):
        environment = super().environment
        environment["PYTHONPATH"] += f":{CLONE}"  # where Snakemake's program is
        return environment | self.cluster.environment | self.choice

    def start(self, *arguments, separate=False):
        """Start Snakemake; if `separate`, not in a fork, so that signals reach it."""
        command = [sys.executable, "-m", IMPATIENT] if separate else [forked_python(), "-c", START, self.python]
        process = subprocess.Popen(
            [*command, "--profile", "slurm", *OFTEN, *arguments],
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self._started.append(process)
        return process

    def kill(self):
        """Kill the processes that were started, but not their jobs."""
        for process in self._started:
            process.kill()

    def end(self):
        """End processes and jobs left by a test, which would keep GPUs from later ones."""
        self.kill()
        self.cluster.cancel_all()

    def submit(self, *arguments):
        """Run to the end, by default everything except pages, and return Snakemake's output."""
        process = self.start(*(arguments or WITHOUT_PAGES))
        output, _ = process.communicate(timeout=LONG_ENOUGH)
        assert process.returncode == 0, output
        return output

    def submitted(self):
        """The jobs submitted since the last call."""
        jobs = self.cluster.jobs()[self._submitted_before :]
        self._submitted_before += len(jobs)
        return jobs

    def copy(self, folder):
        return SlurmProject(super().copy(folder).folder, self.python, self.cluster)


def jobs_done(output):
    """The number of jobs per rule that Snakemake ran, from its table."""
    table = re.search(r"\njob +count\n[- ]+\n(.*?)\ntotal ", output, re.DOTALL)
    return {rule: int(count) for rule, count in (line.split() for line in table[1].splitlines())} if table else {}


def contents(project, *ignored):
    """The digest and time of every result, except logs and provenance."""
    results = project.folder / "results"
    ignored += ("provenance.json", "study.json")
    found = {}
    for path in sorted(results.rglob("*")):
        name = str(path.relative_to(results))
        if path.is_file() and not name.startswith("logs/") and not path.name.endswith(ignored):
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns
    return found


def pocket_config():
    """One layer of two encoders, and their heatmap."""
    fixed = {"use_layers": [LAYER]}
    return {
        "study": "pocket",
        "datasets": {"squares": {"source": "./squares.parquet", "image": "picture", "caption": "words"}},
        "encoders": {
            "reader": encoder_entry("./models/reader", "text", "language", **fixed),
            "viewer": encoder_entry("./models/viewer", "image", "vision", **fixed),
        },
        "saes": {"tiny": {"expansion": 2, "k": 4, "learning_rate": 1e-2, "batch_captions": 16}},
        "analyses": {"layerwise": {"both": {"pairs": [["reader", "viewer"]]}}},
    }


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    """A private Slurm. If it is not installed, tests are skipped, or fail in CI."""
    lacking = missing()
    if lacking:
        reason = f"no Slurm on this machine ({', '.join(lacking)}); on Debian: apt-get install slurm-wlm munge"
        (pytest.fail if os.getenv("CI") else pytest.skip)(reason)
    started = Cluster(tmp_path_factory.mktemp("slurm"))
    started.start()
    yield started
    started.stop()


@pytest.fixture(scope="session")
def new_pocket(fresh, cluster, tmp_path_factory):  # noqa: F811
    """The pocket study before its first run."""
    project = fresh.copy(tmp_path_factory.mktemp("new-pocket") / "clone")
    project.config = pocket_config()
    return SlurmProject(project.folder, project.python, cluster)


@pytest.fixture(scope="session")
def first_run(new_pocket, tmp_path_factory):
    """The study after its first run, the jobs that Slurm ran, and the output."""
    project = new_pocket.copy(tmp_path_factory.mktemp("pocket") / "clone")
    output = project.submit()
    return project, project.submitted(), output


@pytest.fixture
def pocket(first_run, tmp_path):
    """A finished pocket study that a test may change."""
    project = first_run[0].copy(tmp_path / "clone")
    yield project
    project.end()
