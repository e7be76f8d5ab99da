"""Files and folders of results: their names, and how one process at a time writes them aside and renames them.

A result replaces nothing but a result of its own kind, or an empty file or folder. What else is there stays, and is an
error before any work begins. So it is where the result is written first, and with its lock.
"""

import errno
import functools
import hashlib
import json
import os
import platform
import re
import shutil
import stat
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout

from conceptshare.io.errors import ConceptshareError, MadeMeanwhileError, OutputError, StoreError
from conceptshare.io.progress import say

PROVENANCE = "provenance.json"
"""The file in a result's folder that says how it came about."""

_SECONDS_BETWEEN_TRIES = 1.0
_ENOTSUPP = 524  # of the Linux kernel, which some network file systems let through
# What a file system answers that has no locks, and one that cannot sync a file or a folder.
_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL, errno.ENOTTY, _ENOTSUPP}
_NO_SYNC = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL, errno.EBADF, errno.EACCES, _ENOTSUPP}
# Syncs at the same time share the commits of a file system's journal.
_SYNCS_AT_ONCE = 16


class Kind(NamedTuple):
    """A kind of result, and how one is told from anything else that has its name."""

    what: str
    """Its name in messages, such as ``"a CSV file"``."""
    files: str | None = None
    """For a folder, a regular expression that matches the relative path of each file in it; None for a file."""
    suffix: str = ""
    """For a file, how its name ends."""
    magic: bytes = b""
    """For a file, how it begins, from the first byte that is written on."""
    unfinished: str = ""
    """For a folder, as ``files``, what else is in it while it is made; files that end in ``.partial`` always may be."""
    is_one: Callable[[Path], bool] = lambda _: True
    """Whether its content is that of a result; called for what is not empty and has the right names in it."""


def _begins(path: Path, magic: bytes) -> bool:
    """Whether a file begins so, as far as it goes."""
    with path.open("rb") as file:
        return magic.startswith(file.read(len(magic)))


