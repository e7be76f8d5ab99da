"""Downloads the images of a data set that holds only their addresses.

The well-kept downloader img2dataset cannot be installed beside our lock: its 1.47.0 needs pandas < 3 (we have 3) and
brings wandb, opencv and albumentations; hence this small one on httpx2.

The addresses come from strangers. So nothing but public machines is asked (the check is made on the very address that
a socket connects to), proxies of the environment are not used, and time, size and redirects are bounded.

A file that arrived whole and passed the caller's check is kept in the downloads folder as `ab/abcd...`, after the
SHA-256 of its address. An address that failed for good is noted in `dead.jsonl` there; a later run asks for neither.
"""

import asyncio
import hashlib
import ipaddress
import json
import random
import socket
import ssl
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpcore2
import httpx2 as httpx

from conceptshare.config.catalog import Download
from conceptshare.io import progress

MAX_REDIRECTS = 5
"""How many redirects of one address are followed."""
TRY_TIMEOUTS = 6
"""How many time-outs one try of one address may take as a whole."""
FIRST_PAUSE = 0.5
"""Seconds before the second try, about; each later pause is twice as long."""
LONGEST_PAUSE = 30.0
"""Seconds that a pause lasts at most, whatever the server's Retry-After asks for."""
HOPELESS = 200
"""After so many addresses, all of which failed for the network's sake, the connection must be broken."""

_PASSING_STATUSES = {408, 425, 429}
_REDIRECTS = {301, 302, 303, 307, 308}
_NETWORK_ERRORS = (
    httpcore2.TimeoutException,
    httpcore2.NetworkError,
    httpcore2.ProtocolError,
    ssl.SSLError,
    ConnectionError,
    socket.gaierror,
)


class UnusableError(Exception):
    """An address that gives no usable file, however often it is asked; raised by the caller's check too.

    Args:
        reason: what is wrong with it.
        under: the settings that the verdict depends on, by name; under others, the address is asked again.
    """

    def __init__(self, reason: str, **under: Any) -> None:
        super().__init__(reason)
        self.under = under


@dataclass(frozen=True)
class Failure:
    """An address that gave no usable file, and why."""

    reason: str


@dataclass
class Counts:
    """What became of the addresses so far."""

    fetched: int = 0
    """Asked for, and got."""
    there: int = 0
    """Got by an earlier run."""
    dead: int = 0
    """Failed for good, now or in an earlier run."""
    passing: int = 0
    """Failed for a reason that may pass; a later run asks again."""
    answers: int = 0
    """Answers of any kind that a server gave in this run."""
    unreachable: int = 0
    """Of the passing failures, those for the network's sake: no connection, no answer in time, or one cut short."""


