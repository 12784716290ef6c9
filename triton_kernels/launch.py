"""What the launchers share."""

import functools
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Whether kernels are run by Triton's interpreter, on CPU tensors (TRITON_INTERPRET=1 before the first import).
INTERPRETED = triton.knobs.runtime.interpret

#: Lets kernels that need them have all registers: ptxas otherwise spills a little to fit one more block on a processor.
ALL_REGISTERS = {} if INTERPRETED or torch.version.hip else {"maxnreg": 255}


def on_its_device(launcher: Callable[..., Any]) -> Callable[..., Any]:
    """A launcher that launches where its tensors are: Triton takes the current device, whatever its arguments are on."""

    @functools.wraps(launcher)
    def launch(*args: Any, **kwargs: Any) -> Any:
        device = next(x.device for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
        if device.type != "cuda" or device.index == torch.cuda.current_device():
            return launcher(*args, **kwargs)
        with torch.cuda.device(device):
            return launcher(*args, **kwargs)

    return launch


@triton.jit
def trial_kernel(x_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(x_ptr + i, tl.load(x_ptr + i) + 1.0)


@on_its_device
def trial(x: Tensor) -> None:
    """Add 1 to x [16]: whether kernels can be compiled, loaded and launched here at all.

    Raises:
        Exception: whatever Triton, its compiler or the driver say.
    """
    trial_kernel[(1,)](x, BLOCK=16)


def capability(device: torch.device) -> int:
    """90 for compute capability 9.0; the interpreter counts as 80."""
    if device.type != "cuda" or torch.version.hip:
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def float32_precision() -> str:
    """How float32 operands are multiplied: in TF32 where torch was told so, by its old or new setting; else in three TF32
    products, which together have float32's accuracy and run on tensor cores. AMD's matrix cores multiply float32 itself."""
    if torch.version.hip:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"


def blocks(n: int, block: int) -> int:
    """Programs that cover n."""
    return triton.cdiv(n, block)


def dense(x: Tensor) -> Tensor:
    """x, contiguous."""
    return x if x.is_contiguous() else x.clone(memory_format=torch.contiguous_format)


def with_unit_stride(x: Tensor) -> Tensor:
    """x, copied if its last dimension is not contiguous."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else dense(x)
