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
from fastrel.triton_kernels.launch import blocks, capability, dense, float32_precision, on_its_device
from fastrel.triton_kernels.math import ROUNDING, dot, narrow, negative, operand, positive, safe_divide, tile_of
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


@triton.jit(do_not_specialize=["n", "targets"])
def zplus_shares_kernel(
    x_ptr,  # [n, ins]
    w_ptr,  # [outs, ins]
    y_ptr,  # [n, outs]
    bias_ptr,  # [outs]
    rel_ptr,  # [targets, n, outs]
    s_ptr,  # [targets, n, outs]
    x_scale_ptr,  # [n]
    w_scale_ptr,  # [outs]
    top_ptr,  # [targets, n, blocks of outs]
    n, outs, ins, targets, w_row, w_col,
    HAS_OUTPUT: tl.constexpr, HAS_BIAS: tl.constexpr, SCALED: tl.constexpr, REDUCED: tl.constexpr, OFFICIAL: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    columns = tl.cdiv(outs, BLOCK_N)
    block_m, block_n = tile_of(tl.cdiv(n, BLOCK_M), columns, GROUP)
    m = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    in_m, in_o = m < n, o < outs
    row = m.to(tl.int64)
    z = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, ins, BLOCK_K):
        i = start + tl.arange(0, BLOCK_K)
        in_i = i < ins
        b_x = tl.load(x_ptr + row[:, None] * ins + i[None, :], mask=in_m[:, None] & in_i[None, :], other=0.0)  # [BM, BK]
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
    inside = in_m[:, None] & in_o[None, :]
    at = row[:, None] * outs + o[None, :]
    if SCALED:
        b_x_scale = tl.load(x_scale_ptr + m, mask=in_m, other=1.0)  # [BM]
        b_w_scale = tl.load(w_scale_ptr + o, mask=in_o, other=1.0)  # [BN]
        z = z * b_x_scale[:, None] * b_w_scale[None, :]
    if HAS_OUTPUT:
        b_y = tl.load(y_ptr + at, mask=inside, other=0.0).to(tl.float32)  # [BM, BN]
        if HAS_BIAS:
            b_y -= tl.load(bias_ptr + o, mask=in_o, other=0.0).to(tl.float32)[None, :]
        half = (b_y + z) * 0.5
        if REDUCED:
            z = tl.maximum(half, z * FLOOR, propagate_nan=tl.PropagateNan.ALL)
        else:
            z = tl.where(half < z * (0.5 * ROUNDING), 0.0, half)
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
    x_ptr,  # [n, ins]
    s_ptr,  # [lanes, outs], lanes = targets · n
    grad_ptr,  # [lanes, outs]
    w_ptr,  # [outs, ins]
    w_grad_ptr,  # [outs, ins]
    rel_in_ptr,  # [lanes, ins]
    grad_in_ptr,  # [lanes, ins]
    top_ptr,  # [lanes, tops]
    lanes, n, outs, ins, tops, w_row, w_col, w_grad_row, w_grad_col,
    HAS_GRAD: tl.constexpr,
    OWN_WEIGHT: tl.constexpr,  # the gradient's product takes the same weight
    SCALED: tl.constexpr, SPLIT: tl.constexpr, DOT: tl.constexpr, DOT_GRAD: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, TOPS: tl.constexpr,
):  # fmt: skip
    block_m, block_n = tile_of(tl.cdiv(lanes, BLOCK_M), tl.cdiv(ins, BLOCK_N), GROUP)
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
        if HAS_GRAD:
            b_grad = tl.load(grad_ptr + at, mask=inside, other=0.0)  # [BM, BK]
            if not OWN_WEIGHT:
                b_w = tl.load(w_grad_ptr + far * w_grad_row + near * w_grad_col, mask=in_w, other=0.0).to(tl.float32)
            c_grad = dot(b_grad, operand(b_w, DOT_GRAD, PRECISION), c_grad, SPLIT, DOT_GRAD, PRECISION)
    inside = in_lane[:, None] & in_i[None, :]
    b_x = tl.load(x_ptr + (row % n)[:, None] * ins + i[None, :], mask=inside, other=0.0).to(tl.float32)  # [BM, BN]
    rel = positive(b_x) * c_pos + negative(b_x) * c_neg
    if SCALED:
        rel = rel * b_scale[:, None]
    at = row[:, None] * ins + i[None, :]
    tl.store(rel_in_ptr + at, rel, mask=inside)
    if HAS_GRAD:
        tl.store(grad_in_ptr + at, c_grad, mask=inside)


