"""Fetching from a hub, and uploading: the selected files, failures and error messages."""

import os
import signal
import socket
import subprocess
import sys
import time
from hashlib import sha256
from pathlib import Path

import pytest
from huggingface_hub import constants, snapshot_download

from conceptshare.io import progress
from conceptshare.io.errors import HubError
from conceptshare.io.hub import chosen, fetch_files, upload
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
    """The files whose content was requested, sorted by name."""
    return sorted(request.path.partition("/resolve/")[2].partition("/")[2] for request in hub.asked("GET", "/resolve/"))


def fault(*arguments):
    """The one-line message of a failed fetch."""
    with pytest.raises(HubError) as error:
        fetch_files(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


# Selection of files


def test_fetches_all_files_of_a_repository_into_a_folder_named_by_the_commit(hub):
    commit = hub.add("us/tiny", FILES)
    folder = fetch_files("us/tiny", "model", None).folder
    assert folder.name == commit
    assert content(folder) == FILES


def test_fetches_only_matching_files_and_the_first_of_alternatives(hub):
    hub.add("us/tiny", FILES)
    found = fetch_files("us/tiny", "model", None, ["*.json", WEIGHTS])
    assert found.files == ["config.json", "model.safetensors"]
    assert content(found.folder) == {name: FILES[name] for name in found.files}
    assert files_got(hub) == found.files


def test_excludes_files_of_an_earlier_fetch_into_the_same_folder(hub):
    hub.add("us/tiny", FILES)
    everything = fetch_files("us/tiny", "model", None).folder
    found = fetch_files("us/tiny", "model", None, [WEIGHTS])
    assert (found.folder, found.files) == (everything, ["model.safetensors"])
    assert len(hub.asked("GET", "/resolve/")) == len(FILES)


def test_fetches_a_data_set_from_the_hubs_data_sets(hub):
    shards = {"data/train-00000-of-00002.parquet": b"one", "data/train-00001-of-00002.parquet": b"two"}
    commit = hub.add("us/pairs", shards, kind="dataset")
    folder = fetch_files("us/pairs", "dataset", None).folder
    assert (folder.name, content(folder)) == (commit, shards)


def test_fetches_by_branch_tag_or_commit(hub):
    old = hub.add("us/tiny", {"config.json": b"old"}, revision="v1")
    new = hub.add("us/tiny", {"config.json": b"new"})
    for revision, commit, text in [("v1", old, b"old"), ("main", new, b"new"), (None, new, b"new"), (old, old, b"old")]:
        folder = fetch_files("us/tiny", "model", revision).folder
        assert (folder.name, content(folder)) == (commit, {"config.json": text})


def test_fetches_a_moved_branch_again(hub):
    hub.add("us/tiny", {"config.json": b"old", "model.safetensors": b"kept"})
    fetch_files("us/tiny", "model", None)
    hub.add("us/tiny", {"config.json": b"new", "model.safetensors": b"kept"})
    assert content(fetch_files("us/tiny", "model", None).folder) == {
        "config.json": b"new",
        "model.safetensors": b"kept",
    }


def test_does_not_fetch_existing_files_again(hub):
    hub.add("us/tiny", FILES)
    fetch_files("us/tiny", "model", None)
    hub.log.clear()
    fetch_files("us/tiny", "model", None)
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
def test_patterns_select_names(patterns, expected):
    assert chosen(FILES, patterns) == expected


# Transient failures


@pytest.mark.parametrize("status", [429, 500, 503])
@pytest.mark.parametrize("where", ["/api/models/us/tiny", "HEAD /us/tiny", "GET /us/tiny/resolve"])
def test_retries_a_busy_hub(hub, status, where):
    hub.add("us/tiny", FILES)
    hub.fail(status, 1, where)
    assert content(fetch_files("us/tiny", "model", None).folder) == FILES


def test_tries_a_busy_hub_three_times(hub, capsys):
    hub.add("us/tiny", FILES)
    hub.fail(503, 1000, "/api/")
    message = fault("us/tiny", "model", None)
    assert "the hub answered 503 Service Unavailable" in message
    assert len(hub.log) == 3
    assert capsys.readouterr().err.count("retrying") == 2


def test_resumes_a_truncated_body_after_its_last_complete_block(hub, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 10_000)
    hub.add("us/tiny", FILES)
    hub.cut(78_000, "GET /us/tiny/resolve")
    folder = fetch_files("us/tiny", "model", None, ["model.safetensors"]).folder
    assert content(folder) == {"model.safetensors": FILES["model.safetensors"]}
    assert [request.range for request in hub.asked("GET", "/resolve/")] == [None, "bytes=70000-"]


def test_fetches_a_short_body_again(hub):
    hub.add("us/tiny", FILES)
    hub.shorten(70_000, "GET /us/tiny/resolve")
    folder = fetch_files("us/tiny", "model", None, ["model.safetensors"]).folder
    assert content(folder) == {"model.safetensors": FILES["model.safetensors"]}


def test_gives_up_on_a_hub_that_never_answers(hub, monkeypatch):
    """The client itself has no timeout for its second request, which is for the files' sizes."""
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.2)
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.2)
    hub.add("us/tiny", FILES)
    hub.ignore("/tree/")
    assert content(fetch_files("us/tiny", "model", None).folder) == FILES
    hub.ignore("/api/", times=1000)
    assert "the host cannot be reached (ReadTimeout" in fault("us/other", "model", None)
    assert not hub.timed_out


