"""Atomic writes of files and folders: one process at a time writes a result to a temporary path and renames it.

A result only replaces a result of the same kind, or an empty file or folder. Anything else at its path is kept and
raises an error before any work starts; the same holds for the temporary path and the lock file.
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

from conceptshare.io.errors import AlreadyMadeError, ConceptshareError, OutputError, StoreError
from conceptshare.io.progress import info

PROVENANCE = "provenance.json"
"""Name of the provenance record in a result's folder."""

_SECONDS_BETWEEN_TRIES = 1.0
_ENOTSUPP = 524  # internal to the Linux kernel, but some network file systems return it
# Errors of file systems without locks, and of those that cannot sync a file or a folder.
_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL, errno.ENOTTY, _ENOTSUPP}
_NO_SYNC = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL, errno.EBADF, errno.EACCES, _ENOTSUPP}
# Concurrent syncs share the commits of a file system's journal.
_SYNCS_AT_ONCE = 16


class Kind(NamedTuple):
    """A kind of result, and how to distinguish it from other files and folders."""

    label: str
    """Its name in messages, such as ``"a CSV file"``."""
    files: str | None = None
    """For a folder, a regular expression that matches the relative path of each file in it; None for a file."""
    suffix: str = ""
    """For a file, the end of its name."""
    magic: bytes = b""
    """For a file, its first bytes; a partially written file may be shorter."""
    unfinished: str = ""
    """For a folder, like ``files``, for additional files while it is written; ``.partial`` files are always allowed."""
    is_valid: Callable[[Path], bool] = lambda _: True
    """Whether the content is that of a result; only called if it is not empty and its names match."""


def _begins(path: Path, magic: bytes) -> bool:
    """Whether a file starts with ``magic``, or with part of it if the file is shorter."""
    with path.open("rb") as file:
        return magic.startswith(file.read(len(magic)))


def _is_site_script(script: Path) -> bool:
    return script.is_file() and b"conceptshare" in script.read_bytes()


