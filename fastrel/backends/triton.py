"""Backend "triton": the kernels of triton_kernels, on a GPU, or on a CPU under Triton's interpreter."""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from typing import Any

import torch

from fastrel import ops
from fastrel.backends.common import Call, without_kernel

log = logging.getLogger("fastrel")

#: Largest head size that attention kernels hold in registers; under the official rules relevance goes on to the scores.
MAX_HEAD, MAX_HEAD_OFFICIAL = 128, 64


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """Whether kernels run on a CPU, as Triton itself will find when it is imported; a CPU explanation does not import it."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def unavailable() -> str | None:
    """Why Triton kernels cannot run on this machine; `runs_on` knows of one device."""
    if not _installed():
        return "triton is not installed"
    if not interpreted() and not torch.cuda.is_available():
        return "there is no GPU (TRITON_INTERPRET=1 runs the kernels on a CPU, slowly)"
    return None


def runs_on(device: torch.device) -> str | None:
    """On a GPU where a kernel could be compiled and launched; under the interpreter on a CPU."""
    if device.type == "cuda":
        reason = unavailable()
        return reason or _fails_on(torch.cuda.current_device() if device.index is None else device.index)
    if _installed() and interpreted():
        return None
    return f"it runs on a GPU, and the model is on {device}"


@functools.cache
def _fails_on(index: int) -> str | None:
    """Why kernels do not run on this GPU, found by running one: Triton needs a driver, a C compiler and a cache it can write to."""
    capability = torch.cuda.get_device_capability(index)
    if torch.version.hip is None and capability < (8, 0):
        return f"compute capability {capability[0]}.{capability[1]} of cuda:{index} is below 8.0"
    try:
        from fastrel.triton_kernels.launch import trial

        x = torch.zeros(16, device=f"cuda:{index}")
        trial(x)
        wrong = not bool((x == 1).all())
    except Exception as error:
        reason = f"a trial kernel failed on cuda:{index}: {str(error).strip() or type(error).__name__}"
    else:
        reason = f"a trial kernel computed nonsense on cuda:{index}" if wrong else ""
    if reason:
        log.warning("fastrel runs without Triton: %s", reason)
    return reason or None


@functools.cache
def kernels() -> dict[Any, Any]:
    """Launchers by operator."""
    from fastrel.triton_kernels.activation import activation_ratio
    from fastrel.triton_kernels.attention_relevance import attention_relevance
    from fastrel.triton_kernels.attention_update import attention_update
    from fastrel.triton_kernels.layer_norm_backward import layer_norm_backward
    from fastrel.triton_kernels.residual_add import residual_add
    from fastrel.triton_kernels.rollout_row import rollout_row
    from fastrel.triton_kernels.zplus_linear import zplus_linear, zplus_linear_reduced
    from fastrel.triton_kernels.zplus_products import matmul, reduced_matmul, reduced_weight

    return {
        ops.zplus_linear: zplus_linear,
        ops.zplus_linear_reduced: zplus_linear_reduced,
        ops.residual_add: residual_add,
        ops.attention_relevance: attention_relevance,
        ops.attention_update: attention_update,
        ops.rollout_row: rollout_row,
        ops.layer_norm_backward: layer_norm_backward,
        ops.activation_ratio: activation_ratio,
        ops.reduced_weight: reduced_weight,
        ops.reduced_matmul: reduced_matmul,
        torch.matmul: matmul,
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