def test_never_returns_an_incomplete_snapshot(hub, cache):
    """If the hub fails after it has returned the revision, the client returns the folder as it is."""
    commit = hub.add("us/tiny", FILES)
    there = cache / "models--us--tiny" / "snapshots" / commit
    there.mkdir(parents=True)
    (there / "config.json").write_bytes(FILES["config.json"])
    hub.fail(404, 1, "/tree/")
    assert content(fetch_files("us/tiny", "model", None).folder) == FILES


# Permanent failures


def test_an_unknown_repository_is_an_immediate_error(hub):
    message = fault("us/none", "model", None, ["*.json", WEIGHTS])
    assert message.startswith(
        "us/none: *.json, model.safetensors or pytorch_model.bin of this model at revision main "
        f"of {hub.endpoint} cannot be fetched: there is no such model, or it is private"
    )
    assert message.endswith("or point to a local copy, as in model: ./none")
    assert len(hub.log) == 1


def test_the_error_for_an_unknown_data_set_says_data_set(hub):
    message = fault("us/none", "dataset", "v2")
    assert message.startswith(f"us/none: all files of this dataset at revision v2 of {hub.endpoint} cannot be fetched")
    assert message.endswith("source: ./none")


def test_an_unknown_revision_is_an_immediate_error(hub):
    hub.add("us/tiny", FILES)
    assert "the hub has no revision 'v7'" in fault("us/tiny", "model", "v7")
    assert len(hub.log) == 1


@pytest.mark.parametrize("token", [None, TOKEN])
def test_a_gated_repository_is_an_error_with_a_remedy(hub, monkeypatch, token):
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    hub.add("us/tiny", FILES)
    hub.gate("us/tiny")
    message = fault("us/tiny", "model", None, ["config.json"])
    assert f"it is gated; accept its licence at {hub.endpoint}/us/tiny and set HF_TOKEN" in message
    assert len(hub.asked("HEAD")) == 1


@pytest.mark.parametrize("where", ["/api/models/us/tiny", "HEAD ", "GET /us/tiny/resolve"])
def test_reports_the_status_of_a_refusal_without_retrying(hub, where):
    hub.add("us/tiny", FILES)
    hub.fail(403, 1000, where)
    assert "access is refused (403)" in fault("us/tiny", "model", None, ["config.json"])
    assert len([request for request in hub.log if where in str(request)]) == 1


def test_an_unreachable_host_is_one_error(hub):
    hub.stop()
    message = fault("us/tiny", "model", None, ["config.json"])
    assert f"of {hub.endpoint} cannot be fetched: the host cannot be reached (ConnectError: " in message
    assert message.startswith("us/tiny: config.json of this model at revision main")


def test_tries_a_host_that_accepts_no_connection_once(monkeypatch, cache, capsys):
    """As behind a firewall that drops packets: each attempt takes the full timeout."""
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.3)
    with socket.create_server(("127.0.0.1", 0), backlog=0) as server:
        use(monkeypatch, f"http://127.0.0.1:{server.getsockname()[1]}", cache)
        waiting = socket.create_connection(server.getsockname())  # the host never accepts it
        assert "the host cannot be reached (ConnectTimeout" in fault("us/tiny", "model", None)
        waiting.close()
    assert "retrying" not in capsys.readouterr().err


def test_reports_an_unwritable_cache(hub, cache):
    cache.write_text("not a folder")
    hub.add("us/tiny", FILES)
    assert str(cache) in fault("us/tiny", "model", None)


