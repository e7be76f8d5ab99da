"""Fetching from a hub: what is fetched, what happens where that fails, and what is said then."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from huggingface_hub import constants, snapshot_download

from conceptshare.io import progress
from conceptshare.io.errors import HubError
from conceptshare.io.hub import chosen, fetch_files, fetch_snapshot
from tests.helpers.hub import TOKEN, Hub, environment, running, use

FILES = {
    "config.json": b'{"hidden_size": 16}',
    "README.md": b"# Tiny",
    "notes [1].md": b"a name that is also a pattern",
    "model.safetensors": bytes(range(256)) * 400,
    "pytorch_model.bin": b"the same in another format",
    "onnx/model.onnx": b"and in a third",
    "onnx/config.json": b"{}",
}
WEIGHTS = "model.safetensors|pytorch_model.bin"


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def hub(monkeypatch, cache):
    with running() as hub:
        use(monkeypatch, hub.endpoint, cache)
        yield hub


def content(folder):
    """The files below a folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def files_got(hub):
    """The files whose content was asked for, in order of their names."""
    return sorted(request.path.partition("/resolve/")[2].partition("/")[2] for request in hub.asked("GET", "/resolve/"))


def fault(*arguments):
    """What is said where a fetch fails: one line."""
    with pytest.raises(HubError) as error:
        fetch_snapshot(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


# What is fetched


def test_all_files_of_a_repository_are_fetched_into_a_folder_named_by_the_commit(hub):
    commit = hub.add("us/tiny", FILES)
    folder = fetch_snapshot("us/tiny", "model", None)
    assert folder.name == commit
    assert content(folder) == FILES


def test_only_the_files_that_match_are_fetched_and_of_alternatives_only_the_first(hub):
    hub.add("us/tiny", FILES)
    found = fetch_files("us/tiny", "model", None, ["*.json", WEIGHTS])
    assert found.files == ["config.json", "model.safetensors"]
    assert content(found.folder) == {name: FILES[name] for name in found.files}
    assert files_got(hub) == found.files


def test_files_that_an_earlier_fetch_left_in_the_same_folder_are_not_among_those_wanted(hub):
    hub.add("us/tiny", FILES)
    everything = fetch_snapshot("us/tiny", "model", None)
    found = fetch_files("us/tiny", "model", None, [WEIGHTS])
    assert (found.folder, found.files) == (everything, ["model.safetensors"])
    assert len(hub.asked("GET", "/resolve/")) == len(FILES)


def test_a_data_set_is_fetched_from_where_the_hub_keeps_data_sets(hub):
    shards = {"data/train-00000-of-00002.parquet": b"one", "data/train-00001-of-00002.parquet": b"two"}
    commit = hub.add("us/pairs", shards, kind="dataset")
    folder = fetch_snapshot("us/pairs", "dataset", None)
    assert (folder.name, content(folder)) == (commit, shards)


def test_a_branch_a_tag_and_a_commit_each_give_their_own_files(hub):
    old = hub.add("us/tiny", {"config.json": b"old"}, revision="v1")
    new = hub.add("us/tiny", {"config.json": b"new"})
    for revision, commit, text in [("v1", old, b"old"), ("main", new, b"new"), (None, new, b"new"), (old, old, b"old")]:
        folder = fetch_snapshot("us/tiny", "model", revision)
        assert (folder.name, content(folder)) == (commit, {"config.json": text})


def test_a_branch_that_has_moved_is_fetched_anew(hub):
    hub.add("us/tiny", {"config.json": b"old", "model.safetensors": b"kept"})
    fetch_snapshot("us/tiny", "model", None)
    hub.add("us/tiny", {"config.json": b"new", "model.safetensors": b"kept"})
    assert content(fetch_snapshot("us/tiny", "model", None)) == {"config.json": b"new", "model.safetensors": b"kept"}


def test_what_is_there_already_is_not_fetched_again(hub):
    hub.add("us/tiny", FILES)
    fetch_snapshot("us/tiny", "model", None)
    hub.log.clear()
    fetch_snapshot("us/tiny", "model", None)
    assert hub.asked("GET", "/resolve/") == []


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (None, sorted(FILES)),
        (["*.json"], ["config.json"]),
        (["onnx/*"], ["onnx/config.json", "onnx/model.onnx"]),
        (["*/*.json", "READ*.md"], ["README.md", "onnx/config.json"]),
        (["absent.bin|pytorch_*.bin|model.safetensors"], ["pytorch_model.bin"]),
        (["absent.bin"], []),
    ],
)
def test_patterns_choose_names(patterns, expected):
    assert chosen(FILES, patterns) == expected


