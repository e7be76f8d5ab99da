"""Interruptions, full disks and missing files: the bytes of an undisturbed run in the end, or a one-line error."""

import ctypes
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from conceptshare.io import provenance
from conceptshare.sae._checkpoints import PREEMPTED
from tests.helpers.samples import contents
from tests.helpers.stages import SETTINGS, STAGES, Ended, arguments, make_all, run


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The results of every stage, undisturbed."""
    folder = tmp_path_factory.mktemp("made")
    make_all(folder)
    return folder


def files_in(folder, names):
    """The bytes of every file in results, by path."""
    paths = [path for name in names for path in (folder / name, *(folder / name).rglob("*")) if is_result(path)]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def is_result(path):
    """Whether a path is a file that is the same in each run, and not the lock of a killed process."""
    return path.is_file() and not path.name.endswith((provenance.FILE, ".lock"))


def assert_as_undisturbed(stage, made, out):
    """The folder has the results of an undisturbed run and nothing else."""
    assert files_in(out, STAGES[stage]) == files_in(made, STAGES[stage])
    found = {str(path.relative_to(out)) for path in out.rglob("*") if is_result(path)}
    assert found == set(files_in(made, STAGES[stage]))


def assert_nothing_looks_finished_that_is_not(stage, made, out):
    for name in STAGES[stage]:
        if (out / name).exists():
            assert files_in(out, [name]) == files_in(made, [name])


def assert_one_line(ended):
    """A user or system error: one line that says what to do, without a traceback."""
    assert ended.status == 1, ended.output
    assert "Traceback" not in ended.output
    assert [line.startswith("error: ") for line in ended.output.splitlines()[-2:]][-1]


def die_mid_write(size):
    """Make the kernel kill the process when a file grows beyond ``size`` bytes, where it is truncated."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


