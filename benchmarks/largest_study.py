"""What Snakemake needs to plan the largest study, before its run and after it, and to start one of its jobs.

The largest is the paper's; a study of 200 encoders has eight times as many jobs, and is planned before its run alone.
"""

import csv
import os
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import yaml

from conceptshare.config.catalog import read_catalog

SNAKEFILE = Path(__file__).parents[1] / "Snakefile"
# Touching waits a tenth of a second for each of thousands of jobs.
_TOUCH = (
    "from snakemake.executors.touch import Executor; Executor.SLEEPING_TIME = 0; from snakemake.cli import main; main()"
)


def plan_largest_study(folder: Path) -> None:
    """Print the wall time and the peak memory of each plan, beside what they should stay below."""
    (folder / "config.yaml").write_text(yaml.safe_dump(largest_study()))
    (folder / "slurm").symlink_to(SNAKEFILE.parent / "profiles" / "slurm")
    plan = [*_snakemake(), "-n", "--quiet", "all"]
    jobs = {"": plan, ", with --profile slurm": [*plan, "--profile", "slurm"]}
    for how, command in jobs.items():
        _report(f"planning the largest study{how} (under 60 s and 1 GB)", command, folder)
    _pretend_to_run(folder)
    for how, command in jobs.items():
        _report(f"planning it again when it is finished{how}", command, folder)
    job = "correlations:dataset=coco,sae=paper,a=bert-base@0,b=bert-large@0"
    step = ["--target-jobs", job, "--allowed-rules", "correlations", "--force", "--nolock", "--mode", "remote"]
    _report("a job's own start, the workflow parsed again (under 3 s)", [*plan, *step], folder)
    (folder / "config.yaml").write_text(yaml.safe_dump(study_of(200)))
    for how, command in jobs.items():
        _report(f"planning 200 encoders in one matrix{how} (under 300 s and 3 GB)", command, folder)


def study_of(count: int) -> dict[str, object]:
    """All layers of so many encoders on one data set, each with each: those of `largest_study` under many names."""
    names, entries = _paper_encoders(), read_catalog("encoders")
    encoders = {f"{name}-{n}": entries[name] | {"use_layers": "all"} for n in range(count) for name in [names[n % 21]]}
    return {
        "study": "many",
        "datasets": {"coco": None},
        "encoders": encoders,
        "saes": {"paper": None},
        "analyses": {"matrices": {"all": {}}},
    }


def _paper_encoders() -> list[str]:
    return [
        name for name in read_catalog("encoders") if name.endswith(("-base", "-large")) and name != "mambavision-base"
    ]


def largest_study() -> dict[str, object]:
    """All layers of 21 of the paper's encoders on its three data sets, with two seeds, each member with each."""
    encoders = _paper_encoders()
    return {
        "study": "largest",
        "datasets": {"coco": None, "laion": None, "flowers": None},
        "encoders": {name: {"seeds": [0, 1], "use_layers": "all"} for name in encoders},
        "saes": {"paper": None},
        "analyses": {
            "matrices": {"all": {"members": [f"{name}@{seed}" for name in encoders for seed in (0, 1)]}},
            "layerwise": {"seeds": {"pairs": [[f"{name}@0", f"{name}@1"] for name in encoders]}},
        },
    }


def _snakemake() -> list[str]:
    return [sys.executable, "-m", "snakemake", "--snakefile", str(SNAKEFILE)]


def _report(what: str, command: list[str], folder: Path) -> None:
    start = time.perf_counter()
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - start
    if status:
        raise subprocess.CalledProcessError(status, command)
    print(f"{what}: {wall:.1f} s, {usage.ru_utime + usage.ru_stime:.1f} s of a core, {usage.ru_maxrss / 1e6:.2f} GB")


def _pretend_to_run(folder: Path) -> None:
    """Make every output, empty, and have Snakemake record it as made."""
    summary = subprocess.run([*_snakemake(), "--summary"], cwd=folder, capture_output=True, text=True, check=True)
    for row in csv.DictReader(summary.stdout.splitlines(), delimiter="\t"):
        path = folder / row["output_file"]
        if path.suffix in ("", ".zarr"):
            path.mkdir(parents=True, exist_ok=True)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    touch = [sys.executable, "-c", _TOUCH, "--snakefile", str(SNAKEFILE), "--touch", "--forceall", "--cores", "10000"]
    subprocess.run(touch, cwd=folder, capture_output=True, check=True)


if __name__ == "__main__":
    with TemporaryDirectory() as folder:
        plan_largest_study(Path(folder))