class _PassingError(Exception):
    """A try that failed for a reason that may pass.

    Args:
        reason: what went wrong.
        network: whether no server answered in full.
        wait: seconds that the server asks to wait.
    """

    def __init__(self, reason: str, network: bool = False, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.network = network
        self.wait = wait


class Downloads:
    """Downloads files by address, many at once, from an event loop in a thread of its own.

    Args:
        folder: where files and `dead.jsonl` are kept; made if absent.
        options: how to download.
        check: is given each file's bytes, and raises UnusableError where they are of no use. Runs in ``pool``.
        pool: runs the checks.
        settings: the caller's settings that a verdict of ``check`` may depend on.
        what: the data set's name, for progress.
    """

    def __init__(
        self,
        folder: Path,
        options: Download,
        check: Callable[[bytes], None],
        pool: Executor,
        settings: dict[str, Any],
        what: str,
    ) -> None:
        self.counts = Counts()
        self.last_failure = ""
        self._folder = folder
        self._options = options
        self._check = check
        self._pool = pool
        self._what = what
        folder.mkdir(parents=True, exist_ok=True)
        settings = settings | options.model_dump(include={"max_mb", "allow_private"})
        self._dead = _read_dead(folder / "dead.jsonl", settings)
        self._failed: dict[str, str] = {}
        self._under_way: dict[str, asyncio.Task[Path | Failure]] = {}
        self._said = time.monotonic()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="downloads", daemon=True)
        self._resolvers = ThreadPoolExecutor(options.parallel, "resolve")
        self._slots = asyncio.Semaphore(options.parallel)
        self._connections = httpcore2.AsyncConnectionPool(
            ssl_context=httpx.create_ssl_context(),
            max_connections=None,
            max_keepalive_connections=options.parallel,
            keepalive_expiry=5.0,
            network_backend=_CheckedNetwork(self._resolvers, options.allow_private),
        )

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._resolvers.shutdown(wait=False, cancel_futures=True)

    def fetch(self, address: str) -> "Future[Path | Failure]":
        """The file of an address, soon: its path, or why there is none. An address under way is not asked twice."""
        return asyncio.run_coroutine_threadsafe(self._shared(address), self._loop)

    def all_unreachable(self) -> bool:
        """Whether no server answered at all, and no file is there from an earlier run."""
        return self.counts.unreachable > 0 and self.counts.answers == 0 and self.counts.there == 0

    def report(self) -> str:
        """What became of the addresses so far, in words."""
        counts = self.counts
        return (
            f"{self._what}: images: {counts.fetched:,} fetched, {counts.there:,} were there, "
            f"{counts.dead + counts.passing:,} failed ({counts.passing:,} for a reason that may pass)"
        )

    async def _close(self) -> None:
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._connections.aclose()

    async def _shared(self, address: str) -> Path | Failure:
        task = self._under_way.get(address)
        if task is None:
            task = self._under_way[address] = asyncio.create_task(self._outcome(address))
            task.add_done_callback(lambda _: self._under_way.pop(address, None))
        outcome = await task
        self._report_now_and_then()
        return outcome

    async def _outcome(self, address: str) -> Path | Failure:
        """What there is already of an address, or else what asking for it gives."""
        path = self._path(address)
        try:
            if address in self._dead:
                raise UnusableError(self._dead[address])
            if address in self._failed:
                return Failure(self._failed[address])
            if not await self._is_there(path):
                await self._ask(address, path)
                self.counts.fetched += 1
        except UnusableError as error:
            self.counts.dead += 1
            self._mark_dead(address, error)
            return Failure(str(error))
        except _PassingError as error:
            self.counts.passing += 1
            self.counts.unreachable += error.network
            self._failed[address] = self.last_failure = str(error)
            return Failure(str(error))
        return path

    async def _is_there(self, path: Path) -> bool:
        """Whether an earlier run got the file. One that a crash of the machine damaged is fetched again.

        Raises:
            UnusableError: where the file is whole, and another setting than then makes it unusable.
        """
        if not path.is_file():
            return False
        try:
            await self._checked(path)
        except UnusableError as error:
            path.unlink()
            if error.under:
                raise
            return False
        self.counts.there += 1
        return True

    async def _ask(self, address: str, path: Path) -> None:
        """Get a file, in as many tries as it may take.

        Raises:
            UnusableError: where that failed for good.
            _PassingError: where it failed in the last try for a reason that may pass.
        """
        partial = path.with_name(path.name + ".partial")
        path.parent.mkdir(exist_ok=True)
        try:
            for tried in range(1, self._options.attempts + 1):
                try:
                    async with self._slots:
                        await self._try(address, partial)
                    break
                except _PassingError as error:
                    if tried == self._options.attempts:
                        raise
                    await asyncio.sleep(pause(tried, error.wait))
            await self._checked(partial)
            partial.rename(path)
        finally:
            partial.unlink(missing_ok=True)

    async def _try(self, address: str, partial: Path) -> None:
        seconds = TRY_TIMEOUTS * self._options.timeout
        limit = int(self._options.max_mb * 1e6)
        size = 0
        try:
            async with asyncio.timeout(seconds), aclosing(self._parts(address, limit)) as parts:
                with partial.open("wb") as file:
                    async for part in parts:
                        size += len(part)
                        if size > limit:
                            raise _too_large(self._options)
                        file.write(part)
        except TimeoutError:
            raise _PassingError(f"no whole answer within {seconds:g} s", network=True) from None

    async def _parts(self, address: str, limit: int) -> AsyncGenerator[bytes, None]:
        """The bytes at an address, unpacked, as they come, after its redirects."""
        url = _web_address(address)
        for _ in range(MAX_REDIRECTS + 1):
            try:
                async with self._connections.stream(
                    "GET", _core(url), headers=_HEADERS, extensions={"timeout": _timeouts(self._options)}
                ) as answer:
                    self.counts.answers += 1
                    headers = httpx.Headers(answer.headers)
                    if answer.status not in _REDIRECTS:
                        _check_status(answer.status, headers)
                        if _announced(headers) > limit:
                            raise _too_large(self._options)
                        # Of RFC 9110's names of gzip, httpx knows one.
                        headers["Content-Encoding"] = (
                            headers.get("Content-Encoding", "").lower().replace("x-gzip", "gzip")
                        )
                        unpacked = httpx.Response(answer.status, headers=headers, stream=_Body(answer))
                        async for part in unpacked.aiter_bytes():
                            yield part
                        return
                    url = _redirected(answer.status, headers, url)
            except (_PassingError, UnusableError):
                raise
            except _NETWORK_ERRORS as error:
                raise _PassingError(_words(error), network=True) from error
            except Exception as error:  # whatever else a stranger's bytes provoke costs this row, not the run
                raise _PassingError(_words(error)) from error
        raise UnusableError(f"more than {MAX_REDIRECTS} redirects")

    async def _checked(self, path: Path) -> None:
        await self._loop.run_in_executor(self._pool, lambda: self._check(path.read_bytes()))

    def _path(self, address: str) -> Path:
        name = hashlib.sha256(address.encode("utf-8", "surrogatepass")).hexdigest()
        return self._folder / name[:2] / name

    def _mark_dead(self, address: str, error: UnusableError) -> None:
        if address in self._dead:
            return
        self._dead[address] = str(error)
        mark = {"address": address, "reason": str(error)} | ({"under": error.under} if error.under else {})
        with (self._folder / "dead.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(mark) + "\n")

    def _report_now_and_then(self) -> None:
        if time.monotonic() - self._said >= progress.SECONDS_BETWEEN_LINES:
            self._said = time.monotonic()
            progress.info(self.report())


def refusal(host: str) -> str | None:
    """Why a machine's address, such as ``10.0.0.1`` or ``fe80::1%eth0``, is not on the public internet; or None."""
    ip = ipaddress.ip_address(host.partition("%")[0])
    if any(refusal(str(inner)) for inner in _embedded(ip)):
        return f"{host}, which stands for a machine that is not on the public internet"
    if not ip.is_global or ip.is_multicast or ip.is_reserved or getattr(ip, "is_site_local", False):
        return f"{host}, which is not on the public internet"
    return None


def pause(tried: int, wait: float) -> float:
    """Seconds to wait after so many tries: twice as long each time, give or take half, so that tries spread out.

    Args:
        tried: how many tries there were.
        wait: seconds that the server asks for; no less is waited, up to LONGEST_PAUSE.
    """
    grown: float = FIRST_PAUSE * 2 ** (tried - 1) * random.uniform(0.5, 1.5)
    return min(max(grown, wait), LONGEST_PAUSE)


def retry_after(value: str, now: datetime) -> float:
    """Seconds to wait by a Retry-After header: a number of seconds, or a date; 0 where it is neither."""
    try:
        if value.strip().isdigit():
            return float(value)
        return max(0.0, (parsedate_to_datetime(value) - now).total_seconds())
    except (ValueError, TypeError, OverflowError):
        return 0.0


@dataclass(frozen=True)
class _Body(httpx.AsyncByteStream):
    """An answer's body, for httpx to unpack."""

    answer: httpcore2.Response

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for part in self.answer.aiter_stream():
            yield part


@dataclass
class _CheckedNetwork(httpcore2.AsyncNetworkBackend):
    """Connects to public machines only.

    It resolves a host's name itself and connects to what it checked: were the name resolved again to connect, its
    owner could answer otherwise the second time. TLS is still verified against the name.
    """

    resolvers: Executor
    allow_private: bool
    plain: httpcore2.AsyncNetworkBackend = field(default_factory=httpcore2.AnyIOBackend)

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore2.AsyncNetworkStream:
        """Connect to the first of a host's addresses that answers, if all of them may be asked."""
        try:
            async with asyncio.timeout(timeout):
                addresses = await self._resolve(host, port)
        except TimeoutError:
            raise httpcore2.ConnectTimeout(f"the name {host} was not resolved within {timeout:g} s") from None
        why = None if self.allow_private else next(filter(None, map(refusal, addresses)), None)
        if why is not None:
            raise UnusableError(f"forbidden: {host} leads to {why}", allow_private=False)
        for address in addresses[:-1]:
            try:
                return await self.plain.connect_tcp(address, port, timeout, local_address, socket_options)
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout):
                continue
        return await self.plain.connect_tcp(addresses[-1], port, timeout, local_address, socket_options)

    async def _resolve(self, host: str, port: int) -> list[str]:
        def resolve() -> list[str]:
            return [str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]

        try:
            return await asyncio.get_running_loop().run_in_executor(self.resolvers, resolve)
        except UnicodeError:
            raise UnusableError(f"not a valid host name: {host}") from None


