"""The model hub: fetch a model's or a data set's files at one revision, and say what to do where that fails."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal


def fetch_snapshot(
    repository: str, kind: Literal["model", "dataset"], revision: str | None, patterns: Sequence[str] | None = None
) -> Path:
    """The folder with a repository's files at one revision; its name is that revision's commit.

    Args:
        repository: the hub id, such as ``facebook/dinov2-base``.
        kind: what the repository holds.
        revision: a branch, tag or commit. Without one, the newest of the main branch.
        patterns: file names to fetch, with wildcards. Without them, all.

    Raises:
        HubError: where the files are not on this machine and cannot be fetched.
    """
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(repository, repo_type=kind, revision=revision, allow_patterns=patterns))