def test_a_repository_without_matching_files_is_an_error(hub):
    hub.add("us/tiny", FILES)
    message = fault("us/tiny", "model", None, ["*.gguf"])
    assert "the repository has no such files; it has README.md, config.json, model.safetensors, notes [1].md" in message
    assert "onnx/ and 1 more" in message


def test_refuses_an_invalid_hub_id(hub):
    assert "this is not a hub id" in fault("us/tiny/files", "model", None)
    assert hub.log == []


# Without a connection


@pytest.mark.parametrize("how", ["switched off", "unreachable", "down"])
@pytest.mark.parametrize("revision", [None, "main", "commit"])
def test_uses_an_earlier_fetch_without_a_connection(hub, monkeypatch, how, revision):
    commit = hub.add("us/tiny", FILES)
    revision = commit if revision == "commit" else revision
    first = fetch_files("us/tiny", "model", revision, ["*.json", WEIGHTS])
    disconnect(hub, monkeypatch, how)
    asked = len(hub.log)
    assert fetch_files("us/tiny", "model", revision, ["*.json", WEIGHTS]) == first
    if how == "switched off":
        assert len(hub.log) == asked


def disconnect(hub, monkeypatch, how):
    if how == "switched off":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    elif how == "unreachable":
        hub.stop()
    else:
        hub.fail(502, 1000)


@pytest.mark.parametrize("how", ["switched off", "unreachable", "down"])
def test_does_not_use_an_earlier_fetch_of_other_files(hub, monkeypatch, how):
    hub.add("us/tiny", FILES)
    fetch_files("us/tiny", "model", None, ["config.json"])
    disconnect(hub, monkeypatch, how)
    message = fault("us/tiny", "model", None, ["*.json", WEIGHTS])
    assert f"of {hub.endpoint} cannot be fetched: " in message
    if how == "switched off":
        assert "HF_HUB_OFFLINE is set, and not all of them are in the cache of this machine" in message


def test_does_not_use_an_earlier_fetch_of_another_revision(hub, monkeypatch):
    hub.add("us/tiny", FILES)
    hub.add("us/tiny", {"config.json": b"old"}, revision="v1")
    fetch_files("us/tiny", "model", None)
    disconnect(hub, monkeypatch, "switched off")
    assert f"at revision v1 of {hub.endpoint} cannot be fetched" in fault("us/tiny", "model", "v1")


def test_does_not_use_an_earlier_fetch_after_a_refusal(hub):
    """The hub answered with a refusal, so its newest revision may have changed or be closed to this user."""
    hub.add("us/tiny", FILES)
    fetch_files("us/tiny", "model", None)
    hub.fail(403, 1000)
    fault("us/tiny", "model", None)


@pytest.mark.parametrize(("kind", "serves"), [("model", True), ("dataset", False)])
def test_uses_files_cached_by_other_programs_if_they_can_be_verified(hub, monkeypatch, cache, kind, serves):
    """Without a list of files, an incomplete data set looks complete; an incomplete model does not load."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    place = cache / f"{kind}s--us--tiny"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text(commit)
    (place / "snapshots" / commit).mkdir(parents=True)
    (place / "snapshots" / commit / "config.json").write_text("{}")
    disconnect(hub, monkeypatch, "switched off")
    if serves:
        assert fetch_files("us/tiny", kind, None, ["*.json", WEIGHTS]).files == ["config.json"]
    else:
        fault("us/tiny", kind, None)


# Interruptions and progress


FETCH = "from conceptshare.io.hub import fetch_files; print(fetch_files('us/tiny', 'model', None).folder)"


def process(hub: Hub, cache: Path, **more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", FETCH],
        env=environment(hub.endpoint, cache, **more),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_killed_fetch_resumes_with_the_missing_files(hub, cache):
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
def test_a_token_is_sent_to_the_hub_only(hub, cache, gated):
    hub.add("us/tiny", FILES)
    if gated:
        hub.gate("us/tiny")
    ended = process(hub, cache, HF_TOKEN=TOKEN)
    output = "".join(ended.communicate())
    assert {request.token for request in hub.log} == {TOKEN}
    assert (ended.returncode != 0) == gated
    assert TOKEN not in output
    assert not any(TOKEN.encode() in text for text in content(cache).values())


def test_a_long_fetch_reports_its_progress_in_lines(hub, monkeypatch, capsys):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    commit = hub.add("us/tiny", {"model.safetensors": bytes(2_500_000)})
    fetch_files("us/tiny", "model", None)
    output = capsys.readouterr().err.splitlines()
    assert output[0] == f"us/tiny at {commit}: 1 files, from {hub.endpoint}"
    assert output[1].startswith("2.5 of 2.5 MB (")
    assert output[2].startswith("us/tiny: complete in ")
    assert len(output) == 3


def test_the_real_client_works_with_this_hub(hub, cache):
    """The client alone works with the hub of these tests, so they do not depend on a shared mistake."""
    commit = hub.add("us/tiny", FILES)
    assert Path(snapshot_download("us/tiny")) == cache / "models--us--tiny" / "snapshots" / commit


# --- uploads ---


@pytest.fixture
def release(tmp_path, monkeypatch):
    """A folder to upload, by a user who is logged in."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    folder = tmp_path / "release"
    (folder / "saes").mkdir(parents=True)
    (folder / "README.md").write_text("---\nconceptshare_study: ours\n---\n# SAEs\n")
    (folder / "saes" / "cfg.json").write_text("{}")
    (folder / "saes" / "sae_weights.safetensors").write_bytes(bytes(range(256)))
    return folder


