"""Downloads the images of a data set that only contains their URLs.

The well-kept downloader img2dataset cannot be installed with our lock: its 1.47.0 needs pandas < 3 (we have 3) and
brings wandb, opencv and albumentations; hence this small one on httpx2.

URLs are untrusted. Before anything is sent over a connection, it is checked that it leads to a public machine; proxies
of the environment are not used; and time, size and redirects are limited.

A complete file that passed the caller's check is kept in the downloads folder as `ab/abcd...`, the SHA-256 of its URL.
A URL that failed permanently is recorded in `dead.jsonl` there; a later run requests neither again.
"""

import asyncio
import hashlib
import ipaddress
import json
import random
import re
import threading
import time
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http.cookiejar import CookieJar, DefaultCookiePolicy
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx2 as httpx

from conceptshare.config.catalog import Download
from conceptshare.io import progress

MAX_REDIRECTS = 5
"""Maximum number of redirects per URL."""
TRY_TIMEOUTS = 6
"""Maximum duration of one attempt at a URL, in multiples of the timeout."""
FIRST_PAUSE = 0.5
"""Approximate number of seconds before the second attempt; each later pause is twice as long."""
MAX_PAUSE = 30.0
"""Maximum pause in seconds, even if the server's Retry-After is longer."""
MAX_UNREACHABLE = 200
"""If this many URLs fail, all with network errors, the connection is considered broken."""

_PASSING_STATUSES = {408, 425, 429}
_HOST_NAME = re.compile(r"(?=.{1,254}\Z)([a-z0-9_-]{1,63}\.)*[a-z0-9_-]{1,63}\.?", re.IGNORECASE)


class UnusableError(Exception):
    """A URL has no usable file, so retrying is useless; also raised by the caller's check.

    Args:
        reason: the reason.
        permanent: whether this holds under any settings; otherwise a later run tries again.
    """

    def __init__(self, reason: str, permanent: bool = True) -> None:
        super().__init__(reason)
        self.permanent = permanent


@dataclass(frozen=True)
class Failure:
    """The reason why a URL gave no usable file."""

    reason: str


@dataclass
class Counts:
    """Number of URLs by outcome."""

    fetched: int = 0
    """Downloaded."""
    there: int = 0
    """Downloaded by an earlier run."""
    dead: int = 0
    """Failed permanently, now or in an earlier run."""
    transient: int = 0
    """Failed with a transient error; a later run tries again."""
    answers: int = 0
    """Responses of any kind from servers in this run."""
    unreachable: int = 0
    """Transient failures of the network: no connection, a timeout, or a response cut short."""