_HEADERS = [
    ("User-Agent", f"conceptshare/{version('conceptshare')} (research on image-caption data sets)"),
    ("Accept", "image/*,*/*;q=0.5"),
    ("Accept-Encoding", "gzip, deflate"),
]


def _web_address(address: str, base: httpx.URL | None = None) -> httpx.URL:
    """An address, parsed; one in a redirect may be relative to where it was found.

    Raises:
        UnusableError: where it is none, or not one of http or https.
    """
    try:
        url = httpx.URL(address.strip()) if base is None else base.join(address)
    except (httpx.InvalidURL, ValueError) as error:
        raise UnusableError(f"not a valid address: {error}") from None
    if url.scheme not in {"http", "https"}:
        raise UnusableError(f"forbidden: not an http or https address: {str(url)[:_SHOWN]!r}")
    if not url.raw_host:
        raise UnusableError(f"not a valid address: it names no host: {str(url)[:_SHOWN]!r}")
    if url.port is not None and not 0 < url.port < 2**16:
        raise UnusableError(f"not a valid address: it has no port {url.port}")
    return url


def _redirected(status: int, headers: httpx.Headers, url: httpx.URL) -> httpx.URL:
    if "Location" not in headers:
        raise UnusableError(f"HTTP {status} without a location")
    return _web_address(headers["Location"], url)


