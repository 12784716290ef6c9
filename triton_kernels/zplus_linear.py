"""`zplus_linear` and `zplus_linear_reduced`: two products with everything around them fused into their tiles.

The first forms Z and ends in S = R ⊘ Z; the second forms S W⁺, S W⁻ and g W from one pass over the weight and ends in
R' = x⁺ ⊙ (S W⁺) + x⁻ ⊙ (S W⁻). What they multiply in is the operator's (`KINDS`); sums are float32. Where there are many
rows, torch's own products are faster (`zplus_products`).
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from fastrel.triton_kernels import configs, zplus_products
from fastrel.triton_kernels.launch import (
    blocks,
    capability,
    dense,
    float32_precision,
    on_its_device,
    with_unit_stride,
)
from fastrel.triton_kernels.math import (
    ROUNDING,
    dot,
    gelu_slope,
    narrow,
    negative,
    operand,
    positive,
    safe_divide,
    tile_of,
)
from torch import Tensor

from fastrel.ops.zplus_linear_reduced import FLOOR as LEAST_SHARE

FLOOR: tl.constexpr = tl.constexpr(LEAST_SHARE)
FLOAT8_MAX: tl.constexpr = tl.constexpr(zplus_products.FLOAT8_MAX)
LEAST_SCALE: tl.constexpr = tl.constexpr(zplus_products.LEAST_SCALE)


class Kind(NamedTuple):
    """How a layer is multiplied: the dtype of operands, how float32 ones are, in two parts each or not; the gradient's
    operands, and the dtype in which S lies between the two products."""

    name: str
    dot: tl.dtype
    precision: str
    split: bool
    dot_grad: tl.dtype
    stored: torch.dtype


def kind_of(weight: torch.dtype) -> Kind:
    """`zplus_linear` by the weight's dtype: float32's accuracy. 16-bit weights are exact in one operand of 16 bits, S and g in two."""
    if weight == torch.bfloat16:
        return Kind("split", tl.bfloat16, "ieee", True, tl.bfloat16, torch.float32)
    if weight == torch.float16 and not torch.version.hip:
        return Kind("split, tf32", tl.float32, "tf32", True, tl.float32, torch.float32)
    return Kind("float32", tl.float32, float32_precision(), False, tl.float32, torch.float32)


#: `zplus_linear_reduced` by the dtype of the prepared weight.
REDUCED = {
    torch.bfloat16: Kind("bfloat16", tl.bfloat16, "ieee", False, tl.bfloat16, torch.bfloat16),
    torch.float8_e4m3fn: Kind("float8", tl.float8e4nv, "ieee", False, tl.bfloat16, torch.bfloat16),
}


@triton.jit(do_not_specialize=["n"])
def scaled_rows_kernel(
    x_ptr,  # [n, ins]
    out_ptr,  # [n, ins]
    scale_ptr,  # [n]
    n, ins,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Rows of x in float8, each divided by its scale."""
    row = tl.program_id(0).to(tl.int64)
    top = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, ins, BLOCK):
        i = start + tl.arange(0, BLOCK)
        b_x = tl.load(x_ptr + row * ins + i, mask=i < ins, other=0.0).to(tl.float32)
        top = tl.maximum(top, tl.abs(b_x), propagate_nan=tl.PropagateNan.ALL)
    # A sum of NaN is NaN; a maximum over lanes may lose it.
    scale = tl.maximum(tl.max(top), LEAST_SCALE) / FLOAT8_MAX + 0.0 * tl.sum(top)
    tl.store(scale_ptr + row, scale)
    for start in range(0, ins, BLOCK):
        i = start + tl.arange(0, BLOCK)
        b_x = tl.load(x_ptr + row * ins + i, mask=i < ins, other=0.0).to(tl.float32)
        tl.store(out_ptr + row * ins + i, narrow(b_x / scale, tl.float8e4nv), mask=i < ins)