def read_object(path: Path) -> dict[str, Any]:
    """Read the object in a JSON file; an empty one if the file is missing or damaged."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


_SAE_FILES = r"(sae_weights\.safetensors|(cfg|metrics|manifest)\.json|(loss|density)\.csv|provenance\.json)"
FILE = Kind("a new result")
"""Any file; it may replace any other file."""
CSV = Kind("a CSV file", suffix=".csv")
PARQUET = Kind("a Parquet file", suffix=".parquet", magic=b"PAR1")
PNG = Kind("a PNG file", suffix=".png", magic=b"\x89PNG")
PDF = Kind("a PDF file", suffix=".pdf", magic=b"%PDF")
ZIP = Kind("a zip", suffix=".zip", magic=b"PK")
PROVENANCE_RECORD = Kind(
    "a provenance record", suffix=".json", magic=b"{", is_valid=lambda path: "conceptshare" in read_object(path)
)
PROVENANCE_SIDECAR = PROVENANCE_RECORD._replace(suffix=f".{PROVENANCE}")
STUDY = Kind(
    "a resolved study",
    suffix=".json",
    magic=b"{",
    is_valid=lambda path: {"study", "encoders", "analyses"} <= read_object(path).keys(),
)
WEIGHTS = Kind("a record of weights", suffix=".json", magic=b"{", is_valid=lambda path: "location" in read_object(path))
MODEL = Kind(
    "a model",
    r".*",
    is_valid=lambda path: any((path / name).is_file() for name in ("config.json", "open_clip_config.json")),
)
DATASET = Kind(
    "a data set",
    r"samples\.arrow|dropped\.jsonl|manifest\.json",
    unfinished="as-read",
    is_valid=lambda path: "content_hash" in read_object(path / "manifest.json"),
)
SAE_FOLDER = Kind("an SAE", _SAE_FILES, is_valid=lambda path: "d_sae" in read_object(path / "cfg.json"))
SAES = Kind("a folder of SAEs", rf"layer-\d+/seed-\d+/{_SAE_FILES}")
SPARSIFY_FOLDER = Kind(
    "an SAE in sparsify's format",
    r"sae\.safetensors|cfg\.json",
    is_valid=lambda path: "num_latents" in read_object(path / "cfg.json"),
)
CHECKPOINTS = Kind("a folder of checkpoints", r"of\.json|(partial|\d+)/(state|.+\.safetensors)")
EXAMPLES = Kind("a folder of examples", r"(samples|layer-\d+)\.parquet|manifest\.json")
MATRICES = Kind("a folder of matrices", r"(pooled|layer_mean|last|averages|table-3)\.(csv|md|tex)")
LOCK = Kind("a lock", magic=b'{"who": ')
SAE_FIGURES = Kind("a folder of figures of SAEs", r"[^/]+@\d+\.png")
SAMPLE_PAGES = Kind("a folder of samples for pages", r"\d+\.js|\d+/\d+\.webp")
MEMBER_PAGES = Kind("a folder of features for pages", r"(layer-\d+|samples)\.js|(layer-\d+/(maps-)?|samples/)\d+\.js")
PAIR_PAGES = Kind("a folder of matches for pages", r"layer-\d+\.js")
SITE = Kind(
    "a site of features",
    r"index\.html|style\.css|app\.js|study\.js|(data|samples)/.+",
    is_valid=lambda path: not any(path.glob("*.*")) or _is_site_script(path / "app.js"),
)


RELEASE = Kind(
    "a folder to publish",
    r"README\.md|(saes|features|names)/.+",
    is_valid=lambda path: "conceptshare" in read_object(path / PROVENANCE),
)


def store_kind(*names: str) -> Kind:
    """A kind of Zarr store, such as ``"activations"``; with several names, any of these kinds."""
    return Kind(
        f"a store of {' or '.join(names)}",
        r"(.+/)?zarr\.json|.+/c(/\d+)*",
        unfinished=r"progress\.npz",
        is_valid=lambda path: (read_object(path / "zarr.json").get("attributes") or {}).get("kind") in names,
    )


def check_replaceable(path: Path, kind: Kind) -> None:
    """Make sure that a result written to ``path`` would only replace a result of the same kind.

    Raises:
        OutputError: if something else is there, or ``path`` cannot be replaced.
    """
    if path.name in ("", ".."):
        raise OutputError(f"{path}: this folder cannot be replaced; name {kind.label} in it")
    if not path.name.endswith(kind.suffix):
        raise OutputError(f"{path}: the output is {kind.label}; choose a name that ends in {kind.suffix}")
    for parent in path.absolute().parents:
        if os.path.lexists(parent):
            if not parent.is_dir():
                raise OutputError(f"{path}: {parent} is not a folder; choose another path")
            break
    real = path.absolute().parent.resolve() / path.name
    if any(real in (place, *place.parents) for place in (Path.cwd(), Path("~").expanduser().resolve())):
        raise OutputError(f"{path}: contains the working directory or the home folder; name {kind.label} in it")
    if os.path.lexists(path):
        other = _describe_other(path, kind)
        if other:
            raise OutputError(
                f"{path}: {other} is there, and {kind.label} must not replace it; choose another name, or move it away"
            )


def _check_unfinished(path: Path, kind: Kind) -> None:
    """Make sure that ``path`` only holds what an earlier attempt at a result of this kind left.

    Raises:
        OutputError: if something else is there.
    """
    names = rf"{kind.files}|{kind.unfinished}|(.+/)?[^/]+\.partial"
    begun = kind._replace(files=kind.files and names, is_valid=lambda _: True)
    if os.path.lexists(path) and (other := _describe_other(path, begun)):
        raise OutputError(f"{path}: {other} is there, but this path is needed to write {kind.label}; move it away")


def _describe_other(path: Path, kind: Kind) -> str | None:
    """Describe what is at ``path``, for a message; None if it is a result of the kind or an empty file or folder."""
    mode = path.lstat().st_mode
    if stat.S_ISLNK(mode):
        return f"a link to {path.readlink()}"
    if kind.files is None:
        if not stat.S_ISREG(mode):
            return "a folder" if stat.S_ISDIR(mode) else "a special file"
        is_valid = not path.stat().st_size or (_begins(path, kind.magic) and kind.is_valid(path))
        return None if is_valid else "another file"
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
    return None if kind.is_valid(path) else f"a folder with {first} in it"


def _files_in(folder: Path) -> Iterator[str]:
    """Relative paths of the files below a folder, except provenance records and hidden files of NFS and Snakemake."""
    for place, folders, names in os.walk(folder, onerror=_raise):
        links = [name for name in folders if Path(place, name).is_symlink()]
        for name in (*links, *names):
            path = Path(place, name).relative_to(folder).as_posix()
            if path != PROVENANCE and not name.startswith((".nfs", ".snakemake_timestamp")):
                yield path


def _raise(error: OSError) -> None:
    raise error


@contextmanager
def atomic_output(path: Path, kind: Kind = FILE, resume: bool = False, key: str | None = None) -> Iterator[Path]:
    """Yield a temporary path to write a file or folder to, and rename it to ``path`` on success.

    If the body raises, the partial result is removed. If the process is killed, the partial result remains with the
    suffix ``.partial`` and the next attempt removes it. With ``resume``, the next attempt receives it instead, and
    only an error that would occur again (a ConceptshareError) removes it.

    One process at a time writes ``path``; others wait. If a job survives its Snakemake and is submitted a second time,
    both jobs therefore succeed.

    Args:
        path: the result.
        kind: kind of the result, which is also the kind that it may replace.
        resume: whether to resume from what a killed attempt left.
        key: everything that the result depends on, except the library's code.

    Raises:
        OutputError: if something that is not a result of this kind is at ``path`` or at the temporary path.
        AlreadyMadeError: if another process made the result with the same ``key`` while this one waited.
    """
    check_replaceable(path, kind)
    _make_folder(path.parent)
    with output_lock(path) as lock:
        lock.begin(key)
        with unlocked_output(path, kind, resume) as partial:
            yield partial


@contextmanager
def unlocked_output(path: Path, kind: Kind = FILE, resume: bool = False) -> Iterator[Path]:
    """Like `atomic_output`, without the lock: the caller makes sure that no other process writes ``path``."""
    check_replaceable(path, kind)
    partial, replaced = (path.with_name(path.name + suffix) for suffix in (".partial", ".replaced.partial"))
    for left in (partial, replaced):
        _check_unfinished(left, kind)
    if not resume:
        remove(partial)
    remove(replaced)
    try:
        yield partial
        # A later run must recognize this result as its own kind. Only a `MODEL` is written by third-party code.
        if kind is not FILE and (other := _describe_other(partial, kind)):
            raise OutputError(f"{partial}: {other} was written instead of {kind.label}; fix the code that writes it")
        _sync(partial)
    except BaseException as error:
        if not resume or isinstance(error, ConceptshareError):
            with suppress(OSError):  # Zarr's threads may still write into it; the next attempt removes the rest
                remove(partial)
        raise
    try:
        check_replaceable(path, kind)
    except OutputError as error:
        raise OutputError(f"{error}; the new result is at {partial}") from None
    if path.is_dir():  # removing a folder takes time, during which it would look complete
        path.rename(replaced)
    partial.rename(path)
    _sync_one(path.parent)
    with suppress(OSError):  # NFS keeps files that are still open; the next attempt removes them
        remove(replaced)


class Unchanged:
    """Detects that the inputs of a result are replaced while the result is made.

    The state of the inputs is recorded at construction, before anything is read. As a context manager, it compares
    them on entry, which may come after a wait for the lock, and on exit, before the result is renamed.
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
    """The lock of a result, and the process that this one waited for."""

    def __init__(self, path: Path) -> None:
        self._path, self._file = path, path.with_name(f".{path.name}.lock")
        self._lock = FileLock(self._file, mode=0o666, poll_interval=_SECONDS_BETWEEN_TRIES, on_acquired=self._signed)
        self._before, self._other = _identity(path), dict[str, Any]()
        self._key: str | None = None

    def acquire(self) -> None:
        """Wait until no other process makes the result, on any machine that shares the file system's locks.

        Raises:
            OutputError: if something other than a lock has the lock's name.
        """
        with suppress(FileNotFoundError):  # released meanwhile
            _check_unfinished(self._file, LOCK)
        waiting = False
        while not self._lock.is_locked:
            try:
                self._lock.acquire(timeout=_SECONDS_BETWEEN_TRIES if waiting else 0)
            except Timeout:
                holder = read_object(self._file)  # empty if it is just being written
                if not waiting or holder.get("who") != self._other.get("who"):
                    info(
                        f"{self._path}: waiting for {holder.get('who', 'another process')}, which is making it; to "
                        f"make it here instead, end that process"
                    )
                self._other, waiting = holder, True
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
                info(
                    f"{self._path}: this file system has no locks ({error.strerror}); make sure that no other job "
                    f"makes the same result"
                )
                return

    def begin(self, key: str | None) -> None:
        """Record the key of the result in the lock file, for the processes that wait.

        Raises:
            AlreadyMadeError: if the process that this one waited for made the same result.
        """
        made = _identity(self._path) not in (None, self._before)
        if key is not None and made and (self._other.get("key"), self._other.get("code")) == (key, _code()):
            raise AlreadyMadeError(f"{self._path}: made by {self._other['who']} while this process waited")
        self._key = key
        if self._lock.is_locked:
            with self._file.open("r+b") as file:
                self._signed(file.fileno())

    def release(self) -> None:
        """Release the lock."""
        self._file.unlink(missing_ok=True)
        self._lock.release()

    def _signed(self, place: int) -> None:
        """Write the holder of the lock into the lock file."""
        who = f"process {os.getpid()} on {platform.node()}"
        if job := os.getenv("SLURM_JOB_ID"):
            who += f" (Slurm job {job})"
        os.ftruncate(place, 0)
        os.pwrite(place, json.dumps({"who": who, "key": self._key, "code": _code()}).encode(), 0)


