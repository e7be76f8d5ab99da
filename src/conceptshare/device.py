"""Choice of device and float32 precision; the only module that chooses a device."""

import ctypes
import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from conceptshare.io.errors import DeviceError
from conceptshare.io.progress import info

DEVICE = "CONCEPTSHARE_DEVICE"
"""Environment variable that chooses the device: ``cpu``, or ``cuda``, which fails without a GPU. If unset, jobs use a
GPU if there is one, and fail if a scheduler allocated one that cannot be used."""

_OR_CPU = f"or set {DEVICE}=cpu to compute on the CPU"
# Variables that a scheduler sets for a job with a GPU, and their values that mean none.
_ALLOCATED = {
    "CUDA_VISIBLE_DEVICES": {"", "-1", "NoDevFiles"},
    "SLURM_JOB_GPUS": {""},
    "SLURM_STEP_GPUS": {""},
    "SLURM_GPUS": {"", "0"},
    "SLURM_GPUS_ON_NODE": {"", "0"},
}


def devices() -> list[torch.device]:
    """Every GPU that torch can use, or the CPU if there is none or `DEVICE` is ``cpu``.

    Raises:
        DeviceError: if a GPU was requested and none can be used, or the available GPUs do not work.
    """
    requested = _requested()
    if requested == "cpu":
        return [torch.device("cpu")]
    with _as_device_error():
        capabilities = [torch.cuda.get_device_capability(n) for n in range(_count())]
    usable = [torch.device("cuda", n) for n, capability in enumerate(capabilities) if _covered(capability)]
    if capabilities and not usable:
        raise DeviceError(
            f"{torch.cuda.get_device_name(0)} has compute capability {'.'.join(map(str, capabilities[0]))}, but "
            f"{_torch()} only has kernels for {' '.join(torch.cuda.get_arch_list())}; install a torch with kernels "
            f"for this GPU (docs/clusters.md), {_OR_CPU}"
        )
    if not usable and requested:
        raise DeviceError(f"a GPU was requested ({requested}), but {why_no_gpu()}, {_OR_CPU}")
    return usable or [torch.device("cpu")]


def default_device() -> torch.device:
    """Return the first of `devices`."""
    return devices()[0]


def log_device() -> None:
    """Check that the device of this process works, and log it in one line.

    Raises:
        DeviceError: as in `devices`, or if the GPU does not work.
    """
    chosen = default_device()
    if chosen.type == "cpu":
        reason = f"{DEVICE}=cpu" if _requested() else f"{_torch()} sees no GPU, {find_driver()}"
        info(f"device: CPU, {torch.get_num_threads()} threads; {reason}")
        return
    with _as_device_error():
        torch.ones(1, device=chosen).item()
    info(f"device: {chosen}, {torch.cuda.get_device_name(chosen)}; {_torch()}, {find_driver()}")


def why_no_gpu() -> str:
    """Explain why torch sees no GPU, with a remedy."""
    driver, built = find_driver(), torch.version.cuda
    seen = f"{_torch()} sees none; {driver}"
    if built is None:
        return f"{seen}; install a torch that is built for CUDA (docs/clusters.md)"
    if driver == Driver(None, None):
        return f"{seen}; run on a machine that has a GPU and its driver"
    needs, has = built.split(".")[0], (driver.cuda or built).split(".")[0]
    if int(has) < int(needs):
        return (
            f"{seen}; update the driver to one for CUDA {needs}, or install a torch for CUDA {has} (docs/clusters.md)"
        )
    return f"{seen}; check that nvidia-smi lists a GPU that CUDA_VISIBLE_DEVICES names"


class Driver(NamedTuple):
    """NVIDIA's driver; unknown fields are None."""

    version: str | None
    cuda: str | None
    """The newest CUDA version that it supports."""

    def __str__(self) -> str:
        if not any(self):
            return "no NVIDIA driver"
        return f"driver {self.version or 'of unknown version'} for CUDA {self.cuda or 'of unknown version'}"


