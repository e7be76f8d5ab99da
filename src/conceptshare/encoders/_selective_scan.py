"""Selective scan of state-space models in plain PyTorch, for machines without the CUDA-only package mamba-ssm."""

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional

from conceptshare.device import default_device

_PACKAGE = "mamba_ssm"
_MODULE = "mamba_ssm.ops.selective_scan_interface"


def supply_selective_scan() -> None:
    """Make ``mamba_ssm`` importable for model code: the real package if it is installed and usable, else this scan."""
    if _PACKAGE in sys.modules or (default_device().type == "cuda" and importlib.util.find_spec(_PACKAGE) is not None):
        return
    parent = ""
    for part in _MODULE.split("."):
        name = f"{parent}.{part}" if parent else part
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None, is_package=name != _MODULE)
        module.__path__ = []
        sys.modules[name] = module
        if parent:
            setattr(sys.modules[parent], part, module)
        parent = name
    sys.modules[_MODULE].__dict__["selective_scan_fn"] = selective_scan_fn


@torch.no_grad()
def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool | None = None,
) -> Tensor:
    """The scan x_t = exp(Δ_t A) x_{t-1} + Δ_t B_t u_t, y_t = C_t x_t + D u_t (Gu and Dao 2023, Eq. 2 and 4).

    Supports the arguments of mamba-ssm's function that MambaVision uses: no gate ``z``, no last state. Computed in
    float32, one step at a time, without gradients.

    Args:
        u: ``[B, D, L]`` inputs.
        delta: ``[B, D, L]`` step sizes.
        A: ``[D, N]`` state matrix, diagonal.
        B: ``[B, N, L]`` input vectors per step.
        C: ``[B, N, L]`` output vectors per step.
        D: ``[D]`` weights of the skip connection.
        z: not supported.
        delta_bias: ``[D]`` added to the step sizes.
        delta_softplus: whether to apply softplus to the step sizes.
        return_last_state: not supported.

    Returns:
        ``[B, D, L]`` outputs, in the dtype of ``u``.
    """
    x, steps = u.float(), delta.float()
    if delta_bias is not None:
        steps = steps + delta_bias.float()[:, None]
    if delta_softplus:
        steps = functional.softplus(steps)
    B, C = B.float(), C.float()
    state = x.new_zeros(*x.shape[:2], A.shape[1])
    outputs = torch.empty_like(x)
    for t in range(x.shape[2]):
        step = steps[:, :, t, None]
        state = torch.exp(step * A.float()) * state + step * B[:, None, :, t] * x[:, :, t, None]
        outputs[:, :, t] = (state * C[:, None, :, t]).sum(-1)
    return (outputs + D.float()[:, None] * x).to(u.dtype)
