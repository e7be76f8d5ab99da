"""Snakemake is killed or started twice, clocks are wrong, or results cannot be written."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from tests.helpers.forks import forked_python
from tests.helpers.samples import contents

from .conftest import SNAKEMAKE, change

PROGRAM = Path(sys.executable).parent / "snakemake"


def started(project, *arguments):
    """Snakemake in the background; if it is killed, its fork is."""
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    command = [forked_python(), "-c", SNAKEMAKE, project.python, *arguments]
    return subprocess.Popen(command, cwd=project.folder, env=project.environment, **silent)


def wait_until(condition):
    deadline = time.monotonic() + 600
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def at_work_in(folder):
    """Whether any process works in a folder."""

    def is_there(process):
        try:
            return (process / "cwd").readlink() == folder
        except OSError:  # it has just ended, or belongs to another user
            return False

    return any(is_there(process) for process in Path("/proc").glob("[0-9]*"))


@pytest.fixture
def other_file_system(tmp_path):
    """A folder on another file system than the tests', if there is one."""
    for place in (tempfile.gettempdir(), "/dev/shm"):
        if os.access(place, os.W_OK) and Path(place).stat().st_dev != tmp_path.stat().st_dev:
            break
    with tempfile.TemporaryDirectory(dir=place) as folder:
        yield Path(folder)


