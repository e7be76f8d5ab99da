"""The findings of doctor, on this machine as it is and in deliberately broken setups."""

import json
import shutil
import socket
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from snakemake_executor_plugin_slurm import ExecutorSettings

from conceptshare.config.study import load_study
from conceptshare.preflight import doctor
from conceptshare.preflight.plan import Rates, format_bytes, make_plan
from tests.helpers.forks import run_forked
from tests.helpers.hub import TOKEN, use

CLONE = Path(__file__).parents[2]


def command(*arguments, folder=CLONE, **environment):
    """Run doctor in a separate process."""
    code = "from conceptshare.cli import main; main()"
    return run_forked(code, "doctor", *arguments, folder=folder, environment={"HF_HUB_OFFLINE": "1", **environment})


def by_name(findings):
    return {finding.name: finding for finding in findings}


@pytest.fixture(autouse=True)
def _in_the_clone(monkeypatch):
    monkeypatch.chdir(CLONE)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A function that sets the hub's URL and returns the findings."""

    def ask(endpoint):
        use(monkeypatch, endpoint, tmp_path / "cache")
        (finding,) = doctor._hub()
        return finding

    return ask


def test_reports_one_line_per_check_on_this_machine():
    found = command()
    assert found.returncode == 0, found.stdout + found.stderr
    assert found.stderr == ""
    lines = found.stdout.splitlines()
    assert {line.split()[0] for line in lines} <= {"ok", "warning"}
    for name in ("Python", "packages", "torch", "GPU", "results", "hub cache", "hub", "Snakemake", "Slurm", "conda"):
        assert any(line[9:].startswith(name) for line in lines), name
    assert "config.yaml: openclipart is valid" in found.stdout
    assert "offline by choice" in found.stdout


def test_prints_json_without_the_token(tmp_path):
    found = command("--json", folder=tmp_path, HF_TOKEN=TOKEN)
    checks = {check["name"]: check for check in json.loads(found.stdout)}
    assert checks["hub"] == {
        "name": "hub",
        "status": "ok",
        "found": "offline by choice (HF_HUB_OFFLINE); a token is set",
        "remedy": "",
    }
    assert "study" not in checks  # without config.yaml
    assert TOKEN not in found.stdout + found.stderr


def test_an_invalid_study_is_a_failure(tmp_path):
    (tmp_path / "study.yaml").write_text("study: a b\n")
    found = command("--study", "study.yaml", folder=tmp_path)
    assert found.returncode == 1
    assert "missing  study" in found.stdout
    assert "study.yaml: study: 'a b' is not a name" in found.stdout
    assert "Traceback" not in found.stderr


def test_warns_with_both_sizes_if_a_study_does_not_fit_the_disk(monkeypatch):
    assert by_name(doctor._study(CLONE / "config.yaml", Path("results")))["disk"].status == "ok"
    large = CLONE / "config" / "coco-large.yaml"
    needed = make_plan(load_study(large), Rates()).total().written
    for free, status in ((needed + 1, "ok"), (needed - 1, "warning")):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        disk = by_name(doctor._study(large, Path("results")))["disk"]
        assert disk.status == status
        assert disk.found.count(format_bytes(needed)) == 2


class Answering(BaseHTTPRequestHandler):
    """A hub's front page."""

    status = 200

    def do_HEAD(self):
        self.send_response(self.status)
        self.end_headers()

    def log_message(self, *args):
        """Log nothing."""


@pytest.mark.parametrize(("status", "expected"), [(200, "ok"), (401, "ok"), (404, "ok"), (405, "ok"), (503, "warning")])
def test_a_hub_that_answers_is_reachable(hub, status, expected):
    handler = type("Handler", (Answering,), {"status": status})
    with HTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        finding = hub(f"http://127.0.0.1:{server.server_port}")
    assert finding.status == expected
    assert f"http://127.0.0.1:{server.server_port} answers" in finding.found


def test_a_hub_that_refuses_is_a_warning_with_its_url(hub):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{unused.getsockname()[1]}"
    finding = hub(endpoint)
    assert finding.status == "warning"
    assert f"{endpoint} cannot be reached" in finding.found
    assert "HF_ENDPOINT" in finding.remedy


def test_does_not_wait_for_a_hub_that_does_not_answer(hub, monkeypatch):
    monkeypatch.setattr(doctor, "_REQUEST", 0.2)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        finding = hub(f"http://127.0.0.1:{silent.getsockname()[1]}")
    assert finding.status == "warning"
    assert "timed out" in finding.found


def test_an_invalid_endpoint_is_a_warning(hub):
    finding = hub("not an address")
    assert finding.status == "warning"
    assert "not an address cannot be reached (unknown url type" in finding.found


def test_reports_a_token_file_without_its_content(hub, tmp_path):
    with HTTPServer(("127.0.0.1", 0), Answering) as server:
        for content, words in (("", "no token is set"), (TOKEN, "; a token is set")):
            threading.Thread(target=server.handle_request, daemon=True).start()
            (tmp_path / "cache").mkdir(exist_ok=True)
            (tmp_path / "cache" / "token").write_text(content)
            finding = hub(f"http://127.0.0.1:{server.server_port}")
            assert words in finding.found
            assert TOKEN not in str(finding)


