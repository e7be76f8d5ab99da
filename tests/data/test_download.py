"""Downloading images by URL, from a real local server that misbehaves in many ways."""

import gc
import gzip
import hashlib
import io
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from socketserver import StreamRequestHandler, ThreadingTCPServer
from unittest.mock import AsyncMock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from conceptshare.config.catalog import DatasetSpec, Download
from conceptshare.data import download
from conceptshare.data.dataset import make_dataset
from conceptshare.data.download import Downloads, Failure, is_public, pause, retry_after
from conceptshare.io.errors import DatasetError
from tests.helpers.samples import AsRead


def picture(number, side=4):
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), (number % 256, number // 256 % 256, 7)).save(buffer, "PNG")
    return buffer.getvalue()


def answer(body=b"", status=200, length=True, **headers):
    """The bytes of an HTTP response."""
    lines = [f"HTTP/1.1 {status} Whatever", "Connection: close"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    if length is not False:
        lines.append(f"Content-Length: {len(body) if length is True else length}")
    return "\r\n".join([*lines, "", ""]).encode() + body


class Server(ThreadingTCPServer):
    """Answers each path from ``pages``: bytes, or a function of the socket and the number of the request.

    ``asked`` lists the requested paths in order, ``heads`` the heads of the requests.
    """

    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 128

    def __init__(self, host="127.0.0.1"):
        super().__init__((host, 0), Handler)
        self.pages, self.asked, self.heads, self.lock = {}, [], [], threading.Lock()
        self.stopped = threading.Event()
        self.busy = self.busiest = 0
        self.address = f"http://{host}:{self.server_address[1]}"


class Handler(StreamRequestHandler):
    def handle(self):
        head = b""
        while b"\r\n\r\n" not in head:
            part = self.request.recv(4096)
            if not part:
                return
            head += part
        path = head.split()[1].decode()
        with self.server.lock:
            self.server.asked.append(path)
            self.server.heads.append(head.decode())
            count = self.server.asked.count(path)
            self.server.busy += 1
            self.server.busiest = max(self.server.busiest, self.server.busy)
        page = self.server.pages.get(path, answer(b"", 404))
        try:
            self.request.sendall(page) if isinstance(page, bytes) else page(self.request, count)
        except OSError:
            pass  # the client has hung up, as it should after its timeout
        finally:
            with self.server.lock:
                self.server.busy -= 1


@contextmanager
def serving(server):
    with server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        yield server
        server.stopped.set()
        server.shutdown()


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(download, "FIRST_PAUSE", 0.01)
    with serving(Server()) as server:
        yield server


FAST = {"timeout": 3, "attempts": 2, "allow_private": True, "max_mb": 0.1}


@pytest.fixture
def make(tmp_path, server):
    """Makes a data set of the images at some paths of the server (or at full URLs) and opens it."""

    def made(paths, name="set", **keys):
        options = {**FAST, **keys.pop("download", {})}
        addresses = [path if path is None or "://" in path else server.address + path for path in paths]
        table = {"url": addresses, "text": [f"caption {n}" for n in range(len(paths))]}
        pq.write_table(pa.table(table), tmp_path / f"{name}.parquet")
        spec = {"source": str(tmp_path / f"{name}.parquet"), "image_url": "url", "caption": "text", "max_dropped": 1.0}
        make_dataset(DatasetSpec(**{**spec, **keys, "download": options}), tmp_path / name / "data")
        return AsRead(tmp_path / name / "data")

    return made


def fine(server, count):
    for number in range(count):
        server.pages[f"/{number}.png"] = answer(picture(number), Content_Type="image/png")
    return [f"/{number}.png" for number in range(count)]


def dead_addresses(folder):
    path = folder / "downloads" / "dead.jsonl"
    return [json.loads(line)["address"] for line in path.read_text().splitlines()] if path.exists() else []


def reasons(data):
    return {dropped["row"]: dropped["reason"] for dropped in data.manifest["dropped"]}


# The server's behaviour, whether it is transient (tried twice and not recorded as failed), and the reason.


def hang(connection, _):
    wait_for_hangup(connection)


def wait_for_hangup(connection):
    connection.settimeout(20)
    connection.recv(1)


def send_head_slowly(connection, _):
    for byte in answer(picture(1)):
        connection.sendall(bytes([byte]))
        time.sleep(0.2)


def send_body_slowly(connection, _):
    whole = answer(picture(1))
    connection.sendall(whole[:-60])
    for byte in whole[-60:]:
        time.sleep(0.2)
        connection.sendall(bytes([byte]))


def reset(connection, _):
    linger = (1).to_bytes(4, sys.byteorder) + (0).to_bytes(4, sys.byteorder)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    connection.close()


def send_endlessly(connection, _):
    connection.sendall(answer(length=False))
    while True:
        connection.sendall(b"x" * 10_000)


def redirect_endlessly(connection, _):
    connection.sendall(answer(status=302, length=False, Location="?"))
    while True:
        connection.sendall(b"x" * 10_000)


def send_chunks_endlessly(connection, _):
    connection.sendall(answer(length=False, Transfer_Encoding="chunked"))
    while True:
        connection.sendall(b"2710\r\n" + b"x" * 10_000 + b"\r\n")


BOMB = gzip.compress(b"\0" * 50_000_000)
HTML = b"<html><body>The image has moved.</body></html>"
FAULTS = {
    "absent": (answer(b"", 404), False, "HTTP 404"),
    "gone": (answer(b"", 410), False, "HTTP 410"),
    "forbidden": (answer(b"", 403), False, "HTTP 403"),
    "a picture with 404": (answer(picture(1), 404), False, "HTTP 404"),
    "not modified": (answer(b"", 304), False, "HTTP 304"),
    "broken": (answer(b"", 500), True, "HTTP 500"),
    "busy": (answer(b"", 429), True, "HTTP 429"),
    "asked too slowly": (answer(b"", 408), True, "HTTP 408"),
    "never answers": (hang, True, "ReadTimeout"),
    "drips its head": (send_head_slowly, True, "no complete response within 2 s"),
    "drips its body": (send_body_slowly, True, "no complete response within 2 s"),
    "cut short": (answer(picture(1)[:-9], length=len(picture(1))), True, "RemoteProtocolError"),
    "reset": (reset, True, "Error"),
    "no http": (b"SSH-2.0-OpenSSH_9.6\r\n\r\n", True, "RemoteProtocolError"),
    "html": (answer(HTML, Content_Type="text/html"), False, "cannot be decoded"),
    "html called a picture": (answer(HTML, Content_Type="image/png"), False, "cannot be decoded"),
    "half a picture": (answer(picture(1, 200)[:-40]), False, "cannot be decoded"),
    "empty": (answer(b""), False, "cannot be decoded"),
    "no content": (answer(b"", 204, length=False), False, "cannot be decoded"),
    "large": (answer(b"x" * 200_000), False, "larger than 0.1 MB"),
    "large and mute": (send_endlessly, False, "larger than 0.1 MB"),
    "large in chunks": (send_chunks_endlessly, False, "larger than 0.1 MB"),
    "bomb": (answer(BOMB, Content_Encoding="gzip"), False, "larger than 0.1 MB"),
    "no gzip": (answer(b"not gzip", Content_Encoding="gzip"), True, "DecodingError"),
    "redirect to nowhere": (answer(b"", 302), False, "HTTP 302"),
    "redirect to a file": (answer(b"", 302, Location="file:///etc/passwd"), False, "not a valid http or https address"),
    "redirect to nonsense": (answer(b"", 302, Location="http://[::bad/"), False, "HTTP 302"),
    "redirect to no port": (
        answer(b"", 302, Location="http://127.0.0.1:99999/"),
        False,
        "not a valid http or https address: the port 99999 is not between 1 and 65535",
    ),
    "redirect that never ends": (redirect_endlessly, False, "more than 5 redirects"),
    "redirect to itself": (answer(b"", 301, Location="?"), False, "more than 5 redirects"),
    "too many pixels": (answer(picture(1, 400)), False, "400 x 400 pixels, more than max_pixels = 100000"),
}


def test_every_misbehaving_server_gives_one_dropped_row_without_hanging(server, make, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "TRY_TIMEOUTS", 2)
    keys = {"max_pixels": 100_000, "download": {"timeout": 1}}
    paths = ["/0.png"]
    fine(server, 2)
    assert len(BOMB) < 100_000
    for number, (page, _, _) in enumerate(FAULTS.values()):
        server.pages[f"/fault-{number}"] = page
        paths.append(f"/fault-{number}")
    data = make([*paths, "/1.png"], **keys)
    assert [data.caption(row) for row in range(len(data))] == ["caption 0", f"caption {len(paths)}"]
    assert (data.manifest["rows_read"], data.manifest["rows"]) == (len(paths) + 1, 2)
    assert len(data.manifest["dropped"]) == len(FAULTS)
    for number, (dropped, (name, (_, _, reason))) in enumerate(
        zip(data.manifest["dropped"], FAULTS.items(), strict=True)
    ):
        assert reason in dropped["reason"], (name, dropped)
        assert dropped["row"] == number + 1
        assert dropped["id"] == f"{number + 1:08d}"
        assert dropped["address"] == f"{server.address}/fault-{number}"
    counts = Counter(server.asked)
    for number, (name, (_, passing, reason)) in enumerate(FAULTS.items()):
        once = 6 if "redirects" in reason else 1
        asked = sum(count for path, count in counts.items() if path.split("?")[0] == f"/fault-{number}")
        assert asked == (2 if passing else once), name
    by_setting = [n for n, (_, _, reason) in enumerate(FAULTS.values()) if "max_pixels" in reason or "MB" in reason]
    passing = [n for n, (_, passing, _) in enumerate(FAULTS.values()) if passing]
    dead = set(range(len(FAULTS))) - {*by_setting, *passing}
    assert set(dead_addresses(tmp_path / "set")) == {f"{server.address}/fault-{n}" for n in dead}
    assert not list((tmp_path / "set" / "downloads").rglob("*.partial"))

    # A second run retries only transient failures, with other settings too.
    server.asked.clear()
    again = make([*paths, "/1.png"], **keys)
    assert Counter(server.asked) == {f"/fault-{n}": 1 if n in by_setting else 2 for n in [*by_setting, *passing]}
    assert again.content_hash == data.content_hash
    assert reasons(again).keys() == reasons(data).keys()


@pytest.mark.parametrize(
    "address",
    [
        "ftp://127.0.0.1/a.png",
        "file:///etc/passwd",
        "data:image/png;base64,AAAA",
        "/etc/passwd",
        "nonsense",
        "",
        "  ",
        None,
        "http://",
        "http://[::1",
        "http://127.0.0.1/" + "a" * 10_000,
        "javascript://x",
    ],
)
def test_drops_invalid_urls_with_a_reason(address, server, tmp_path):
    table = {"url": [*(server.address + path for path in fine(server, 2)), address], "text": ["a", "b", "c"]}
    pq.write_table(pa.table(table), tmp_path / "set.parquet")
    spec = DatasetSpec(
        source=str(tmp_path / "set.parquet"),
        image_url="url",
        caption="text",
        max_dropped=0.5,
        download=Download(**FAST),
    )
    make_dataset(spec, tmp_path / "set" / "data")
    (dropped,) = AsRead(tmp_path / "set" / "data").manifest["dropped"]
    assert "address" in dropped["reason"]
    assert dropped["row"] == 2


@pytest.mark.parametrize(
    "address",
    [
        *("http://127.0.0.1:99999/a", "https://127.0.0.1:65536/", "http://127.0.0.1:-1/a", "http://127.0.0.1:0/a"),
        *("http://127.0.0.1:http/a", "http://:80/a", "http:///a.png", "http:/a.png", "//127.0.0.1/a", "gopher://x/a"),
        *("http://a b/c", "http://a\nb/c", "http://a\0b/c", "http://a\x7fb/c", "http://\u3000/", "http://a|b/"),
        *("http://%31/", "http://[::1/", "http://[zz]/", "http://::1/", "http://256.1.1.1/", "http://a..b/"),
        *("http://xn--0.example/", "http://\u2603.invalid/", f"http://{'a' * 64}.com/", f"http://{'a.' * 128}com/"),
        *("http://127.0.0.1/\udcff", "http://\udcff/"),
    ],
)
def test_an_address_that_can_never_work_is_permanently_dropped_without_a_retry(address, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "pause", lambda *_: pytest.fail("tried again"))
    with (
        ThreadPoolExecutor(1) as pool,
        Downloads(tmp_path, Download(**FAST), lambda _: None, pool, "set") as downloads,
    ):
        failure = downloads.fetch(address).result()
        assert (downloads.counts.dead, downloads.counts.unreachable) == (1, 0)
    assert failure.reason.startswith("not a valid http or https address: ")
    assert len(failure.reason.splitlines()) == 1


@pytest.mark.parametrize("host", ["xn--ls8h.la", "xn--fa-hia.de", "b\u00fccher.de", "my_host.org.", "[::1]", "127.1"])
def test_an_unusual_host_is_valid(host):
    assert download._valid(f"http://{host}:8080/a.png").port == 8080


def test_a_group_of_errors_is_reported_as_its_first():
    error = ExceptionGroup("unhandled errors in a TaskGroup", [ExceptionGroup("", [OSError("cable cut")])])
    assert download._words(error) == "OSError: cable cut"


def test_a_url_that_works_on_the_second_attempt_is_a_sample(server, make):
    fine(server, 2)
    server.pages["/late"] = lambda connection, count: connection.sendall(
        answer(b"", 500) if count < 3 else answer(picture(9), Content_Type="image/png")
    )
    data = make(["/0.png", "/late", "/1.png"], download={"attempts": 3})
    assert data.manifest["dropped"] == []
    assert data.image(1).getpixel((0, 0)) == (9, 0, 7)
    assert server.asked.count("/late") == 3


@pytest.mark.parametrize("kind", ["text/html", "application/octet-stream", "image/jpeg", "nonsense"])
def test_ignores_the_content_type(server, make, kind):
    server.pages["/a"] = answer(picture(5), Content_Type=kind)
    server.pages["/b"] = answer(gzip.compress(picture(6)), Content_Type=kind, Content_Encoding="gzip")
    server.pages["/c"] = answer(gzip.compress(picture(7)), Content_Type=kind, Content_Encoding="x-gzip")
    data = make(["/a", "/b", "/c"])
    assert [data.image(row).getpixel((0, 0)) for row in range(3)] == [(5, 0, 7), (6, 0, 7), (7, 0, 7)]


def test_follows_at_most_five_redirects(server, make):
    fine(server, 2)
    for left in range(1, 8):
        target = f"/hop/{left - 1}" if left > 1 else f"{server.address}/0.png"
        server.pages[f"/hop/{left}"] = answer(b"", [301, 302, 303, 307, 308][left % 5], Location=target)
    data = make(["/hop/5", "/hop/6", "/1.png"])
    assert reasons(data) == {1: "more than 5 redirects"}
    assert data.image(0).getpixel((0, 0)) == (0, 0, 7)


def test_samples_are_in_row_order_whatever_order_downloads_finish_in(server, make):
    paths = fine(server, 40)
    for number in range(0, 40, 3):
        page = server.pages[f"/{number}.png"]
        server.pages[f"/{number}.png"] = lambda connection, _, page=page: (time.sleep(0.15), connection.sendall(page))
    data = make(paths)
    assert [data.image(row).getpixel((0, 0))[0] for row in range(40)] == list(range(40))
    assert [data.caption(row) for row in range(40)] == [f"caption {n}" for n in range(40)]


def test_requests_a_url_once_even_if_many_rows_have_it(server, make):
    fine(server, 1)
    server.pages["/busy"] = answer(b"", 503)
    data = make(["/0.png", "/0.png", "/dead", "/busy", "/dead", "/busy", "/0.png"], download={"attempts": 1})
    assert Counter(server.asked) == {"/0.png": 1, "/dead": 1, "/busy": 1}
    assert len(data) == 3
    assert reasons(data) == {2: "HTTP 404", 4: "HTTP 404", 3: "HTTP 503", 5: "HTTP 503"}


def test_limits_the_number_of_concurrent_requests(server, make):
    paths = fine(server, 30)
    for path in paths:
        page = server.pages[path]
        server.pages[path] = lambda connection, _, page=page: (time.sleep(0.03), connection.sendall(page))
    assert len(make(paths, download={"parallel": 3})) == 30
    # The server counts a request until shortly after its answer is read; without a bound, it would count 30.
    assert 2 <= server.busiest <= 6


def test_does_not_read_rows_far_ahead_of_a_slow_download(server, tmp_path, monkeypatch):
    """While the first image is held back, only a limited number of others are requested."""
    release = threading.Event()
    paths = fine(server, 1200)
    page = server.pages["/0.png"]
    server.pages["/0.png"] = lambda connection, _: (release.wait(10), connection.sendall(page))
    pq.write_table(
        pa.table({"url": [server.address + path for path in paths], "text": paths}), tmp_path / "set.parquet"
    )
    options = Download(parallel=2, timeout=20, allow_private=True)
    spec = DatasetSpec(source=str(tmp_path / "set.parquet"), image_url="url", caption="text", download=options)
    with ThreadPoolExecutor(1) as pool:
        making = pool.submit(make_dataset, spec, tmp_path / "data")
        until(lambda: len(server.asked) >= 500)
        time.sleep(0.5)
        asked = len(server.asked)
        release.set()
        making.result()
    assert asked <= 520
    assert len(AsRead(tmp_path / "data")) == 1200


def until(condition, seconds=600):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came to that"
        time.sleep(0.01)


def test_files_are_named_by_the_hash_of_their_url(server, make, tmp_path):
    make(fine(server, 2))
    kept = {
        path.relative_to(tmp_path / "set" / "downloads").as_posix(): path.read_bytes()
        for path in (tmp_path / "set" / "downloads").rglob("*")
        if path.is_file()
    }
    names = [hashlib.sha256(f"{server.address}/{n}.png".encode()).hexdigest() for n in range(2)]
    assert kept == {f"{name[:2]}/{name}": picture(n) for n, name in enumerate(names)}


def test_the_manifest_records_where_the_images_came_from(server, make):
    data = make(fine(server, 2))
    assert data.manifest["columns"] == {"id": None, "image_url": "url", "caption": "text"}
    assert all("conceptshare/" in head and "\r\nUser-Agent: " in head for head in server.heads)


def test_does_not_download_rows_without_a_caption(server, tmp_path):
    table = {"url": [server.address + path for path in fine(server, 3)], "text": ["a", "", "c"]}
    pq.write_table(pa.table(table), tmp_path / "set.parquet")
    spec = DatasetSpec(
        source=str(tmp_path / "set.parquet"),
        image_url="url",
        caption="text",
        max_dropped=0.5,
        download=Download(**FAST),
    )
    make_dataset(spec, tmp_path / "data")
    assert sorted(server.asked) == ["/0.png", "/2.png"]


def test_fetches_a_damaged_file_of_an_earlier_run_again(server, make, tmp_path):
    first = make(fine(server, 3))
    name = hashlib.sha256(f"{server.address}/1.png".encode()).hexdigest()
    (tmp_path / "set" / "downloads" / name[:2] / name).write_bytes(b"")
    server.asked.clear()
    assert make(fine(server, 3)).content_hash == first.content_hash
    assert server.asked == ["/1.png"]
    assert dead_addresses(tmp_path / "set") == []


def test_skips_a_truncated_line_of_failed_urls(server, make, tmp_path):
    fine(server, 2)
    rows = ["/0.png", "/dead/1", "/dead/2", "/1.png"]
    make(rows, download={"parallel": 1})
    path = tmp_path / "set" / "downloads" / "dead.jsonl"
    path.write_bytes(path.read_bytes()[:-15])
    for asked in (["/dead/2"], []):
        server.asked.clear()
        assert reasons(make(rows)) == {1: "HTTP 404", 2: "HTTP 404"}
        assert server.asked == asked


def test_requests_a_url_again_once_the_settings_allow_it(server, make, tmp_path):
    fine(server, 2)
    noise = io.BytesIO()
    Image.effect_noise((400, 400), 90).save(noise, "PNG")
    server.pages["/large"] = answer(noise.getvalue())
    rows = ["/0.png", "/large", "/1.png"]
    assert "larger than 0.1 MB" in reasons(make(rows))[1]
    assert "max_pixels" in reasons(make(rows, max_pixels=9999, download={"max_mb": 1}))[1]
    assert reasons(make(rows, download={"max_mb": 1})) == {}
    assert "max_pixels" in reasons(make(rows, max_pixels=9999, download={"max_mb": 1}))[1]
    assert dead_addresses(tmp_path / "set") == []


def test_does_not_connect_to_private_hosts(server, make, tmp_path):
    port = server.server_address[1]
    fine(server, 1)
    hosts = ["127.0.0.1", "localhost", "2130706433", "0x7f.1", "127.1", "[::ffff:127.0.0.1]", "0.0.0.0"]
    with pytest.raises(DatasetError, match="0 usable rows") as caught:
        make([f"http://{host}:{port}/0.png" for host in hosts], download={"allow_private": False})
    assert "forbidden: it leads to 127.0.0.1, which is not on the public internet" in str(caught.value)
    assert server.asked == []
    assert dead_addresses(tmp_path / "set") == []


@pytest.mark.parametrize("checked", ["before the request", "after the answer"])
def test_does_not_follow_a_redirect_to_a_private_host(server, make, monkeypatch, checked):
    """The server's own address counts as public here, so that it can redirect."""
    monkeypatch.setattr(download, "is_public", lambda host: host == "127.0.0.1")
    if checked == "after the answer":  # as if httpx reported new connections differently
        monkeypatch.setattr(Downloads, "_check_connected", AsyncMock())
    with serving(Server("127.0.0.2")) as other:
        server.pages["/away"] = answer(b"", 302, Location=other.address + fine(other, 1)[0])
        data = make([*fine(server, 2), "/away"], download={"allow_private": False})
        assert "forbidden: it leads to 127.0.0.2" in reasons(data)[2]
        assert other.asked == ([] if checked == "before the request" else ["/0.png"])


def test_refuses_a_host_that_resolves_to_a_private_address_on_connection(server, make, monkeypatch):
    """The check is on the connected address, whatever the name resolves to."""
    real, resolved = socket.getaddrinfo, []

    def rebinding(host, *rest, **more):
        if host not in {"rebind.example", b"rebind.example"}:
            return real(host, *rest, **more)
        resolved.append(host)
        return real("8.8.8.8" if len(resolved) == 1 else "127.0.0.1", *rest, **more)

    monkeypatch.setattr(socket, "getaddrinfo", rebinding)
    assert is_public(socket.getaddrinfo("rebind.example", 80)[0][4][0])
    with pytest.raises(DatasetError, match=r"forbidden: it leads to 127\.0\.0\.1"):
        make([f"http://rebind.example:{server.server_address[1]}/0.png"], download={"allow_private": False})
    assert server.asked == []


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "127.9.9.9", "10.1.2.3", "172.16.0.1", "172.31.255.255", "192.168.1.1", "169.254.169.254",
     "100.64.0.1", "0.0.0.0", "0.1.2.3", "224.0.0.1", "239.1.1.1", "240.0.0.1", "255.255.255.255", "192.0.2.1",
     "198.18.0.1", "::", "::1", "fe80::1", "fe80::1%eth0", "fc00::1", "fd12::1", "ff02::1", "fec0::1",
     "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:7f00:1", "2002:7f00:1::", "2002:a00:1::", "64:ff9b::7f00:1",
     "64:ff9b::a00:1", "2001:db8::1", "2001:0:a00:1::f5ff:fffe", "::127.0.0.1", "100::1"],
)  # fmt: skip
def test_refuses_a_private_address(host):
    assert not is_public(host)