def _end_of(path: Path) -> bytes:
    """The last KiB of a file, which may have a million rows before it; nothing if it is missing."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 1024))
            return file.read()
    except OSError:
        return b""


def _is_of_pages(script: Path) -> bool:
    return script.is_file() and b"conceptshare" in script.read_bytes()


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; an empty one where it is missing or damaged."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


_SAE_FILES = r"(sae_weights\.safetensors|(cfg|metrics|manifest)\.json|(loss|density)\.csv|provenance\.json)"
FILE = Kind("a new result")
"""Replaces a file, or nothing."""
CSV = Kind("a CSV file", suffix=".csv")
PARQUET = Kind("a Parquet file", suffix=".parquet", magic=b"PAR1")
PNG = Kind("a PNG file", suffix=".png", magic=b"\x89PNG")
PDF = Kind("a PDF file", suffix=".pdf", magic=b"%PDF")
ACCOUNT = Kind(
    "a provenance record", suffix=".json", magic=b"{", is_one=lambda path: "conceptshare" in read_object(path)
)
ACCOUNT_BESIDE = ACCOUNT._replace(suffix=f".{PROVENANCE}")
ACCOUNT_PAGE = Kind(
    "a provenance page",
    suffix=".html",
    magic=b"<!doctype html>",
    is_one=lambda path: b"conceptshare" in path.read_bytes(),
)
STUDY = Kind(
    "a resolved study",
    suffix=".json",
    magic=b"{",
    is_one=lambda path: {"study", "encoders", "analyses"} <= read_object(path).keys(),
)
WEIGHTS = Kind("a record of weights", suffix=".json", magic=b"{", is_one=lambda path: "location" in read_object(path))
MODEL = Kind(
    "a model",
    r".*",
    is_one=lambda path: any((path / name).is_file() for name in ("config.json", "open_clip_config.json")),
)
DATASET = Kind(
    "a data set",
    r"samples\.arrow|manifest\.json",
    unfinished="as-read|dropped",
    is_one=lambda path: b'"content_hash"' in _end_of(path / "manifest.json"),
)
SAE = Kind("an SAE", _SAE_FILES, is_one=lambda path: "d_sae" in read_object(path / "cfg.json"))
SAES = Kind("a folder of SAEs", rf"layer-\d+/seed-\d+/{_SAE_FILES}")
SPARSIFY = Kind(
    "an SAE of sparsify's",
    r"sae\.safetensors|cfg\.json",
    is_one=lambda path: "num_latents" in read_object(path / "cfg.json"),
)
CHECKPOINTS = Kind("a folder of checkpoints", r"of\.json|(partial|\d+)/(state|.+\.safetensors)")
EXAMPLES = Kind("a folder of examples", r"(samples|layer-\d+)\.parquet|manifest\.json")
MATRICES = Kind("a folder of matrices", r"(pooled|layer_mean|last|averages|table-3)\.(csv|md|tex)")
LOCK = Kind("a lock", magic=b'{"who": ')
SAE_FIGURES = Kind("a folder of figures of SAEs", r"[^/]+@\d+\.png")
SAMPLE_PAGES = Kind("a folder of samples for pages", r"\d+\.js|\d+/\d+\.webp")
MEMBER_PAGES = Kind("a folder of features for pages", r"layer-\d+\.js|layer-\d+/(maps-)?\d+\.js")
PAIR_PAGES = Kind("a folder of matches for pages", r"layer-\d+\.js")
SITE = Kind(
    "a site of features",
    r"index\.html|style\.css|app\.js|study\.js|(data|samples)/.+",
    is_one=lambda path: not any(path.glob("*.*")) or _is_of_pages(path / "app.js"),
)


def store_kind(*names: str) -> Kind:
    """A kind of Zarr store, such as ``"activations"``; of more than one name, any of these."""
    return Kind(
        f"a store of {' or '.join(names)}",
        r"(.+/)?zarr\.json|.+/c(/\d+)*",
        unfinished=r"progress\.npz",
        is_one=lambda path: (read_object(path / "zarr.json").get("attributes") or {}).get("kind") in names,
    )


def check_replaceable(path: Path, kind: Kind) -> None:
    """Make sure that a result at ``path`` would replace nothing but a result of its kind.

    Raises:
        OutputError: where something else is there, or ``path`` cannot be replaced.
    """
    if path.name in ("", ".."):
        raise OutputError(f"{path}: a folder that cannot be replaced; name {kind.what} in it")
    if not path.name.endswith(kind.suffix):
        raise OutputError(f"{path}: {kind.what} is to be written there; choose a name that ends in {kind.suffix}")
    for parent in path.absolute().parents:
        if os.path.lexists(parent):
            if not parent.is_dir():
                raise OutputError(f"{path}: {parent} is no folder; choose another place")
            break
    real = path.absolute().parent.resolve() / path.name
    if any(real in (place, *place.parents) for place in (Path.cwd(), Path("~").expanduser().resolve())):
        raise OutputError(f"{path}: the working directory or the home folder is there; name {kind.what} in it")
    if os.path.lexists(path):
        found = _other_than(path, kind)
        if found:
            raise OutputError(
                f"{path}: {found}, which {kind.what} is not to replace; choose another name, or move it away"
            )


def _check_unfinished(path: Path, kind: Kind) -> None:
    """Make sure that nothing is at ``path`` but what an attempt at a result of a kind left there.

    Raises:
        OutputError: where something else is.
    """
    names = rf"{kind.files}|{kind.unfinished}|(.+/)?[^/]+\.partial"
    begun = kind._replace(files=kind.files and names, is_one=lambda _: True)
    if os.path.lexists(path) and (found := _other_than(path, begun)):
        raise OutputError(f"{path}: {found}, where {kind.what} is to be written first; move it away")


def _other_than(path: Path, kind: Kind) -> str | None:
    """What is at ``path`` that is no result of a kind, in words; None where such a result is there, or nothing."""
    mode = path.lstat().st_mode
    if stat.S_ISLNK(mode):
        return f"a link to {path.readlink()}"
    if kind.files is None:
        if not stat.S_ISREG(mode):
            return "a folder" if stat.S_ISDIR(mode) else "no regular file"
        is_one = not path.stat().st_size or (_begins(path, kind.magic) and kind.is_one(path))
        return None if is_one else "another file"
    if not stat.S_ISDIR(mode):
        return "a file"
    if path.is_mount():
        return "a mounted file system"
    files = _files_in(path)
    first = next(files, None)
    if first is None:
        return None
    other = next((name for name in (first, *files) if not re.fullmatch(kind.files, name)), None)
    if other is not None:
        return f"a folder with {other} in it"
    return None if kind.is_one(path) else f"a folder with {first} in it"


def _files_in(folder: Path) -> Iterator[str]:
    """The files below a folder by relative path, but for hidden ones and those that tell how a result came about."""
    for place, folders, names in os.walk(folder, onerror=_raise):
        links = [name for name in folders if Path(place, name).is_symlink()]
        for name in (*links, *names):
            path = Path(place, name).relative_to(folder).as_posix()
            if path != PROVENANCE and not name.startswith((".nfs", ".snakemake_timestamp")):
                yield path


def _raise(error: OSError) -> None:
    raise error


@contextmanager
def written_aside(path: Path, kind: Kind = FILE, resume: bool = False, key: str | None = None) -> Iterator[Path]:
    """Give a path beside ``path`` to write a file or folder at, and rename it to ``path`` if all went well.

    Where the body raises, what it wrote is removed; where the process is killed, what it wrote keeps the suffix
    ``.partial`` and is removed by the next attempt. With ``resume``, the next attempt finds it instead, and only an
    error that would come again (a ConceptshareError) removes it.

    One process at a time makes ``path``; others wait. So a job that goes on after its Snakemake was killed and the job
    that is then submitted anew both end well.

    Args:
        path: the result.
        kind: what it is, and may replace.
        resume: whether to go on with what an attempt that was killed left.
        key: everything that the result depends on, but for the library's code.

    Raises:
        OutputError: where something is at ``path`` that is no result of that kind, or where it is written first.
        MadeMeanwhileError: where the process that this one had to wait for made it, with the same ``key``.
    """
    check_replaceable(path, kind)
    _make_folder(path.parent)
    with alone(path) as lock:
        lock.begin(key)
        with renamed(path, kind, resume) as partial:
            yield partial


@contextmanager
def renamed(path: Path, kind: Kind = FILE, resume: bool = False) -> Iterator[Path]:
    """As `written_aside`, where no other process can be making ``path``."""
    check_replaceable(path, kind)
    partial, replaced = (path.with_name(path.name + suffix) for suffix in (".partial", ".replaced.partial"))
    for left in (partial, replaced):
        _check_unfinished(left, kind)
    if not resume:
        remove(partial)
    remove(replaced)
    try:
        yield partial
        # The next attempt has to know its own result again. Only a `MODEL` is written by others' code.
        if kind is not FILE and (found := _other_than(partial, kind)):
            raise OutputError(f"{partial}: {found} was written, and not {kind.what}; correct what writes it")
        _sync(partial)
    except BaseException as error:
        if not resume or isinstance(error, ConceptshareError):
            with suppress(OSError):  # Zarr's threads may still write into it; the next attempt removes what they leave
                remove(partial)
        raise
    try:
        check_replaceable(path, kind)
    except OutputError as error:
        raise OutputError(f"{error}; what was made is at {partial}") from None
    if path.is_dir():  # which is removed bit by bit, and looks whole until then
        path.rename(replaced)
    partial.rename(path)
    _sync_one(path.parent)
    with suppress(OSError):  # NFS keeps what is still open; the next attempt removes it
        remove(replaced)


class Unchanged:
    """Notices that results which another is made from are replaced while it is made.

    What they are is noted when this is made, before anything is read. As a context, it compares at the beginning, which
    may come after a wait, and at the end, before the result gets its name.
    """

    def __init__(self, *inputs: Path) -> None:
        self._noted = {path: _contents(path) for path in inputs}

    def __enter__(self) -> None:
        self._compare(None)

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is None or isinstance(error, Exception):
            self._compare(error)

    def _compare(self, error: BaseException | None) -> None:
        for path, noted in self._noted.items():
            if _contents(path) != noted:
                raise StoreError(f"{path}: replaced by another process while it was read; run again") from error


class Lock:
    """What this process holds of a result's lock, and whom it waited for."""

    def __init__(self, path: Path) -> None:
        self._path, self._file = path, path.with_name(f".{path.name}.lock")
        self._lock = FileLock(self._file, mode=0o666, poll_interval=_SECONDS_BETWEEN_TRIES, on_acquired=self._signed)
        self._before, self._other = _identity(path), dict[str, Any]()
        self._key: str | None = None

    def acquire(self) -> None:
        """Wait until no other process makes the result, on any machine that sees the file system's locks.

        Raises:
            OutputError: where something else has the lock's name.
        """
        with suppress(FileNotFoundError):  # released meanwhile
            _check_unfinished(self._file, LOCK)
        waiting = False
        while not self._lock.is_locked:
            try:
                self._lock.acquire(timeout=_SECONDS_BETWEEN_TRIES if waiting else 0)
            except Timeout:
                holder = read_object(self._file)  # nothing where it is just being written
                if not waiting or holder.get("who") != self._other.get("who"):
                    say(
                        f"{self._path}: waiting for {holder.get('who', 'another process')}, which is making it; to "
                        f"make it here in its place, end that one"
                    )
                self._other, waiting = holder, True
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
                say(f"{self._path}: no file locks here ({error.strerror}); make sure that no other job makes it")
                return

    def begin(self, key: str | None) -> None:
        """Let who waits for this process know what it makes.

        Raises:
            MadeMeanwhileError: where the one that this process waited for made the same.
        """
        made = _identity(self._path) not in (None, self._before)
        if key is not None and made and (self._other.get("key"), self._other.get("code")) == (key, _code()):
            raise MadeMeanwhileError(f"{self._path}: made by {self._other['who']} meanwhile")
        self._key = key
        if self._lock.is_locked:
            with self._file.open("r+b") as file:
                self._signed(file.fileno())

    def release(self) -> None:
        """Let others make the result."""
        self._file.unlink(missing_ok=True)
        self._lock.release()

    def _signed(self, place: int) -> None:
        """Write who holds the lock into its file."""
        who = f"process {os.getpid()} on {platform.node()}"
        if job := os.getenv("SLURM_JOB_ID"):
            who += f" (Slurm job {job})"
        os.ftruncate(place, 0)
        os.pwrite(place, json.dumps({"who": who, "key": self._key, "code": _code()}).encode(), 0)