def test_uploads_to_a_new_repository_and_sends_only_changed_files_later(hub, release):
    address = upload("us/saes", release)
    assert {**content(release), ".gitattributes": b""} == hub.files("us/saes")
    assert address.startswith(f"{hub.endpoint}/us/saes/commit/")
    assert len(hub.asked("PUT")) == len(hub.asked("POST", "/commit/")) == 1
    assert upload("us/saes", release) == address
    assert len(hub.asked("PUT")) == len(hub.asked("POST", "/commit/")) == 1
    (release / "saes" / "cfg.json").write_text('{"k": 1}')
    (release / "added.parquet").write_bytes(b"PAR1")
    assert upload("us/saes", release) != address
    assert {**content(release), ".gitattributes": b""} == hub.files("us/saes")
    assert [request.path.split("/")[2] for request in hub.asked("PUT")] == [
        sha256(content(release)[name]).hexdigest() for name in ("saes/sae_weights.safetensors", "added.parquet")
    ]


@pytest.mark.parametrize(
    ("there", "first"),
    [
        ({"model.safetensors": b"another model"}, "model.safetensors"),
        ({"README.md": b"# By hand"}, "README.md"),
        ({"README.md": b"---\nconceptshare_study: theirs\n---\n"}, "README.md"),
        ({"README.md": b"---\nconceptshare_study: ours\n---\n", "saes/other.json": b"{}"}, "saes/other.json"),
    ],
)
def test_never_uploads_into_a_repository_of_something_else(hub, release, there, first):
    hub.add("us/saes", there)
    with pytest.raises(HubError, match=f"^us/saes: not uploaded to .*: it has {first}, .*name another repository"):
        upload("us/saes", release)
    assert not hub.asked("POST") + hub.asked("PUT")
    assert hub.files("us/saes") == there


def test_uploads_into_an_empty_repository_and_over_an_older_card_of_the_study(hub, release):
    hub.add("us/saes", {".gitattributes": b"x", "README.md": b"---\nconceptshare_study: ours\n---\nolder\n"})
    upload("us/saes", release)
    assert hub.files("us/saes") == {**content(release), ".gitattributes": b"x"}


@pytest.mark.parametrize(
    ("token", "repository", "why"),
    [
        (None, "us/saes", "you are not logged in; run `hf auth login`, or set HF_TOKEN"),
        ("wrong", "us/saes", r"your token may not write there \(401\); use one with write access"),
        (TOKEN, "them/saes", r"your token may not write there \(403\); use one with write access"),
        (TOKEN, "not an id", "this is not a hub id of the form OWNER/NAME"),
    ],
)
def test_a_refused_upload_is_one_line_with_the_remedy(hub, release, monkeypatch, token, repository, why):
    monkeypatch.delenv("HF_TOKEN")
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(HubError, match=f"^{repository}: not uploaded to {hub.endpoint}: {why}") as error:
        upload(repository, release)
    assert "\n" not in str(error.value)
    assert not hub.asked("PUT")


def test_an_upload_that_fails_at_its_end_is_resumed(hub, release):
    hub.fail(500, times=10, where="/commit/")
    with pytest.raises(
        HubError, match=r"the hub answered 500 .*; run again, which sends only what is missing"
    ) as error:
        upload("us/saes", release)
    assert TOKEN not in str(error.value)
    hub.recover()
    upload("us/saes", release)
    assert len(hub.asked("PUT")) == 1
    assert hub.files("us/saes").keys() == {*content(release), ".gitattributes"}
