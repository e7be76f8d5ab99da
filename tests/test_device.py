"""Jobs use the right device and precision."""

import pytest
import torch

from conceptshare import cli, device
from conceptshare.device import default_device, devices, find_driver, full_float32, log_device
from conceptshare.io import provenance
from conceptshare.io.errors import DeviceError

SMI = """
| NVIDIA-SMI 535.104.05             Driver Version: 535.104.05   CUDA Version: 12.2     |
"""
NEWER_SMI = """
| NVIDIA-SMI 595.20                 KMD Version: 595.20          CUDA UMD Version: 13.4 |
"""
PROC = """NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build  (dvs-builder)
GCC version:  gcc version 12.3.0 (Ubuntu 12.3.0-1ubuntu1~22.04)
"""


@pytest.fixture(autouse=True)
def _unasked(monkeypatch):
    for name in (device.DEVICE, *device._ALLOCATED):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def without_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def with_gpus(monkeypatch):
    """Makes torch report GPUs of given compute capabilities."""

    def see(*capabilities, kernels="sm_75 sm_80 sm_86 sm_90 sm_100 sm_120"):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda n: capabilities[n])
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda n: f"card {n}")
        monkeypatch.setattr(torch.cuda, "get_arch_list", kernels.split)
        monkeypatch.setattr(torch.version, "cuda", "13.2")

    return see


def with_driver(monkeypatch, version=None, cuda=None, smi=""):
    monkeypatch.setattr(device, "_driver_version", lambda: version)
    monkeypatch.setattr(device, "_driver_cuda", lambda: cuda)
    monkeypatch.setattr(device, "_nvidia_smi", lambda: smi)


