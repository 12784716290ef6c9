"""`zplus_linear` by torch's own matrix products, and three passes around them: where there are many rows, nothing is faster.

    sides    x → [x⁺ x⁻] in bfloat16, or |x| where products are reduced
    product  Z = [x⁺ x⁻] [W⁺ W⁻]ᵀ, or 2 Z = y − b + |x| |W|ᵀ
    shares   S = R ⊘ Z, S and g in bfloat16, in one part or in two, side by side
    products C = S [W⁺ W⁻], g W
    combine  R' = x⁺ ⊙ C⁺ + x⁻ ⊙ C⁻

Operands are bfloat16, sums and results float32. All terms of Z and C have one sign: nothing cancels, and 0 is exactly 0. With
parts=2, S = high + low holds 16 bits, and [high low] is multiplied with the weight above itself: one product, as deep as two.
"""

import torch
import triton
import triton.language as tl
from fastrel.triton_kernels import configs
from fastrel.triton_kernels.launch import blocks, capability, dense, on_its_device
from fastrel.triton_kernels.math import narrow, negative, positive, safe_divide
from torch import Tensor

from fastrel import weights
from fastrel.ops.narrow_products import prepared, product
from fastrel.ops.zplus_linear_reduced import FLOOR as LEAST_SHARE

FLOOR: tl.constexpr = tl.constexpr(LEAST_SHARE)

#: Largest number of float8_e4m3fn, and what no scale is below.
FLOAT8_MAX, LEAST_SCALE = 448.0, 1e-30

#: Numbers per program of a pass.
BLOCK = 1024


