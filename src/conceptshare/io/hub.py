"""The model hub: fetch the files of a model or data set at one revision, and upload a folder; errors name the remedy.

Files are in the cache of the hub's own client (``HF_HOME``), which other tools on the machine share. Running an
interrupted fetch again fetches the missing files. A partially fetched file starts over: the client (2.4) gives each
download a temporary name of its own and has no public way to resume one. If a connection is lost within a run, the
client does resume, in steps of 10 MB.
"""

import fnmatch
import glob
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from conceptshare.io import progress
from conceptshare.io.errors import HubError
from conceptshare.io.progress import info

Kind = Literal["model", "dataset"]

# Seconds before the second and the third attempt.
_PAUSES = (1.0, 4.0)

STUDY = "conceptshare_study"
"""Key of a model card that names the study whose SAEs its repository has."""

# Names of files or folders that a message lists.
_SHOWN_NAMES = 5

# The key of a study's config that can name a local copy instead.
_KEYS = {"model": "model", "dataset": "source"}


@dataclass(frozen=True)
class Snapshot:
    """Files of a repository at one revision."""

    folder: Path
    """Folder of the files, named after the commit. It may contain further files that other programs fetched."""
    files: list[str]
    """Relative paths of the requested files, sorted."""


def fetch_files(
    repository: str,
    kind: Kind,
    revision: str | None,
    patterns: Sequence[str] | None = None,
    remedy: str | None = None,
) -> Snapshot:
    """Fetch a repository's files at one revision.

    Without a connection, or with ``HF_HUB_OFFLINE=1``, the files of an earlier fetch of the same revision are used.

    Args:
        repository: the hub id, such as ``facebook/dinov2-base``.
        kind: whether the repository holds a model or a data set.
        revision: a branch, tag or commit. Defaults to the newest commit of the main branch.
        patterns: file names to fetch, see `chosen`. Defaults to all files.
        remedy: the key and path with which a study would name a local copy, if not ``model`` or ``source``.

    Raises:
        HubError: if the files are not on this machine and cannot be fetched.
    """
    from huggingface_hub import constants

    remedy = remedy or f"{_KEYS[kind]}: ./{repository.rpartition('/')[2]}"
    wanted = _describe(repository, kind, revision, patterns)
    error: Exception
    if constants.is_offline_mode():
        cached = _cached(repository, kind, revision, patterns)
        if cached is None:
            why = "HF_HUB_OFFLINE is set, and not all of them are in the cache of this machine"
            raise HubError(f"{wanted} cannot be fetched: {why}; or point to a local copy, as in {remedy}")
        return cached
    for pause in (*_PAUSES, None):
        try:
            return _fetch(repository, kind, revision, patterns)
        except Exception as failure:  # the client raises many types
            error = failure
        why = _reason(error, repository, kind, revision)
        if pause is None or not _may_pass(error):
            break
        info(f"{repository}: {why}; retrying in {pause:.0f} s")
        time.sleep(pause)
    if _is_down(_root(error)):
        cached = _cached(repository, kind, revision, patterns)
        if cached is not None:
            info(f"{repository}: {why}; using the cached files at {cached.folder}")
            return cached
    raise HubError(f"{wanted} cannot be fetched: {why}; or point to a local copy, as in {remedy}") from error


def upload(repository: str, folder: Path) -> str:
    """Upload a folder to a repository of models, which is made if it does not exist; return the address of the commit.

    Files that an earlier upload of the same study sent are not sent again, or replaced if they have changed.

    Raises:
        HubError: if no user is logged in or may write there, the repository has other files, or the hub fails.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    api, refused = HfApi(), f"{repository}: not uploaded to {constants.ENDPOINT}"
    try:
        api.whoami()
        if other := _other_files(repository, folder):
            raise HubError(
                f"{refused}: it has {other[0]}, which is not of this study; name another repository, or delete it"
            )
        api.create_repo(repository, exist_ok=True)
        return str(api.upload_folder(repo_id=repository, folder_path=folder).commit_url)
    except HubError:
        raise
    except LocalTokenNotFoundError:
        raise HubError(
            f"{refused}: you are not logged in; run `hf auth login`, or set HF_TOKEN to your token"
        ) from None
    except Exception as error:  # the client raises many types
        why = _reason(error, repository, "model", None)
        if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403):
            why = f"your token may not write there ({error.response.status_code}); use one with write access"
        elif _is_down(error):
            why += "; run again, which sends only what is missing"
        raise HubError(f"{refused}: {why}") from error


def _other_files(repository: str, folder: Path) -> list[str]:
    """Files of a repository that an upload of this folder's study did not write; none if there is no repository."""
    from huggingface_hub import HfApi, ModelCard
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        found = set(HfApi().list_repo_files(repository))
    except RepositoryNotFoundError:
        return []
    ours = {path.relative_to(folder).as_posix() for path in folder.rglob("*")} | {".gitattributes"}
    if "README.md" in found:
        cards = [ModelCard.load(place, ignore_metadata_errors=True) for place in (repository, folder / "README.md")]
        if cards[0].data.get(STUDY) != cards[1].data.get(STUDY):
            ours.remove("README.md")
    return sorted(found - ours)


