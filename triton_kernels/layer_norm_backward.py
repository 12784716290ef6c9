"""`layer_norm_backward`: statistics and gradient of a row while it is in registers, and what the residual stream adds to it."""

import torch
import triton
import triton.language as tl
from fastrel.triton_kernels.launch import dense, on_its_device
from fastrel.triton_kernels.math import LARGEST, safe_divide, share
from fastrel.triton_kernels.residual_add import residual_add_of_sum
from torch import Tensor

from fastrel import ops
from fastrel.reference import rules

#: Numbers of a row that the registers of a program hold: wider ones are left to torch.
WIDEST = 8192


@triton.jit
def norm_backward(
    p_grad, p_x, p_weight, p_beside, c, width, eps, FROZEN: tl.constexpr, WEIGHTED: tl.constexpr, ADDED: tl.constexpr
):
    """The gradient of a row and what goes past the norm, [BLOCK]."""
    inside = c < width
    b_x = tl.load(p_x + c, mask=inside, other=0.0).to(tl.float32)  # [BLOCK]
    b_g = tl.load(p_grad + c, mask=inside, other=0.0)  # [BLOCK]
    if WEIGHTED:
        b_g = b_g * tl.load(p_weight + c, mask=inside, other=0.0).to(tl.float32)
    centred = tl.where(inside, b_x - tl.sum(b_x) / width, 0.0)
    variance = tl.sum(centred * centred) / width
    # Squares that overflow would make the gradient 0, which looks like an answer.
    rstd = tl.where(variance <= LARGEST, 1.0 / tl.sqrt(variance + eps), float("nan"))
    out = b_g - tl.sum(b_g) / width
    if not FROZEN:
        normed = centred * rstd
        out -= normed * (tl.sum(b_g * normed) / width)
    out *= rstd
    if ADDED:
        out += tl.load(p_beside + c, mask=inside, other=0.0)
    return out


