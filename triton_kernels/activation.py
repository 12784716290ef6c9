"""A gradient through an activation function in one pass, where no product ends in it."""

import torch
import triton
import triton.language as tl
from fastrel.triton_kernels.launch import blocks, dense, on_its_device
from fastrel.triton_kernels.math import GELU_SLOPES, gelu_slope
from torch import Tensor

BLOCK = 1024


#: The slope y/x, beside those of `GELU_SLOPES`.
RATIO = tl.constexpr(0)


@triton.jit(do_not_specialize=["size", "total"])
def activation_kernel(
    grad_ptr,  # [targets, size]
    x_ptr, y_ptr,  # [size]
    out_ptr,  # [targets, size]
    size, total,
    SLOPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < total
    b_x = tl.load(x_ptr + at % size, mask=inside, other=0.0).to(tl.float32)  # [BLOCK]
    if SLOPE == RATIO:
        b_y = tl.load(y_ptr + at % size, mask=inside, other=0.0).to(tl.float32)  # [BLOCK]
        slope = tl.where(b_x == 0.0, 0.0, b_y / tl.where(b_x == 0.0, 1.0, b_x))
    else:
        slope = gelu_slope(b_x, SLOPE)
    tl.store(out_ptr + at, tl.load(grad_ptr + at, mask=inside, other=0.0) * slope, mask=inside)


def activation_ratio(grad: Tensor, x: Tensor, y: Tensor, gelu: str = "") -> Tensor:
    """`fastrel::activation_ratio` for x, y of float32, bfloat16 or float16, lanes of float32."""
    return through_gelu(grad, x, gelu, frozen=True) if gelu else _through(grad, x, y, RATIO.value)


def through_gelu(grad: Tensor, x: Tensor, approximate: str = "none", frozen: bool = False) -> Tensor:
    """grad [K, *] of float32 times the slope of gelu at x [*] of float32, bfloat16 or float16; frozen: AttnLRP's, gelu(x) / x."""
    return _through(grad, x, x, GELU_SLOPES[approximate, frozen])


@on_its_device
def _through(grad: Tensor, x: Tensor, y: Tensor, slope: int) -> Tensor:
    grad, x, y = dense(grad), dense(x), dense(y)
    out = torch.empty_like(grad)
    activation_kernel[(blocks(grad.numel(), BLOCK),)](
        grad_ptr=grad, x_ptr=x, y_ptr=y, out_ptr=out, size=x.numel(), total=grad.numel(), SLOPE=slope, BLOCK=BLOCK
    )
    return out
