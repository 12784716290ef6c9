"""What tensor cores make of a matrix product, in plain PyTorch: operands rounded or cut off, sums in short accumulators.

with products(tf32):                 # every mm, bmm, addmm, baddbmm inside
    ...
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten

#: Bits of a float8 product's accumulator on Ada and Hopper (DeepSeek-V3, arXiv:2412.19437, §3.3.2), its sign not among them.
FLOAT8_SUM_BITS = 14


def keep_bits(x: Tensor, bits: int, nearest: bool = True) -> Tensor:
    """float32 x with `bits` bits of mantissa after the leading one, the rest rounded to nearest even or cut off."""
    drop, at = 23 - bits, x.contiguous().view(torch.int32)
    if nearest:
        at = at + ((1 << (drop - 1)) - 1) + ((at >> drop) & 1)
    return torch.where(x.isnan(), x, (at & -(1 << drop)).view(torch.float32))


def tf32(x: Tensor) -> Tensor:
    """TF32, as our kernels round to it."""
    return keep_bits(x, 10)


def tf32_cut_off(x: Tensor) -> Tensor:
    """TF32, as a tensor core takes float32 bits."""
    return keep_bits(x, 10, nearest=False)


def bfloat16(x: Tensor) -> Tensor:
    """One operand of bfloat16."""
    return x.bfloat16().to(x.dtype)


def two_parts(x: Tensor) -> Tensor:
    """What two operands of bfloat16 hold."""
    high = x.bfloat16().to(x.dtype)
    return high + (x - high).bfloat16().to(x.dtype)


class _Products(TorchDispatchMode):
    def __init__(self, operand: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._operand = operand

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        first = {aten.mm.default: 0, aten.bmm.default: 0, aten.addmm.default: 1, aten.baddbmm.default: 1}.get(func)
        if first is not None and args[first].is_floating_point():
            a, b = (self._operand(x) for x in args[first : first + 2])
            args = (*args[:first], a, b, *args[first + 2 :])
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def products(operand: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Both operands of every matrix product inside go through `operand`."""
    with _Products(operand):
        yield


def float8_sum(a: Tensor, b: Tensor, promoted_every: int | None) -> Tensor:
    """a [m, k] @ b [k, n] as float8 tensor cores add: 32 products at a time into an accumulator of 14 bits, cut off.

    promoted_every: after how many of k the accumulator is added to a float32 one and starts again; None: never.
    """
    total = a.new_zeros(a.shape[0], b.shape[1])
    short = torch.zeros_like(total)
    for k in range(0, a.shape[1], 32):
        short = keep_bits(short + a[:, k : k + 32] @ b[k : k + 32], FLOAT8_SUM_BITS - 1, nearest=False)
        if promoted_every and (k + 32) % promoted_every == 0:
            total, short = total + short, torch.zeros_like(short)
    return total + short
