"""Which implementation of the fused operators runs, and why another cannot."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fastrel import native, ops, weights
from fastrel.errors import InputError, UnsupportedModelError
from fastrel.ops.library import CPU_KERNELS, REFERENCES

BACKENDS = ("torch", "cpp", "triton", "cuda")

_NOT_YET = {
    "triton": "no Triton kernels are part of this version",
    "cuda": "no CUDA kernels are part of this version",
}


def unavailable(name: str) -> str | None:
    """Why a backend cannot run on this machine; None where it can. Compiles the kernels of "cpp" if need be."""
    return native.load() if name == "cpp" else _NOT_YET.get(name)


def require(name: str) -> None:
    """Raise InputError unless `name` is "auto" or a backend that can run."""
    if name == "auto":
        return
    if name not in BACKENDS:
        raise InputError(f"unknown backend {name!r}; choose auto or one of {', '.join(BACKENDS)}")
    reason = unavailable(name)
    if reason:
        raise InputError(f"backend {name!r} cannot run: {reason}")


def lower(reverse: fx.GraphModule, backend: str, device: torch.device, keep_weights: bool = True) -> None:
    """Choose, once and for every operator of a reverse graph, what computes it on this device.

    Weights in reduced precision are kept from call to call (`fastrel.weights`) if `keep_weights`.

    Raises:
        InputError: a backend asked for by name does not run on this device.
        UnsupportedModelError: it lacks an operator that this explanation needs, with the reason.
    """
    chosen = backend
    if backend == "auto":
        chosen = "cpp" if device.type == "cpu" and unavailable("cpp") is None else "torch"
    elif backend == "cpp" and device.type != "cpu":
        raise InputError(f"backend 'cpp' runs on a CPU, and the model is on {device}")
    for node in reverse.graph.nodes:
        if node.target not in REFERENCES:
            continue
        reason = _unsupported(node.target, node.args)
        if chosen == "cpp" and node.target in CPU_KERNELS and reason is None:
            node.target = CPU_KERNELS[node.target]
        elif backend == "cpp" and reason:
            raise UnsupportedModelError(f"backend 'cpp' cannot run: {node.target} {reason}; with 'auto', torch does it")
        else:
            node.target = REFERENCES[node.target]
        if keep_weights and node.target in (CPU_KERNELS[ops.reduced_weight], REFERENCES[ops.reduced_weight]):
            node.target = weights.kept(node.target)
    reverse.recompile()


def _unsupported(op: Any, args: Any) -> str | None:
    """Why the C++ kernel of `op` does not take these arguments."""
    options = [x for x in args if isinstance(x, str)]
    if "original_lrp" in options:
        return "has no kernel for rules 'original_lrp'"
    if "gradcam" in options:
        return "has no kernel for attention Grad-CAM's update"
    if op is ops.attention_relevance and "official" in options and args[3] is not None:
        return "has no kernel for a mask under the official rules, which share relevance with it over the whole sample"
    return None
