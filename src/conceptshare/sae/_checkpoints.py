"""Checkpoints of unfinished trainings, and the signal that requests one."""

import hashlib
import json
import signal
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import version
from itertools import repeat
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from conceptshare.io.files import CHECKPOINTS, check_replaceable, remove
from conceptshare.io.progress import info
from conceptshare.sae._trainer import Trainer

PREEMPTED = 75
"""Exit status of a training that received SIGTERM and saved its state: temporary failure, as in sysexits.h."""

_VERSION = 2
"""Version of a state's contents; states of other versions are not used."""
_KEY = "of.json"
_KEPT = 2
# States that are written at the same time; each is copied to the host.
_THREADS = 4


class Checkpoints:
    """Checkpoints of trainings that take steps together: the newest two, each a folder named after its step.

    A state's file name contains the training's name and a digest of the file, so that a truncated file is detected and
    the checkpoint before it is used.

    Args:
        folder: the folder of checkpoints, created at the first one.
        key: identifies the trainings. Checkpoints of an earlier attempt with another key are not used.
    """

    def __init__(self, folder: Path, key: dict[str, Any]) -> None:
        self._folder = folder
        self.key = json.dumps(key | {"version": _VERSION, "begun_by": version("conceptshare")}, sort_keys=True)
        """Identifies the trainings."""
        if not self._key_matches():
            check_replaceable(folder, CHECKPOINTS)

    def save(self, trainers: Mapping[str, Trainer]) -> None:
        """Save a checkpoint atomically, and remove all but the newest two."""
        if not self._key_matches():
            self.remove()
            self._folder.mkdir(parents=True)
            (self._folder / _KEY).write_text(self.key, encoding="utf-8")
        step = next(iter(trainers.values())).step
        partial = self._folder / "partial"
        remove(partial)
        try:
            partial.mkdir()
            with ThreadPoolExecutor(_THREADS) as saving:
                list(saving.map(_save, trainers, trainers.values(), repeat(partial)))
            partial.rename(self._folder / f"{step:09d}")
        finally:
            remove(partial)
        for older in self._all()[_KEPT:]:
            remove(older)

    def restore(self, trainers: Mapping[str, Trainer]) -> int:
        """Restore trainings from the newest intact checkpoint.

        Returns:
            Its step; 0 if there is none.
        """
        for checkpoint in self._all() if self._key_matches() else []:
            files = {file.stem.rpartition("-")[0]: file for file in checkpoint.glob("*.safetensors")}
            if not all(_file_name(name) in files and _is_intact(files[_file_name(name)]) for name in trainers):
                info(f"{checkpoint}: damaged; using the checkpoint before it, if there is one")
                remove(checkpoint)
                continue
            for name, trainer in trainers.items():
                trainer.restore(load_file(files[_file_name(name)]))
            return next(iter(trainers.values())).step
        return 0

    def remove(self) -> None:
        """Remove all checkpoints."""
        remove(self._folder)

    def _key_matches(self) -> bool:
        try:
            return (self._folder / _KEY).read_text(encoding="utf-8") == self.key
        except (OSError, UnicodeError):
            return False

    def _all(self) -> list[Path]:
        return sorted((path for path in self._folder.iterdir() if path.name.isdecimal()), reverse=True)


@contextmanager
def stop_on_sigterm() -> Iterator[threading.Event]:
    """Yield an event that SIGTERM sets, which Slurm sends before it preempts a job."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = signal.signal(signal.SIGTERM, lambda *_: stop.set())
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)


def _save(name: str, trainer: Trainer, folder: Path) -> None:
    file = folder / _file_name(name)
    save_file(trainer.state(), file)
    file.rename(f"{file}-{_digest(file)}.safetensors")


def _file_name(training: str) -> str:
    return training.replace(" ", "-")


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()[:16]


def _is_intact(file: Path) -> bool:
    return _digest(file) == file.stem.rpartition("-")[2]
