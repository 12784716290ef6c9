"""What `precision` means for the matrix products of an explanation.

Reduced products must not be slower than float32's, and whether they are depends on the processor: torch's int8 runs at 0.01 times the
speed of float32 where there is no VNNI (on AVX2 our own do it, at twice the speed), bfloat16 at 0.6 times on Intel's AVX-512 BF16
without AMX and at 2 times on AMD's. So it is measured, once per process and in milliseconds; FASTREL_INT8 and FASTREL_BF16, 0 or 1,
decide otherwise. `fastrel doctor` tells.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from fastrel import weights
from fastrel.backends import native, triton
from fastrel.errors import InputError

Precision = Literal["float32", "mixed", "low"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)

#: Reduced products must be so many times as fast: there is more to do around them, and a tie would be decided by chance.
MARGIN = 1.2

#: What decides instead of a measurement.
VARIABLES = {"int8": "FASTREL_INT8", "bfloat16": "FASTREL_BF16"}


@dataclass(frozen=True)
class Products:
    """How linear layers multiply: relevance in float32 (None), bfloat16 or 8 bits; the gradient in bfloat16 or float32."""

    relevance: Literal["bfloat16", "int8", "float8"] | None = None
    bf16_gradient: bool = False


def check(precision: str, rules: str) -> None:
    """Raise InputError for an unknown precision, one that these rules do not survive, or settings that cannot be."""
    if precision not in PRECISIONS:
        raise InputError(f"unknown precision {precision!r}; choose one of {', '.join(PRECISIONS)}")
    if precision == "float32":
        return
    if rules != "positive":
        raise InputError(f"precision {precision!r} needs rules='positive': maps of {rules!r} depend on rounding")
    for dtype in VARIABLES:
        _asked(dtype)
    weights.limit()


def products(
    precision: Precision,
    rules: str,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
    backend: str = "auto",
) -> Products:
    """The products of a model whose lanes are of this dtype, on this device.

    On a CPU "mixed" multiplies in bfloat16 and "low" in int8, each only where that is faster than float32; where int8 is not,
    "low" is "mixed". A GPU multiplies in bfloat16, and for "low" in float8 where it can (Triton kernels, many rows, compute
    capability 9.0 or newer: Ada's sums of 14 bits cannot be promoted to float32). float64 models are left alone.

    Raises:
        InputError: as `check`.
    """
    check(precision, rules)
    if precision == "float32" or dtype != torch.float32:
        return Products()
    if backend in ("triton", "cuda") or (device is not None and device.type == "cuda"):
        if device is not None and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
            return Products()  # bfloat16 is emulated there
        return Products("float8" if precision == "low" and _fast_float8(device, backend) else "bfloat16", True)
    bfloat16 = is_fast("bfloat16", backend)
    if precision == "low" and is_fast("int8", backend):
        return Products("int8", bfloat16)
    return Products("bfloat16", True) if bfloat16 else Products()


def _fast_float8(device: torch.device | None, backend: str) -> bool:
    """Whether Triton kernels run and multiply in float8; under the interpreter they do."""
    if backend not in ("auto", "triton"):
        return False
    if device is None or device.type != "cuda":
        return triton.unavailable() is None
    if triton.runs_on(device):
        return False
    if torch.version.hip:  # CDNA3's float8 is another one, and CDNA2 has none
        return torch.cuda.get_device_properties(device).gcnArchName.startswith(("gfx95", "gfx12"))
    return torch.cuda.get_device_capability(device) >= (9, 0)


def is_fast(dtype: str, backend: str = "auto") -> bool:
    """Whether products in "int8" or "bfloat16" are faster than in float32, or FASTREL_INT8 or FASTREL_BF16 says so.

    Plain PyTorch only imitates them.
    """
    asked = _asked(dtype)
    if asked is not None:
        return asked
    return backend != "torch" and native.load() is None and speeds()[dtype] >= MARGIN


def _asked(dtype: str) -> bool | None:
    value = os.environ.get(VARIABLES[dtype], "")
    if value not in ("", "0", "1"):
        raise InputError(
            f"{VARIABLES[dtype]}={value!r}: set 1 to multiply in {dtype}, 0 not to, or unset it to have it measured"
        )
    return None if not value else value == "1"


@functools.cache
def speeds() -> dict[str, float]:
    """How fast this processor multiplies in int8 and bfloat16, as multiples of float32's speed.

    First small matrices, because it may be hundreds of times slower; where it is not, those of a layer of ViT-B.
    """
    found = {}
    for dtype in VARIABLES:
        for rows, width in ((16, 256), (192, 768)):
            found[dtype] = _seconds("float32", rows, width) / _seconds(dtype, rows, width)
            if found[dtype] < 0.25:
                break
    return found


def _seconds(dtype: str, rows: int, width: int) -> float:
    """The products of a z+ layer, of which one has the weight turned: the shortest of a few."""
    a, b = (torch.ones(shape, dtype=getattr(torch, dtype), device="cpu") for shape in ((rows, width), (width, width)))
    of_int8 = torch._int_mm if native.load() else torch.ops.fastrel_cpu.int8_matmul
    multiply: Callable[[Tensor, Tensor], Tensor] = of_int8 if dtype == "int8" else torch.mm
    best = float("inf")
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        for _ in range(4):
            start = time.perf_counter()
            multiply(a, b)
            multiply(a, b.T)
            best = min(best, time.perf_counter() - start)
    return best