@functools.cache
def _code() -> str:
    """Hash of the library's code."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


_held: dict[Path, Lock] = {}


@contextmanager
def output_lock(path: Path) -> Iterator[Lock]:
    """Hold the lock of ``path``; reentrant within a process.

    Commands take the lock when they start, so that an earlier job never replaces the result of a later one.
    """
    absolute = path.absolute()
    if absolute in _held:
        yield _held[absolute]
        return
    lock = Lock(path)
    lock.acquire()
    _held[absolute] = lock
    try:
        yield lock
    finally:
        del _held[absolute]
        lock.release()


def _identity(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size


def _contents(path: Path) -> Any:
    """Identity of a result, which changes when it is replaced: that of a file, or of the files directly in a folder."""
    if not path.is_dir():
        return _identity(path)
    files = (file for file in path.iterdir() if file.name != PROVENANCE and not file.name.startswith("."))
    return {file.name: _identity(file) for file in files if not file.is_dir()}


def _make_folder(folder: Path) -> None:
    """Create a folder and its parents, synced so that they survive a power failure."""
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for place in missing:
        _sync_one(place.parent)


def _sync(path: Path) -> None:
    """Sync a file, or everything in a folder, to disk: no name must survive a power failure without its content."""
    places = [path]
    if path.is_dir():
        places += [Path(place, name) for place, folders, names in os.walk(path) for name in (*folders, *names)]
    with ThreadPoolExecutor(_SYNCS_AT_ONCE) as pool:
        for _ in pool.map(_sync_one, reversed(places)):
            pass


def _sync_one(path: Path) -> None:
    try:
        opened = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except (FileNotFoundError, PermissionError):  # removed meanwhile (NFS), or owned by another user
        return
    try:
        os.fsync(opened)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise
    finally:
        os.close(opened)


def link(source: Path, target: Path) -> None:
    """Hard-link a file to ``target``, in a folder that is made if needed; copy it if links are not supported."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        target.hardlink_to(source)
    except OSError:
        shutil.copyfile(source, target)


def remove(path: Path) -> None:
    """Remove a file, or a folder with its contents; a missing path is not an error."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
