"""Downloads the images of a data set that holds only their addresses.

The well-kept downloader img2dataset cannot be installed with our lock: its 1.47.0 needs pandas < 3 (we have 3) and
brings wandb, opencv and albumentations; hence this small one on httpx2.

The addresses come from strangers. So each connection is checked to lead to a public machine before anything is sent
over it, proxies of the environment are not used, and time, size and redirects are bounded.

A file that arrived whole and passed the caller's check is kept in the downloads folder as `ab/abcd...`, after the
SHA-256 of its address. An address that failed for good is noted in `dead.jsonl` there; a later run asks for neither.
"""

import asyncio
import hashlib
import ipaddress
import json
import random
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


class UnusableError(Exception):
    """An address that gives no usable file, however often it is asked; raised by the caller's check too.

    Args:
        reason: what is wrong with it.
        for_good: whether that holds under any settings; else a later run asks again.
    """

    def __init__(self, reason: str, for_good: bool = True) -> None:
        super().__init__(reason)
        self.for_good = for_good


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
        self._said = time.monotonic()
        self._loop = asyncio.new_event_loop()
        self._loop.set_default_executor(ThreadPoolExecutor(options.parallel, "resolve"))  # it resolves names
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
            verify=httpx.create_ssl_context(),  # with the environment's certificates, which trust_env would leave out
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
        await self._client.aclose()

    async def _shared(self, address: str) -> Path | Failure:
        task = self._under_way.get(address)
        if task is None:
            task = self._under_way[address] = asyncio.create_task(self._outcome(address))
            task.add_done_callback(lambda _: self._under_way.pop(address, None))
        outcome = await task
        if time.monotonic() - self._said >= progress.SECONDS_BETWEEN_LINES:
            self._said = time.monotonic()
            progress.info(self.report())
        return outcome

    async def _outcome(self, address: str) -> Path | Failure:
        """What there is already of an address, or else what asking for it gives."""
        path = self._path(address)
        try:
            if address in self._dead:
                raise UnusableError(self._dead[address])
            if address in self._failed:
                return Failure(self._failed[address])
            if await self._is_there(path):
                self.counts.there += 1
            else:
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
        """Whether an earlier run got the file. One that a crash of the machine damaged is fetched again."""
        if not path.is_file():
            return False
        try:
            await self._checked(path)
        except UnusableError:
            path.unlink()
            return False
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
        size = 0
        try:
            async with asyncio.timeout(seconds), aclosing(self._parts(address)) as parts:
                with partial.open("wb") as file:
                    async for part in parts:
                        size += len(part)
                        if size > self._options.max_mb * 1e6:
                            raise UnusableError(f"larger than {self._options.max_mb:g} MB", for_good=False)
                        file.write(part)
        except (UnusableError, _PassingError):
            raise
        except TimeoutError:
            raise _PassingError(f"no whole answer within {seconds:g} s", network=True) from None
        except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
            raise UnusableError(f"not a valid http or https address: {_words(error)}") from None
        except Exception as error:  # whatever a stranger's bytes provoke costs this row, not the run
            raise _PassingError(_words(error), network=isinstance(error, httpx.TransportError)) from error

    async def _parts(self, address: str) -> AsyncGenerator[bytes, None]:
        """The bytes at an address, unpacked, as they come, after its redirects.

        httpx would read the body of a redirect to its end, whatever its length; so they are followed here.
        """
        request = self._client.build_request("GET", address, extensions={"trace": self._check_connected})
        for _ in range(MAX_REDIRECTS + 1):
            answer = await self._client.send(request, stream=True)
            try:
                self._check_peer(answer.extensions["network_stream"])  # in case the event below gets another name
                self.counts.answers += 1
                if answer.next_request is None:
                    _check_status(answer)
                    async for part in answer.aiter_bytes():
                        yield part
                    return
                request = answer.next_request
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
        """Refuse a connection to a machine that may not be asked, whatever its name resolved to when."""
        host = stream.get_extra_info("server_addr")[0]
        if not self._options.allow_private and not is_public(host):
            raise UnusableError(f"forbidden: it leads to {host}, which is not on the public internet", for_good=False)

    async def _checked(self, path: Path) -> None:
        await self._loop.run_in_executor(self._pool, lambda: self._check(path.read_bytes()))

    def _path(self, address: str) -> Path:
        name = hashlib.sha256(address.encode("utf-8", "surrogatepass")).hexdigest()
        return self._folder / name[:2] / name

    def _mark_dead(self, address: str, error: UnusableError) -> None:
        if address in self._dead:
            return
        if not error.for_good:
            self._failed[address] = str(error)
            return
        self._dead[address] = str(error)
        with (self._folder / "dead.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"address": address, "reason": str(error)}) + "\n")


def is_public(host: str) -> bool:
    """Whether a machine's address, such as ``10.0.0.1`` or ``fe80::1%eth0``, is on the public internet."""
    ip = ipaddress.ip_address(host.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        # Packets to these end up at an IPv4 address. Those of NAT64 and Teredo are reserved anyway.
        inner = ip.ipv4_mapped or ip.sixtofour
        if inner is not None and not is_public(str(inner)):
            return False
        if ip.is_site_local:
            return False
    return ip.is_global and not ip.is_multicast and not ip.is_reserved


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


def _check_status(answer: httpx.Response) -> None:
    status = answer.status_code
    if status >= 500 or status in _PASSING_STATUSES:
        wait = retry_after(answer.headers.get("Retry-After", ""), datetime.now(UTC))
        raise _PassingError(f"HTTP {status}", wait=wait)
    if not 200 <= status < 300:
        raise UnusableError(f"HTTP {status}")


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:200].removesuffix(": ")


def _read_dead(path: Path) -> dict[str, str]:
    """The addresses noted as dead, with the reason. A line that a kill cut short is ended, and its address left out."""
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
