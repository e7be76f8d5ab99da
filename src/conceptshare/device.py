"""Where a job computes, and how exactly."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def full_float32() -> Iterator[None]:
    """Keep all 24 bits of float32 factors in products and convolutions, in all threads of the process.

    By default a GPU keeps 11 of them (TF32) in convolutions, and in products too if a setting or the environment asks
    for it. Products of 16-bit factors stay as they are, and so does cuDNN. Settings are restored at the end.
    """
    gpu: Any = torch.backends.cudnn  # torch's stubs lack the settings of single operations
    cpu: Any = torch.backends.mkldnn
    operations = (torch.backends.cuda.matmul, gpu.conv, gpu.rnn, cpu.matmul, cpu.conv, cpu.rnn)
    before = [operation.fp32_precision for operation in operations]

    def use(precisions: list[str]) -> None:
        # torch has two names for each setting, and reading the older one raises if they disagree: set both.
        of_products = "medium" if precisions[3] == "bf16" else "high"
        torch.set_float32_matmul_precision(of_products if precisions[0] == "tf32" else "highest")
        gpu.allow_tf32 = precisions[1] == "tf32"
        for operation, precision in zip(operations, precisions, strict=True):
            operation.fp32_precision = precision

    use(["ieee"] * len(operations))
    try:
        yield
    finally:
        use(before)