@triton.jit
def signed_sums(
    x_ptr, w_ptr, y_ptr, bias_ptr, x_scale_ptr, w_scale_ptr, m, o, n, outs, ins, x_row, y_row, w_row, w_col,
    HAS_OUTPUT: tl.constexpr, HAS_BIAS: tl.constexpr, SCALED: tl.constexpr, REDUCED: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Z of the rows m and outputs o, from both signed products or from the layer's own output and one of magnitudes."""
    in_m, in_o = m < n, o < outs
    row = m.to(tl.int64)
    z = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, ins, BLOCK_K):
        i = start + tl.arange(0, BLOCK_K)
        in_i = i < ins
        b_x = tl.load(x_ptr + row[:, None] * x_row + i[None, :], mask=in_m[:, None] & in_i[None, :], other=0.0)  # [BM, BK]
        p_w = w_ptr + o.to(tl.int64)[None, :] * w_row + i.to(tl.int64)[:, None] * w_col
        b_w = tl.load(p_w, mask=in_o[None, :] & in_i[:, None], other=0.0)  # [BK, BN]
        b_x, b_w = b_x.to(tl.float32), b_w.to(tl.float32)
        limit: tl.constexpr = BLOCK_K if SCALED else None
        if HAS_OUTPUT:
            a, b = operand(tl.abs(b_x), DOT, PRECISION), operand(tl.abs(b_w), DOT, PRECISION)
            z = tl.dot(a, b, z, input_precision=PRECISION, max_num_imprecise_acc=limit)
        else:
            a, b = operand(positive(b_x), DOT, PRECISION), operand(positive(b_w), DOT, PRECISION)
            z = tl.dot(a, b, z, input_precision=PRECISION, max_num_imprecise_acc=limit)
            a, b = operand(negative(b_x), DOT, PRECISION), operand(negative(b_w), DOT, PRECISION)
            z = tl.dot(a, b, z, input_precision=PRECISION, max_num_imprecise_acc=limit)
    if SCALED:
        b_x_scale = tl.load(x_scale_ptr + m, mask=in_m, other=1.0)  # [BM]
        b_w_scale = tl.load(w_scale_ptr + o, mask=in_o, other=1.0)  # [BN]
        z = z * b_x_scale[:, None] * b_w_scale[None, :]
    if HAS_OUTPUT:
        p_y = y_ptr + row[:, None] * y_row + o[None, :]
        b_y = tl.load(p_y, mask=in_m[:, None] & in_o[None, :], other=0.0).to(tl.float32)  # [BM, BN]
        if HAS_BIAS:
            b_y -= tl.load(bias_ptr + o, mask=in_o, other=0.0).to(tl.float32)[None, :]
        half = (b_y + z) * 0.5
        if REDUCED:
            z = tl.maximum(half, z * FLOOR, propagate_nan=tl.PropagateNan.ALL)
        else:
            z = tl.where(half < z * (0.5 * ROUNDING), 0.0, half)
    return z


