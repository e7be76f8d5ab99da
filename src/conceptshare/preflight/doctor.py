"""Checks that this machine has everything a run needs, with a remedy for each missing item.

Checks may fail: an exception becomes a finding, and checks of disks and servers that do not respond time out.
"""

import fcntl
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

from conceptshare.config.study import load_study
from conceptshare.io.errors import ConceptshareError, DeviceError, StudyError
from conceptshare.io.provenance import cores
from conceptshare.preflight.plan import RESULTS, Rates, format_bytes, make_plan

# Timeouts in seconds of a request, and of a check that depends on other machines.
_REQUEST, _CHECK = 3.0, 5.0
# Checks without a timeout: they only depend on memory and Python's own disk, but importing torch can take long.
_NO_TIMEOUT = {"Python", "packages", "torch"}


class Finding(NamedTuple):
    """Result of one check."""

    name: str
    status: Literal["ok", "warning", "missing"]
    """``missing`` if every run needs it; ``warning`` if only some runs do."""
    found: str
    remedy: str = ""


def examine(config: Path | None, results: Path = RESULTS) -> list[Finding]:
    """Check this machine, and a study if one is given.

    Args:
        config: the study.
        results: the folder that results are written to.
    """
    from huggingface_hub import constants

    checks: dict[str, Callable[[], list[Finding]]] = {
        # pip does not install this package for an older Python.
        "Python": lambda: [Finding("Python", "ok", platform.python_version())],
        "packages": _packages,
        "torch": _torch,
        "results": lambda: [_disk("results", results, "missing")],
        "hub cache": lambda: [_disk("hub cache", Path(constants.HF_HUB_CACHE), "warning")],
        "hub": _hub,
        "Snakemake": _snakemake,
        "Slurm": _slurm,
        "conda": _conda,
    }
    if config is not None:
        checks["study"] = lambda: _study(config, results)
    # In parallel, because several wait for other machines.
    waiting = [_start(name, check) for name, check in checks.items()]
    return [finding for finish in waiting for finding in finish()]


def as_text(findings: list[Finding]) -> str:
    """One line per check: status, name, finding and remedy."""
    width = max(len(finding.name) for finding in findings)
    return "\n".join(
        f"{finding.status:<9}{finding.name:<{width}}  {'; '.join(filter(None, [finding.found, finding.remedy]))}"
        for finding in findings
    )


def as_json(findings: list[Finding]) -> str:
    """Findings as JSON: a list of objects."""
    return json.dumps([finding._asdict() for finding in findings])


def _start(name: str, check: Callable[[], list[Finding]]) -> Callable[[], list[Finding]]:
    """Start a check in its own thread, and return a function that waits for its findings."""
    findings: list[list[Finding]] = []

    def run() -> None:
        try:
            findings.append(check())
        except Exception as error:  # anything can be missing on a machine
            message = " ".join(str(error).split())
            findings.append([Finding(name, "warning", f"could not be checked ({type(error).__name__}: {message})")])

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    started = time.monotonic()

    def finish() -> list[Finding]:
        thread.join(None if name in _NO_TIMEOUT else max(0.0, started + _CHECK - time.monotonic()))
        return findings[0] if findings else [Finding(name, "warning", f"no answer in {_CHECK:.0f} seconds")]

    return finish


def _packages() -> list[Finding]:
    from packaging.requirements import Requirement

    needed = [Requirement(text) for text in importlib.metadata.requires("conceptshare") or []]
    needed = [one for one in needed if one.marker is None or one.marker.evaluate({"extra": ""})]
    wrong = []
    for one in needed:
        try:
            version = importlib.metadata.version(one.name)
            if one.specifier.contains(version, prereleases=True):
                continue
            found = f"{version}; needed: {one.specifier}"
        except importlib.metadata.PackageNotFoundError:
            found = "not installed"
        wrong.append(Finding(one.name, "missing", found, f"pip install '{one}'"))
    return wrong or [Finding("packages", "ok", f"all {len(needed)} in the declared ranges")]


def _torch() -> list[Finding]:
    try:
        import torch
    except Exception as error:  # missing shared libraries raise many types
        message = " ".join(str(error).split())
        return [Finding("torch", "missing", f"cannot be imported ({type(error).__name__}: {message})", "reinstall it")]
    has = Finding("torch", "ok", f"{torch.__version__}, {torch.get_num_threads()} threads of {cores()} cores")
    return [has, _gpus()]


def _gpus() -> Finding:
    """Check whether jobs on this machine use a GPU."""
    import torch

    from conceptshare.device import DEVICE, devices, find_driver, why_no_gpu

    try:
        usable = devices()
    except DeviceError as error:
        return Finding("GPU", "missing", str(error))
    if usable[0].type == "cuda":
        seen = (torch.cuda.get_device_properties(gpu) for gpu in usable)
        gpus = [f"{gpu.name} with {format_bytes(gpu.total_memory)}" for gpu in seen]
        bf16 = "with bfloat16" if torch.cuda.is_bf16_supported() else "without bfloat16"
        return Finding("GPU", "ok", f"{', '.join(gpus)}; {find_driver()}, torch for CUDA {torch.version.cuda}, {bf16}")
    if os.environ.get(DEVICE):
        return Finding("GPU", "ok", f"{DEVICE}=cpu; the CPU is used")
    if any(find_driver()) or shutil.which("nvidia-smi"):
        return Finding("GPU", "warning", f"the CPU is used: {why_no_gpu()}")
    return Finding("GPU", "ok", "none here; the CPU is used")