@triton.jit(do_not_specialize=["rows"])
def layer_norm_backward_kernel(
    grad_ptr,  # [lanes, width]
    x_ptr,  # [rows, width]
    weight_ptr,  # [width]
    beside_ptr,  # [lanes, width]
    out_ptr,  # [lanes, width]
    rows, width, eps,
    FROZEN: tl.constexpr,  # the deviation is a constant
    WEIGHTED: tl.constexpr, ADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at, c = tl.program_id(0).to(tl.int64) * width, tl.arange(0, BLOCK)
    value = (tl.program_id(0) % rows).to(tl.int64) * width
    out = norm_backward(grad_ptr + at, x_ptr + value, weight_ptr, beside_ptr + at, c, width, eps, FROZEN, WEIGHTED, ADDED)
    tl.store(out_ptr + at + c, out, mask=c < width)


@triton.jit(do_not_specialize=["rows", "tokens"])
def half_block_kernel(
    grad_ptr,  # [lanes, width]
    x_ptr,  # [rows, width]
    weight_ptr,  # [width]
    grad_beside_ptr,  # [lanes, width]
    u_ptr, v_ptr,  # [rows, width]
    rel_ptr, rel_beside_ptr,  # [lanes, width]
    z_ptr,  # [rows, width]
    through_ptr,  # [samples, heads, tokens], samples · tokens = lanes
    row_ptr, row_out_ptr,  # [lanes]
    out_ptr, rel_u_ptr, rel_v_ptr,  # [lanes, width]
    rows, width, heads, tokens, eps,
    FROZEN: tl.constexpr, WEIGHTED: tl.constexpr, GRAD_ADDED: tl.constexpr, REL_ADDED: tl.constexpr,
    DIVISOR: tl.constexpr,  # R_v ⊘ Z instead of R_v
    THROUGH: tl.constexpr, ROW: tl.constexpr, BLOCK: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    at, c = tl.program_id(0).to(tl.int64) * width, tl.arange(0, BLOCK)
    value, inside = (tl.program_id(0) % rows).to(tl.int64) * width, c < width
    p_beside = grad_beside_ptr + at
    out = norm_backward(grad_ptr + at, x_ptr + value, weight_ptr, p_beside, c, width, eps, FROZEN, WEIGHTED, GRAD_ADDED)
    tl.store(out_ptr + at + c, out, mask=inside)
    b_u = tl.load(u_ptr + value + c, mask=inside, other=0.0).to(tl.float32)  # [BLOCK]
    b_v = tl.load(v_ptr + value + c, mask=inside, other=0.0).to(tl.float32)  # [BLOCK]
    b_rel = tl.load(rel_ptr + at + c, mask=inside, other=0.0)  # [BLOCK]
    if REL_ADDED:
        b_rel += tl.load(rel_beside_ptr + at + c, mask=inside, other=0.0)
    rel_u, rel_v = share(b_u, b_v, b_rel)
    if DIVISOR:
        rel_v = safe_divide(rel_v, tl.load(z_ptr + value + c, mask=inside, other=1.0), False)
    tl.store(rel_u_ptr + at + c, rel_u, mask=inside)
    tl.store(rel_v_ptr + at + c, rel_v, mask=inside)
    if THROUGH:
        lane, h = tl.program_id(0).to(tl.int64), tl.arange(0, HEADS)
        p_through = through_ptr + (lane // tokens * heads + h) * tokens + lane % tokens
        total = tl.sum(tl.load(p_through, mask=h < heads, other=0.0))
        if ROW:
            total += tl.load(row_ptr + lane)
        tl.store(row_out_ptr + lane, total)


def layer_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, dims: int, eps: float, frozen: bool = False
) -> Tensor:
    """`fastrel::layer_norm_backward` for x of float32, bfloat16 or float16, lanes of float32."""
    return layer_norm_backward_beside(grad, x, weight, dims, eps, None, frozen)


@on_its_device
def layer_norm_backward_beside(
    grad: Tensor, x: Tensor, weight: Tensor | None, dims: int, eps: float, beside: Tensor | None, frozen: bool = False
) -> Tensor:
    """`layer_norm_backward` + `beside`, the gradient that goes past the norm."""
    width = x.shape[-dims:].numel()
    if width > WIDEST:
        out = ops.layer_norm_backward(grad, x.float(), None if weight is None else weight.float(), dims, eps, frozen)
        return out if beside is None else out + beside
    grad, x = dense(grad), dense(x)
    out = torch.empty_like(grad)
    layer_norm_backward_kernel[(grad.numel() // width,)](
        grad_ptr=grad, x_ptr=x, weight_ptr=x if weight is None else dense(weight),
        beside_ptr=grad if beside is None else dense(beside), out_ptr=out,
        rows=x.numel() // width, width=width, eps=eps,
        FROZEN=frozen, WEIGHTED=weight is not None, ADDED=beside is not None, **_blocking(width),
    )  # fmt: skip
    return out


@on_its_device
def half_block(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    dims: int,
    eps: float,
    grad_beside: Tensor | None,
    u: Tensor,
    v: Tensor,
    rel: Tensor,
    rel_beside: Tensor | None,
    through: Tensor | None = None,
    row: Tensor | None = None,
    divisor: Tensor | None = None,
    frozen: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`layer_norm_backward_beside` and `residual_add_of_sum` of one value x = u + v in one launch: between a layer and the one before
    it on the way back there is nothing else.

    And r + r M [K, B, T] by the heads' own parts of r M, `through` [K, B, h, T], with `row` r [K, B, T]; without it r M. divisor: Z of
    the layer that v comes from, [rows, width]; R_v is then its S.
    """
    width = x.shape[-dims:].numel()
    none = rel.new_empty(0)
    alike = grad.shape == rel.shape and u.shape == x.shape == v.shape
    if through is not None and through.numel() // through.shape[2] * width != grad.numel():
        alike = False
    if width > WIDEST or not alike:
        out = layer_norm_backward_beside(grad, x, weight, dims, eps, grad_beside, frozen)
        total = none if through is None else through.sum(2) if row is None else through.sum(2) + row
        rel_u, rel_v = residual_add_of_sum(u, v, rel, rel_beside)
        return out, rel_u, rel_v if divisor is None else rules.safe_divide(rel_v, divisor.view(v.shape)), total
    grad, x, u, v, rel = (dense(one) for one in (grad, x, u, v, rel))
    out, rel_u, rel_v = (torch.empty_like(rel) for _ in range(3))
    heads, tokens, total = 1, 1, none
    if through is not None:
        heads, tokens = through.shape[2:]
        total = torch.empty((*through.shape[:2], tokens), dtype=torch.float32, device=rel.device)
    half_block_kernel[(grad.numel() // width,)](
        grad_ptr=grad, x_ptr=x, weight_ptr=x if weight is None else dense(weight),
        grad_beside_ptr=grad if grad_beside is None else dense(grad_beside), u_ptr=u, v_ptr=v, rel_ptr=rel,
        rel_beside_ptr=rel if rel_beside is None else dense(rel_beside),
        z_ptr=rel if divisor is None else divisor, through_ptr=rel if through is None else through,
        row_ptr=rel if row is None else dense(row), row_out_ptr=total,
        out_ptr=out, rel_u_ptr=rel_u, rel_v_ptr=rel_v,
        rows=x.numel() // width, width=width, heads=heads, tokens=tokens, eps=eps, FROZEN=frozen, WEIGHTED=weight is not None,
        GRAD_ADDED=grad_beside is not None, REL_ADDED=rel_beside is not None,
        DIVISOR=divisor is not None, THROUGH=through is not None, ROW=row is not None,
        HEADS=triton.next_power_of_2(heads), **_blocking(width),
    )  # fmt: skip
    return out, rel_u, rel_v, total


def _blocking(width: int) -> dict[str, int]:
    block = triton.next_power_of_2(width)
    return {"BLOCK": block, "num_warps": min(16, max(1, block // 512))}
