"""What the launchers share."""

import torch
import triton
from fastrel.triton_kernels import math
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

#: Whether kernels are run by Triton's interpreter, on CPU tensors (TRITON_INTERPRET=1 before the first import).
INTERPRETED = isinstance(math.safe_divide, InterpretedFunction)


#: Lets kernels that need them have all registers: ptxas otherwise spills a little to fit one more block on a processor.
ALL_REGISTERS = {} if INTERPRETED or torch.version.hip else {"maxnreg": 255}


def capability(device: torch.device) -> int:
    """90 for compute capability 9.0; the interpreter counts as 80."""
    if device.type != "cuda" or torch.version.hip:
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def precision(*values: Tensor) -> str:
    """How float32 operands are multiplied: in TF32 where the values have 16 bits, which it holds exactly, or where torch
    was told so (`torch.set_float32_matmul_precision`); else in three TF32 products, which together have float32's
    accuracy and run on tensor cores. AMD's matrix cores multiply float32 itself."""
    if torch.version.hip:
        return "ieee"
    narrow = all(x.dtype in (torch.bfloat16, torch.float16) for x in values)
    return "tf32" if narrow or torch.get_float32_matmul_precision() != "highest" else "tf32x3"


def blocks(n: int, block: int) -> int:
    """Programs that cover n."""
    return triton.cdiv(n, block)


def with_unit_stride(x: Tensor) -> Tensor:
    """x, copied if its last dimension is not contiguous."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