def _disk(name: str, folder: Path, status: Literal["warning", "missing"]) -> Finding:
    """Check whether files can be written and locked in a folder, or in its nearest existing parent."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=existing) as file:
            free = f"{folder}: {format_bytes(shutil.disk_usage(existing).free)} free"
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                remedy = "use a disk with flock, or start one run at a time"
                return Finding(name, "warning", f"{free}, but files cannot be locked there ({error.strerror})", remedy)
    except OSError as error:
        remedy = "make it writable, or link it to a disk that is"
        return Finding(name, status, f"{folder}: cannot be written to ({error.strerror})", remedy)
    return Finding(name, "ok", f"{free}, locks work")


def _hub() -> list[Finding]:
    from huggingface_hub import constants, get_token

    # Only report whether there is a token, because it is a secret.
    token = "a token is set" if get_token() else "no token is set, which gated models and data sets need"
    if constants.is_offline_mode():
        return [Finding("hub", "ok", f"offline by choice (HF_HUB_OFFLINE); {token}")]
    remedy = "only what is on this machine can be used; check the connection, HF_ENDPOINT and proxies"
    try:
        with urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=_REQUEST):
            pass
    except urllib.error.HTTPError as error:
        if error.code >= 500:
            return [Finding("hub", "warning", f"{constants.ENDPOINT} answers {error.code} {error.reason}", remedy)]
    except (OSError, ValueError) as error:  # ValueError for an invalid URL
        reason = getattr(error, "reason", error)
        return [Finding("hub", "warning", f"{constants.ENDPOINT} cannot be reached ({reason})", remedy)]
    return [Finding("hub", "ok", f"{constants.ENDPOINT} answers; {token}")]


def _snakemake() -> list[Finding]:
    program = Path(sys.executable).with_name("snakemake")
    if not program.is_file():
        found = shutil.which("snakemake")
        if found is None:
            remedy = f"{sys.executable} -m pip install snakemake"
            return [Finding("Snakemake", "missing", "no command snakemake next to Python or on PATH", remedy)]
        program = Path(found)
    plugin = importlib.metadata.version("snakemake-executor-plugin-slurm")
    version = importlib.metadata.version("snakemake")
    return [Finding("Snakemake", "ok", f"{version}, with its Slurm plugin {plugin}")]


def _slurm() -> list[Finding]:
    if shutil.which("sbatch") is None:
        return [Finding("Slurm", "ok", "none here (no sbatch on PATH); jobs run on this machine")]
    for program in ("squeue", "sinfo", "scontrol"):
        if shutil.which(program) is None:
            return [Finding("Slurm", "warning", f"sbatch is on PATH, but no {program}", "add it, or leave Slurm out")]
    ping = _run("scontrol", "ping")
    if ping.returncode != 0 or " UP" not in ping.stdout:
        message = next(iter((ping.stderr or ping.stdout).splitlines()), "no details")
        remedy = "ask the cluster's administrators, or run without --profile slurm"
        return [Finding("Slurm", "warning", f"its controller does not answer ({message.strip()})", remedy)]
    partitions = _run("sinfo", "--noheader", "--format=%P %D nodes, GPUs %G").stdout.splitlines()
    slurm = Finding("Slurm", "ok", "; ".join(line.strip() for line in partitions) or "no partitions")
    if _run("sacct", "--noheader", "--allocations").returncode == 0:
        return [slurm, Finding("accounting", "ok", "sacct answers; it is used to query the state of jobs")]
    remedy = "set slurm-status-command: squeue in the profile"
    return [slurm, Finding("accounting", "warning", "sacct does not answer", remedy)]


def _run(*command: str) -> "subprocess.CompletedProcess[str]":
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=_REQUEST)
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(command, 1, "", str(error))


def _conda() -> list[Finding]:
    program = next(filter(None, map(shutil.which, ("mamba", "conda"))), None)
    return [Finding("conda", "ok", program or "none on PATH; only --sdm conda needs it")]


def _study(config: Path, results: Path) -> list[Finding]:
    try:
        study = load_study(config)
    except ConceptshareError as error:
        return [Finding("study", "missing", line) for line in str(error).splitlines()]
    valid = Finding("study", "ok", f"{config}: {study.study} is valid")
    try:
        needed = make_plan(study, Rates(), results=results).total().written
    except StudyError as error:
        return [valid, Finding("disk", "warning", f"the size of the study is unknown ({error})")]
    existing = next(path for path in (results, *results.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    sizes = f"the study needs {format_bytes(needed)} without existing results, and {format_bytes(free)} are free"
    if needed <= free:
        return [valid, Finding("disk", "ok", sizes)]
    remedy = "link results/ to a larger disk, set stream: true, or limit the data"
    return [valid, Finding("disk", "warning", sizes, remedy)]
