"""A local model hub: serves the requests of the hub's client over HTTP, with failures on demand.

Uploads are those of the client without Xet, its storage service: one commit, with large files by the LFS protocol.
"""

import base64
import hashlib
import json
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest
from huggingface_hub import constants

from tests.helpers.forks import forked_python, reimport

USER = "us"
"""The user whose token is `TOKEN`."""
TOKEN = "hf_a_token_that_is_nowhere_to_be_written"


@dataclass(frozen=True)
class Request:
    """A request that the hub received."""

    method: str
    path: str
    range: str | None
    token: str | None
    body: bytes = b""

    def __str__(self) -> str:
        return f"{self.method} {self.path}"


@dataclass
class Repository:
    """A repository: files by commit, and commits by branch or tag."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    revisions: dict[str, str] = field(default_factory=dict)
    gated: bool = False


@dataclass
class Trouble:
    """A failure of the next ``times`` requests that contain ``where``."""

    kind: str
    where: str
    times: int
    number: int
    """A status, or the number of bytes of the body that are sent before it stops."""


class Hub:
    """A running hub. `log` holds every request for a repository, `other_requests` every other."""

    def __init__(self) -> None:
        self.log: list[Request] = []
        self.other_requests: list[Request] = []
        self.over = threading.Event()
        self.held = threading.Event()
        """Set once a body is held back."""
        self.timed_out = False
        """Whether a client waited longer than this hub stays silent."""
        self._names: dict[str, str] = {}
        self._blobs: dict[str, bytes] = {}
        self._repositories: dict[tuple[str, str], Repository] = {}
        self._troubles: list[Trouble] = []
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def add(self, repository: str, files: Path | dict[str, bytes], kind: str = "model", revision: str = "main") -> str:
        """Set the files of a branch or tag of a repository; return its commit."""
        if isinstance(files, Path):
            files = {
                path.relative_to(files).as_posix(): path.read_bytes() for path in files.rglob("*") if path.is_file()
            }
        listing = [f"{name} {hashlib.sha1(content).hexdigest()}" for name, content in sorted(files.items())]
        commit = hashlib.sha1("\n".join([repository, *listing]).encode()).hexdigest()
        known = self._repositories.setdefault((kind, repository), Repository())
        known.commits[commit] = files
        known.revisions[revision] = commit
        return commit

    def files(self, repository: str) -> dict[str, bytes]:
        """The files at a model's main branch."""
        known = self._repositories["model", repository]
        return known.commits[known.revisions["main"]]

    def commit(self, repository: str, revision: str) -> str:
        """The commit of a model's branch or tag."""
        return self._repositories["model", repository].revisions[revision]

    def rename(self, old: str, new: str) -> None:
        """Redirect requests for a model's old name to its new one."""
        self._names[old] = new

    def gate(self, repository: str, kind: str = "model") -> None:
        """Refuse the files, as to users who have not accepted a licence."""
        self._repositories[kind, repository].gated = True

    def fail(self, status: int, times: int, where: str = "") -> None:
        """Answer the next requests with an error status."""
        self._troubles.append(Trouble("fail", where, times, status))

    def recover(self) -> None:
        """End all failures."""
        self._troubles.clear()

    def cut(self, after: int, where: str, times: int = 1) -> None:
        """Drop the connection in the middle of the next bodies."""
        self._troubles.append(Trouble("cut", where, times, after))

    def shorten(self, to: int, where: str) -> None:
        """Answer the next request with the beginning of the file as if it were complete."""
        self._troubles.append(Trouble("shorten", where, 1, to))

    def hold(self, after: int, where: str) -> None:
        """Send only the beginning of the next body and keep the connection open."""
        self._troubles.append(Trouble("hold", where, 1, after))

    def ignore(self, where: str, times: int = 1) -> None:
        """Do not answer the next requests at all."""
        self._troubles.append(Trouble("ignore", where, times, 0))

    def stop(self) -> None:
        """Stop, so that the hub is unreachable."""
        self.over.set()
        self._server.shutdown()
        self._server.server_close()

    def asked(self, method: str, part: str = "") -> list[Request]:
        """The requests of a method whose path contains ``part``."""
        return [request for request in self.log if request.method == method and part in request.path]

    def trouble(self, request: Request) -> Trouble | None:
        """The failure to apply to a request, if any."""
        if request.path == "/api/agent-harnesses":
            self.other_requests.append(request)  # the client requests this once a day, for usage statistics
            return None
        with self._lock:
            self.log.append(request)
            for trouble in self._troubles:
                if trouble.times > 0 and trouble.where in str(request):
                    trouble.times -= 1
                    return trouble
        return None

    def answer(self, request: Request) -> "Answer":
        """The hub's normal answer to a request."""
        if request.method in ("POST", "PUT"):
            return self._receive(request)
        if request.path == "/api/whoami-v2":
            return _json({"type": "user", "name": USER}) if request.token == TOKEN else Answer(401)
        parts = unquote(request.path).strip("/").split("/")
        if parts[0] == "api":
            kind, rest = parts[1].removesuffix("s"), parts[2:]
        else:
            kind, rest = ("dataset", parts[1:]) if parts[0] == "datasets" else ("model", parts)
        words = [n for n, word in enumerate(rest) if word in ("revision", "tree", "resolve")]
        end = words[0] if words else len(rest)
        name = "/".join(rest[:end])
        if name in self._names:
            return Answer(307, {"Location": request.path.replace(name, self._names[name], 1)})
        repository = self._repositories.get((kind, name))
        if repository is None:
            return Answer(404 if request.token else 401, {"X-Error-Code": "RepoNotFound"})
        revision, path = ("main", "") if not words else (rest[end + 1], "/".join(rest[end + 2 :]))
        commit = repository.revisions.get(revision, revision)
        if commit not in repository.commits:
            return Answer(404, {"X-Error-Code": "RevisionNotFound"})
        files = repository.commits[commit]
        if parts[0] != "api":
            return _file(repository, commit, files, path, request)
        if words and rest[end] == "tree":
            return _json([{"type": "file", "path": name, "size": len(x), "oid": _tag(x)} for name, x in files.items()])
        return _json({"id": name, "sha": commit, "siblings": [{"rfilename": name} for name in files]})

    def _receive(self, request: Request) -> "Answer":
        """The answer to a request of an upload."""
        parts = request.path.strip("/").split("/")
        if parts[0] == "lfs":  # where the answer to a batch request sends the client, without its token
            assert hashlib.sha256(request.body).hexdigest() == parts[1]
            self._blobs[parts[1]] = request.body
            return Answer(200)
        if request.token != TOKEN:
            return Answer(401)
        if request.path == "/api/validate-yaml":
            return _json({"errors": [], "warnings": []})
        if request.path == "/api/repos/create":
            wanted = json.loads(request.body)
            name = f"{wanted['organization'] or USER}/{wanted['name']}"
            if not name.startswith(f"{USER}/"):
                return Answer(403)
            if ("model", name) in self._repositories:
                return Answer(409, body=json.dumps({"url": f"{self.endpoint}/{name}"}).encode())
            self.add(name, {".gitattributes": b""})
            return _json({"url": f"{self.endpoint}/{name}"})
        if request.path.endswith(".git/info/lfs/objects/batch"):
            objects = json.loads(request.body)["objects"]
            for each in objects:
                if each["oid"] not in self._blobs:
                    each["actions"] = {"upload": {"href": f"{self.endpoint}/lfs/{each['oid']}"}}
            return _json({"objects": objects})
        name = "/".join(parts[2:4])
        if ("model", name) not in self._repositories:
            return Answer(404, {"X-Error-Code": "RepoNotFound"})
        files = self.files(name)
        if parts[4] == "preupload":
            return _json({"files": [_mode(file, files) for file in json.loads(request.body)["files"]]})
        assert parts[4] == "commit"
        changed = {}
        for line in map(json.loads, request.body.splitlines()[1:]):
            value = line["value"]
            is_large = line["key"] == "lfsFile"
            changed[value["path"]] = self._blobs[value["oid"]] if is_large else base64.b64decode(value["content"])
        commit = self.add(name, files | changed)
        return _json({"commitOid": commit, "commitUrl": f"{self.endpoint}/{name}/commit/{commit}"})


