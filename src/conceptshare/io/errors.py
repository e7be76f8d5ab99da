"""The errors a user can cause and mend. Every message names the file, key or sample, and the remedy."""

import errno
import os

_ROOM = "make room and run again, which goes on from what is there"
_RIGHTS = "let this user read and write there, and run again"
_DISK = "see what ails that disk, and run again"
_REFUSALS = {
    errno.EDQUOT: _ROOM,
    errno.EACCES: _RIGHTS,
    errno.EPERM: _RIGHTS,
    errno.EROFS: _RIGHTS,
    errno.EIO: _DISK,
    errno.ESTALE: _DISK,
}


def refusal(error: BaseException) -> str | None:
    """What to say of an error by which the system refused to read or write, be the file whole or not; else None.

    Libraries that read and write files raise types of their own, which quote the system's words.
    """
    said = " ".join(str(error).split())
    if os.strerror(errno.ENOSPC) in said:
        return f"the disk is full; {_ROOM}"
    return next((f"{said}; {remedy}" for number, remedy in _REFUSALS.items() if os.strerror(number) in said), None)


class ConceptshareError(Exception):
    """Base of every error that conceptshare raises on purpose."""


class StudyError(ConceptshareError):
    """The study or the catalog says something that cannot be run."""


class DatasetError(ConceptshareError):
    """A data set cannot be read, or too much of it is unusable."""


class EncoderError(ConceptshareError):
    """An encoder cannot be found or loaded, or is not what the catalog says."""


class StoreError(ConceptshareError):
    """A store on disk is missing, unfinished, damaged or of another kind."""


class OutputError(ConceptshareError):
    """A result would replace something that is no result of its kind, or cannot be written where it is asked for."""


class NumericsError(ConceptshareError):
    """A computation met numbers that are not finite or do not fit their type."""


class DeviceError(ConceptshareError):
    """A GPU that a job was to compute on cannot be used."""


class HubError(ConceptshareError):
    """Files that a model hub holds are neither on this machine nor to be fetched."""


class MadeMeanwhileError(ConceptshareError):
    """Another process made the same result while this one waited for it: nothing is left to do."""
