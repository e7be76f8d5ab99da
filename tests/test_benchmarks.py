"""The script for a short look at a GPU: what it reports of parts that fail, hang or succeed, and without a GPU."""

import fcntl
import json
import subprocess
import sys

import pytest
from benchmarks.gpu import PARTS, run_part

from tests.helpers.forks import run_forked

PRINTS = "import pathlib, sys; lines = pathlib.Path(sys.argv[1], 'gpu.jsonl').open('a'); lines.write('{\"n\": 1}\\n'); "


def lines_of(part, code, seconds, out):
    out.mkdir(exist_ok=True)
    command = [sys.executable, "-c", PRINTS + "lines.flush(); " + code, str(out)]
    return [json.loads(line) for line in run_part(part, command, seconds, out)]


def test_a_part_that_fails_reports_its_error_and_what_it_had_found(tmp_path):
    assert lines_of("sae", "raise SystemExit('no such kernel')", 60, tmp_path) == [
        {"n": 1},
        {"part": "sae", "error": "no such kernel", "log": str(tmp_path / "gpu.log")},
    ]
    assert lines_of("stream", "", 60, tmp_path) == [{"n": 1}]
    assert len((tmp_path / "gpu.jsonl").read_text().splitlines()) == 3


def test_a_part_ends_at_its_deadline_with_what_it_started(tmp_path):
    # What it starts holds a lock until it ends.
    started = "import pathlib, sys, time; time.sleep(60); pathlib.Path(sys.argv[1], 'survived').touch()"
    code = f"""
import fcntl, signal, subprocess
lock = open(sys.argv[1] + "/lock", "w")
fcntl.flock(lock, fcntl.LOCK_EX)
subprocess.Popen([sys.executable, "-c", "{started}", sys.argv[1]], pass_fds=[lock.fileno()])
signal.pause()
"""
    assert lines_of("sae", code, 5, tmp_path) == [{"n": 1}, {"part": "sae", "error": "ended at its deadline of 5 s"}]
    with (tmp_path / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
    assert not (tmp_path / "survived").exists()


def test_without_a_gpu_it_says_so(tmp_path):
    code = "import runpy; runpy.run_module('benchmarks.gpu', run_name='__main__')"
    ended = run_forked(code, "--out", tmp_path / "out", environment={"CUDA_VISIBLE_DEVICES": ""})
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr.startswith("no GPU: torch ")
    assert not (tmp_path / "out").exists()


@pytest.mark.gpu
def test_on_a_gpu_every_part_but_the_tests_runs(tmp_path):
    parts = [part for part in PARTS if part != "parity"]
    command = [sys.executable, "-m", "benchmarks.gpu", "--small", *parts, "--out", str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = [json.loads(line) for line in ended.stdout.splitlines()]
    assert [line for line in lines if "error" in line] == []
    assert [line["part"] for line in lines if "finished_after" in line] == parts
    assert ended.stdout == (tmp_path / "gpu.jsonl").read_text()
