"""The provenance record of a result."""

import json
import os
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from conceptshare.io import provenance
from conceptshare.io.store import new_store, open_store, save_array


@pytest.fixture(autouse=True)
def _as_if_new(monkeypatch):
    monkeypatch.setattr(provenance, "_job", None)
    provenance._commit.cache_clear()
    yield
    provenance._commit.cache_clear()


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def test_the_record_is_in_a_folder_or_next_to_a_file(tmp_path):
    (tmp_path / "folder").mkdir()
    provenance.record(tmp_path / "folder")
    provenance.record(tmp_path / "a@0__b.csv")
    assert [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*.*"))] == [
        "a@0__b.provenance.json",
        "folder/provenance.json",
    ]


def test_records_versions_and_hardware(tmp_path):
    provenance.record(tmp_path)
    record = read(tmp_path / "provenance.json")
    assert record["conceptshare"]["version"] == version("conceptshare")
    assert record["versions"]["numpy"] == np.__version__
    assert record["versions"]["open_clip_torch"] == version("open_clip_torch")
    assert record["python"] == ".".join(map(str, sys.version_info[:3]))
    assert record["hardware"]["cores"] == len(os.sched_getaffinity(0))
    assert record["hardware"]["threads"] == torch.get_num_threads()
    in_all = int(Path("/proc/meminfo").read_text().split()[1]) * 1024
    assert record["hardware"]["memory_bytes"] == pytest.approx(in_all, rel=0.01)


def test_records_the_command_and_its_resources(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    before = datetime.now(UTC).replace(microsecond=0)
    weights, source = f"{tmp_path}/weights.json", '{"source": "/home/someone/a b.parquet"}'
    provenance.begin(["activations", "--weights", weights, "--encoder", source, "--seed", "3", f"{tmp_path}-other"])
    provenance.record(tmp_path)
    job = read(tmp_path / "provenance.json")["job"]
    assert job["arguments"] == [
        *("activations", "--weights", "./weights.json", "--encoder", '{"source": "~/a b.parquet"}', "--seed", "3"),
        f"{tmp_path}-other",
    ]
    assert before <= datetime.fromisoformat(job["began"]) <= datetime.now(UTC)
    assert 0 <= job["seconds"] < 600
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    assert job["peak_memory_bytes"] >= resident / 2
    assert job["peak_gpu_memory_bytes"] is None or torch.cuda.is_available()


def test_calls_from_python_have_no_command(tmp_path):
    provenance.record(tmp_path)
    job = read(tmp_path / "provenance.json")["job"]
    assert job["arguments"] is job["began"] is job["seconds"] is None


def test_records_only_listed_environment_variables(tmp_path, monkeypatch):
    home = tmp_path / "home" / "someone"
    home.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    for name in ("HF_TOKEN", "USER", "LOGNAME", "SLURM_JOB_ACCOUNT"):
        monkeypatch.setenv(name, f"secret-{name}")
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURMD_NODENAME", "node-3")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    provenance.begin(["weights", "--out", str(home / "weights.json")])
    provenance.record(tmp_path)
    text = (tmp_path / "provenance.json").read_text()
    assert "secret" not in text
    assert "someone" not in text
    assert json.loads(text)["slurm"] == {"SLURM_JOB_ID": "17", "SLURMD_NODENAME": "node-3"}
    assert json.loads(text)["hardware"]["cuda_visible_devices"] == "2,3"


def git(folder, *arguments):
    command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false", "-C", str(folder)]
    return subprocess.run([*command, *arguments], check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A git clone that the library seems to be in."""
    folder = tmp_path / "clone"
    folder.mkdir()
    git(folder, "init", "-q")
    (folder / "code.py").write_text("1\n")
    git(folder, "add", ".")
    git(folder, "commit", "-q", "-m", "first")
    git(folder, "tag", "v1")
    monkeypatch.setattr(provenance, "_CLONE", folder)
    return folder


def commit():
    found = provenance.environment()["conceptshare"]
    return found["commit"], found["dirty"]


def test_records_the_commit_regardless_of_tags(clone):
    assert commit() == (git(clone, "rev-parse", "HEAD"), False)


def test_records_uncommitted_changes(clone):
    (clone / "code.py").write_text("2\n")
    assert commit() == (git(clone, "rev-parse", "HEAD"), True)


def test_ignores_another_repository_set_by_git_variables(clone, tmp_path, monkeypatch):
    git(tmp_path, "init", "-q", "other")
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "other" / ".git"))
    found = commit()
    monkeypatch.delenv("GIT_DIR")
    assert found == (git(clone, "rev-parse", "HEAD"), False)


def test_a_library_installed_inside_a_clone_has_no_commit(clone, monkeypatch):
    (clone / "site-packages").mkdir()
    monkeypatch.setattr(provenance, "_CLONE", clone / "site-packages")
    assert commit() == (None, None)


def test_records_no_commit_without_git(clone, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert commit() == (None, None)


def test_records_no_commit_if_git_fails(clone):
    (clone / ".git" / "HEAD").write_text("nonsense")
    assert commit() == (None, None)


def test_does_not_import_torch(tmp_path):
    code = "import sys; from conceptshare.io import provenance; provenance.environment(); print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"


def test_records_the_gpus_that_torch_sees(tmp_path, monkeypatch):
    # Test machines have no GPU, so this imitates torch with two.
    cuda = SimpleNamespace(
        is_available=lambda: True,
        device_count=lambda: 2,
        get_device_name=lambda n: f"GPU {n}",
        max_memory_allocated=lambda n: 10 + n,
    )
    stand_in = SimpleNamespace(cuda=cuda, version=SimpleNamespace(cuda="13.0"), get_num_threads=lambda: 4)
    monkeypatch.setitem(sys.modules, "torch", stand_in)
    provenance.record(tmp_path)
    record = read(tmp_path / "provenance.json")
    assert record["hardware"]["gpus"] == ["GPU 0", "GPU 1"]
    assert record["hardware"]["cuda"] == "13.0"
    assert record["job"]["peak_gpu_memory_bytes"] == [10, 11]


def test_a_store_appears_with_its_record_and_is_valid_without_it(tmp_path):
    path = tmp_path / "a.zarr"
    with new_store(path, "activations", {}) as group:
        save_array(group, "x", np.arange(3))
    account = path / "provenance.json"
    assert read(account)["versions"]["zarr"] == version("zarr")
    assert "provenance.json" not in open_store(path, "activations").attrs["files"]
    account.write_text("something else")
    open_store(path, "activations")
    account.unlink()
    open_store(path, "activations")


def study_of(encoders):
    analyses = {kind: {} for kind in ("matrices", "layerwise", "sharedness")}
    return {"study": "s", "datasets": {}, "encoders": encoders, "saes": {}, "analyses": analyses, "stream": False}


def test_the_record_of_a_study_omits_the_users_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    study = study_of({"a": {"model": "/home/someone/a"}})
    provenance.record_study(json.dumps(study), tmp_path / "s" / "provenance.json")
    record = read(tmp_path / "s" / "provenance.json")
    assert record["study"] == study_of({"a": {"model": "~/a"}})
    assert [path for path in (tmp_path / "s").iterdir() if "someone" in path.read_text()] == []
    assert record["versions"]["torch"] == version("torch")