_SHOWN = 200  # characters of a stranger's text in a message


def _core(url: httpx.URL) -> httpcore2.URL:
    return httpcore2.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path)


def _timeouts(options: Download) -> dict[str, float]:
    return dict.fromkeys(("connect", "read", "write", "pool"), options.timeout)


def _check_status(status: int, headers: httpx.Headers) -> None:
    if status >= 500 or status in _PASSING_STATUSES:
        raise _PassingError(f"HTTP {status}", wait=retry_after(headers.get("Retry-After", ""), datetime.now(UTC)))
    if not 200 <= status < 300:
        raise UnusableError(f"HTTP {status}")


def _announced(headers: httpx.Headers) -> int:
    """The size in bytes that an answer says it has, or 0."""
    length = headers.get("Content-Length", "")
    return int(length) if length.isdigit() else 0


def _too_large(options: Download) -> UnusableError:
    return UnusableError(f"larger than {options.max_mb:g} MB", max_mb=options.max_mb)


def _embedded(ip: ipaddress.IPv4Address | ipaddress.IPv6Address) -> list[ipaddress.IPv4Address]:
    """The IPv4 addresses that packets to an IPv6 address end up at; those of NAT64 and Teredo are reserved anyway."""
    if isinstance(ip, ipaddress.IPv4Address):
        return []
    return [inner for inner in (ip.ipv4_mapped, ip.sixtofour) if inner is not None]


def _words(error: Exception) -> str:
    while isinstance(error, ExceptionGroup):  # of the tasks that open a connection
        error = error.exceptions[0]
    return f"{type(error).__name__}: {error}"[:_SHOWN].removesuffix(": ")


def _read_dead(path: Path, settings: dict[str, Any]) -> dict[str, str]:
    """The addresses noted as dead, under the present settings, with the reason; a line torn by a kill is mended."""
    dead = {}
    lines = path.read_bytes().split(b"\n") if path.exists() else [b""]
    for line in lines:
        try:
            mark = json.loads(line)
            if all(settings.get(name) == value for name, value in mark.get("under", {}).items()):
                dead[mark["address"]] = mark["reason"]
        except (ValueError, KeyError, TypeError, AttributeError):
            continue  # the torn line: its address is asked again
    if lines[-1]:
        with path.open("ab") as file:
            file.write(b"\n")
    return dead
