"""Whatever stops, starves or robs a stage: the bytes of an undisturbed run in the end, or one clear line and no output."""

import ctypes
import os
import resource
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from conceptshare.sae._checkpoints import PREEMPTED
from tests.stages import STAGES, arguments, make_all, run


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The results of every stage, undisturbed."""
    folder = tmp_path_factory.mktemp("made")
    make_all(folder)
    return folder


def files_in(folder, names):
    """The bytes of every file in results, by path."""
    paths = [path for name in names for path in (folder / name, *(folder / name).rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def assert_as_undisturbed(stage, made, out):
    """The results are those of an undisturbed run, and there is nothing else."""
    assert files_in(out, STAGES[stage]) == files_in(made, STAGES[stage])
    found = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert found == set(files_in(made, STAGES[stage]))


def assert_nothing_looks_finished_that_is_not(stage, made, out):
    for name in STAGES[stage]:
        if (out / name).exists():
            assert files_in(out, [name]) == files_in(made, [name])


def assert_one_line(ended):
    """An error of the user's or the system's: one line that says what to do, and no traceback."""
    assert ended.status == 1, ended.said
    assert "Traceback" not in ended.said
    assert [line.startswith("error: ") for line in ended.said.splitlines()[-2:]][-1]


def die_mid_write(size):
    """Let the kernel end the process as it writes past the ``size``-th byte of any file, which is then cut off there."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


# Signals, and at which share of what an undisturbed run does with files.
STOPS = [(signal.SIGKILL, 0.3), (signal.SIGTERM, 0.5), (signal.SIGINT, 0.7), (signal.SIGKILL, 0.9), (signal.SIGKILL, 1)]
STATUSES = {signal.SIGKILL: {-9}, signal.SIGTERM: {-15, PREEMPTED}, signal.SIGINT: {130}}


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_that_is_stopped_at_any_moment_ends_with_the_same_bytes(stage, made, tmp_path):
    """Each attempt finds what the one before left; where one is done before its moment, the next starts anew."""
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
        assert ended.status in STATUSES[sent] | {0}, ended.said
        stopped += ended.status != 0
        assert_nothing_looks_finished_that_is_not(stage, made, tmp_path)
    assert stopped >= 3
    assert run(given, tmp_path).status == 0
    assert_as_undisturbed(stage, made, tmp_path)
