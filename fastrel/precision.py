"""What `precision` means for the matrix products of an explanation."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch

from fastrel.backends import triton
from fastrel.errors import InputError

Precision = Literal["float32", "mixed", "low"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)


@dataclass(frozen=True)
class Products:
    """How linear layers multiply: relevance in float32 (None), bfloat16 or 8 bits; the gradient in bfloat16 or float32."""

    relevance: Literal["bfloat16", "int8", "float8"] | None = None
    bf16_gradient: bool = False


def products(
    precision: Precision,
    rules: str,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
    backend: str = "auto",
) -> Products:
    """The products of a model whose lanes are of this dtype, on this device.

    On a CPU "mixed" multiplies in bfloat16 only where the processor does that faster than float32, and "low" in int8. A GPU
    multiplies in bfloat16, and for "low" in float8 where it can (Triton kernels, compute capability 8.9 or newer). float64
    models are left alone.

    Raises:
        InputError: an unknown precision, or one that these rules do not survive.
    """
    if precision not in PRECISIONS:
        raise InputError(f"unknown precision {precision!r}; choose one of {', '.join(PRECISIONS)}")
    if precision == "float32":
        return Products()
    if rules != "positive":
        raise InputError(f"precision {precision!r} needs rules='positive': maps of {rules!r} depend on rounding")
    if dtype != torch.float32:
        return Products()
    if backend in ("triton", "cuda") or (device is not None and device.type == "cuda"):
        if device is not None and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
            return Products()  # bfloat16 is emulated there
        return Products("float8" if precision == "low" and _fast_float8(device, backend) else "bfloat16", True)
    if precision == "low":
        return Products("int8", fast_bfloat16())
    return Products("bfloat16", True) if fast_bfloat16() else Products()


def _fast_float8(device: torch.device | None, backend: str) -> bool:
    """Whether Triton kernels run and multiply in float8; under the interpreter they do."""
    if backend not in ("auto", "triton") or triton.unavailable():
        return False
    if device is None or device.type != "cuda":
        return True
    if torch.version.hip:  # CDNA3's float8 is another one, and CDNA2 has none
        return torch.cuda.get_device_properties(device).gcnArchName.startswith(("gfx95", "gfx12"))
    return torch.cuda.get_device_capability(device) >= (8, 9)


def fast_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 matrices faster than float32: with AMX, or AVX-512 BF16 as AMD has it.

    Intel's AVX-512 BF16 without AMX is no faster than its float32 (0.6 times the speed where it was measured).
    FASTREL_BF16=0 or 1 decides otherwise.
    """
    asked = os.environ.get("FASTREL_BF16")
    if asked in ("0", "1"):
        return asked == "1"
    if torch.cpu._is_amx_tile_supported():
        return True
    try:
        processor = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "AuthenticAMD" in processor and "avx512_bf16" in processor
