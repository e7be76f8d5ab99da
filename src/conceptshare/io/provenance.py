"""How a result came about: `provenance.json` in its folder, or `{name}.provenance.json` beside its file.

It tells the commit, the versions, the command with its settings and seeds, the hardware, and what the job took. It is
the one file that differs between two runs of the same, so it is no part of what makes two results equal. Nothing of the
environment is written but what is named here: no user, no token, and no path of the user's home.
"""

import functools
import importlib.metadata
import json
import os
import platform
import re
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from conceptshare.io.files import PROVENANCE, PROVENANCE_RECORD, Kind, unlocked_output

FILE = PROVENANCE

_PACKAGES = (
    *(
        "torch",
        "numpy",
        "zarr",
        "transformers",
        "open_clip_torch",
        "timm",
        "datasets",
        "snakemake",
        "scipy",
        "scikit-learn",
    ),
    "safetensors",
)
_CLONE = Path(__file__).parents[3]
_GIT_SECONDS = 10
# Inside a rule the profile takes SLURM_JOB_GPUS and others away, so that its jobs can start jobs.
_SLURM = ("SLURM_JOB_ID", "SLURMD_NODENAME", "SLURM_STEP_GPUS", "SLURM_GPUS_ON_NODE")


class _Job(NamedTuple):
    """What this process was started for."""

    arguments: list[str]
    began: datetime
    clock: float


_job: _Job | None = None


def begin(arguments: Sequence[str]) -> None:
    """Let all that is recorded from now on tell these arguments of the command line, and count time from here."""
    global _job
    _job = _Job([shown(text) for text in arguments], datetime.now(UTC), time.monotonic())


def record(result: Path) -> None:
    """Write how a result came about: into it, where it is a folder, and else beside it.

    Called before the result gets its final name. What a library's user calls without the command line has no
    ``arguments``, and no time.
    """
    path = result / FILE if result.is_dir() else result.with_name(f"{result.stem}.{FILE}")
    _write(path, PROVENANCE_RECORD, json.dumps({"job": _of_job(), **surroundings()}, indent=1) + "\n")


def record_study(study: str, out: Path) -> None:
    """Write a whole study, given as JSON, with the versions and the machine it is run on, as the file ``out``."""
    account = {"study": json.loads(shown(study)), **surroundings()}
    _write(out, PROVENANCE_RECORD, json.dumps(account, indent=1) + "\n")


def surroundings() -> dict[str, Any]:
    """The library with its commit, the versions of what it uses, and the hardware; what is not known is None."""
    return {
        "conceptshare": {"version": _version("conceptshare"), **_commit()},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {package: _version(package) for package in _PACKAGES},
        "hardware": _hardware(),
        "slurm": {name: os.environ[name] for name in _SLURM if name in os.environ} or None,
    }


def _of_job() -> dict[str, Any]:
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    torch = _torch_with_gpus()
    return {
        "arguments": _job and _job.arguments,
        "began": _job and _job.began.isoformat(timespec="seconds"),
        "seconds": _job and round(time.monotonic() - _job.clock, 1),
        "peak_memory_bytes": kilobytes if sys.platform == "darwin" else kilobytes * 1024,
        "peak_gpu_memory_bytes": torch
        and [torch.cuda.max_memory_allocated(n) for n in range(torch.cuda.device_count())],
    }


def _write(path: Path, kind: Kind, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with unlocked_output(path, kind) as partial:
        partial.write_text(content, encoding="utf-8")


def shown(text: str) -> str:
    """An argument without the folders that lead to the project, and without the user's home."""
    for folder, short in ((Path.cwd(), "."), (Path.home(), "~")):
        if folder != Path(folder.anchor):
            text = re.sub(rf'{re.escape(str(folder))}(?=[/"]|$)', short, text)
    return text


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache
def _commit() -> dict[str, Any]:
    """The commit of the clone that this library is part of, and whether files in it were changed since."""
    unknown = {"commit": None, "dirty": None}
    if not (_CLONE / ".git").exists():
        return unknown  # installed from a package; whatever clone its environment may lie in is another's
    describe = ["git", "--no-optional-locks", "-C", str(_CLONE), "describe", "--always", "--dirty", "--abbrev=40"]
    own = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        # Without its tags, git describes a commit by its name alone.
        found = subprocess.run(
            [*describe, "--exclude=*"], capture_output=True, text=True, check=True, timeout=_GIT_SECONDS, env=own
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return unknown
    return {"commit": found.removesuffix("-dirty"), "dirty": found.endswith("-dirty")}


def _hardware() -> dict[str, Any]:
    torch = sys.modules.get("torch")
    gpus = _torch_with_gpus()
    return {
        "cpu": _cpu(),
        "cores": cores(),
        "threads": torch and torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "gpus": gpus and [gpus.cuda.get_device_name(n) for n in range(gpus.cuda.device_count())],
        "gpu_driver": gpus and _gpu_driver(),
        "cuda": gpus and gpus.version.cuda,
        "cuda_visible_devices": os.environ.get("CUDA_VISIBLE_DEVICES"),
    }


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _torch_with_gpus() -> Any:
    """The module torch, if the job has imported it and may compute on GPUs."""
    torch: Any = sys.modules.get("torch")
    if torch is None or os.environ.get("CONCEPTSHARE_DEVICE") == "cpu" or not torch.cuda.is_available():
        return None
    return torch


def _cpu() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or None)


def _gpu_driver() -> str | None:
    try:
        return Path("/proc/driver/nvidia/version").read_text(encoding="utf-8").splitlines()[0]
    except (OSError, IndexError):
        return None