def chosen(names: Iterable[str], patterns: Sequence[str] | None) -> list[str]:
    """Names that match any of the patterns, sorted; all names if there are no patterns.

    Args:
        names: paths in a repository.
        patterns: names in which ``*`` matches anything but a slash. A pattern may hold alternatives separated by
            ``|`` in order of preference; only the first alternative that matches any name is used.
    """
    known = sorted(names)
    if patterns is None:
        return known
    selected = set()
    for pattern in patterns:
        matches = ([name for name in known if _matches(name, one)] for one in pattern.split("|"))
        selected.update(next(filter(None, matches), []))
    return sorted(selected)


def _matches(name: str, pattern: str) -> bool:
    parts, wanted = name.split("/"), pattern.split("/")
    return len(parts) == len(wanted) and all(map(fnmatch.fnmatchcase, parts, wanted))


def _fetch(repository: str, kind: Kind, revision: str | None, patterns: Sequence[str] | None) -> Snapshot:
    from huggingface_hub import HfApi, constants, snapshot_download

    _limit_waiting()
    details: Any = HfApi().repo_info(
        repository, repo_type=kind, revision=revision, timeout=constants.HF_HUB_ETAG_TIMEOUT
    )
    names = sorted(file.rfilename for file in details.siblings or [])
    files = chosen(names, patterns)
    if not files:
        raise _NothingError(_some(names))
    info(f"{repository} at {details.sha}: {len(files)} files, from {constants.ENDPOINT}")
    started = time.monotonic()
    bars: Any = None if sys.stderr.isatty() else _Lines
    folder = Path(
        snapshot_download(
            repository,
            repo_type=kind,
            revision=revision,  # not its commit, or the client would not record the commit of this revision
            allow_patterns=[glob.escape(name) for name in files],
            tqdm_class=bars,
        )
    )
    missing = [name for name in files if not (folder / name).is_file()]
    if missing:
        # The client returns the files that it has if the hub fails between two requests.
        raise _IncompleteError(f"{missing[0]} and {len(missing) - 1} more were not fetched")
    info(f"{repository}: complete in {time.monotonic() - started:.1f} s at {folder}")
    return Snapshot(folder, files)


def _cached(repository: str, kind: Kind, revision: str | None, patterns: Sequence[str] | None) -> Snapshot | None:
    """Files of an earlier fetch on this machine, or None if any of the requested files is missing."""
    from huggingface_hub import HfApi, get_cached_repo_tree, snapshot_download
    from huggingface_hub.errors import (
        CachedRepoTreeNotFoundError,
        HFValidationError,
        LocalEntryNotFoundError,
        RevisionResolutionError,
    )

    try:
        commit = HfApi().resolve_revision(repository, repo_type=kind, revision=revision, local_files_only=True).resolved
        try:
            names = [file.path for file in get_cached_repo_tree(repository, repo_type=kind, revision=commit)]
        except CachedRepoTreeNotFoundError:
            if kind == "dataset":
                return None  # a data set with missing files would be read without an error
            names = None
        wanted = None if names is None else [glob.escape(name) for name in chosen(names, patterns)]
        folder = Path(
            snapshot_download(repository, repo_type=kind, revision=commit, local_files_only=True, allow_patterns=wanted)
        )
    except (HFValidationError, LocalEntryNotFoundError, RevisionResolutionError):
        return None
    if names is None:
        names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    files = chosen(names, patterns)
    return Snapshot(folder, files) if files else None


class _NothingError(Exception):
    """The repository has none of the requested files."""


class _IncompleteError(Exception):
    """The client reported success without all files."""