@dataclass
class Answer:
    """A response."""

    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""


def _failure(status: int, bearer: str) -> Answer:
    """A failure that repeats the secret of the request, as careless servers do."""
    message = f"refused to {bearer}"
    return Answer(status, {"X-Error-Message": message}, json.dumps({"error": message}).encode())


def _mode(file: dict[str, Any], known: dict[str, bytes]) -> dict[str, Any]:
    """How to upload a file, and the git hash or, for LFS, the SHA-256 of the one that is there."""
    mode = "lfs" if file["path"].endswith((".safetensors", ".parquet")) else "regular"
    described = {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}
    if file["path"] not in known:
        return described
    content = known[file["path"]]
    git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    return {**described, "oid": git if mode == "regular" else _tag(content)}


def _json(content: Any) -> Answer:
    return Answer(200, {"Content-Type": "application/json"}, json.dumps(content).encode())


def _tag(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _file(repository: Repository, commit: str, files: dict[str, bytes], path: str, request: Request) -> Answer:
    if repository.gated:
        return Answer(403 if request.token else 401, {"X-Error-Code": "GatedRepo"})
    if path not in files:
        return Answer(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
    content = files[path]
    headers = {"ETag": f'"{_tag(content)}"', "X-Repo-Commit": commit, "X-Linked-Size": str(len(content))}
    if request.range is None:
        return Answer(200, headers, content)
    start = int(request.range.removeprefix("bytes=").rstrip("-"))
    headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
    return Answer(206, headers, content[start:])


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._respond()

        def do_GET(self) -> None:
            self._respond()

        def do_POST(self) -> None:
            self._respond()

        def do_PUT(self) -> None:
            self._respond()

        def log_message(self, *args: Any) -> None:
            """Log nothing."""

        def _respond(self) -> None:
            if hub.over.is_set():
                self.close_connection = True
                return
            bearer = self.headers["Authorization"]
            token = bearer.removeprefix("Bearer ") if bearer else None
            body = self.rfile.read(int(self.headers["Content-Length"] or 0))
            request = Request(self.command, urlsplit(self.path).path, self.headers["Range"], token, body)
            trouble = hub.trouble(request)
            if trouble is not None and trouble.kind == "ignore":
                hub.timed_out |= not hub.over.wait(20)
                self.close_connection = True
                return
            if trouble is not None and trouble.kind == "fail":
                answer = _failure(trouble.number, bearer or "")
            else:
                answer = hub.answer(request)
            if trouble is not None and trouble.kind == "shorten":
                answer.body, trouble = answer.body[: trouble.number], None
            self.send_response(answer.status)
            for name, value in {**answer.headers, "Content-Length": str(len(answer.body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "HEAD":
                return
            if trouble is None or trouble.kind == "fail":
                self.wfile.write(answer.body)
                return
            self.wfile.write(answer.body[: trouble.number])
            self.wfile.flush()
            if trouble.kind == "hold":
                hub.held.set()
                hub.over.wait(60)
            self.close_connection = True

    return Handler


@contextmanager
def running() -> Iterator[Hub]:
    """A hub that runs during the block."""
    hub = Hub()
    try:
        yield hub
    finally:
        if not hub.over.is_set():
            hub.stop()


def use(monkeypatch: Any, endpoint: str, cache: Path) -> None:
    """Point the hub's client in this process at ``endpoint``, with no token and another cache."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("conceptshare.io.hub._PAUSES", (0.01, 0.02))
    huggingface_hub.close_session()


def environment(endpoint: str, cache: Path, **more: str) -> dict[str, str]:
    """The environment of a process that uses ``endpoint``."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    return {**own, "HF_ENDPOINT": endpoint, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1", **more}


def fetching_python(folder: Path, endpoint: str, cache: Path) -> str:
    """A ``python`` program in ``folder`` whose ``-m conceptshare`` runs in a fork that uses ``endpoint``."""
    program = folder / "fetching" / "python"
    program.parent.mkdir()
    code = "from tests.helpers.hub import run_fetching; run_fetching()"
    program.write_text(f'#!/bin/sh\nexec "{forked_python()}" -c "{code}" "{endpoint}" "{cache}" "$@"\n')
    program.chmod(0o755)
    return str(program)


def run_fetching() -> None:
    """Run the command line that follows an endpoint, a cache and ``-m conceptshare``."""
    endpoint, cache, _, _, *sys.argv[1:] = sys.argv[1:]
    reimport("conceptshare")
    use(pytest.MonkeyPatch(), endpoint, Path(cache))
    from conceptshare.cli import main

    main()
