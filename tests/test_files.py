"""Results appear whole or not at all, and one process at a time makes one."""

import errno
import fcntl
import os
import subprocess
import sys

import pytest

from conceptshare.files import written_aside


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_under_its_name_only_when_it_is_complete(tmp_path):
    out = tmp_path / "deep" / "table.csv"
    with written_aside(out) as partial:
        partial.write_text("half")
        assert not out.exists()
        assert partial.parent == out.parent  # or renaming could cross file systems
    assert out.read_text() == "half"
    assert names_in(out.parent) == ["table.csv"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("as_folder", [True, False])
def test_what_failed_leaves_nothing_behind_and_the_old_output_as_it_was(tmp_path, error, as_folder):
    out = tmp_path / "result"
    out.write_text("old")

    def fail():
        with written_aside(out) as partial:
            if as_folder:
                partial.mkdir()
                (partial / "part").write_text("new")
            else:
                partial.write_text("new")
            raise error

    with pytest.raises(error):
        fail()
    assert out.read_text() == "old"
    assert names_in(tmp_path) == ["result"]


@pytest.mark.parametrize("old_is_folder", [True, False])
@pytest.mark.parametrize("new_is_folder", [True, False])
def test_an_old_output_is_replaced_whole(tmp_path, old_is_folder, new_is_folder):
    out = tmp_path / "result"
    if old_is_folder:
        out.mkdir()
        (out / "old").touch()
    else:
        out.touch()
    with written_aside(out) as partial:
        if new_is_folder:
            partial.mkdir()
            (partial / "new").touch()
        else:
            partial.write_text("new")
    if new_is_folder:
        assert names_in(out) == ["new"]
    else:
        assert out.read_text() == "new"


def test_a_link_is_replaced_and_what_it_points_at_is_left_alone(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "kept").touch()
    (tmp_path / "result").symlink_to(tmp_path / "elsewhere")
    with written_aside(tmp_path / "result") as partial:
        partial.mkdir()
    assert names_in(tmp_path / "result") == []
    assert names_in(tmp_path / "elsewhere") == ["kept"]


@pytest.mark.parametrize("as_folder", [True, False])
def test_the_remains_of_a_killed_attempt_are_cleared_away(tmp_path, as_folder):
    remains = tmp_path / "result.partial"
    if as_folder:
        remains.mkdir()
        (remains / "left over").touch()
    else:
        remains.touch()
    with written_aside(tmp_path / "result") as partial:
        assert not partial.exists()
        partial.mkdir()
    assert names_in(tmp_path / "result") == []


MAKE = """
import sys
from pathlib import Path
from conceptshare.errors import MadeMeanwhileError
from conceptshare.files import written_aside

path, key, content = sys.argv[1:]
try:
    with written_aside(Path(path), key=key or None) as partial:
        print("making", flush=True)
        sys.stdin.readline()
        partial.write_text(content)
except MadeMeanwhileError as message:
    print(message)
"""


@pytest.fixture
def make():
    """Start another process that makes a result, and finishes it when it is sent a line."""
    started = []

    def start(path, key, content):
        command = [sys.executable, "-c", MAKE, str(path), key, content]
        pipes = dict.fromkeys(["stdin", "stdout", "stderr"], subprocess.PIPE)
        started.append(subprocess.Popen(command, text=True, **pipes))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def until_it_waits(process):
    line = process.stderr.readline()
    assert "waiting for process" in line
    return line


def finish(process):
    out, error = process.communicate("\n", timeout=60)
    assert process.returncode == 0, error
    return out


def test_who_waited_for_the_same_result_takes_it_as_it_is(tmp_path, make):
    first = make(tmp_path / "result", "same", "of the first")
    assert first.stdout.readline() == "making\n"
    second = make(tmp_path / "result", "same", "of the second")
    line = until_it_waits(second)
    assert str(first.pid) in line
    finish(first)
    assert f"{tmp_path / 'result'}: made by process {first.pid}" in finish(second)
    assert (tmp_path / "result").read_text() == "of the first"
    assert names_in(tmp_path) == ["result"]


@pytest.mark.parametrize("keys", [("one", "other"), ("", "")])
def test_who_waited_for_another_result_of_the_same_name_replaces_it(tmp_path, make, keys):
    first = make(tmp_path / "result", keys[0], "of the first")
    assert first.stdout.readline() == "making\n"
    second = make(tmp_path / "result", keys[1], "of the second")
    until_it_waits(second)
    finish(first)
    assert finish(second) == "making\n"
    assert (tmp_path / "result").read_text() == "of the second"
    assert names_in(tmp_path) == ["result"]


def test_nobody_waits_for_a_process_that_was_killed(tmp_path, make):
    (tmp_path / "result").write_text("old")
    first = make(tmp_path / "result", "same", "of the first")
    assert first.stdout.readline() == "making\n"
    second = make(tmp_path / "result", "same", "of the second")
    until_it_waits(second)
    first.kill()
    assert finish(second) == "making\n"
    assert (tmp_path / "result").read_text() == "of the second"


def test_where_there_are_no_locks_a_result_is_made_with_a_warning(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with written_aside(tmp_path / "result") as partial:
        partial.write_text("made")
    assert "no file locks here (No locks available)" in capsys.readouterr().err
    assert (tmp_path / "result").read_text() == "made"