def _root(error: Exception) -> BaseException:
    """The failed request that made the client report that a file is not on this machine."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    return error.__cause__ if isinstance(error, LocalEntryNotFoundError) and error.__cause__ else error


def _is_down(error: BaseException) -> bool:
    """Whether the error is transient: the hub did not answer, is overloaded or failed internally."""
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in (408, 429) or error.response.status_code >= 500
    return isinstance(error, httpx2.TransportError | _IncompleteError)


def _may_pass(error: Exception) -> bool:
    """Whether to retry after an error."""
    import httpx2

    if isinstance(error, OSError) and "Consistency check failed" in str(error):
        return True
    # Before a connection times out, the operating system has retried several times. If the client wraps a failure, it
    # has already made its own retries.
    return _is_down(error) and not isinstance(error, httpx2.ConnectTimeout)


def _reason(error: Exception, repository: str, kind: Kind, revision: str | None) -> str:
    import httpx2
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    page = f"{constants.ENDPOINT}/{'datasets/' if kind == 'dataset' else ''}{repository}"
    match _root(error):
        case GatedRepoError():
            return f"it is gated; accept its licence at {page} and set HF_TOKEN to your token"
        case RevisionNotFoundError():
            return f"the hub has no revision {revision!r} of it"
        case RepositoryNotFoundError():
            return (
                f"there is no such {kind}, or it is private, and no path {repository} exists here; check the id or "
                f"path, or set HF_TOKEN to your token"
            )
        case HfHubHTTPError() as refused if refused.response.status_code in (401, 403):
            return f"access is refused ({refused.response.status_code}); check HF_TOKEN, and accept a licence at {page}"
        case HfHubHTTPError() as failed:
            return f"the hub answered {failed.response.status_code} {failed.response.reason_phrase}"
        case _NothingError():
            return f"the repository has no such files; it has {_root(error)}"
        case HFValidationError():
            return "this is not a hub id of the form OWNER/NAME"
        case httpx2.TransportError() as lost:
            return f"the host cannot be reached ({type(lost).__name__}: {_first_line(lost)})"
        case other:
            return f"{type(other).__name__}: {_first_line(other)}"


def _some(names: Sequence[str]) -> str:
    """A few names, of different folders if there are several, for a message."""
    first = dict.fromkeys(name.rpartition("/")[0] or name for name in names)
    shown = [f"{name}/" if name not in names else name for name in first][:_SHOWN_NAMES]
    more = len(first) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "") if names else "none"


def _describe(repository: str, kind: Kind, revision: str | None, patterns: Sequence[str] | None) -> str:
    from huggingface_hub import constants

    files = "all files" if patterns is None else ", ".join(pattern.replace("|", " or ") for pattern in patterns)
    return f"{repository}: {files} of this {kind} at revision {revision or 'main'} of {constants.ENDPOINT}"


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or "no details"


def _limit_waiting() -> None:
    """Set a timeout on each request of the client; without it, some requests would wait forever."""
    from huggingface_hub import get_session

    hooks = get_session().event_hooks
    if _limit not in hooks["request"]:
        get_session().event_hooks = {**hooks, "request": [*hooks["request"], _limit]}


def _limit(request: Any) -> None:
    from huggingface_hub import constants

    longest = float(max(constants.HF_HUB_ETAG_TIMEOUT, constants.HF_HUB_DOWNLOAD_TIMEOUT))
    limits = request.extensions.get("timeout", {})
    request.extensions["timeout"] = {
        part: min(limits.get(part) or longest, longest) for part in ("connect", "read", "write", "pool")
    }


class _Lines(tqdm):  # type: ignore[type-arg]
    """Reports every half minute how much has been downloaded; the client's own bars would fill a log."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options | {"disable": True})
        # The client counts files, bytes received and bytes written, each with a bar.
        self._is_total = options.get("desc") == "Downloading bytes"
        self._start = self._last = time.monotonic()

    def update(self, n: float | None = 1) -> None:
        """Add ``n`` to the count."""
        self.n += n or 0
        now = time.monotonic()
        if self._is_total and now - self._last >= progress.SECONDS_BETWEEN_LINES:
            rate = self.n / max(now - self._start, 1e-9)
            info(f"{self.n / 1e6:,.1f} of {(self.total or 0) / 1e6:,.1f} MB ({rate / 1e6:.1f} MB/s)")
            self._last = now