# What passes by itself


@pytest.mark.parametrize("status", [429, 500, 503])
@pytest.mark.parametrize("where", ["/api/models/us/tiny", "HEAD /us/tiny", "GET /us/tiny/resolve"])
def test_a_hub_that_is_busy_for_a_while_is_asked_again(hub, status, where):
    hub.add("us/tiny", FILES)
    hub.fail(status, 1, where)
    assert content(fetch_snapshot("us/tiny", "model", None)) == FILES


def test_a_hub_that_stays_busy_is_asked_three_times(hub, capsys):
    hub.add("us/tiny", FILES)
    hub.fail(503, 1000, "/api/")
    message = fault("us/tiny", "model", None)
    assert "the hub answered 503 Service Unavailable" in message
    assert len(hub.log) == 3
    assert capsys.readouterr().err.count("retrying") == 2


def test_a_body_that_is_cut_short_is_continued_after_the_last_whole_block(hub, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 10_000)
    hub.add("us/tiny", FILES)
    hub.cut(78_000, "GET /us/tiny/resolve")
    folder = fetch_snapshot("us/tiny", "model", None, ["model.safetensors"])
    assert content(folder) == {"model.safetensors": FILES["model.safetensors"]}
    assert [request.range for request in hub.asked("GET", "/resolve/")] == [None, "bytes=70000-"]


def test_a_body_that_ends_too_early_is_fetched_again(hub):
    hub.add("us/tiny", FILES)
    hub.shorten(70_000, "GET /us/tiny/resolve")
    folder = fetch_snapshot("us/tiny", "model", None, ["model.safetensors"])
    assert content(folder) == {"model.safetensors": FILES["model.safetensors"]}


def test_a_hub_that_never_answers_is_given_up(hub, monkeypatch):
    """The client itself sets no time limit on its second question, which is for the files' sizes."""
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.2)
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.2)
    hub.add("us/tiny", FILES)
    hub.ignore("/tree/")
    assert content(fetch_snapshot("us/tiny", "model", None)) == FILES
    hub.ignore("/api/", times=1000)
    assert "the host cannot be reached (ReadTimeout" in fault("us/other", "model", None)
    assert not hub.outwaited


def test_a_snapshot_is_never_given_with_files_missing(hub, cache):
    """The client gives the folder it has, where the hub fails after it has told the revision."""
    commit = hub.add("us/tiny", FILES)
    there = cache / "models--us--tiny" / "snapshots" / commit
    there.mkdir(parents=True)
    (there / "config.json").write_bytes(FILES["config.json"])
    hub.fail(404, 1, "/tree/")
    assert content(fetch_snapshot("us/tiny", "model", None)) == FILES


# What does not


def test_an_unknown_repository_is_one_clear_error_at_once(hub):
    message = fault("us/none", "model", None, ["*.json", WEIGHTS])
    assert message.startswith(
        "us/none: *.json, model.safetensors or pytorch_model.bin of this model at revision main "
        f"of {hub.endpoint} cannot be fetched: there is no such model, or it is private"
    )
    assert message.endswith("or point to a local copy, as in model: ./none")
    assert len(hub.log) == 1


def test_an_unknown_data_set_is_told_as_one(hub):
    message = fault("us/none", "dataset", "v2")
    assert message.startswith(f"us/none: all files of this dataset at revision v2 of {hub.endpoint} cannot be fetched")
    assert message.endswith("source: ./none")


