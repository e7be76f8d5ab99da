"""What Snakemake does when it is killed or started twice, when clocks are wrong, and when results cannot be written."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.data import contents

SNAKEMAKE = Path(sys.executable).parent / "snakemake"


def started(project, *arguments):
    """Snakemake in the background."""
    environment = os.environ | {"PYTHONPATH": str(project.folder / "src"), "HF_HUB_OFFLINE": "1"}
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen([SNAKEMAKE, *arguments], cwd=project.folder, env=environment, **silent)


def wait_until(condition):
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def at_work_in(folder):
    """Whether any process works in a folder."""

    def is_there(process):
        try:
            return (process / "cwd").readlink() == folder
        except OSError:  # it has just ended, or is another user's
            return False

    return any(is_there(process) for process in Path("/proc").glob("[0-9]*"))


@pytest.fixture
def other_file_system(tmp_path_factory):
    """A folder on another file system than the tests' own, where there is one."""
    shared = Path("/dev/shm")
    if not os.access(shared, os.W_OK):
        yield tmp_path_factory.mktemp("results")
        return
    folder = shared / f"conceptshare-test-{os.getpid()}"
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)


@pytest.mark.skipif(sys.platform != "linux", reason="finds the job that outlives Snakemake in /proc")
def test_snakemake_that_is_killed_goes_on_after_unlocking_and_another_one_waits_outside(
    new_study, finished, other_file_system
):
    (new_study.folder / "results").symlink_to(other_file_system)
    wanted = ["--cores", "1", "results/squares/activations/reader.zarr"]
    first = started(new_study, *wanted)
    wait_until((new_study.folder / "results/logs/squares/activations/reader.log").exists)
    another = new_study.run(*wanted)
    assert another.returncode == 1
    assert "Directory cannot be locked. Please make sure that no other Snakemake process" in another.stderr
    assert "Traceback" not in another.stdout + another.stderr
    first.send_signal(signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL
    wait_until(lambda: not at_work_in(new_study.folder))  # its job ends by itself
    locked = new_study.run(*wanted)
    assert locked.returncode == 1
    assert "It can be removed with the --unlock argument" in locked.stderr
    assert new_study.run("--unlock").returncode == 0
    again = new_study.run(*wanted)
    assert again.returncode == 0, again.stdout + again.stderr
    assert new_study.plan(*wanted) == {}
    for name in ("data", "activations/reader.zarr", "tokens/reader.zarr"):
        results = [project.folder / "results/squares" / name for project in (new_study, finished)]
        assert contents(results[0]) == contents(results[1])
    assert not list(other_file_system.rglob("*.partial*"))


def test_what_the_message_says_of_a_damaged_store_brings_back_the_same_bytes(study, finished):
    store, pair = "features/tiny/reader@1.zarr", "correlations/tiny/reader@0__reader@1.zarr"
    results, expected = (project.folder / "results/squares" for project in (study, finished))
    (results / store / "layer-01/features/c/0/0").unlink()
    shutil.rmtree(results / pair)
    wanted = ["--cores", "1", f"results/squares/{pair}"]
    refused = study.run(*wanted)
    assert refused.returncode == 1
    assert f"{store}: layer-01/features/c/0/0 is missing; delete the store and run the features stage" in refused.stderr
    assert not (results / pair).exists()
    shutil.rmtree(results / store)
    again = study.run(*wanted)
    assert again.returncode == 0, again.stdout + again.stderr
    for name in (store, pair):
        assert contents(results / name) == contents(expected / name)


def test_files_from_the_future_cost_nothing_or_are_said_and_set_right_by_giving_them_the_time(study, finished):
    results, similarity = study.folder / "results/squares", "results/squares/similarity/tiny/reader__viewer.csv"
    tomorrow = time.time() + 86400
    for path in (study.folder / "squares.parquet", results / "data/samples.arrow"):
        os.utime(path, (tomorrow, tomorrow))
    assert study.plan() == {}  # so small, they are compared by content
    os.utime(results / "activations/reader.zarr/.snakemake_timestamp", (tomorrow, tomorrow))
    assert study.plan()["features"] == 2
    said = study.run("--cores", "1", similarity)
    assert said.returncode == 1
    assert "input results/squares/activations/reader.zarr" in said.stderr
    assert "could indicate a clock skew problem" in said.stderr
    subprocess.run(["find", ".", "-newermt", "now", "-exec", "touch", "{}", "+"], cwd=study.folder, check=True)
    assert study.run("--cores", "1", similarity).returncode == 0
    assert study.run("--cores", "1", "--touch").returncode == 0
    assert study.plan() == {}
    assert contents(results) == contents(finished.folder / "results/squares")


def test_results_that_cannot_be_written_are_one_message(new_study):
    bound = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.geteuid() == 0 else []
    if bound and subprocess.run([*bound, "true"], capture_output=True, check=False).returncode:
        pytest.skip("root may write everywhere here")
    results = new_study.folder / "results"
    results.mkdir(mode=0o555)
    command = [*bound, SNAKEMAKE, "--cores", "1", "results/squares/data/manifest.json"]
    environment = os.environ | {"PYTHONPATH": str(new_study.folder / "src")}
    refused = subprocess.run(
        command, cwd=new_study.folder, env=environment, capture_output=True, text=True, check=False
    )
    assert refused.returncode == 1
    assert "Permission denied: 'results/" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert list(results.iterdir()) == []