def test_uses_and_logs_the_cpu_if_no_gpu_was_requested(without_gpu, capsys):
    assert default_device() == torch.device("cpu")
    log_device()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("device: CPU, ")
    assert torch.__version__ in line


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("CUDA_VISIBLE_DEVICES", "0"),
        ("CUDA_VISIBLE_DEVICES", "GPU-8932f937"),
        ("SLURM_JOB_GPUS", "0"),
        ("SLURM_STEP_GPUS", "2,3"),
        ("SLURM_GPUS", "a100:1"),
        ("SLURM_GPUS_ON_NODE", "1"),
        (device.DEVICE, "cuda"),
    ],
)
def test_a_job_with_an_allocated_gpu_fails_without_one_unless_the_cpu_is_chosen(without_gpu, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(DeviceError) as caught:
        log_device()
    message = str(caught.value)
    assert "\n" not in message
    assert f"({name}={value})" in message
    assert f"{device.DEVICE}=cpu" in message
    monkeypatch.setenv(device.DEVICE, "cpu")
    assert devices() == [torch.device("cpu")]


@pytest.mark.parametrize(
    ("name", "value"),
    [("CUDA_VISIBLE_DEVICES", ""), ("CUDA_VISIBLE_DEVICES", "-1"), ("SLURM_GPUS", "0"), (device.DEVICE, "")],
)
def test_detects_that_a_scheduler_allocated_no_gpu(without_gpu, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    assert devices() == [torch.device("cpu")]


@pytest.mark.parametrize(
    ("built", "driver", "parts"),
    [
        ("13.2", {"smi": SMI}, ["driver 535.104.05 for CUDA 12.2", "for CUDA 13.2", "for CUDA 13,", "for CUDA 12 "]),
        ("13.2", {"version": "570.86.15", "cuda": "12.8"}, ["driver 570.86.15 for CUDA 12.8", "torch for CUDA 12 "]),
        ("12.6", {"smi": NEWER_SMI}, ["driver 595.20 for CUDA 13.4", "nvidia-smi lists"]),
        ("13.2", {}, ["no NVIDIA driver", "a machine that has a GPU"]),
        (None, {"smi": SMI}, ["without CUDA", "built for CUDA (docs"]),
    ],
)
def test_the_message_has_the_cuda_versions_of_driver_and_wheel_and_a_remedy(
    without_gpu, monkeypatch, built, driver, parts
):
    monkeypatch.setattr(torch.version, "cuda", built)
    with_driver(monkeypatch, **driver)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with pytest.raises(DeviceError) as caught:
        devices()
    assert [part for part in parts if part not in str(caught.value)] == []


def test_finds_the_driver_in_proc_or_with_nvidia_smi(tmp_path, monkeypatch):
    monkeypatch.setattr(device, "_driver_cuda", lambda: None)
    smi = tmp_path / "nvidia-smi"
    smi.write_text(f"#!/bin/sh\ncat <<'END'\n{SMI}END\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert find_driver() == ("535.104.05", "12.2")
    monkeypatch.setattr(device.Path, "read_text", lambda *_: PROC)
    assert find_driver() == ("570.86.15", "12.2")


@pytest.mark.parametrize(
    ("capability", "kernels", "covered"),
    [
        ((9, 0), "sm_80 sm_90", True),
        ((8, 9), "sm_80 sm_90", True),
        ((7, 0), "sm_75 sm_80", False),
        ((10, 3), "sm_90 sm_120", False),
        ((10, 3), "sm_90 compute_90", True),
        ((12, 1), "sm_90a sm_120a", True),
    ],
)
def test_refuses_a_gpu_without_torch_kernels(with_gpus, monkeypatch, capability, kernels, covered):
    with_gpus(capability, kernels=kernels)
    if covered:
        assert devices() == [torch.device("cuda", 0)]
        return
    with pytest.raises(DeviceError, match=f"card 0 has compute capability {capability[0]}.{capability[1]}.*{kernels}"):
        devices()
    monkeypatch.setenv(device.DEVICE, "cpu")
    assert devices() == [torch.device("cpu")]


def test_uses_only_gpus_with_torch_kernels(with_gpus):
    with_gpus((6, 1), (8, 6), (8, 9))
    assert devices() == [torch.device("cuda", 1), torch.device("cuda", 2)]


def test_a_broken_gpu_is_a_one_line_error(with_gpus, monkeypatch):
    def broken(_):
        raise torch.AcceleratorError(
            "CUDA error: all CUDA-capable devices are busy or unavailable\nCUDA kernel errors …"
        )

    with_gpus((9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", broken)
    with pytest.raises(DeviceError) as caught:
        log_device()
    assert str(caught.value).startswith("the GPU does not work (CUDA error: all CUDA-capable devices are busy or")
    assert "\n" not in str(caught.value)


def test_refuses_an_unknown_device(monkeypatch):
    monkeypatch.setenv(device.DEVICE, "cuda:1")
    with pytest.raises(DeviceError, match="CONCEPTSHARE_DEVICE=cuda:1: set it to cpu or cuda"):
        devices()


_CHANGES = {
    "torch's defaults": lambda patch: None,
    "matmul precision high": lambda patch: torch.set_float32_matmul_precision("high"),
    "matmul precision medium": lambda patch: torch.set_float32_matmul_precision("medium"),
    "products, by the older name": lambda patch: patch.setattr(torch.backends.cuda.matmul, "allow_tf32", True),
    "convolutions, by the older name": lambda patch: patch.setattr(torch.backends.cudnn, "allow_tf32", False),
    "products, by the newer name": lambda patch: patch.setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
    "everything, by the newer name": lambda patch: patch.setattr(torch.backends, "fp32_precision", "tf32"),
}


def _settings():
    backends = torch.backends
    operations = [backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn, backends.mkldnn.matmul]
    return [operation.fp32_precision for operation in operations]


@pytest.mark.parametrize("change", _CHANGES.values(), ids=_CHANGES)
def test_full_float32_overrides_every_tf32_setting_and_restores_it(change):
    defaults = torch.get_float32_matmul_precision()
    try:
        with pytest.MonkeyPatch.context() as patch:
            change(patch)
            before = _settings()
            with full_float32():
                assert _settings() == ["ieee"] * 4
                # Reading the older names raises if they disagree with the newer ones.
                assert torch.get_float32_matmul_precision() == "highest"
                assert not torch.backends.cuda.matmul.allow_tf32
                assert not torch.backends.cudnn.allow_tf32
            assert _settings() == before
    finally:
        torch.set_float32_matmul_precision(defaults)


_MODEL = ["--encoder", "minilm", "--weights", "absent", "--data", "absent"]
_COMMANDS = {
    "activations": ["activations", *_MODEL, "--out", "out", "--tokens", "tokens"],
    "part of activations": ["activations", *_MODEL, "--out", "out", "--part", "1/2"],
    "sae": ["sae", "train", "--tokens", "absent", "--layer", "0", "--out", "out"],
    "stream": ["stream", *_MODEL, "--saes", "out", "--activations", "store"],
    "features": ["features", "--activations", "absent", "--saes", "absent", "--out", "out"],
    "examples": ["examples", *_MODEL, "--features", "absent", "--saes", "absent", "--out", "out"],
    "correlations": ["correlations", "absent", "missing", "--out", "out"],
    "similarity": ["similarity", "absent", "missing", "--out", "out.csv"],
}


@pytest.mark.parametrize("arguments", _COMMANDS.values(), ids=_COMMANDS)
def test_compute_jobs_log_their_device_and_fail_without_an_allocated_gpu(
    arguments, without_gpu, monkeypatch, tmp_path, capfd
):
    monkeypatch.chdir(tmp_path)
    # Process state that a job changes.
    monkeypatch.setattr("conceptshare.cli.options._OFFLINE", {})
    monkeypatch.setattr(provenance, "_job", None)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr("sys.argv", ["conceptshare", *arguments])
    with pytest.raises(SystemExit, match="1"):
        cli.main()
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("error: a GPU was requested (CUDA_VISIBLE_DEVICES=0)")
    monkeypatch.setattr("sys.argv", ["conceptshare", *arguments, "--gpus", "0"])
    monkeypatch.setenv(device.DEVICE, "")  # set by the command, restored afterwards
    with pytest.raises(SystemExit, match="1"):
        cli.main()
    first, *_, last = capfd.readouterr().err.splitlines()
    assert first.startswith("device: CPU, ")
    assert first.endswith("CONCEPTSHARE_DEVICE=cpu")
    assert "absent" in last
