"""What this machine has of all that a run needs, and what to do about what it lacks.

No check is trusted: what one raises becomes its finding, and disks and machines that do not answer are not waited for.
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

# Seconds that a request has, and that a check has which waits for others.
_REQUEST, _CHECK = 3.0, 5.0
# Checks of what is in memory or on the Python's own disk, from which importing torch can take long.
_PATIENT = {"Python", "packages", "torch"}


class Finding(NamedTuple):
    """What one check found."""

    name: str
    status: Literal["ok", "warning", "missing"]
    """``missing`` is what no run can do without; a ``warning`` some can."""
    found: str
    remedy: str = ""


def examine(config: Path | None, results: Path = RESULTS) -> list[Finding]:
    """Check this machine, and a study where one is given.

    Args:
        config: the study.
        results: the folder that results are written to.
    """
    from huggingface_hub import constants

    checks: dict[str, Callable[[], list[Finding]]] = {
        "Python": _python,
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
    # At once, as several wait for an answer of others.
    waiting = [_start(name, check) for name, check in checks.items()]
    return [finding for finish in waiting for finding in finish()]


def as_text(findings: list[Finding]) -> str:
    """A line a check: its status, its name, what was found and what to do about it."""
    width = max(len(finding.name) for finding in findings)
    return "\n".join(
        f"{finding.status:<9}{finding.name:<{width}}  {'; '.join(filter(None, [finding.found, finding.remedy]))}"
        for finding in findings
    )


def as_json(findings: list[Finding]) -> str:
    """The same for machines: a list of mappings."""
    return json.dumps([finding._asdict() for finding in findings])


def _start(name: str, check: Callable[[], list[Finding]]) -> Callable[[], list[Finding]]:
    """Begin a check in a thread of its own; what is returned gives what it finds."""
    found: list[list[Finding]] = []

    def run() -> None:
        try:
            found.append(check())
        except Exception as error:  # a machine can lack anything
            said = " ".join(str(error).split())
            found.append([Finding(name, "warning", f"could not be checked ({type(error).__name__}: {said})")])

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    started = time.monotonic()

    def finish() -> list[Finding]:
        thread.join(None if name in _PATIENT else max(0.0, started + _CHECK - time.monotonic()))
        return found[0] if found else [Finding(name, "warning", f"no answer in {_CHECK:.0f} seconds")]

    return finish


def _python() -> list[Finding]:
    from packaging.specifiers import SpecifierSet

    version = platform.python_version()
    needed = importlib.metadata.metadata("conceptshare")["Requires-Python"]
    if SpecifierSet(needed).contains(version, prereleases=True):
        return [Finding("Python", "ok", version)]
    return [
        Finding("Python", "missing", f"{version}, where {needed} is needed", "make the environment with a newer one")
    ]


def _packages() -> list[Finding]:
    from packaging.requirements import Requirement

    needed = [Requirement(text) for text in importlib.metadata.requires("conceptshare") or []]
    needed = [one for one in needed if one.marker is None or one.marker.evaluate({"extra": ""})]
    wrong = []
    for one in needed:
        try:
            version = importlib.metadata.version(one.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(Finding(one.name, "missing", "not installed", f"pip install '{one}'"))
            continue
        if not one.specifier.contains(version, prereleases=True):
            wrong.append(
                Finding(one.name, "missing", f"{version}, where {one.specifier} is needed", f"pip install '{one}'")
            )
    return wrong or [Finding("packages", "ok", f"all {len(needed)} in the declared ranges")]


def _torch() -> list[Finding]:
    try:
        import torch
    except Exception as error:  # a library that it loads can be absent in many ways
        said = " ".join(str(error).split())
        return [Finding("torch", "missing", f"cannot be imported ({type(error).__name__}: {said})", "install it again")]
    has = Finding("torch", "ok", f"{torch.__version__}, {torch.get_num_threads()} threads of {cores()} cores")
    return [has, _gpus()]


def _gpus() -> Finding:
    """Whether jobs here would compute on a GPU."""
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
    """Whether files can be written and locked where a folder is, or will be."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            free = f"{folder}: {format_bytes(shutil.disk_usage(there).free)} free"
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

    # Nothing but whether there is one: a token is a secret.
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
    except (OSError, ValueError) as error:  # the second where the address is none
        reason = getattr(error, "reason", error)
        return [Finding("hub", "warning", f"{constants.ENDPOINT} cannot be reached ({reason})", remedy)]
    return [Finding("hub", "ok", f"{constants.ENDPOINT} answers; {token}")]


def _snakemake() -> list[Finding]:
    program = Path(sys.executable).with_name("snakemake")
    if not program.is_file():
        found = shutil.which("snakemake")
        if found is None:
            remedy = f"{sys.executable} -m pip install snakemake"
            return [Finding("Snakemake", "missing", "no command snakemake beside Python or on PATH", remedy)]
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
        said = next(iter((ping.stderr or ping.stdout).splitlines()), "no further word")
        remedy = "ask those who run the cluster, or run without --profile slurm"
        return [Finding("Slurm", "warning", f"its controller does not answer ({said.strip()})", remedy)]
    partitions = _run("sinfo", "--noheader", "--format=%P %D nodes, GPUs %G").stdout.splitlines()
    accounts = _run("sacct", "--noheader", "--allocations").returncode == 0
    tells = (
        Finding("accounting", "ok", "sacct answers, which jobs are asked after with")
        if accounts
        else Finding(
            "accounting", "warning", "sacct does not answer", "set slurm-status-command: squeue in the profile"
        )
    )
    return [Finding("Slurm", "ok", "; ".join(line.strip() for line in partitions) or "no partitions"), tells]


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
    sound = Finding("study", "ok", f"{config}: {study.study} is sound")
    try:
        needed = make_plan(study, Rates(), results=results).total().written
    except StudyError as error:
        return [sound, Finding("disk", "warning", f"what the study needs is not known ({error})")]
    there = next(path for path in (results, *results.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    says = f"the study needs {format_bytes(needed)} where nothing of it is made, and {format_bytes(free)} are free"
    if needed <= free:
        return [sound, Finding("disk", "ok", says)]
    return [
        sound,
        Finding("disk", "warning", says, "link results/ to a larger disk, set stream: true, or limit the data"),
    ]
