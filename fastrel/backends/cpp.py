"""Backend "cpp": the C++ kernels of csrc/cpu."""

from __future__ import annotations

from typing import Any

import torch

from fastrel.backends import native
from fastrel.backends.common import Call, without_kernel
from fastrel.ops.library import CPU_KERNELS

unavailable = native.load


def runs_on(device: torch.device) -> str | None:
    """On a CPU."""
    return None if device.type == "cpu" else f"it runs on a CPU, and the model is on {device}"


def kernels() -> dict[Any, Any]:
    """`fastrel_cpu::` for `fastrel::`."""
    return CPU_KERNELS


def supports(call: Call) -> list[str]:
    """Why a call cannot be computed."""
    reasons = without_kernel(call, "int8")
    if call.dtype not in (torch.float32, torch.float64):
        reasons.append(f"computes in float32 and float64, not {str(call.dtype).removeprefix('torch.')}")
    return reasons
