"""Errors that a user can cause and fix. Every message names the file, key or sample, and the remedy."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

_FREE_SPACE = "free some space and run again; the run resumes from what is there"
_PERMISSIONS = "let this user read and write there, and run again"
_DISK = "check that disk, and run again"
_REMEDIES = {
    errno.EDQUOT: _FREE_SPACE,
    errno.EACCES: _PERMISSIONS,
    errno.EPERM: _PERMISSIONS,
    errno.EROFS: _PERMISSIONS,
    errno.EIO: _DISK,
    errno.ESTALE: _DISK,
}


def system_error_message(error: BaseException) -> str | None:
    """User-facing message for an OS-level I/O error (disk full, permissions), or None for any other error.

    The error is recognized by its text: libraries raise types of their own, which quote the system's message.
    """
    message = " ".join(str(error).split())
    if os.strerror(errno.ENOSPC) in message:
        return f"the disk is full; {_FREE_SPACE}"
    remedies = (remedy for number, remedy in _REMEDIES.items() if os.strerror(number) in message)
    return next((f"{message}; {remedy}" for remedy in remedies), None)


class ConceptshareError(Exception):
    """Base of every error that conceptshare raises on purpose."""


class StudyError(ConceptshareError):
    """The study or the catalog contains a setting that cannot be run."""


@contextmanager
def reading(kind: type[ConceptshareError], what: str, remedy: str) -> Iterator[None]:
    """Convert errors of libraries to one of ours, because damaged files raise many types; OS-level errors pass through.

    Args:
        kind: the type of the error.
        what: what cannot be read.
        remedy: what to do.
    """
    try:
        yield
    except ConceptshareError:
        raise
    except Exception as error:
        if system_error_message(error) is not None:
            raise
        message = " ".join(str(error).split())[:300]
        raise kind(f"{what} ({type(error).__name__}: {message}){remedy}") from error


class DatasetError(ConceptshareError):
    """A data set cannot be read, or too much of it is unusable."""


class EncoderError(ConceptshareError):
    """An encoder cannot be found or loaded, or does not match its catalog entry."""


class StoreError(ConceptshareError):
    """A store on disk is missing, unfinished, damaged or of another kind."""


class OutputError(ConceptshareError):
    """A result would replace something that is not a result of its kind, or cannot be written to the given path."""


class NumericsError(ConceptshareError):
    """A computation produced numbers that are not finite or do not fit their dtype."""


class DeviceError(ConceptshareError):
    """The GPU that a job needs cannot be used."""


class HubError(ConceptshareError):
    """Files of a model hub are neither on this machine nor can they be fetched."""


class AlreadyMadeError(ConceptshareError):
    """Another process made the same result while this one waited for the lock: nothing is left to do."""
