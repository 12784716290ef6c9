"""The first product of `zplus_linear`: Z of a layer, and S = R ⊘ Z while it is in registers."""

import torch
import triton
import triton.language as tl
from fastrel.triton_kernels import configs, zplus_products
from fastrel.triton_kernels.launch import blocks, capability, dense
from fastrel.triton_kernels.math import ROUNDING, narrow, negative, operand, positive, safe_divide, tile_of
from fastrel.triton_kernels.zplus_kinds import Kind, options_of, rows_of
from torch import Tensor

from fastrel.ops.zplus_linear_reduced import FLOOR as LEAST_SHARE

FLOOR: tl.constexpr = tl.constexpr(LEAST_SHARE)
FLOAT8_MAX: tl.constexpr = tl.constexpr(zplus_products.FLOAT8_MAX)
LEAST_SCALE: tl.constexpr = tl.constexpr(zplus_products.LEAST_SCALE)


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


def shares(
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
