"""Files and folders of results: what they are called, and how they are written aside and renamed when complete."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from conceptshare.errors import ConceptshareError


def layer_name(layer: int) -> str:
    """The name of a layer's group or folder: ``layer-03``."""
    return f"layer-{layer:02d}"


@contextmanager
def written_aside(path: Path, resume: bool = False) -> Iterator[Path]:
    """Give a path beside ``path`` to write a file or folder at, and rename it to ``path`` if all went well.

    Where the body raises, what it wrote is removed; where the process is killed, what it wrote keeps the suffix
    ``.partial`` and is removed by the next attempt. With ``resume``, the next attempt finds it instead, and only an
    error that would come again (a ConceptshareError) removes it.
    """
    partial = path.with_name(path.name + ".partial")
    if not resume:
        remove(partial)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield partial
        remove(path)
        partial.rename(path)
    except BaseException as error:
        if not resume or isinstance(error, ConceptshareError):
            remove(partial)
        raise


def remove(path: Path) -> None:
    """Remove a file, or a folder with all that is in it; what is not there is no error."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
