"""Provenance of results: `provenance.json` in a result's folder, or `{name}.provenance.json` next to its file.

It records the commit, the versions, the command with its settings and seeds, the hardware, and the job's time and
memory. It is the only file that differs between identical runs, so it is ignored when results are compared. Nothing
else of the environment is recorded: no user, no token, and no path in the user's home.
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

from conceptshare.io.files import PROVENANCE, PROVENANCE_RECORD, unlocked_output

FILE = PROVENANCE

_PACKAGES = (
    *("torch", "numpy", "zarr", "transformers", "open_clip_torch", "timm"),
    *("datasets", "snakemake", "scipy", "scikit-learn", "safetensors"),
)
_CLONE = Path(__file__).parents[3]
_GIT_SECONDS = 10
# Inside a rule, the profile unsets SLURM_JOB_GPUS and others, so that jobs can start jobs.
_SLURM = ("SLURM_JOB_ID", "SLURMD_NODENAME", "SLURM_STEP_GPUS", "SLURM_GPUS_ON_NODE")


class _Job(NamedTuple):
    """The command line and start of this process."""

    arguments: list[str]
    began: datetime
    clock: float


_job: _Job | None = None


def begin(arguments: Sequence[str]) -> None:
    """Set the command-line arguments that records will contain, and start counting time."""
    global _job
    _job = _Job([shown(text) for text in arguments], datetime.now(UTC), time.monotonic())


def record(result: Path) -> None:
    """Write the provenance of a result: into it if it is a folder, and next to it otherwise.

    Called before the result is renamed to its final name. Without the command line, in use as a library, the record has
    no ``arguments`` and no time.
    """
    path = result / FILE if result.is_dir() else result.with_name(f"{result.stem}.{FILE}")
    _write(path, {"job": _of_job(), **environment()})


def record_study(study: str, out: Path) -> None:
    """Write a study, given as JSON, with the versions and the machine to the file ``out``."""
    _write(out, {"study": json.loads(shown(study)), **environment()})


def environment() -> dict[str, Any]:
    """The library with its commit, the versions of its dependencies, and the hardware; unknown values are None."""
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


def _write(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with unlocked_output(path, PROVENANCE_RECORD) as partial:
        partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def shown(text: str) -> str:
    """Shorten an argument: replace the working directory by ``.`` and the user's home by ``~``."""
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
    """The commit of the clone that contains this library, and whether its files were changed."""
    unknown = {"commit": None, "dirty": None}
    if not (_CLONE / ".git").exists():
        return unknown  # installed from a package, whose environment may be inside an unrelated clone
    describe = ["git", "--no-optional-locks", "-C", str(_CLONE), "describe", "--always", "--dirty", "--abbrev=40"]
    own = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        # With tags excluded, git describes a commit by its hash.
        commit = subprocess.run(
            [*describe, "--exclude=*"], capture_output=True, text=True, check=True, timeout=_GIT_SECONDS, env=own
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return unknown
    return {"commit": commit.removesuffix("-dirty"), "dirty": commit.endswith("-dirty")}


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
    """Number of CPU cores that this process may use."""
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
