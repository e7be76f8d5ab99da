"""Files and folders of results: their names, and how one process at a time writes them aside and renames them."""

import errno
import json
import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from conceptshare.errors import ConceptshareError, MadeMeanwhileError
from conceptshare.progress import say

_SECONDS_BETWEEN_TRIES = 1.0
# What a file system says that has no locks.
_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP}


def layer_name(layer: int) -> str:
    """The name of a layer's group or folder: ``layer-03``."""
    return f"layer-{layer:02d}"


@contextmanager
def written_aside(path: Path, resume: bool = False, key: str | None = None) -> Iterator[Path]:
    """Give a path beside ``path`` to write a file or folder at, and rename it to ``path`` if all went well.

    Where the body raises, what it wrote is removed; where the process is killed, what it wrote keeps the suffix
    ``.partial`` and is removed by the next attempt. With ``resume``, the next attempt finds it instead, and only an
    error that would come again (a ConceptshareError) removes it.

    One process at a time makes ``path``; others wait. So a job that goes on after its Snakemake was killed and the job
    that is then submitted anew both end well.

    Args:
        path: the result.
        resume: whether to go on with what an attempt that was killed left.
        key: tells the result from others of the same path.

    Raises:
        MadeMeanwhileError: where the process that this one had to wait for made it, with the same ``key``.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _alone(path, key), renamed(path, resume) as partial:
        yield partial


@contextmanager
def renamed(path: Path, resume: bool = False) -> Iterator[Path]:
    """As `written_aside`, where no other process can be making ``path``."""
    partial, replaced = (path.with_name(path.name + suffix) for suffix in (".partial", ".replaced.partial"))
    if not resume:
        remove(partial)
    remove(replaced)
    try:
        yield partial
        if path.is_dir():  # which is removed bit by bit, and looks whole until then
            path.rename(replaced)
        elif partial.is_dir():
            remove(path)
        partial.rename(path)
        remove(replaced)
    except BaseException as error:
        if not resume or isinstance(error, ConceptshareError):
            with suppress(OSError):  # Zarr's threads may still write into it; the next attempt removes what they leave
                remove(partial)
        raise


@contextmanager
def _alone(path: Path, key: str | None) -> Iterator[None]:
    """Wait until no other process makes ``path``, on any machine that sees the file system's locks."""
    file = path.with_name(f".{path.name}.lock")
    lock = FileLock(file, mode=0o666, poll_interval=_SECONDS_BETWEEN_TRIES, on_acquired=lambda place: _sign(place, key))
    before, other = _identity(path), None
    while not lock.is_locked:
        try:
            lock.acquire(timeout=0 if other is None else _SECONDS_BETWEEN_TRIES)
        except Timeout:
            holder = _holder(file)
            if holder != other:
                say(
                    f"{path}: waiting for {holder.get('who', 'another process')}, which is making it; to make it here "
                    f"in its place, end that one"
                )
            other = holder
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            say(f"{path}: no file locks here ({error.strerror}); make sure that no other job makes it")
            yield
            return
    try:
        if other is not None and key is not None and other.get("key") == key and _identity(path) not in (None, before):
            raise MadeMeanwhileError(f"{path}: made by {other['who']} meanwhile")
        yield
    finally:
        file.unlink(missing_ok=True)
        lock.release()


def _sign(place: int, key: str | None) -> None:
    """Write who holds a lock into its file."""
    who = f"process {os.getpid()} on {platform.node()}"
    if job := os.getenv("SLURM_JOB_ID"):
        who += f" (Slurm job {job})"
    os.ftruncate(place, 0)
    os.pwrite(place, json.dumps({"who": who, "key": key}).encode(), 0)


def _holder(lock: Path) -> dict[str, Any]:
    """What the holder of a lock wrote; nothing where it is just being written."""
    try:
        signed: dict[str, Any] = json.loads(lock.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return signed


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns


def remove(path: Path) -> None:
    """Remove a file, or a folder with all that is in it; what is not there is no error."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