@on_its_device
def zplus_linear(
    x: Tensor, weight: Tensor, y: Tensor | None, bias: Tensor | None, rel: Tensor, grad: Tensor | None, rules: str
) -> tuple[Tensor, Tensor]:
    """`fastrel::zplus_linear` with operands of float32, bfloat16 or float16 and lanes of float32.

    Z is formed from both signed products, except in float32 where the layer's own output is given: one that was rounded to
    16 bits has no digits left for a difference.
    """
    kind = kind_of(weight.dtype)
    if x.dtype == weight.dtype == torch.bfloat16 and configs.products_first(x.numel() // x.shape[-1], weight.shape):
        return zplus_products.linear(x, weight, weight, None, None, rel, grad, rules, parts=2)
    from_output = y is not None and y.dtype == weight.dtype == torch.float32
    return _fused(kind, x, weight, None, weight, y if from_output else None, bias, rel, grad, rules)


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
) -> tuple[Tensor, Tensor]:
    """`fastrel::zplus_linear_reduced` in the prepared weight's dtype, bfloat16 or float8_e4m3fn. |W| is formed in registers."""
    kind = REDUCED[w.dtype]
    if kind.name == "bfloat16" and configs.products_first(x.numel() // x.shape[-1], w.shape):
        return zplus_products.linear(x, w, w_grad, y, bias, rel, grad, "positive", parts=1)
    return _fused(kind, x, w, scales, w_grad, y, bias, rel, grad, "positive")


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
) -> tuple[Tensor, Tensor]:
    outs, ins = w.shape
    rel = dense(rel)
    given = dense(x.reshape(-1, ins))
    n, targets, device, scaled = len(given), len(rel), rel.device, kind.name == "float8"
    lanes, where = targets * n, capability(device)
    bias = bias if y is not None else None
    tile = configs.product(configs.SHARES, kind.name, n, where)
    tops = blocks(outs, tile.n)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    unused = rel
    s, operand_x, x_scale, top = empty(*rel.shape, dtype=kind.stored), given, unused, unused
    if scaled:
        operand_x, x_scale, top = empty(n, ins, dtype=w.dtype), empty(n), empty(lanes, tops)
        scaled_rows_kernel[(n,)](x_ptr=given, out_ptr=operand_x, scale_ptr=x_scale, n=n, ins=ins, BLOCK=1024)
    zplus_shares_kernel[(blocks(n, tile.m) * tops,)](
        x_ptr=operand_x, w_ptr=w, y_ptr=unused if y is None else dense(y.reshape(n, outs)),
        bias_ptr=unused if bias is None else dense(bias), rel_ptr=rel, s_ptr=s,
        x_scale_ptr=x_scale, w_scale_ptr=scales if scaled else unused, top_ptr=top,
        n=n, outs=outs, ins=ins, targets=targets, w_row=w.stride(0), w_col=w.stride(1),
        HAS_OUTPUT=y is not None, HAS_BIAS=bias is not None, SCALED=scaled, REDUCED=kind.stored == torch.bfloat16,
        OFFICIAL=rules == "official",
        DOT=kind.dot, PRECISION=kind.precision, **_options(tile),
    )  # fmt: skip
    rel_in = empty(*rel.shape[:-1], ins)
    grad_in = torch.empty_like(rel_in) if grad is not None else rel_in.new_empty(0)
    tile = configs.product(configs.BACK, kind.name, lanes, where)
    if w_grad is None or (w_grad.data_ptr() == w.data_ptr() and w_grad.dtype == w.dtype):
        w_grad = w
    zplus_back_kernel[(blocks(lanes, tile.m) * blocks(ins, tile.n),)](
        x_ptr=given, s_ptr=s, grad_ptr=unused if grad is None else dense(grad), w_ptr=w, w_grad_ptr=w_grad,
        rel_in_ptr=rel_in, grad_in_ptr=grad_in, top_ptr=top,
        lanes=lanes, n=n, outs=outs, ins=ins, tops=tops,
        w_row=w.stride(0), w_col=w.stride(1), w_grad_row=w_grad.stride(0), w_grad_col=w_grad.stride(1),
        HAS_GRAD=grad is not None, OWN_WEIGHT=w_grad is w, SCALED=scaled, SPLIT=kind.split,
        DOT=kind.dot, DOT_GRAD=kind.dot_grad, PRECISION=kind.precision, TOPS=triton.next_power_of_2(tops) if scaled else 1,
        **_options(tile),
    )  # fmt: skip
    return rel_in, grad_in


def _options(tile: configs.Tile) -> dict[str, Any]:
    return {
        "BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k, "GROUP": configs.GROUP,
        "num_warps": tile.warps, "num_stages": tile.stages,
    }  # fmt: skip