def test_an_unknown_revision_is_one_clear_error_at_once(hub):
    hub.add("us/tiny", FILES)
    assert "the hub has no revision 'v7'" in fault("us/tiny", "model", "v7")
    assert len(hub.log) == 1


@pytest.mark.parametrize("token", [None, TOKEN])
def test_a_gated_repository_is_an_error_that_says_what_to_do(hub, monkeypatch, token):
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    hub.add("us/tiny", FILES)
    hub.gate("us/tiny")
    message = fault("us/tiny", "model", None, ["config.json"])
    assert f"it is gated; accept its licence at {hub.endpoint}/us/tiny and set HF_TOKEN" in message
    assert len(hub.asked("HEAD")) == 1


@pytest.mark.parametrize("where", ["/api/models/us/tiny", "HEAD ", "GET /us/tiny/resolve"])
def test_a_refusal_is_told_with_its_status_and_not_asked_again(hub, where):
    hub.add("us/tiny", FILES)
    hub.fail(403, 1000, where)
    assert "access is refused (403)" in fault("us/tiny", "model", None, ["config.json"])
    assert len([request for request in hub.log if where in str(request)]) == 1


def test_a_host_that_cannot_be_reached_is_one_clear_error(hub):
    hub.stop()
    message = fault("us/tiny", "model", None, ["config.json"])
    assert f"of {hub.endpoint} cannot be fetched: the host cannot be reached (ConnectError: " in message
    assert message.startswith("us/tiny: config.json of this model at revision main")


def test_a_host_that_answers_no_connection_is_asked_once(monkeypatch, cache, capsys):
    """As where a firewall drops what is sent: each try takes as long as the client may wait."""
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.3)
    with socket.create_server(("127.0.0.1", 0), backlog=0) as server:
        use(monkeypatch, f"http://127.0.0.1:{server.getsockname()[1]}", cache)
        waiting = socket.create_connection(server.getsockname())  # the one that the system keeps for its owner
        assert "the host cannot be reached (ConnectTimeout" in fault("us/tiny", "model", None)
        waiting.close()
    assert "retrying" not in capsys.readouterr().err


def test_a_cache_that_cannot_be_written_is_told(hub, cache):
    cache.write_text("not a folder")
    hub.add("us/tiny", FILES)
    assert str(cache) in fault("us/tiny", "model", None)


def test_a_repository_without_such_files_is_an_error(hub):
    hub.add("us/tiny", FILES)
    assert "the repository has no such files" in fault("us/tiny", "model", None, ["*.gguf"])


def test_what_is_no_hub_id_is_an_error(hub):
    assert "this is not a hub id" in fault("us/tiny/files", "model", None)
    assert hub.log == []


# Without a connection


@pytest.mark.parametrize("how", ["switched off", "unreachable", "down"])
@pytest.mark.parametrize("revision", [None, "main", "commit"])
def test_an_earlier_fetch_serves_without_a_connection(hub, monkeypatch, how, revision):
    commit = hub.add("us/tiny", FILES)
    revision = commit if revision == "commit" else revision
    first = fetch_files("us/tiny", "model", revision, ["*.json", WEIGHTS])
    lose(hub, monkeypatch, how)
    asked = len(hub.log)
    assert fetch_files("us/tiny", "model", revision, ["*.json", WEIGHTS]) == first
    if how == "switched off":
        assert len(hub.log) == asked


def lose(hub, monkeypatch, how):
    if how == "switched off":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    elif how == "unreachable":
        hub.stop()
    else:
        hub.fail(502, 1000)


@pytest.mark.parametrize("how", ["switched off", "unreachable", "down"])
def test_an_earlier_fetch_of_other_files_does_not_serve(hub, monkeypatch, how):
    hub.add("us/tiny", FILES)
    fetch_snapshot("us/tiny", "model", None, ["config.json"])
    lose(hub, monkeypatch, how)
    message = fault("us/tiny", "model", None, ["*.json", WEIGHTS])
    assert f"of {hub.endpoint} cannot be fetched: " in message
    if how == "switched off":
        assert "HF_HUB_OFFLINE is set, and not all of them are in the cache of this machine" in message