@functools.cache
def _code() -> str:
    """Tells this state of the library's code from others."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


_held: dict[Path, Lock] = {}


@contextmanager
def alone(path: Path) -> Iterator[Lock]:
    """Be the one process that makes ``path``; where this process is that already, there is nothing to wait for.

    A command is so from its beginning: a job that was started earlier never replaces what a later one made.
    """
    place = path.absolute()
    if place in _held:
        yield _held[place]
        return
    lock = Lock(path)
    lock.acquire()
    _held[place] = lock
    try:
        yield lock
    finally:
        del _held[place]
        lock.release()


def _identity(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def _contents(path: Path) -> Any:
    """What tells a result from another of its name: itself, or the files right in its folder."""
    if not path.is_dir():
        return _identity(path)
    files = (file for file in path.iterdir() if file.name != PROVENANCE and not file.name.startswith("."))
    return {file.name: _identity(file) for file in files if not file.is_dir()}


def _make_folder(folder: Path) -> None:
    """Make a folder, and those that it is in, so that they outlive a power cut."""
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for place in missing:
        _sync_one(place.parent)


def _sync(path: Path) -> None:
    """Have the disk hold a file, or all of a folder: a name must not outlive a power cut without its content."""
    places = [path]
    if path.is_dir():
        places += [Path(place, name) for place, folders, names in os.walk(path) for name in (*folders, *names)]
    with ThreadPoolExecutor(_SYNCS_AT_ONCE) as pool:
        for _ in pool.map(_sync_one, reversed(places)):
            pass


def _sync_one(path: Path) -> None:
    try:
        opened = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except (FileNotFoundError, PermissionError):  # removed meanwhile, as NFS does, or another's
        return
    try:
        os.fsync(opened)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise
    finally:
        os.close(opened)


def remove(path: Path) -> None:
    """Remove a file, or a folder with all that is in it; what is not there is no error."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
