"""States of unfinished trainings on disk, and the signal that asks for one."""

import hashlib
import json
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from conceptshare.io.files import CHECKPOINTS, check_replaceable, remove
from conceptshare.io.progress import info
from conceptshare.sae._trainer import Trainer

PREEMPTED = 75
"""Exit status of a training that was asked to stop (SIGTERM) and saved its state: temporary failure, in sysexits.h."""

_VERSION = 1
"""Of what a state holds; one of another version is not gone on with."""
_KEY = "of.json"
_KEPT = 2


class Checkpoints:
    """The states of trainings that go step by step together: the newest two, each a folder named after its step.

    A state's file is named after its training and the digest of its bytes, so that a torn one is noticed, and the
    checkpoint before it used.

    Args:
        folder: where they lie; it is there from the first checkpoint on.
        key: what is trained. Where an earlier attempt was at something else, its checkpoints are not used.
    """

    def __init__(self, folder: Path, key: dict[str, Any]) -> None:
        self._folder = folder
        self.key = json.dumps(key | {"version": _VERSION, "begun_by": version("conceptshare")}, sort_keys=True)
        """What is trained."""
        if not self._ours():
            check_replaceable(folder, CHECKPOINTS)

    def save(self, trainers: Mapping[str, Trainer]) -> None:
        """Write the states aside, rename them together, and remove what is older than the checkpoint before."""
        if not self._ours():
            self.remove()
            self._folder.mkdir(parents=True)
            (self._folder / _KEY).write_text(self.key, encoding="utf-8")
        step = next(iter(trainers.values())).step
        partial = self._folder / "partial"
        remove(partial)
        try:
            partial.mkdir()
            for name, trainer in trainers.items():
                file = partial / "state"
                save_file(trainer.state(), file)
                file.rename(partial / f"{_file_name(name)}-{_digest(file)}.safetensors")
            partial.rename(self._folder / f"{step:09d}")
        finally:
            remove(partial)
        for older in self._all()[_KEPT:]:
            remove(older)

    def restore(self, trainers: Mapping[str, Trainer]) -> int:
        """Let trainings go on from the newest checkpoint that is whole.

        Returns:
            Its step; 0 where there is none.
        """
        for checkpoint in self._all() if self._ours() else []:
            files = {file.stem.rpartition("-")[0]: file for file in checkpoint.glob("*.safetensors")}
            if not all(_file_name(name) in files and _whole(files[_file_name(name)]) for name in trainers):
                info(f"{checkpoint}: not whole; using the checkpoint before it, if there is one")
                remove(checkpoint)
                continue
            for name, trainer in trainers.items():
                trainer.restore(load_file(files[_file_name(name)]))
            return next(iter(trainers.values())).step
        return 0

    def remove(self) -> None:
        """Leave nothing."""
        remove(self._folder)

    def _ours(self) -> bool:
        try:
            return (self._folder / _KEY).read_text(encoding="utf-8") == self.key
        except (OSError, UnicodeError):
            return False

    def _all(self) -> list[Path]:
        return sorted((path for path in self._folder.iterdir() if path.name.isdecimal()), reverse=True)


@contextmanager
def asked_to_stop() -> Iterator[threading.Event]:
    """An event that SIGTERM sets, as Slurm sends it before it takes a machine back."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = signal.signal(signal.SIGTERM, lambda *_: asked.set())
    try:
        yield asked
    finally:
        signal.signal(signal.SIGTERM, before)


def _file_name(training: str) -> str:
    return training.replace(" ", "-")


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()[:16]


def _whole(file: Path) -> bool:
    return _digest(file) == file.stem.rpartition("-")[2]
