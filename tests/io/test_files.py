"""Results appear complete or not at all, and only one process at a time makes each."""

import errno
import fcntl
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from conceptshare.io.errors import OutputError, StoreError
from conceptshare.io.files import (
    FILE,
    PARQUET,
    PNG,
    PROVENANCE_RECORD,
    SAE_FOLDER,
    Kind,
    Unchanged,
    atomic_output,
    check_replaceable,
)

FOLDER = Kind("a folder", "new|old|part|left over")


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_has_its_name_only_once_complete(tmp_path):
    out = tmp_path / "deep" / "table.csv"
    with atomic_output(out, FILE) as partial:
        partial.write_text("half")
        assert not out.exists()
        assert partial.parent == out.parent  # otherwise renaming could cross file systems
    assert out.read_text() == "half"
    assert names_in(out.parent) == ["table.csv"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("as_folder", [True, False])
def test_a_failure_leaves_nothing_and_keeps_the_old_output(tmp_path, error, as_folder):
    out = tmp_path / "result"
    if as_folder:
        out.mkdir()
    (out / "old" if as_folder else out).write_text("old")

    def fail():
        with atomic_output(out, FOLDER if as_folder else FILE) as partial:
            if as_folder:
                partial.mkdir()
                (partial / "part").write_text("new")
            else:
                partial.write_text("new")
            raise error

    with pytest.raises(error):
        fail()
    assert (out / "old" if as_folder else out).read_text() == "old"
    assert names_in(tmp_path) == ["result"]


@pytest.mark.parametrize("old", [None, "nothing", "old"])
@pytest.mark.parametrize("as_folder", [True, False])
def test_replaces_an_old_output_completely(tmp_path, old, as_folder):
    out = tmp_path / "result"
    if old and as_folder:
        out.mkdir()
        (out / ".snakemake_timestamp").touch()
        (out / "provenance.json").touch()
    if old and (not as_folder or old == "old"):
        (out / "old" if as_folder else out).write_text(old.removeprefix("nothing"))
    with atomic_output(out, FOLDER if as_folder else FILE) as partial:
        if as_folder:
            partial.mkdir()
        (partial / "new" if as_folder else partial).write_text("new")
    assert names_in(tmp_path) == ["result"]
    assert (out / "new" if as_folder else out).read_text() == "new"
    assert not as_folder or names_in(out) == ["new"]


@pytest.mark.parametrize("as_folder", [True, False])
def test_removes_the_remains_of_a_killed_attempt(tmp_path, as_folder):
    remains = tmp_path / "result.partial"
    if as_folder:
        remains.mkdir()
        (remains / "left over").touch()
    else:
        remains.touch()
    with atomic_output(tmp_path / "result", FOLDER if as_folder else FILE) as partial:
        assert not partial.exists()
        partial.mkdir() if as_folder else partial.touch()
    assert names_in(tmp_path) == ["result"]
    assert not as_folder or names_in(tmp_path / "result") == []


MAKE = """
import sys
from pathlib import Path
from conceptshare.io.errors import AlreadyMadeError
from conceptshare.io.errors import OutputError, StoreError
from conceptshare.io.files import FILE, SAE_FOLDER, Kind, Unchanged, check_replaceable, atomic_output

FOLDER = Kind("a folder", "new|old|part|left over")

path, key, content = sys.argv[1:]
try:
    with atomic_output(Path(path), FILE, key=key or None) as partial:
        print("making", flush=True)
        sys.stdin.readline()
        partial.write_text(content)
except AlreadyMadeError as message:
    print(message)
"""


@pytest.fixture
def make():
    """Starts another process that makes a result and finishes it when it receives a line."""
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


def wait_until_it_waits(process):
    line = process.stderr.readline()
    assert "waiting for process" in line
    return line


def finish(process):
    out, error = process.communicate("\n", timeout=600)
    assert process.returncode == 0, error
    return out


def test_a_process_that_waited_for_the_same_result_keeps_it(tmp_path, make):
    first = make(tmp_path / "result", "same", "of the first")
    assert first.stdout.readline() == "making\n"
    second = make(tmp_path / "result", "same", "of the second")
    line = wait_until_it_waits(second)
    assert str(first.pid) in line
    finish(first)
    assert f"{tmp_path / 'result'}: made by process {first.pid}" in finish(second)
    assert (tmp_path / "result").read_text() == "of the first"
    assert names_in(tmp_path) == ["result"]


@pytest.mark.parametrize("keys", [("one", "other"), ("", "")])
def test_a_process_that_waited_for_another_result_of_the_same_name_replaces_it(tmp_path, make, keys):
    first = make(tmp_path / "result", keys[0], "of the first")
    assert first.stdout.readline() == "making\n"
    second = make(tmp_path / "result", keys[1], "of the second")
    wait_until_it_waits(second)
    finish(first)
    assert finish(second) == "making\n"
    assert (tmp_path / "result").read_text() == "of the second"
    assert names_in(tmp_path) == ["result"]


def test_does_not_wait_for_a_killed_process(tmp_path, make):
    (tmp_path / "result").write_text("old")
    first = make(tmp_path / "result", "same", "of the first")
    assert first.stdout.readline() == "making\n"
    second = make(tmp_path / "result", "same", "of the second")
    wait_until_it_waits(second)
    first.kill()
    assert finish(second) == "making\n"
    assert (tmp_path / "result").read_text() == "of the second"


@pytest.mark.parametrize(
    "number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOTTY, 524], ids=str
)
def test_warns_and_continues_on_a_file_system_without_locks(tmp_path, monkeypatch, capsys, number):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with atomic_output(tmp_path / "result", FILE) as partial:
        partial.write_text("made")
    assert f"this file system has no locks ({os.strerror(number)})" in capsys.readouterr().err
    assert (tmp_path / "result").read_text() == "made"
    assert names_in(tmp_path) == ["result"]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP, 524, errno.EIO], ids=str)