# Signals, and when to send them, as a fraction of an undisturbed run's file operations.
STOPS = [(signal.SIGKILL, 0.3), (signal.SIGTERM, 0.5), (signal.SIGINT, 0.7), (signal.SIGKILL, 1)]
STATUSES = {signal.SIGKILL: {-9}, signal.SIGTERM: {-15, PREEMPTED}, signal.SIGINT: {130}}


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_stopped_at_any_moment_ends_with_the_same_bytes(stage, made, tmp_path):
    """Each attempt continues from the previous one; after one that finishes early, the next starts from scratch."""
    given, results = arguments(stage, made, tmp_path), files_in(made, STAGES[stage])
    torn = run(given, tmp_path, before=partial(die_mid_write, max(map(len, results.values())) * 2 // 3))
    assert torn.status == -signal.SIGXFSZ
    assert_nothing_looks_finished_that_is_not(stage, made, tmp_path)
    whole = run(given, tmp_path)
    stopped = 0
    for sent, share in STOPS:
        if not any(".partial" in path.name or "checkpoints" in path.name for path in tmp_path.rglob("*")):
            assert_as_undisturbed(stage, made, tmp_path)
        ended = run(given, tmp_path, at=max(1, round(share * whole.touched)), sent=sent)
        assert ended.status in STATUSES[sent] | {0}, ended.output
        stopped += ended.status != 0
        assert_nothing_looks_finished_that_is_not(stage, made, tmp_path)
    assert stopped >= 2  # a late signal may meet a process that has just ended
    assert run(given, tmp_path).status == 0
    assert_as_undisturbed(stage, made, tmp_path)
    assert not list(tmp_path.rglob("*.lock"))


# A file that a stage reads, and the stage that wrote it; `averages` and `members` are tables of `metrics`.
READS = [
    ("activations", "data/samples.arrow", "data"),
    ("stream", "data/manifest.json", "data"),
    ("activations", "vit.json", "vit.json"),
    ("sae", "tokens/vit.zarr/layer-01/tokens/c/0/0", "tokens/vit.zarr"),
    ("similarity", "activations/vit.zarr/layer-02/global/zarr.json", "activations/vit.zarr"),
    ("features", "streams/bert/layer-01/seed-0/sae_weights.safetensors", "streams/bert"),
    ("features", "streams/bert/layer-02/seed-0/cfg.json", "streams/bert"),
    ("features", "streams/bert.zarr/layer-01/global/c/0/0", "streams/bert.zarr"),
    ("correlations", "features/bert@0.zarr/layer-01/features/c/0/0", "features/bert@0.zarr"),
    ("metrics", "features/bert@0.zarr/zarr.json", "features/bert@0.zarr"),
    ("metrics", "correlations/bert@0__bert@1.zarr/rho_ab/c/0/0", "correlations/bert@0__bert@1.zarr"),
    ("formats", "tables/all.parquet", "tables/all.parquet"),
    ("figures", "tables/members.parquet", "tables/members.parquet"),
    ("figures", "streams/bert/layer-01/seed-0/loss.csv", "streams/bert"),
    ("figures", "streams/bert/layer-01/seed-0/density.csv", "streams/bert"),
]


@pytest.mark.parametrize(("stage", "file", "result"), READS)
def test_refuses_an_incomplete_result_and_says_what_to_delete(stage, file, result, made, tmp_path):
    damaged = tmp_path / "made"
    shutil.copytree(made, damaged)
    whole = (damaged / file).read_bytes()
    for left in (None, whole[: len(whole) // 2], b""):
        (damaged / file).unlink() if left is None else (damaged / file).write_bytes(left)
        ended = run(arguments(stage, damaged, tmp_path / "out"), tmp_path / "out")
        assert_one_line(ended)
        assert str(damaged / result) in ended.output.splitlines()[-1]
        assert re.search(r"delete|no such table; run the metrics stage", ended.output.splitlines()[-1])
        assert not [path for path in tmp_path.joinpath("out").rglob("*") if path.is_file()]


_LIBC = ctypes.CDLL(None, use_errno=True)
_NEW_USER, _NEW_MOUNTS, _READ_ONLY, _REMOUNT = 0x10000000, 0x00020000, 1, 32


def _check(result, what):
    if result:
        raise OSError(ctypes.get_errno(), what)


def mount(folder, options, flags=0):
    _check(_LIBC.mount(b"disk", os.fsencode(folder), b"tmpfs", flags, options.encode()), "mount")


def enter_private_namespace():
    """Enter a namespace whose mounts no other process sees and which end with this process."""
    user, group = os.getuid(), os.getgid()
    _check(_LIBC.unshare(_NEW_USER | _NEW_MOUNTS), "unshare")
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {user} 1")
    Path("/proc/self/gid_map").write_text(f"0 {group} 1")


def run_on_a_full_disk_and_again(folder, kept, options, flags):
    """Instead of one run: one on a full or nearly full disk, and another once it has room."""
    enter_private_namespace()
    for attempt, disk in (("first", (options, flags)), ("second", ("size=100m,nr_inodes=0", _REMOUNT))):
        mount(folder, *disk)
        child = os.fork()
        if not child:
            return
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        shutil.copytree(folder, kept / attempt)
        (kept / f"{attempt}.status").write_text(str(status))
    sys.exit()


@pytest.mark.usefixtures("own_disks")
@pytest.mark.parametrize("disk", ["full", "read-only"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_full_disk_is_a_one_line_error_and_the_next_run_succeeds(stage, disk, made, tmp_path):
    pages = sum(-(-len(content) // 4096) for content in files_in(made, STAGES[stage]).values())
    little = f"size={pages // 2 * 4}k" if pages > 1 else "nr_inodes=1"
    how = (little, 0) if disk == "full" else ("", _READ_ONLY)
    folder, kept = tmp_path / "disk", tmp_path / "kept"
    folder.mkdir()
    kept.mkdir()
    given = arguments(stage, made, folder)
    both = run(given, folder, before=partial(run_on_a_full_disk_and_again, folder, kept, *how))
    assert both.status == 0, both.output
    assert [(kept / f"{attempt}.status").read_text() for attempt in ("first", "second")] == ["1", "0"]
    errors = [line for line in both.output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    expected = (
        "the disk is full; free some space" if disk == "full" else "Read-only file system.*let this user .* write"
    )
    assert re.search(expected, errors[0])
    assert "Traceback" not in both.output
    assert_nothing_looks_finished_that_is_not(stage, made, kept / "first")
    assert_as_undisturbed(stage, made, kept / "second")


@pytest.mark.usefixtures("own_disks")
def test_a_checkpoint_that_does_not_fit_the_disk_leaves_the_previous_one(made, tmp_path):
    weights = len(files_in(made, STAGES["sae"])[f"{STAGES['sae'][0]}/sae_weights.safetensors"])
    folder, kept = tmp_path / "disk", tmp_path / "kept"
    folder.mkdir()
    kept.mkdir()
    little = f"size={3 * weights * 3 // 2 // 4096 * 4}k"  # a checkpoint has the weights and both of Adam's moments
    given = arguments("sae", made, folder)
    both = run(given, folder, before=partial(run_on_a_full_disk_and_again, folder, kept, little, 0))
    assert [(kept / f"{attempt}.status").read_text() for attempt in ("first", "second")] == ["1", "0"], both.output
    state, key = sorted(path.relative_to(kept / "first") for path in (kept / "first").rglob("*") if is_result(path))
    assert state.parent.name == "000000001"
    assert key.name == "of.json"
    assert "resuming at step 1" in both.output
    assert_as_undisturbed("sae", made, kept / "second")


def test_does_not_resume_checkpoints_of_another_version(made, tmp_path):
    given = arguments("sae", made, tmp_path)
    assert run(given, tmp_path, at=25, sent=signal.SIGTERM).status == PREEMPTED
    (key,) = tmp_path.rglob("*.checkpoints/of.json")
    key.write_text(json.dumps(json.loads(key.read_text()) | {"version": 0}, sort_keys=True))
    again = run(given, tmp_path)
    assert again.status == 0, again.output
    assert "resuming at step" not in again.output
    assert_as_undisturbed("sae", made, tmp_path)


@pytest.mark.parametrize(
    "lost",
    [
        *("tokens/vit.zarr.partial/layer-01/tokens/zarr.json", "tokens/vit.zarr.partial/offsets/zarr.json"),
        *("activations/vit.zarr.partial/layer-02/zarr.json", "activations/vit.zarr.partial/zarr.json"),
    ],
)
def test_truncated_metadata_of_an_unfinished_store_are_rewritten(lost, made, tmp_path):
    whole = run(arguments("activations", made, tmp_path / "whole"), tmp_path)
    given = arguments("activations", made, tmp_path)
    assert run(given, tmp_path, at=whole.touched * 2 // 3).status == -signal.SIGKILL
    (tmp_path / lost).write_bytes((tmp_path / lost).read_bytes()[:40])
    again = run(given, tmp_path)
    if again.status:
        assert_one_line(again)
        assert "the partial store of an earlier attempt is damaged" in again.output
        assert run(given, tmp_path).status == 0
    shutil.rmtree(tmp_path / "whole")
    assert_as_undisturbed("activations", made, tmp_path)


def until(condition):
    deadline = time.monotonic() + 600
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_job_with_outdated_settings_leaves_no_result(made, tmp_path):
    """Such as a job that outlives its killed Snakemake while a new Snakemake trains SAEs with another k."""
    shutil.copytree(made / "streams", tmp_path / "streams")
    given = ["features", "--activations", made / "streams/bert.zarr", "--saes", tmp_path / "streams/bert"]
    whole = run([*given, "--out", tmp_path / "whole/bert@0.zarr"], tmp_path)
    assert whole.status == 0, whole.output
    given = [*map(str, given), "--out", str(tmp_path / "features/bert@0.zarr")]
    lock = tmp_path / "features/.bert@0.zarr.lock"
    (tmp_path / "features").mkdir()
    with ThreadPoolExecutor(1) as pool:
        outlived = pool.submit(run, given, tmp_path, whole.touched // 3, signal.SIGSTOP)
        until(lambda: lock.is_file() and lock.read_text().endswith("}"))
        process = int(json.loads(lock.read_text())["who"].split()[1])
        until(lambda: Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "T")
        retrain = arguments("stream", made, tmp_path / "new")
        retrain[retrain.index("--settings") + 1] = json.dumps(json.loads(SETTINGS) | {"k": 2})
        assert run(retrain, tmp_path).status == 0
        shutil.rmtree(tmp_path / "streams/bert")
        (tmp_path / "new/streams/bert").rename(tmp_path / "streams/bert")
        command = [sys.executable, "-m", "conceptshare", *given]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as later:
            try:
                assert f"waiting for process {process}" in later.stderr.readline()
            finally:  # otherwise both would wait forever
                os.kill(process, signal.SIGCONT)
            output = later.stderr.read()
        assert later.returncode == 0, output
        assert outlived.result().status in {0, 1}, outlived.result().output
    again = run([*given[:-1], str(tmp_path / "again/bert@0.zarr")], tmp_path)
    assert again.status == 0, again.output
    assert contents(tmp_path / "features/bert@0.zarr") == contents(tmp_path / "again/bert@0.zarr")
    assert contents(tmp_path / "features/bert@0.zarr") != contents(tmp_path / "whole/bert@0.zarr")


@pytest.mark.parametrize("stage", ["dataset", "figures"])  # their libraries keep caches there
def test_runs_on_a_node_without_scratch_and_home(stage, made, tmp_path):
    home = tmp_path / "home"
    home.touch()
    given = arguments(stage, made, tmp_path / "out")
    environment = os.environ | {"HOME": str(home), "TMPDIR": str(home / "gone")}
    for name in ("HF_HOME", "HF_DATASETS_CACHE", "XDG_CACHE_HOME", "MPLCONFIGDIR"):
        environment.pop(name, None)
    command = [sys.executable, "-m", "conceptshare", *given]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if ended.returncode:
        assert_one_line(Ended(ended.returncode, ended.stderr, 0))
        assert str(home) in ended.stderr
        assert not [path for path in tmp_path.joinpath("out").rglob("*") if path.is_file()]
        assert run(given, tmp_path / "out").status == 0
    assert_as_undisturbed(stage, made, tmp_path / "out")