def test_does_not_wait_for_a_check_that_hangs(monkeypatch):
    monkeypatch.setattr(doctor, "_CHECK", 0.1)
    over = threading.Event()
    (finding,) = doctor._start("Slurm", lambda: [over.wait()])()
    over.set()
    assert finding.status == "warning"
    assert finding.found.startswith("no answer")


def test_a_check_that_raises_is_a_warning_with_the_error(monkeypatch):
    def broken():
        raise ZeroDivisionError("by\nnought")

    (finding,) = doctor._start("GPU", broken)()
    assert finding == ("GPU", "warning", "could not be checked (ZeroDivisionError: by nought)", "")


def test_an_unwritable_results_folder_fails_and_an_unwritable_cache_warns(tmp_path):
    for name, status in (("results", "missing"), ("hub cache", "warning")):
        finding = doctor._disk(name, Path("/proc/no-such-folder"), status)
        assert finding.status == status
        assert "/proc/no-such-folder: cannot be written to" in finding.found
        assert finding.remedy
    (tmp_path / "results").write_text("a file")
    assert doctor._disk("results", tmp_path / "results", "missing").status == "missing"


def test_checking_a_folder_leaves_nothing_in_it(tmp_path):
    finding = doctor._disk("results", tmp_path / "results" / "not there yet", "missing")
    assert finding.status == "ok"
    assert "locks work" in finding.found
    assert list(tmp_path.iterdir()) == []


def programs(folder, **scripts):
    """A PATH with only these shell scripts."""
    folder.mkdir()
    for name, script in scripts.items():
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)
    return str(folder)


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """A function that puts a cluster's programs on PATH and returns the findings."""

    def ask(**scripts):
        monkeypatch.setenv("PATH", programs(tmp_path / "bin", **scripts))
        return by_name(doctor._slurm())

    return ask


UP = {
    "sbatch": "",
    "squeue": "",
    "scontrol": "echo 'Slurmctld(primary) at head is UP'",
    "sinfo": "echo 'gpu* 4 nodes, GPUs gpu:a100:8'; echo 'cpu 10 nodes, GPUs (null)'",
    "sacct": "echo 17",
}


def test_a_machine_without_slurm_is_fine(slurm):
    assert slurm()["Slurm"].status == "ok"


def test_reports_a_clusters_partitions_and_accounting(slurm):
    found = slurm(**UP)
    assert found["Slurm"] == ("Slurm", "ok", "gpu* 4 nodes, GPUs gpu:a100:8; cpu 10 nodes, GPUs (null)", "")
    assert found["accounting"].status == "ok"


def test_suggests_a_status_command_for_a_cluster_without_accounting(slurm):
    found = slurm(**UP | {"sacct": "echo 'Slurm accounting storage is disabled' >&2; exit 1"})
    assert found["accounting"].status == "warning"
    assert "slurm-status-command: squeue" in found["accounting"].remedy


def test_a_controller_that_does_not_answer_is_a_warning_with_its_message(slurm):
    found = slurm(**UP | {"scontrol": "echo 'Slurmctld(primary) at head is DOWN'"})["Slurm"]
    assert found.status == "warning"
    assert "at head is DOWN" in found.found


def test_does_not_wait_for_a_program_that_hangs(slurm, monkeypatch):
    monkeypatch.setattr(doctor, "_REQUEST", 0.2)
    assert slurm(**UP | {"scontrol": "exec /bin/sleep 20"})["Slurm"].status == "warning"


def test_names_a_missing_program(slurm):
    found = slurm(**{name: script for name, script in UP.items() if name != "squeue"})["Slurm"]
    assert (found.status, found.found) == ("warning", "sbatch is on PATH, but no squeue")


@pytest.mark.parametrize(
    ("requirement", "found"),
    [("no-such-package>=1", "not installed"), ("numpy>=99", "needed: >=99"), ("numpy<1; extra == 'x'", None)],
)
def test_missing_or_outdated_packages_come_with_the_install_command(monkeypatch, requirement, found):
    monkeypatch.setattr("importlib.metadata.requires", lambda _: ["numpy>=2", requirement])
    (finding,) = doctor._packages()
    if found is None:
        assert (finding.status, finding.found) == ("ok", "all 1 in the declared ranges")
        return
    assert finding.status == "missing"
    assert found in finding.found
    assert finding.remedy == f"pip install '{requirement}'"


def test_warns_about_a_gpu_that_torch_does_not_see(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("PATH", programs(tmp_path / "without"))
    assert by_name(doctor._torch())["GPU"].status == "ok"
    monkeypatch.setenv("PATH", programs(tmp_path / "with", **{"nvidia-smi": ""}))
    assert by_name(doctor._torch())["GPU"].status == "warning"


def test_a_requested_but_unusable_gpu_is_a_failure(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("SLURM_JOB_GPUS", "3")
    gpu = by_name(doctor._torch())["GPU"]
    assert gpu.status == "missing"
    assert "SLURM_JOB_GPUS=3" in gpu.found
    monkeypatch.setenv("CONCEPTSHARE_DEVICE", "cpu")
    assert by_name(doctor._torch())["GPU"][1:3] == ("ok", "CONCEPTSHARE_DEVICE=cpu; the CPU is used")


def test_the_status_command_is_known_to_snakemake():
    assert "status_command" in ExecutorSettings.__dataclass_fields__