def test_tolerates_a_file_system_without_sync_but_not_a_broken_disk(tmp_path, monkeypatch, number):
    def refuse(_):
        raise OSError(number, os.strerror(number))

    def make():
        with atomic_output(tmp_path / "result", FILE) as partial:
            partial.write_text("made")

    monkeypatch.setattr(os, "fsync", refuse)
    if number == errno.EIO:
        with pytest.raises(OSError, match="Input/output error"):
            make()
    else:
        make()
    assert names_in(tmp_path) == ([] if number == errno.EIO else ["result"])


def test_syncs_a_result_before_and_after_it_is_renamed(tmp_path, monkeypatch):
    done, sync, rename = [], os.fsync, Path.rename

    def note_sync(number):
        done.append(str(Path(f"/proc/self/fd/{number}").readlink()))
        sync(number)

    def note_rename(path, target):
        done.append("renamed")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(Path, "rename", note_rename)
    with atomic_output(tmp_path / "above" / "result", Kind("a folder", r"part/file")) as partial:
        (partial / "part").mkdir(parents=True)
        (partial / "part" / "file").write_text("made")
    made = [f"{tmp_path}/above/result.partial{rest}" for rest in ("", "/part", "/part/file")]
    assert done[0] == str(tmp_path)  # has the new folder above
    assert sorted(done[1:4]) == made
    assert done[4:] == ["renamed", f"{tmp_path}/above"]


def foreign_files(folder):
    """Files that must not be lost."""
    (folder / "thesis").mkdir()
    (folder / "thesis" / "cfg.json").write_text("{}")
    (folder / "thesis" / "chapter.tex").write_text("In the beginning")
    (folder / "empty").mkdir()
    (folder / "letter").write_text("Dear")
    (folder / "link").symlink_to("thesis")
    (folder / "nowhere").symlink_to("gone")
    os.mkfifo(folder / "queue")


@pytest.mark.parametrize(
    "name", ["thesis", "letter", "link", "nowhere", "queue", "letter/sae", ".", "..", "/", "thesis/.."]
)
@pytest.mark.parametrize("kind", [SAE_FOLDER, FILE])
def test_never_replaces_anything_but_a_result_of_the_same_kind(tmp_path, monkeypatch, name, kind):
    foreign_files(tmp_path)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    before = sorted((str(path), path.lstat().st_ino) for path in tmp_path.rglob("*"))
    if (name, kind) == ("letter", FILE):
        check_replaceable(Path(name), kind)
        return
    with (
        pytest.raises(OutputError, match=f"^{re.escape(str(Path(name)))}: .*; (name|choose)"),
        atomic_output(Path(name), kind),
    ):
        pytest.fail("began")
    assert sorted((str(path), path.lstat().st_ino) for path in tmp_path.rglob("*")) == before