class _TransientError(Exception):
    """An attempt failed with a transient error.

    Args:
        reason: the reason.
        network: whether no server responded completely.
        wait: seconds to wait, as requested by the server.
    """

    def __init__(self, reason: str, network: bool = False, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.network = network
        self.wait = wait


class Downloads:
    """Downloads files concurrently, in an event loop that runs in its own thread.

    Args:
        folder: folder of the files and `dead.jsonl`; created if missing.
        options: settings of the downloads.
        check: called with each file's bytes; raises UnusableError if they are unusable. Runs in ``pool``.
        pool: runs the checks.
        what: the data set's name, for progress.
    """

    def __init__(
        self, folder: Path, options: Download, check: Callable[[bytes], None], pool: Executor, what: str
    ) -> None:
        self.counts = Counts()
        self.last_failure = ""
        self._folder = folder
        self._options = options
        self._check = check
        self._pool = pool
        self._what = what
        folder.mkdir(parents=True, exist_ok=True)
        self._dead = _read_dead(folder / "dead.jsonl")
        self._failed: dict[str, str] = {}
        self._under_way: dict[str, asyncio.Task[Path | Failure]] = {}
        self._reported = time.monotonic()
        self._loop = asyncio.new_event_loop()
        self._loop.set_default_executor(ThreadPoolExecutor(options.parallel, "resolve"))  # resolves host names
        self._thread = threading.Thread(target=self._loop.run_forever, name="downloads", daemon=True)
        self._slots = asyncio.Semaphore(options.parallel)
        self._client = httpx.AsyncClient(
            headers={
                "User-Agent": f"conceptshare/{version('conceptshare')} (research on image-caption data sets)",
                "Accept": "image/*,*/*;q=0.5",
                "Accept-Encoding": "gzip, deflate",
            },
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),
            timeout=options.timeout,
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=options.parallel),
            verify=httpx.create_ssl_context(),  # uses the environment's certificates despite trust_env=False
            trust_env=False,
        )

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def fetch(self, address: str) -> "Future[Path | Failure]":
        """Start the download of a URL, unless it is running: a future of the file's path, or of the failure."""
        return asyncio.run_coroutine_threadsafe(self._shared(address), self._loop)

    def all_unreachable(self) -> bool:
        """Whether no server responded at all, and there is no file from an earlier run."""
        return self.counts.unreachable > 0 and self.counts.answers == 0 and self.counts.there == 0

    def report(self) -> str:
        """The counts so far, as a line for the log."""
        counts = self.counts
        return (
            f"{self._what}: images: {counts.fetched:,} fetched, {counts.there:,} were there, "
            f"{counts.dead + counts.transient:,} failed ({counts.transient:,} with a transient error)"
        )

    async def _close(self) -> None:
        for task in self._under_way.values():  # not the tasks they started, which they cancel themselves
            task.cancel()
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._client.aclose()

    async def _shared(self, address: str) -> Path | Failure:
        task = self._under_way.get(address)
        if task is None:
            task = self._under_way[address] = asyncio.create_task(self._outcome(address))
            task.add_done_callback(lambda _: self._under_way.pop(address, None))
        outcome = await task
        if time.monotonic() - self._reported >= progress.SECONDS_BETWEEN_LINES:
            self._reported = time.monotonic()
            progress.info(self.report())
        return outcome

    async def _outcome(self, address: str) -> Path | Failure:
        """The known outcome of a URL, or the outcome of downloading it."""
        path = self._path(address)
        try:
            if address in self._dead:
                raise UnusableError(self._dead[address])
            if address in self._failed:
                return Failure(self._failed[address])
            if await self._is_there(path):
                self.counts.there += 1
            else:
                await self._download(address, path)
                self.counts.fetched += 1
        except UnusableError as error:
            self.counts.dead += 1
            self._mark_dead(address, error)
            return Failure(str(error))
        except _TransientError as error:
            self.counts.transient += 1
            self.counts.unreachable += error.network
            self._failed[address] = self.last_failure = str(error)
            return Failure(str(error))
        return path

    async def _is_there(self, path: Path) -> bool:
        """Whether there is an intact file from an earlier run. A damaged one is removed and downloaded again."""
        if not path.is_file():
            return False
        try:
            await self._checked(path)
        except UnusableError:
            path.unlink()
            return False
        return True

    async def _download(self, address: str, path: Path) -> None:
        """Download a file, with retries.

        Raises:
            UnusableError: if it failed permanently.
            _TransientError: if the last attempt failed with a transient error.
        """
        partial = path.with_name(path.name + ".partial")
        path.parent.mkdir(exist_ok=True)
        try:
            for tried in range(1, self._options.attempts + 1):
                try:
                    async with self._slots:
                        await self._try(address, partial)
                    break
                except _TransientError as error:
                    if tried == self._options.attempts:
                        raise
                    await asyncio.sleep(pause(tried, error.wait))
            await self._checked(partial)
            partial.rename(path)
        finally:
            partial.unlink(missing_ok=True)

    async def _try(self, address: str, partial: Path) -> None:
        seconds = TRY_TIMEOUTS * self._options.timeout
        size = 0
        try:
            async with asyncio.timeout(seconds), aclosing(self._parts(address)) as parts:
                with partial.open("wb") as file:
                    async for part in parts:
                        size += len(part)
                        if size > self._options.max_mb * 1e6:
                            raise UnusableError(f"larger than {self._options.max_mb:g} MB", permanent=False)
                        file.write(part)
        except (UnusableError, _TransientError):
            raise
        except TimeoutError:
            raise _TransientError(f"no complete response within {seconds:g} s", network=True) from None
        except Exception as error:  # untrusted data may raise any type, which must only cost this row
            raise _TransientError(_words(error), network=isinstance(error, httpx.TransportError)) from error

    async def _parts(self, address: str) -> AsyncGenerator[bytes, None]:
        """Yield the decompressed bytes at a URL, following redirects.

        Redirects are followed here because httpx would read the whole body of a redirect, whatever its size.
        """
        url = _valid(address)
        request = self._client.build_request("GET", url, extensions={"trace": self._check_connected})
        for _ in range(MAX_REDIRECTS + 1):
            answer = await self._client.send(request, stream=True)
            try:
                self._check_peer(answer.extensions["network_stream"])  # in case the event below gets another name
                self.counts.answers += 1
                if answer.next_request is None:
                    _check_status(answer)
                    encoding = answer.headers.get("Content-Encoding", "").lower()
                    answer.headers["Content-Encoding"] = encoding.replace("x-gzip", "gzip")  # its name in HTTP/1.0
                    async for part in answer.aiter_bytes():
                        yield part
                    return
                request = answer.next_request
                _valid(request.url)
            finally:
                await answer.aclose()
        raise UnusableError(f"more than {MAX_REDIRECTS} redirects")

    async def _check_connected(self, event: str, info: dict[str, Any]) -> None:
        """Check a new connection before anything is sent over it; httpx calls this at every step of a request."""
        if event == "connection.connect_tcp.complete":
            try:
                self._check_peer(info["return_value"])
            except UnusableError:
                await info["return_value"].aclose()
                raise

    def _check_peer(self, stream: Any) -> None:
        """Reject a connection to a machine that is not public, independent of name resolution."""
        host = stream.get_extra_info("server_addr")[0]
        if not self._options.allow_private and not is_public(host):
            raise UnusableError(f"forbidden: it leads to {host}, which is not on the public internet", permanent=False)

    async def _checked(self, path: Path) -> None:
        await self._loop.run_in_executor(self._pool, lambda: self._check(path.read_bytes()))

    def _path(self, address: str) -> Path:
        name = hashlib.sha256(address.encode("utf-8", "surrogatepass")).hexdigest()
        return self._folder / name[:2] / name

    def _mark_dead(self, address: str, error: UnusableError) -> None:
        if address in self._dead:
            return
        if not error.permanent:
            self._failed[address] = str(error)
            return
        self._dead[address] = str(error)
        with (self._folder / "dead.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"address": address, "reason": str(error)}) + "\n")


def is_public(host: str) -> bool:
    """Whether an IP address, such as ``10.0.0.1`` or ``fe80::1%eth0``, is on the public internet."""
    ip = ipaddress.ip_address(host.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        # These lead to an embedded IPv4 address. Those of NAT64 and Teredo are reserved anyway.
        inner = ip.ipv4_mapped or ip.sixtofour
        if inner is not None and not is_public(str(inner)):
            return False
        if ip.is_site_local:
            return False
    return ip.is_global and not ip.is_multicast and not ip.is_reserved


def pause(tried: int, wait: float) -> float:
    """Seconds to wait after a number of attempts: exponential backoff with a jitter of 50%.

    Args:
        tried: number of attempts so far.
        wait: minimum number of seconds, as requested by the server; limited by MAX_PAUSE.
    """
    grown: float = FIRST_PAUSE * 2 ** (tried - 1) * random.uniform(0.5, 1.5)
    return min(max(grown, wait), MAX_PAUSE)


def retry_after(value: str, now: datetime) -> float:
    """Seconds to wait according to a Retry-After header: a number of seconds or a date; 0 if it is neither."""
    try:
        if value.strip().isdigit():
            return float(value)
        return max(0.0, (parsedate_to_datetime(value) - now).total_seconds())
    except (ValueError, TypeError, OverflowError):
        return 0.0


def _valid(address: str | httpx.URL) -> httpx.URL:
    """Parse a URL, and reject one that no server can have: errors of the connection would be taken for transient."""
    try:
        url = httpx.URL(address)
        host = url.raw_host.decode()
        for label in re.findall(r"\bxn--([^.]*)", host):
            label.encode().decode("punycode")
    except (httpx.InvalidURL, UnicodeError) as error:
        fault = " ".join(str(error).split())[:200]
    else:
        if url.scheme not in {"http", "https"}:
            fault = "it does not start with http:// or https://"
        elif ":" not in host and not _HOST_NAME.fullmatch(host):  # httpx has checked IPv6 addresses
            fault = f"{host[:100]!r} is not the name of a host"
        elif url.port is not None and not 0 < url.port < 2**16:
            fault = f"the port {url.port} is not between 1 and 65535"
        else:
            return url
    raise UnusableError(f"not a valid http or https address: {fault}")


def _check_status(answer: httpx.Response) -> None:
    status = answer.status_code
    if status >= 500 or status in _PASSING_STATUSES:
        wait = retry_after(answer.headers.get("Retry-After", ""), datetime.now(UTC))
        raise _TransientError(f"HTTP {status}", wait=wait)
    if not 200 <= status < 300:
        raise UnusableError(f"HTTP {status}")


def _words(error: Exception) -> str:
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    return " ".join(f"{type(error).__name__}: {error}"[:200].split()).removesuffix(":")


def _read_dead(path: Path) -> dict[str, str]:
    """Read the URLs recorded as dead, with reasons. A truncated last line is ended, and its URL is skipped."""
    dead = {}
    lines = path.read_bytes().split(b"\n") if path.exists() else [b""]
    for line in lines:
        try:
            mark = json.loads(line)
            dead[mark["address"]] = mark["reason"]
        except (ValueError, KeyError, TypeError):
            continue
    if lines[-1]:
        with path.open("ab") as file:
            file.write(b"\n")
    return dead