def find_driver() -> Driver:
    """Find the driver of this machine, from the driver itself or else from nvidia-smi."""
    version, cuda = _driver_version(), _driver_cuda()
    if not (version and cuda):
        shown = _nvidia_smi()
        version = version or _first(r"(?:Driver|KMD) Version\s*:\s*(\d[\d.]*)", shown)
        cuda = cuda or _first(r"CUDA [\w ]*Version\s*:\s*(\d[\d.]*)", shown)
    return Driver(version, cuda)


def _driver_version() -> str | None:
    try:
        return _first(r"Kernel Module[\w ]*?\s+(\d[\d.]*)", Path("/proc/driver/nvidia/version").read_text("utf-8"))
    except OSError:
        return None


def _driver_cuda() -> str | None:
    number = ctypes.c_int()
    try:
        failed = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(number))
    except (OSError, AttributeError):
        return None
    return None if failed else f"{number.value // 1000}.{number.value % 1000 // 10}"


def _nvidia_smi() -> str:
    try:
        return subprocess.run(["nvidia-smi"], capture_output=True, text=True, timeout=10, check=False).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def _first(pattern: str, text: str) -> str | None:
    match = re.search(pattern, text)
    return match and match[1]


def _requested() -> str | None:
    """``cpu``, or the variable and value that request a GPU; None if there is no request."""
    choice = os.environ.get(DEVICE, "")
    if choice not in ("", "cpu", "cuda"):
        raise DeviceError(f"{DEVICE}={choice}: set it to cpu or cuda; CUDA_VISIBLE_DEVICES chooses among GPUs")
    if choice:
        return "cpu" if choice == "cpu" else f"{DEVICE}=cuda"
    allocated = (f"{name}={os.environ[name]}" for name, no in _ALLOCATED.items() if os.environ.get(name, "") not in no)
    return next(allocated, None)


def _count() -> int:
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


@contextmanager
def _as_device_error() -> Iterator[None]:
    """Convert errors of a GPU that does not work to a DeviceError of one line."""
    try:
        yield
    except RuntimeError as error:
        message = str(error).strip().partition("\n")[0]
        raise DeviceError(
            f"the GPU does not work ({message}); see whether nvidia-smi shows an error or another job, {_OR_CPU}"
        ) from error


def _covered(capability: tuple[int, int]) -> bool:
    """Whether torch has kernels for a compute capability, or PTX (compute_XY) to compile them from."""
    if torch.version.cuda is None:  # ROCm builds number architectures differently
        return True
    for name in torch.cuda.get_arch_list():
        kind, _, number = name.partition("_")
        built = divmod(int(re.sub(r"\D", "", number)), 10)
        if built <= capability and (kind == "compute" or built[0] == capability[0]):
            return True
    return False


def _torch() -> str:
    return (
        f"torch {torch.__version__} built {f'for CUDA {torch.version.cuda}' if torch.version.cuda else 'without CUDA'}"
    )


@contextmanager
def full_float32() -> Iterator[None]:
    """Use full float32 precision (24 bits) in products and convolutions, in all threads of the process.

    By default a GPU uses TF32 (11 bits) in convolutions, and in products too if a setting or the environment enables
    it. cuDNN stays enabled but uses deterministic algorithms. Products in 16 bits are not affected. Settings are
    restored at the end.
    """
    gpu: Any = torch.backends.cudnn  # torch's stubs lack the settings per operation
    cpu: Any = torch.backends.mkldnn
    operations = (torch.backends.cuda.matmul, gpu.conv, gpu.rnn, cpu.matmul, cpu.conv, cpu.rnn)
    before, deterministic = [operation.fp32_precision for operation in operations], gpu.deterministic

    def use(precisions: list[str]) -> None:
        # torch has two names for each setting, and reading the older one raises if they disagree: set both.
        of_products = "medium" if precisions[3] == "bf16" else "high"
        torch.set_float32_matmul_precision(of_products if precisions[0] == "tf32" else "highest")
        gpu.allow_tf32 = precisions[1] == "tf32"
        for operation, precision in zip(operations, precisions, strict=True):
            operation.fp32_precision = precision

    use(["ieee"] * len(operations))
    gpu.deterministic = True
    try:
        yield
    finally:
        use(before)
        gpu.deterministic = deterministic