def test_does_not_replace_the_home_or_working_folder_or_their_parents(tmp_path, monkeypatch):
    for name in ("home", "work/here"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "work/here")
    for place in ("home", "work", "work/here"):
        with pytest.raises(OutputError, match="the working directory or the home folder"):
            check_replaceable(tmp_path / place, FOLDER)
    check_replaceable(Path("../new"), FOLDER)


def test_keeps_files_that_appear_while_a_result_is_made(tmp_path):
    out = tmp_path / "result"

    def make():
        with atomic_output(out, FOLDER) as partial:
            partial.mkdir()
            (partial / "new").touch()
            out.mkdir()
            (out / "thesis").touch()

    with pytest.raises(OutputError, match=r"a folder with thesis in it.*the new result is at .*result\.partial"):
        make()
    assert names_in(out) == ["thesis"]
    assert names_in(tmp_path / "result.partial") == ["new"]


@pytest.mark.parametrize("as_folder", [True, False])
def test_a_replaced_input_is_an_error_whatever_else_failed(tmp_path, as_folder):
    given, out = tmp_path / "input", tmp_path / "result"
    if as_folder:
        given.mkdir()
    file = given / "zarr.json" if as_folder else given

    def make(replace, error=None):
        file.write_text("old")
        with atomic_output(out, FILE) as partial, Unchanged(given):
            partial.write_text("made")
            if replace:
                (tmp_path / "new").write_text("new")
                (tmp_path / "new").rename(file)
            if error is not None:
                raise error

    for error in (None, ValueError("a chunk is missing")):
        with pytest.raises(StoreError, match="input: replaced by another process while it was read; run again"):
            make(replace=True, error=error)
        assert not out.exists()
    with pytest.raises(ValueError, match="something else"):
        make(replace=False, error=ValueError("something else"))
    make(replace=False)
    assert out.read_text() == "made"


@pytest.mark.parametrize("unfinished_name", ["result.partial", "result.replaced.partial", ".result.lock"])
@pytest.mark.parametrize("kind", [SAE_FOLDER, FILE])
@pytest.mark.parametrize("resume", [False, True])
def test_keeps_foreign_files_named_like_an_unfinished_result(tmp_path, unfinished_name, kind, resume):
    for name in ("thesis", "letter", "link", "queue"):
        folder = tmp_path / name
        folder.mkdir()
        foreign_files(folder)
        (folder / name).rename(folder / unfinished_name)
        before = {path: path.lstat().st_ino for path in folder.rglob("*")}
        if (name, kind) == ("letter", FILE) and unfinished_name != ".result.lock":
            continue
        with (
            pytest.raises(OutputError, match=f"^{re.escape(str(folder / unfinished_name))}: .*; move it away"),
            atomic_output(folder / "result", kind, resume),
        ):
            pytest.fail("began")
        assert {path: path.lstat().st_ino for path in folder.rglob("*")} == before
        assert name != "letter" or (folder / unfinished_name).read_text() == "Dear"


@pytest.mark.parametrize("kind", [PNG, PARQUET, PROVENANCE_RECORD])
def test_keeps_a_file_named_like_an_unfinished_one_with_other_content(tmp_path, kind):
    out = tmp_path / f"result{kind.suffix}"
    partial = out.with_name(f"{out.name}.partial")
    partial.write_text("Dear")
    with pytest.raises(OutputError, match="another file"), atomic_output(out, kind):
        pytest.fail("began")
    assert partial.read_text() == "Dear"
    for cut_off in (kind.magic[:2], b"", kind.magic + b"more"):
        partial.write_bytes(cut_off)
        with pytest.raises(KeyError), atomic_output(out, kind):
            raise KeyError
        assert names_in(tmp_path) == []