@triton.jit(do_not_specialize=["n", "targets"])
def zplus_shares_kernel(
    x_ptr,  # [n, ins], x_row numbers from row to row
    w_ptr,  # [outs, ins]
    y_ptr,  # [n, outs], y_row numbers from row to row
    bias_ptr,  # [outs]
    rel_ptr,  # [targets, n, outs]
    s_ptr,  # [targets, n, outs]
    x_scale_ptr,  # [n]
    w_scale_ptr,  # [outs]
    top_ptr,  # [targets, n, blocks of outs]
    n, outs, ins, targets, x_row, y_row, w_row, w_col,
    HAS_OUTPUT: tl.constexpr, HAS_BIAS: tl.constexpr, SCALED: tl.constexpr, REDUCED: tl.constexpr, OFFICIAL: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    columns = tl.cdiv(outs, BLOCK_N)
    block_m, block_n = tile_of(tl.program_id(0), tl.cdiv(n, BLOCK_M), columns, GROUP)
    m = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    in_m, in_o = m < n, o < outs
    z = signed_sums(
        x_ptr, w_ptr, y_ptr, bias_ptr, x_scale_ptr, w_scale_ptr, m, o, n, outs, ins, x_row, y_row, w_row, w_col,
        HAS_OUTPUT, HAS_BIAS, SCALED, REDUCED, DOT, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    row = m.to(tl.int64)
    inside = in_m[:, None] & in_o[None, :]
    at = row[:, None] * outs + o[None, :]
    if SCALED:
        b_w_scale = tl.load(w_scale_ptr + o, mask=in_o, other=1.0)  # [BN]
    size = tl.cast(n, tl.int64) * outs
    for t in range(targets):
        b_rel = tl.load(rel_ptr + t * size + at, mask=inside, other=0.0)  # [BM, BN]
        s = safe_divide(b_rel, z, OFFICIAL)
        if SCALED:
            s = s * b_w_scale[None, :]
            p_top = top_ptr + (tl.cast(t, tl.int64) * n + row) * columns + block_n
            tl.store(p_top, tl.max(tl.where(inside, tl.abs(s), 0.0), 1), mask=in_m)
        tl.store(s_ptr + t * size + at, narrow(s, s_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["lanes", "n"])
def zplus_back_kernel(
    x_ptr,  # [n, ins], x_row numbers from row to row
    s_ptr,  # [lanes, outs], lanes = targets · n; R where S is yet to be formed
    z_ptr,  # [n, outs]
    grad_ptr,  # [lanes, grad_outs]
    w_ptr,  # [outs, ins]
    w_grad_ptr,  # [grad_outs, ins]
    slope_ptr,  # [n, ins], slope_row numbers from row to row: what x is the gelu of
    divisor_ptr,  # [n, ins]
    rel_in_ptr,  # [lanes, ins]
    grad_in_ptr,  # [lanes, ins]
    top_ptr,  # [lanes, tops]
    lanes, n, outs, grad_outs, ins, tops, x_row, slope_row, w_row, w_col, w_grad_row, w_grad_col,
    HAS_GRAD: tl.constexpr,
    OWN_WEIGHT: tl.constexpr,  # the gradient's product takes the same weight
    APART: tl.constexpr,  # the gradient is of other outputs
    DIVIDE: tl.constexpr,  # S = R ⊘ Z
    OFFICIAL: tl.constexpr,
    SLOPE: tl.constexpr,  # 1: gelu, 2: its approximation
    DIVISOR: tl.constexpr,  # R' ⊘ this instead of R'
    SCALED: tl.constexpr, SPLIT: tl.constexpr, DOT: tl.constexpr, DOT_GRAD: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, TOPS: tl.constexpr,
):  # fmt: skip
    block_m, block_n = tile_of(tl.program_id(0), tl.cdiv(lanes, BLOCK_M), tl.cdiv(ins, BLOCK_N), GROUP)
    lane = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    i = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    in_lane, in_i = lane < lanes, i < ins
    row = lane.to(tl.int64)
    c_pos = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    c_neg = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    c_grad = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if SCALED:
        c = tl.arange(0, TOPS)
        b_top = tl.load(top_ptr + row[:, None] * tops + c[None, :], mask=in_lane[:, None] & (c < tops)[None, :], other=0.0)
        b_scale = tl.maximum(tl.max(b_top, 1), LEAST_SCALE) / FLOAT8_MAX  # [BM]
    for start in range(0, outs, BLOCK_K):
        o = start + tl.arange(0, BLOCK_K)
        in_o = o < outs
        at, inside = row[:, None] * outs + o[None, :], in_lane[:, None] & in_o[None, :]
        in_w = in_o[:, None] & in_i[None, :]
        far, near = o.to(tl.int64)[:, None], i.to(tl.int64)[None, :]
        b_s = tl.load(s_ptr + at, mask=inside, other=0.0).to(tl.float32)  # [BM, BK]
        if DIVIDE:
            p_z = z_ptr + (row % n)[:, None] * outs + o[None, :]
            b_s = safe_divide(b_s, tl.load(p_z, mask=inside, other=1.0), OFFICIAL)
        b_w = tl.load(w_ptr + far * w_row + near * w_col, mask=in_w, other=0.0).to(tl.float32)  # [BK, BN]
        if SCALED:
            s = operand(b_s / b_scale[:, None], DOT, PRECISION)
            b = operand(positive(b_w), DOT, PRECISION)
            c_pos = tl.dot(s, b, c_pos, input_precision=PRECISION, max_num_imprecise_acc=BLOCK_K)
            b = operand(negative(b_w), DOT, PRECISION)
            c_neg = tl.dot(s, b, c_neg, input_precision=PRECISION, max_num_imprecise_acc=BLOCK_K)
        else:
            c_pos = dot(b_s, operand(positive(b_w), DOT, PRECISION), c_pos, SPLIT, DOT, PRECISION)
            c_neg = dot(b_s, operand(negative(b_w), DOT, PRECISION), c_neg, SPLIT, DOT, PRECISION)
        if HAS_GRAD and not APART:
            b_grad = tl.load(grad_ptr + at, mask=inside, other=0.0)  # [BM, BK]
            if not OWN_WEIGHT:
                b_w = tl.load(w_grad_ptr + far * w_grad_row + near * w_grad_col, mask=in_w, other=0.0).to(tl.float32)
            c_grad = dot(b_grad, operand(b_w, DOT_GRAD, PRECISION), c_grad, SPLIT, DOT_GRAD, PRECISION)
    if HAS_GRAD and APART:
        for start in range(0, grad_outs, BLOCK_K):
            o = start + tl.arange(0, BLOCK_K)
            in_o = o < grad_outs
            p_grad = grad_ptr + row[:, None] * grad_outs + o[None, :]
            b_grad = tl.load(p_grad, mask=in_lane[:, None] & in_o[None, :], other=0.0)  # [BM, BK]
            p_w = w_grad_ptr + o.to(tl.int64)[:, None] * w_grad_row + i.to(tl.int64)[None, :] * w_grad_col
            b_w = tl.load(p_w, mask=in_o[:, None] & in_i[None, :], other=0.0).to(tl.float32)  # [BK, BN]
            c_grad = dot(b_grad, operand(b_w, DOT_GRAD, PRECISION), c_grad, SPLIT, DOT_GRAD, PRECISION)
    inside = in_lane[:, None] & in_i[None, :]
    b_x = tl.load(x_ptr + (row % n)[:, None] * x_row + i[None, :], mask=inside, other=0.0).to(tl.float32)  # [BM, BN]
    rel = positive(b_x) * c_pos + negative(b_x) * c_neg
    if SCALED:
        rel = rel * b_scale[:, None]
    if DIVISOR:
        p_z = divisor_ptr + (row % n)[:, None] * ins + i[None, :]
        rel = safe_divide(rel, tl.load(p_z, mask=inside, other=1.0), OFFICIAL)
    at = row[:, None] * ins + i[None, :]
    tl.store(rel_in_ptr + at, rel, mask=inside)
    if HAS_GRAD:
        if SLOPE != 0:
            p_slope = slope_ptr + (row % n)[:, None] * slope_row + i[None, :]
            c_grad *= gelu_slope(tl.load(p_slope, mask=inside, other=0.0).to(tl.float32), SLOPE == 2)
        tl.store(grad_in_ptr + at, c_grad, mask=inside)


#: What x may be the result of, by the names that gelu has for its ways: the slope that the gradient is multiplied by.
SLOPES = {"none": 1, "tanh": 2}


@on_its_device
def zplus_linear(
    x: Tensor,
    weight: Tensor,
    y: Tensor | None,
    bias: Tensor | None,
    rel: Tensor,
    grad: Tensor | None,
    rules: str,
    w_grad: Tensor | None = None,
    sums: Tensor | None = None,
    formed: bool = False,
    slope: Tensor | None = None,
    approximate: str = "none",
    divisor: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`fastrel::zplus_linear` with operands of float32, bfloat16 or float16 and lanes of float32.

    Z is formed from both signed products, except in float32 where the layer's own output is given: one that was rounded to
    16 bits has no digits left for a difference.

    w_grad [grad_outs, ins]: where the gradient is of other outputs than relevance. sums: Z, formed before (`zplus_sums`); formed: then
    `rel` is S already. slope: what x is the gelu of; the gradient goes through that, too. divisor: Z of the layer before, [n, ins], of
    which R' becomes the S.
    """
    in_bfloat16 = x.dtype == weight.dtype == torch.bfloat16
    by_library = sums is None and in_bfloat16 and configs.products_first(x.numel() // x.shape[-1], weight.shape)
    if grad is not None and w_grad is not None and (by_library or grad.shape[:-1] != rel.shape[:-1]):
        rel_in, _ = zplus_linear(x, weight, y, bias, rel, None, rules, sums=sums, formed=formed)
        return rel_in, zplus_products.matmul(grad, w_grad)
    if by_library:
        rel_in, grad_in = zplus_products.linear(x, weight, weight, None, None, rel, grad, rules, parts=2)
        return rel_in, _through_gelu(grad_in, slope, approximate)
    later = (sums, formed, slope, approximate, divisor)
    y, w_grad = y if has_exact_output(weight, y) else None, weight if w_grad is None else w_grad
    return _fused(kind_of(weight.dtype), x, weight, None, w_grad, y, bias, rel, grad, rules, *later)


def has_exact_output(weight: Tensor, y: Tensor | None) -> bool:
    """Whether Z of `zplus_linear` may be formed from the layer's own output."""
    return y is not None and y.dtype == weight.dtype == torch.float32


@on_its_device
def zplus_linear_reduced(
    x: Tensor,
    w: Tensor,
    w_abs: Tensor,
    scales: Tensor,
    w_grad: Tensor | None,
    y: Tensor,
    bias: Tensor | None,
    rel: Tensor,
    grad: Tensor | None,
    sums: Tensor | None = None,
    formed: bool = False,
    slope: Tensor | None = None,
    approximate: str = "none",
    divisor: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`fastrel::zplus_linear_reduced` in the prepared weight's dtype, bfloat16 or float8_e4m3fn. |W| is formed in registers.

    w_grad [grad_outs, ins] and what comes after it: as `zplus_linear` takes them.
    """
    kind = REDUCED[w.dtype]
    by_library = sums is None and kind.name == "bfloat16" and configs.products_first(x.numel() // x.shape[-1], w.shape)
    apart = grad is not None and w_grad is not None and len(w_grad) != len(w)
    if grad is not None and w_grad is not None and apart and (by_library or grad.shape[:-1] != rel.shape[:-1]):
        rel_in, _ = zplus_linear_reduced(x, w, w_abs, scales, None, y, bias, rel, None, sums=sums, formed=formed)
        return rel_in, zplus_products.reduced_matmul(grad, w_grad)
    if by_library:
        rel_in, grad_in = zplus_products.linear(x, w, w_grad, y, bias, rel, grad, "positive", parts=1)
        return rel_in, _through_gelu(grad_in, slope, approximate)
    later = (sums, formed, slope, approximate, divisor)
    return _fused(kind, x, w, scales, w_grad, y, bias, rel, grad, "positive", *later)


def _through_gelu(grad: Tensor, x: Tensor | None, approximate: str) -> Tensor:
    if x is None:
        return grad
    return torch.ops.aten.gelu_backward(grad, x.to(grad.dtype).expand_as(grad), approximate=approximate)


def rows_of(x: Tensor, width: int) -> Tensor:
    """x [*, width] as [n, width], a view of it where that can be."""
    return with_unit_stride(x.reshape(-1, width))


def _fused(
    kind: Kind,
    x: Tensor,
    w: Tensor,
    scales: Tensor | None,
    w_grad: Tensor | None,
    y: Tensor | None,
    bias: Tensor | None,
    rel: Tensor,
    grad: Tensor | None,
    rules: str,
    sums: Tensor | None,
    formed: bool,
    slope: Tensor | None,
    approximate: str,
    divisor: Tensor | None,
) -> tuple[Tensor, Tensor]:
    outs, ins = w.shape
    rel = dense(rel)
    given = rows_of(x, ins)
    n, targets, device = len(given), len(rel), rel.device
    lanes, where = targets * n, capability(device)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    unused, scaled = rel, kind.name == "float8"
    s, top, tops = (rel, unused, 1) if sums is not None else _shares(kind, given, w, scales, y, bias, rel, rules)
    rel_in = empty(*rel.shape[:-1], ins)
    grad_in = torch.empty_like(rel_in) if grad is not None else rel_in.new_empty(0)
    divide = sums is not None and not formed
    how = f"{kind.name}, divided" if sums is not None and f"{kind.name}, divided" in configs.BACK else kind.name
    tile = configs.product(configs.BACK, how, lanes, where)
    if w_grad is None or (w_grad.data_ptr() == w.data_ptr() and w_grad.dtype == w.dtype and w_grad.shape == w.shape):
        w_grad = w
    behind = None if slope is None else rows_of(slope, ins)
    zplus_back_kernel[(blocks(lanes, tile.m) * blocks(ins, tile.n),)](
        x_ptr=given, s_ptr=s, z_ptr=sums if sums is not None and divide else unused, grad_ptr=unused if grad is None else dense(grad),
        w_ptr=w, w_grad_ptr=w_grad, slope_ptr=unused if behind is None else behind,
        divisor_ptr=unused if divisor is None else divisor,
        rel_in_ptr=rel_in, grad_in_ptr=grad_in, top_ptr=top,
        lanes=lanes, n=n, outs=outs, grad_outs=len(w_grad), ins=ins, tops=tops,
        x_row=given.stride(0), slope_row=ins if behind is None else behind.stride(0),
        w_row=w.stride(0), w_col=w.stride(1), w_grad_row=w_grad.stride(0), w_grad_col=w_grad.stride(1),
        HAS_GRAD=grad is not None, OWN_WEIGHT=w_grad is w, APART=grad is not None and len(w_grad) != outs,
        DIVIDE=divide, OFFICIAL=(divide or divisor is not None) and rules == "official", DIVISOR=divisor is not None,
        SLOPE=SLOPES[approximate] if behind is not None and grad is not None else 0, SCALED=scaled, SPLIT=kind.split,
        DOT=kind.dot, DOT_GRAD=kind.dot_grad, PRECISION=kind.precision, TOPS=triton.next_power_of_2(tops) if scaled else 1,
        **options_of(tile),
    )  # fmt: skip
    return rel_in, grad_in


def _shares(
    kind: Kind,
    x: Tensor,
    w: Tensor,
    scales: Tensor | None,
    y: Tensor | None,
    bias: Tensor | None,
    rel: Tensor,
    rules: str,
) -> tuple[Tensor, Tensor, int]:
    """S of x [n, ins]; in float8 the largest |S| of every row and block of columns, and how many of these there are."""
    (outs, ins), n, targets, scaled = w.shape, len(x), len(rel), kind.name == "float8"
    tile = configs.product(configs.SHARES, kind.name, n, capability(rel.device))
    tops, unused = blocks(outs, tile.n), rel
    bias = bias if y is not None else None

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=rel.device)

    s, operand_x, x_scale, top = empty(*rel.shape, dtype=kind.stored), x, unused, unused
    if scaled:
        operand_x, x_scale, top = empty(n, ins, dtype=w.dtype), empty(n), empty(targets * n, tops)
        scaled_rows_kernel[(n,)](x_ptr=dense(x), out_ptr=operand_x, scale_ptr=x_scale, n=n, ins=ins, BLOCK=1024)
    own = unused if y is None else rows_of(y, outs)
    zplus_shares_kernel[(blocks(n, tile.m) * tops,)](
        x_ptr=operand_x, w_ptr=w, y_ptr=own, bias_ptr=unused if bias is None else dense(bias), rel_ptr=rel, s_ptr=s,
        x_scale_ptr=x_scale, w_scale_ptr=scales if scaled else unused, top_ptr=top,
        n=n, outs=outs, ins=ins, targets=targets, x_row=operand_x.stride(0), y_row=outs if y is None else own.stride(0),
        w_row=w.stride(0), w_col=w.stride(1),
        HAS_OUTPUT=y is not None, HAS_BIAS=bias is not None, SCALED=scaled, REDUCED=kind.stored == torch.bfloat16,
        OFFICIAL=rules == "official",
        DOT=kind.dot, PRECISION=kind.precision, **options_of(tile),
    )  # fmt: skip
    return s, top, tops


def options_of(tile: configs.Tile) -> dict[str, Any]:
    """A tile as the kernels take it."""
    return {
        "BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k, "GROUP": configs.GROUP,
        "num_warps": tile.warps, "num_stages": tile.stages,
    }  # fmt: skip