def test_an_earlier_fetch_of_another_revision_does_not_serve(hub, monkeypatch):
    hub.add("us/tiny", FILES)
    hub.add("us/tiny", {"config.json": b"old"}, revision="v1")
    fetch_snapshot("us/tiny", "model", None)
    lose(hub, monkeypatch, "switched off")
    assert f"at revision v1 of {hub.endpoint} cannot be fetched" in fault("us/tiny", "model", "v1")


def test_a_refusal_is_not_overcome_by_an_earlier_fetch(hub):
    """The hub was asked, and said no: its newest revision is another by now, or no longer for this user."""
    hub.add("us/tiny", FILES)
    fetch_snapshot("us/tiny", "model", None)
    hub.fail(403, 1000)
    fault("us/tiny", "model", None)


@pytest.mark.parametrize(("kind", "serves"), [("model", True), ("dataset", False)])
def test_what_others_left_serves_where_it_can_be_judged(hub, monkeypatch, cache, kind, serves):
    """Without a list of what there is, a data set with a file missing looks like a whole one; a model does not load."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    place = cache / f"{kind}s--us--tiny"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text(commit)
    (place / "snapshots" / commit).mkdir(parents=True)
    (place / "snapshots" / commit / "config.json").write_text("{}")
    lose(hub, monkeypatch, "switched off")
    if serves:
        assert fetch_files("us/tiny", kind, None, ["*.json", WEIGHTS]).files == ["config.json"]
    else:
        fault("us/tiny", kind, None)


# Interrupted, and in the dark


FETCH = "from conceptshare.io.hub import fetch_snapshot; print(fetch_snapshot('us/tiny', 'model', None))"


def process(hub: Hub, cache: Path, **more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", FETCH],
        env=environment(hub.endpoint, cache, **more),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_fetch_that_was_killed_goes_on_with_the_files_that_are_missing(hub, cache):
    commit = hub.add("us/tiny", FILES)
    hub.hold(50_000, f"GET /us/tiny/resolve/{commit}/model.safetensors")
    first = process(hub, cache)
    assert hub.held.wait(60)
    complete = cache / "hub" / "models--us--tiny" / "snapshots"
    while len(content(complete)) < len(FILES) - 1:
        assert first.poll() is None
        time.sleep(0.01)
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()
    hub.log.clear()
    out, err = process(hub, cache).communicate()
    assert content(Path(out.strip())) == FILES, err
    assert files_got(hub) == ["model.safetensors"]


@pytest.mark.parametrize("gated", [False, True])
def test_a_token_is_sent_to_the_hub_and_said_to_nobody_else(hub, cache, gated):
    hub.add("us/tiny", FILES)
    if gated:
        hub.gate("us/tiny")
    ended = process(hub, cache, HF_TOKEN=TOKEN)
    said = "".join(ended.communicate())
    assert {request.token for request in hub.log} == {TOKEN}
    assert (ended.returncode != 0) == gated
    assert TOKEN not in said
    assert not any(TOKEN.encode() in text for text in content(cache).values())


def test_a_long_fetch_says_how_far_it_is_in_lines(hub, monkeypatch, capsys):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    commit = hub.add("us/tiny", {"model.safetensors": bytes(2_500_000)})
    fetch_snapshot("us/tiny", "model", None)
    said = capsys.readouterr().err.splitlines()
    assert said[0] == f"us/tiny at {commit}: 1 files, from {hub.endpoint}"
    assert said[1].startswith("2.5 of 2.5 MB (")
    assert said[2].startswith("us/tiny: complete in ")
    assert len(said) == 3


def test_the_client_of_today_asks_for_what_this_hub_answers(hub, cache):
    """The hub of these tests, used by the client without us: else they would show only that two errors agree."""
    commit = hub.add("us/tiny", FILES)
    assert Path(snapshot_download("us/tiny")) == cache / "models--us--tiny" / "snapshots" / commit
