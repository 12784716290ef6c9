"""Backend "triton": the kernels of triton_kernels, on a GPU, or on a CPU under Triton's interpreter."""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import torch

from fastrel import ops
from fastrel.backends.common import Call, without_kernel

#: Largest head size that attention kernels hold in registers; under the official rules relevance goes on to the scores.
MAX_HEAD, MAX_HEAD_OFFICIAL = 128, 64


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _interpreted() -> bool:
    from fastrel.triton_kernels.launch import INTERPRETED

    return INTERPRETED


@functools.cache
def unavailable() -> str | None:
    """Why Triton kernels cannot run on this machine."""
    if not _installed():
        return "triton is not installed"
    if _interpreted():
        return None
    if not torch.cuda.is_available():
        return "there is no GPU (TRITON_INTERPRET=1 runs the kernels on a CPU, slowly)"
    if torch.version.hip is None and torch.cuda.get_device_capability() < (8, 0):
        return f"compute capability {torch.cuda.get_device_capability()} is below 8.0"
    return None


def runs_on(device: torch.device) -> str | None:
    """On a GPU; under the interpreter on a CPU."""
    if device.type == "cuda" or (_installed() and _interpreted()):
        return None
    return f"it runs on a GPU, and the model is on {device}"


@functools.cache
def kernels() -> dict[Any, Any]:
    """Launchers by operator."""
    from fastrel.triton_kernels.attention_relevance import attention_relevance
    from fastrel.triton_kernels.attention_update import attention_update
    from fastrel.triton_kernels.layer_norm_backward import layer_norm_backward
    from fastrel.triton_kernels.residual_add import residual_add
    from fastrel.triton_kernels.rollout_row import rollout_row
    from fastrel.triton_kernels.zplus_linear import zplus_linear, zplus_linear_reduced

    return {
        ops.zplus_linear: zplus_linear,
        ops.zplus_linear_reduced: zplus_linear_reduced,
        ops.residual_add: residual_add,
        ops.attention_relevance: attention_relevance,
        ops.attention_update: attention_update,
        ops.rollout_row: rollout_row,
        ops.layer_norm_backward: layer_norm_backward,
    }


def supports(call: Call) -> list[str]:
    """Why a call cannot be computed."""
    reasons = without_kernel(call, "float8")
    if call.dtype != torch.float32:
        reasons.append(f"computes in float32, and lanes of this model are {str(call.dtype).removeprefix('torch.')}")
    limit = MAX_HEAD_OFFICIAL if "official" in call.options else MAX_HEAD
    if call.head_size > limit:
        reasons.append(f"holds heads of at most {limit} features under these rules, not {call.head_size}")
    return reasons