@triton.jit
def sides_kernel(
    x_ptr,  # [n, ins]
    out_ptr,  # [n, 2 · ins], or [n, ins] of magnitudes
    ins,
    MAGNITUDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, c = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = c < ins
    b_x = tl.load(x_ptr + row * ins + c, mask=inside, other=0.0).to(tl.float32)  # [BLOCK]
    if MAGNITUDE:
        tl.store(out_ptr + row * ins + c, narrow(tl.abs(b_x), tl.bfloat16), mask=inside)
    else:
        p_out = out_ptr + row * 2 * ins + c
        tl.store(p_out, narrow(positive(b_x), tl.bfloat16), mask=inside)
        tl.store(p_out + ins, narrow(negative(b_x), tl.bfloat16), mask=inside)


@triton.jit
def store_parts(p, x, outs, inside, PARTS: tl.constexpr):
    """x in bfloat16, and with two parts what that leaves of it, `outs` further on."""
    high = narrow(x, tl.bfloat16)
    tl.store(p, high, mask=inside)
    if PARTS == 2:
        tl.store(p + outs, narrow(x - high.to(tl.float32), tl.bfloat16), mask=inside)


@triton.jit(do_not_specialize=["n"])
def shares_kernel(
    z_ptr,  # [n, outs], or |x| |W|ᵀ where the layer's own output is given
    y_ptr,  # [n, outs]
    bias_ptr,  # [outs]
    rel_ptr,  # [lanes, outs], lanes = targets · n
    grad_ptr,  # [lanes, outs]
    s_ptr,  # [lanes, PARTS · outs]
    g_ptr,  # [lanes, PARTS · outs]
    n, outs,
    HAS_OUTPUT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_GRAD: tl.constexpr, OFFICIAL: tl.constexpr,
    PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    lane, c = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = c < outs
    b_z = tl.load(z_ptr + (lane % n) * outs + c, mask=inside, other=0.0)  # [BLOCK]
    if HAS_OUTPUT:
        b_y = tl.load(y_ptr + (lane % n) * outs + c, mask=inside, other=0.0).to(tl.float32)  # [BLOCK]
        if HAS_BIAS:
            b_y -= tl.load(bias_ptr + c, mask=inside, other=0.0).to(tl.float32)
        b_z = tl.maximum((b_y + b_z) * 0.5, b_z * FLOOR, propagate_nan=tl.PropagateNan.ALL)
    b_rel = tl.load(rel_ptr + lane * outs + c, mask=inside, other=0.0)  # [BLOCK]
    to = lane * PARTS * outs + c
    store_parts(s_ptr + to, safe_divide(b_rel, b_z, OFFICIAL), outs, inside, PARTS)
    if HAS_GRAD:
        store_parts(g_ptr + to, tl.load(grad_ptr + lane * outs + c, mask=inside, other=0.0), outs, inside, PARTS)


@triton.jit
def parts_kernel(
    x_ptr,  # [lanes, width]
    out_ptr,  # [lanes, 2 · width]
    width,
    BLOCK: tl.constexpr,
):  # fmt: skip
    lane, c = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    b_x = tl.load(x_ptr + lane * width + c, mask=c < width, other=0.0)  # [BLOCK]
    store_parts(out_ptr + lane * 2 * width + c, b_x, width, c < width, 2)


@triton.jit(do_not_specialize=["n"])
def combine_kernel(
    x_ptr,  # [n, ins]
    c_ptr,  # [lanes, 2 · ins], lanes = targets · n
    out_ptr,  # [lanes, ins]
    n, ins,
    BLOCK: tl.constexpr,
):  # fmt: skip
    lane, c = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = c < ins
    b_x = tl.load(x_ptr + (lane % n) * ins + c, mask=inside, other=0.0).to(tl.float32)  # [BLOCK]
    p_c = c_ptr + lane * 2 * ins + c
    b_pos = tl.load(p_c, mask=inside, other=0.0)  # [BLOCK]
    b_neg = tl.load(p_c + ins, mask=inside, other=0.0)  # [BLOCK]
    tl.store(out_ptr + lane * ins + c, positive(b_x) * b_pos + negative(b_x) * b_neg, mask=inside)


_kept = weights.kept_by_version(prepared)


def linear(
    x: Tensor,
    w: Tensor,
    w_grad: Tensor | None,
    y: Tensor | None,
    bias: Tensor | None,
    rel: Tensor,
    grad: Tensor | None,
    rules: str,
    parts: int,
) -> tuple[Tensor, Tensor]:
    """Both lanes [targets, *, outs] through x [*, ins] and w [outs, ins] of bfloat16, S and g in `parts` of bfloat16 each.

    y: the layer's own output, where Z may be as inexact as a reduced product: one product less.
    """
    outs, ins = w.shape
    rel, given = dense(rel), dense(x.reshape(-1, ins))
    n, lanes, device = len(given), rel.numel() // outs, rel.device

    def empty(rows: int, columns: int) -> Tensor:
        return torch.empty((rows, columns), dtype=torch.bfloat16, device=device)

    (signed,) = _kept(w, f"sides {parts}")
    sides = empty(n, ins if y is not None else 2 * ins)
    sides_kernel[n, blocks(ins, BLOCK)](x_ptr=given, out_ptr=sides, ins=ins, MAGNITUDE=y is not None, BLOCK=BLOCK)
    other = signed.narrow(0, 0, outs) if y is None else _kept(w, "magnitude 1")[0]
    z = product(sides, other.t())
    s, g = empty(lanes, parts * outs), empty(lanes if grad is not None else 0, parts * outs)
    shares_kernel[lanes, blocks(outs, BLOCK)](
        z_ptr=z, y_ptr=z if y is None else dense(y.reshape(n, outs)), bias_ptr=z if bias is None else dense(bias),
        rel_ptr=rel, grad_ptr=rel if grad is None else dense(grad), s_ptr=s, g_ptr=g, n=n, outs=outs,
        HAS_OUTPUT=y is not None, HAS_BIAS=y is not None and bias is not None,
        HAS_GRAD=grad is not None, OFFICIAL=rules == "official", PARTS=parts, BLOCK=BLOCK,
    )  # fmt: skip
    del z, sides
    c = product(s, signed)
    rel_in = torch.empty((*rel.shape[:-1], ins), dtype=torch.float32, device=device)
    combine_kernel[lanes, blocks(ins, BLOCK)](x_ptr=given, c_ptr=c, out_ptr=rel_in, n=n, ins=ins, BLOCK=BLOCK)
    if grad is None or w_grad is None:
        return rel_in, rel_in.new_empty(0)
    twice = w_grad if parts == 1 else _kept(w_grad, f"itself {parts}")[0]
    return rel_in, product(g, twice).view(rel_in.shape)


def reduced_weight(weight: Tensor, purpose: str) -> tuple[Tensor, Tensor, Tensor]:
    """`fastrel::reduced_weight` for these kernels, which have no use for |W|: W in bfloat16 stands in its place, and in that of
    float8 where no number of rows is multiplied in it."""
    if purpose != "float8" or not configs.in_float8(configs.FLOAT8_ROWS, weight.shape, capability(weight.device)):
        narrow = weight.bfloat16()
        return narrow, narrow, weight.new_empty(0)
    scales = weight.float().abs().amax(1).clamp_min(LEAST_SCALE) / FLOAT8_MAX
    return (weight.float() / scales.unsqueeze(1)).to(torch.float8_e4m3fn), weight.bfloat16(), scales


@on_its_device
def reduced_matmul(grad: Tensor, weight: Tensor) -> Tensor:
    """`fastrel.ops.reduced_matmul` of a bfloat16 weight, its sums not rounded."""
    flat = dense(grad.reshape(-1, grad.shape[-1])).to(weight.dtype)
    return product(flat, weight).view(*grad.shape[:-1], weight.shape[1])


@on_its_device
def matmul(lane: Tensor, weight: Tensor) -> Tensor:
    """`torch.matmul` of a float32 lane: by a bfloat16 weight [width, outs] in two parts, on tensor cores, not in float32."""
    if not (lane.dtype == torch.float32 and weight.dtype == torch.bfloat16 and weight.dim() == 2):
        return torch.matmul(lane.to(torch.float32), weight.to(torch.float32))
    width = weight.shape[0]
    rows = dense(lane).view(-1, width)
    parts = torch.empty((len(rows), 2 * width), dtype=torch.bfloat16, device=lane.device)
    parts_kernel[len(rows), blocks(width, BLOCK)](x_ptr=rows, out_ptr=parts, width=width, BLOCK=BLOCK)
    return product(parts, _kept(weight, "itself 2")[0]).view(*lane.shape[:-1], weight.shape[1])