@pytest.mark.parametrize("host", ["8.8.8.8", "1.1.1.1", "172.32.0.1", "2606:4700:4700::1111", "2002:808:808::"])
def test_accepts_a_public_address(host):
    assert is_public(host)


def test_ignores_proxies_in_the_environment(server, make, monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert len(make(fine(server, 2))) == 2


def closed_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_reports_a_missing_connection_and_records_no_failed_urls(make, tmp_path):
    port = closed_port()
    addresses = [f"http://127.0.0.1:{port}/{n}" for n in range(5)]
    with pytest.raises(
        DatasetError, match=r"none of the 5 image URLs.*Connect.*[Cc]heck this machine's internet connection"
    ):
        make(addresses)
    assert dead_addresses(tmp_path / "set") == []
    assert not (tmp_path / "set" / "data").exists()


def test_detects_a_missing_connection_before_trying_every_row(make, monkeypatch):
    monkeypatch.setattr(download, "MAX_UNREACHABLE", 20)
    monkeypatch.setattr("conceptshare.data.dataset.MAX_UNREACHABLE", 20)
    port = closed_port()
    addresses = [f"http://127.0.0.1:{port}/{n}" for n in range(5000)]
    with pytest.raises(DatasetError, match=r"none of the (\d{2,3}) image URLs"):
        make(addresses, download={"attempts": 1})


def test_some_unreachable_hosts_are_not_a_missing_connection(server, make):
    data = make([*fine(server, 2), f"http://127.0.0.1:{closed_port()}/a"])
    assert len(data) == 2
    assert "Connect" in reasons(data)[2]


def test_too_many_failures_suggest_another_run(server, make):
    server.pages["/busy"] = answer(b"", 503)
    with pytest.raises(DatasetError, match=r"1 of 3 rows are unusable.*HTTP 503.*run again"):
        make([*fine(server, 2), "/busy"], max_dropped=0.1)


def test_reports_the_outcome_of_downloads(server, make, capsys):
    server.pages["/busy"] = answer(b"", 503)
    rows = [*fine(server, 3), "/dead", "/busy"]
    make(rows)
    assert "images: 3 fetched, 0 were there, 2 failed (1 with a transient error)" in capsys.readouterr().err
    make(rows)
    assert "images: 0 fetched, 3 were there, 2 failed (1 with a transient error)" in capsys.readouterr().err


def test_reports_the_outcome_of_downloads_in_the_progress_too(server, make, capsys, monkeypatch):
    monkeypatch.setattr(download.progress, "SECONDS_BETWEEN_LINES", 0.0)
    make([*fine(server, 2), "/dead"])
    lines = [line for line in capsys.readouterr().err.splitlines() if "images: " in line]
    assert len(lines) == 4
    assert any("1 failed" in line for line in lines[:-1])
    assert "images: 2 fetched, 0 were there, 1 failed" in lines[-1]


def test_waits_for_as_long_as_a_server_requests(server, make):
    fine(server, 2)
    times = []

    def busy_at_first(connection, count):
        times.append(time.monotonic())
        connection.sendall(answer(b"", 429, Retry_After="1") if count == 1 else answer(picture(3)))

    server.pages["/busy"] = busy_at_first
    assert make(["/0.png", "/busy", "/1.png"]).manifest["dropped"] == []
    assert times[1] - times[0] >= 1


def test_pauses_grow_with_jitter_up_to_a_maximum():
    first, third = [pause(1, 0) for _ in range(50)], [pause(3, 0) for _ in range(50)]
    assert max(first) < min(third)
    assert len(set(first)) > 40
    assert pause(99, 0) == pause(1, 1e9) == download.MAX_PAUSE
    assert pause(1, 7) == 7


def test_retry_after_is_in_seconds_or_a_date():
    now = datetime(2026, 1, 1, tzinfo=UTC)
    date = (now + timedelta(seconds=90)).strftime("%a, %d %b %Y %H:%M:%S GMT")
    assert [retry_after(value, now) for value in ("7", " 12 ", date)] == [7, 12, 90]
    assert [retry_after(value, now) for value in ("", "soon", "-3", "nan", "Thu, 01 Jan 1970 00:00:00 GMT")] == [0] * 5


@contextmanager
def encrypted(server, tmp_path, name):
    """The server's URL over TLS, with a self-signed certificate for ``name``, and that certificate."""
    subprocess.run(
        [
            "openssl",
            "req",
            "-x509",
            "-newkey",
            "rsa:2048",
            "-nodes",
            "-days",
            "2",
            "-subj",
            f"/CN={name}",
            "-addext",
            f"subjectAltName=DNS:{name}",
            "-keyout",
            tmp_path / "key.pem",
            "-out",
            tmp_path / "cert.pem",
        ],
        check=True,
        capture_output=True,
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
    server.get_request = lambda: (
        lambda pair: (context.wrap_socket(pair[0], server_side=True, do_handshake_on_connect=False), pair[1])
    )(server.socket.accept())
    yield f"https://localhost:{server.server_address[1]}", tmp_path / "cert.pem"


@pytest.mark.parametrize(("certified", "trusted"), [("localhost", True), ("localhost", False), ("other.org", True)])
def test_verifies_tls_against_the_host_name(server, make, tmp_path, monkeypatch, certified, trusted):
    fine(server, 2)
    with encrypted(server, tmp_path, certified) as (address, certificate):
        if trusted:
            monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        rows = [f"{address}/0.png", f"{address}/1.png"]
        if trusted and certified == "localhost":
            assert len(make(rows)) == 2
        else:
            with pytest.raises(DatasetError, match=r"certificate verify failed|CERTIFICATE_VERIFY_FAILED"):
                make(rows, download={"attempts": 1})


def test_a_killed_run_resumes_with_the_same_bytes(server, tmp_path):
    rng = np.random.default_rng(0)
    count = 60
    rows = []
    for number in range(count):
        page = answer(b"", 404) if number % 10 == 3 else answer(picture(number))
        delay = float(rng.uniform(0.02, 0.1))
        server.pages[f"/{number}"] = lambda connection, _, page=page, delay=delay: (
            time.sleep(delay),
            connection.sendall(page),
        )
        rows.append(f"{server.address}/{number}")
    pq.write_table(pa.table({"url": rows, "text": [f"c {n}" for n in range(count)]}), tmp_path / "set.parquet")
    spec = {
        "source": str(tmp_path / "set.parquet"),
        "image_url": "url",
        "caption": "text",
        "max_dropped": 0.5,
        "download": {"parallel": 3, "allow_private": True},
    }

    def start(name):
        command = [
            sys.executable,
            "-m",
            "conceptshare",
            "dataset",
            "--dataset",
            json.dumps(spec),
            "--out",
            str(tmp_path / name / "data"),
        ]
        return subprocess.Popen(command, stderr=subprocess.DEVNULL, env={**os.environ, "HF_HUB_OFFLINE": "1"})

    undisturbed = start("undisturbed")
    assert undisturbed.wait(600) == 0
    server.asked.clear()
    killed = start("killed")
    until(lambda: len(server.asked) >= 25)
    killed.send_signal(signal.SIGKILL)
    killed.wait(600)
    until(lambda: server.busy == 0)
    downloads = tmp_path / "killed" / "downloads"
    there = {path.name for path in downloads.rglob("*") if path.is_file() and len(path.name) == 64}
    known = {row for row in rows if hashlib.sha256(row.encode()).hexdigest() in there}
    known |= set(dead_addresses(tmp_path / "killed"))
    assert len(known) >= 15
    asked_before = set(server.asked)
    server.asked.clear()
    assert start("killed").wait(600) == 0
    assert not {server.address + path for path in server.asked} & known
    assert {server.address + path for path in server.asked} | known == set(rows)
    assert len(server.asked) == len(set(server.asked))
    assert len(asked_before) < count
    for name in ("samples.arrow", "manifest.json"):
        assert (tmp_path / "killed" / "data" / name).read_bytes() == (
            tmp_path / "undisturbed" / "data" / name
        ).read_bytes()
    assert len(AsRead(tmp_path / "killed" / "data")) == count - 6


def test_leaving_the_context_cancels_downloads(server, tmp_path):
    server.pages["/hang"] = hang
    with ThreadPoolExecutor(1) as pool:
        options = Download(timeout=30, allow_private=True)
        with Downloads(tmp_path / "downloads", options, lambda _: None, pool, "set") as downloads:
            future = downloads.fetch(f"{server.address}/hang")
            until(lambda: server.asked)
        assert future.done()
    assert not list((tmp_path / "downloads").rglob("*.partial"))


@pytest.mark.filterwarnings("error")
def test_ending_while_connections_are_opened_leaves_no_coroutine_behind(tmp_path):
    port = closed_port()
    options = Download(timeout=30, attempts=1, allow_private=True)
    with ThreadPoolExecutor(1) as pool:
        for _ in range(5):
            with Downloads(tmp_path / "downloads", options, lambda _: None, pool, "set") as downloads:
                for name in range(1000):
                    downloads.fetch(f"http://127.0.0.1:{port}/{name}")
                until(lambda downloads=downloads: downloads.counts.transient > 100)
    gc.collect()


def test_returns_a_file_or_a_failure(server, tmp_path):
    fine(server, 1)
    with ThreadPoolExecutor(1) as pool:
        options = Download(**FAST)
        with Downloads(tmp_path / "downloads", options, lambda _: None, pool, "set") as downloads:
            assert downloads.fetch(f"{server.address}/0.png").result().read_bytes() == picture(0)
            assert downloads.fetch(f"{server.address}/none").result() == Failure("HTTP 404")


def test_transient_failures_are_not_retried_within_a_run(server, tmp_path):
    server.pages["/busy"] = answer(b"", 503)
    with ThreadPoolExecutor(1) as pool:
        options = Download(**FAST)
        with Downloads(tmp_path / "downloads", options, lambda _: None, pool, "set") as downloads:
            for _ in range(3):
                assert downloads.fetch(f"{server.address}/busy").result() == Failure("HTTP 503")
    assert server.asked == ["/busy"] * 2