@pytest.mark.skipif(sys.platform != "linux", reason="finds the job that outlives Snakemake in /proc")
def test_a_killed_snakemake_resumes_after_unlocking_and_a_second_one_is_locked_out(
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


def test_the_remedy_for_a_damaged_store_restores_the_same_bytes(study, finished):
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


def test_files_with_future_times_are_harmless_or_an_error_fixed_by_touching_them(study, finished):
    results, similarity = study.folder / "results/squares", "results/squares/similarity/reader__viewer.csv"
    tomorrow = time.time() + 86400
    for path in (study.folder / "squares.parquet", results / "data/samples.arrow"):
        os.utime(path, (tomorrow, tomorrow))
    assert study.plan() == {}  # small files are compared by content
    os.utime(results / "activations/reader.zarr/.snakemake_timestamp", (tomorrow, tomorrow))
    assert study.plan()["features"] == 2
    result = study.run("--cores", "1", similarity)
    assert result.returncode == 1
    assert "input results/squares/activations/reader.zarr" in result.stderr
    assert "could indicate a clock skew problem" in result.stderr
    subprocess.run(["find", ".", "-newermt", "now", "-exec", "touch", "{}", "+"], cwd=study.folder, check=True)
    assert study.run("--cores", "1", similarity).returncode == 0
    assert study.run("--cores", "1", "--touch").returncode == 0
    assert study.plan() == {}
    assert contents(results) == contents(finished.folder / "results/squares")


def test_unwritable_results_are_one_message(new_study):
    bound = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.geteuid() == 0 else []
    if bound and subprocess.run([*bound, "true"], capture_output=True, check=False).returncode:
        pytest.skip("root may write everywhere here")
    results = new_study.folder / "results"
    results.mkdir(mode=0o555)
    command = [*bound, PROGRAM, "--cores", "1", "results/squares/data/manifest.json"]
    environment = os.environ | {"PYTHONPATH": str(new_study.folder / "src")}
    refused = subprocess.run(
        command, cwd=new_study.folder, env=environment, capture_output=True, text=True, check=False
    )
    assert refused.returncode == 1
    assert "Permission denied: 'results/" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert list(results.iterdir()) == []


CHANGES = [
    (change("datasets", "squares", "order_seed", to=3), "squares/data: made with order_seed: 0, not 3"),
    (
        change("encoders", "viewer", "precision", to="bfloat16"),
        "activations/viewer.zarr: made with precision: float32, not",
    ),
    (
        change("encoders", "reader", "model", to="./models/second-reader"),
        "weights/reader.json: made with model: ./models/reader, not ./models/second-reader",
    ),
    (change("saes", "tiny", "k", to=5), "saes/tiny/reader: made with k: 4, not 5"),
    (
        change("saes", "tiny", "max_fvu_global", to=0.5),
        "results/studies/miniature: made with saes.tiny.max_fvu_global: 0.9, not 0.5",
    ),
    (change("correlations", "precision", to="float32"), "reader@1.zarr: made with precision: float16, not float32"),
    (
        change("correlations", "unexplained_layers", to="leave_out"),
        "reader@1.zarr: made with unexplained_layers: mark, not leave_out",
    ),
    (change("names", to={"command": "true"}), "names/tiny/reader@0.parquet: made with names.command: , not true"),
    (
        change("analyses", "sharedness", "own", "features_shown", to=2),
        "studies/miniature: made with analyses.sharedness.own.features_shown: 6, not 2",
    ),
]


def test_reports_changed_settings_that_snakemake_cannot_detect(study):
    """Without Snakemake's metadata, and with metadata of results that another checkout has since replaced."""
    assert study.plan() == {}
    before, notes = study.config, study.folder / ".snakemake"
    for apply, _ in CHANGES:
        study.config = before
        config = study.config
        apply(config)
        study.config = config
        assert study.plan() != {}  # with its metadata, it reruns the changed parts
    shutil.rmtree(notes)
    study.config = before
    assert study.plan() == {}
    for apply, difference in CHANGES:
        study.config = before
        config = study.config
        apply(config)
        study.config = config
        refused = study.run("--cores", "1", "-n")
        assert refused.returncode == 1
        assert difference in refused.stdout + refused.stderr
        assert "delete these and run again" in refused.stdout + refused.stderr
    # Following the message helps.
    shutil.rmtree(study.folder / "results/studies/miniature")
    assert study.plan()["figures_sharedness"] == 2


def test_reports_features_of_another_code(study):
    """Copied to another name, with nothing that Snakemake has recorded."""
    features = study.folder / "results/squares/features"
    shutil.copytree(features / "tiny", features / "tiny+after_topk", copy_function=shutil.copy2)
    study.config = study.config | {"features": ["before_topk", "after_topk"]}
    refused = study.run("--cores", "1", "-n")
    assert refused.returncode == 1
    expected = "tiny+after_topk/reader@0.zarr: made with code: before_topk, not after_topk"
    assert expected in refused.stdout + refused.stderr


def test_the_provenance_of_a_study_has_only_settings_that_its_results_were_made_with(study):
    store = study.folder / "results/squares/correlations/tiny/reader@0__viewer@0.zarr/zarr.json"
    store.write_text(store.read_text().replace('"float16"', '"float32"'))
    asked = "results/studies/miniature/study.json"
    command = [sys.executable, "-m", "conceptshare", "provenance", "--study", asked, "--out", "new/provenance.json"]
    refused = subprocess.run(
        command, cwd=study.folder, env=study.environment, capture_output=True, text=True, check=False
    )
    assert refused.returncode == 1
    assert "reader@0__viewer@0.zarr: made with precision: float32, not float16" in refused.stderr
    assert not (study.folder / "new").exists()


def test_removes_only_results_that_are_no_longer_part_of_the_study(study):
    folder, config = study.folder / "results/studies/miniature", study.config
    tables, note, foreign = folder / "squares/tiny", folder / "note.txt", folder / "squares/tiny/pairs/mine.csv"
    note.write_text("mine")
    foreign.write_text("mine")
    gone = {*tables.glob("layerwise/seeds.*"), *tables.glob("sharedness/own.*"), *tables.glob("overlaps.*")}
    gone |= set(folder.glob("pages/data/squares/tiny/pairs/*/*"))  # from the layerwise analysis
    assert len(gone) > 12
    kept = {path for path in folder.rglob("*") if path.is_file()} - gone
    del config["analyses"]["layerwise"], config["analyses"]["sharedness"]["own"]
    study.config = config
    done = study.run("--cores", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    left = {path for path in folder.rglob("*") if path.is_file()}
    assert not left & gone
    assert not (tables / "layerwise").exists()
    assert kept <= left
    assert f"{foreign.relative_to(study.folder)}: not part of this study" in done.stderr
    assert note.read_text() == foreign.read_text() == "mine"
    assert study.plan() == {}


@pytest.mark.usefixtures("own_disks")
def test_reports_a_disk_that_is_full_when_a_job_starts(new_study):
    (new_study.folder / "results").mkdir()
    command = f"""
        mount -t tmpfs -o size=256k disk results
        mkdir -p results/logs/weights
        head -c 1000000 /dev/zero > results/fill
        {PROGRAM} --cores 1 results/weights/reader.json
    """
    refused = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "bash", "-c", command],
        cwd=new_study.folder,
        env=new_study.environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert refused.returncode == 1
    assert "error: results: the disk is full; free some space and run again" in refused.stderr
    assert "Traceback" not in refused.stderr
