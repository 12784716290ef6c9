"""`layer_norm_backward`: statistics and gradient of a row while it is in registers, and what the residual stream adds to it."""

import torch
import triton
import triton.language as tl
from fastrel.triton_kernels.launch import dense, on_its_device
from torch import Tensor

from fastrel import ops

#: Numbers that fit into a program: wider rows are left to torch.
WIDEST = 65536


@triton.jit(do_not_specialize=["rows"])
def layer_norm_backward_kernel(
    grad_ptr,  # [lanes, width]
    x_ptr,  # [rows, width]
    weight_ptr,  # [width]
    beside_ptr,  # [lanes, width]
    out_ptr,  # [lanes, width]
    rows, width, eps,
    WEIGHTED: tl.constexpr, ADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    lane = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    inside = c < width
    b_x = tl.load(x_ptr + (lane % rows) * width + c, mask=inside, other=0.0).to(tl.float32)  # [BLOCK]
    b_g = tl.load(grad_ptr + lane * width + c, mask=inside, other=0.0)  # [BLOCK]
    if WEIGHTED:
        b_g = b_g * tl.load(weight_ptr + c, mask=inside, other=0.0).to(tl.float32)
    centred = tl.where(inside, b_x - tl.sum(b_x) / width, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred) / width + eps)
    normed = centred * rstd
    out = rstd * (b_g - tl.sum(b_g) / width - normed * (tl.sum(b_g * normed) / width))
    if ADDED:
        out += tl.load(beside_ptr + lane * width + c, mask=inside, other=0.0)
    tl.store(out_ptr + lane * width + c, out, mask=inside)


def layer_norm_backward(grad: Tensor, x: Tensor, weight: Tensor | None, dims: int, eps: float) -> Tensor:
    """`fastrel::layer_norm_backward` for x of float32, bfloat16 or float16, lanes of float32."""
    return layer_norm_backward_beside(grad, x, weight, dims, eps, None)


@on_its_device
def layer_norm_backward_beside(
    grad: Tensor, x: Tensor, weight: Tensor | None, dims: int, eps: float, beside: Tensor | None
) -> Tensor:
    """`layer_norm_backward` + `beside`, the gradient that goes past the norm."""
    width = x.shape[-dims:].numel()
    if width > WIDEST:
        out = ops.layer_norm_backward(grad, x.float(), None if weight is None else weight.float(), dims, eps)
        return out if beside is None else out + beside
    grad, x = dense(grad), dense(x)
    out = torch.empty_like(grad)
    block = triton.next_power_of_2(width)
    layer_norm_backward_kernel[(grad.numel() // width,)](
        grad_ptr=grad, x_ptr=x, weight_ptr=x if weight is None else dense(weight),
        beside_ptr=grad if beside is None else dense(beside), out_ptr=out,
        rows=x.numel() // width, width=width, eps=eps,
        WEIGHTED=weight is not None, ADDED=beside is not None, BLOCK=block, num_warps=min(16, max(1, block // 512)),
    )  # fmt: skip
    return out
