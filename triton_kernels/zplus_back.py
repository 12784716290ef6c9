"""The second product of `zplus_linear`: S W⁺, S W⁻ and g W from one pass over the weight, and R' = x⁺ ⊙ (S W⁺) + x⁻ ⊙ (S W⁻)."""

import torch
import triton
import triton.language as tl
from fastrel.triton_kernels import configs
from fastrel.triton_kernels.launch import blocks, capability, dense
from fastrel.triton_kernels.math import GELU_SLOPES, dot, gelu_slope, negative, operand, positive, safe_divide, tile_of
from fastrel.triton_kernels.zplus_kinds import Kind, options_of, rows_of
from fastrel.triton_kernels.zplus_shares import FLOAT8_MAX, LEAST_SCALE, shares
from torch import Tensor


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
    SLOPE: tl.constexpr,  # of gelu, by number
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
            c_grad *= gelu_slope(tl.load(p_slope, mask=inside, other=0.0).to(tl.float32), SLOPE)
        tl.store(grad_in_ptr + at, c_grad, mask=inside)


def fused(
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
    frozen: bool,
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
    s, top, tops = (rel, unused, 1) if sums is not None else shares(kind, given, w, scales, y, bias, rel, rules)
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
        SLOPE=GELU_SLOPES[approximate, frozen] if behind is not None and grad is not None else 0, SCALED=scaled, SPLIT=kind.split,
        DOT=kind.dot, DOT_GRAD=kind.dot_grad, PRECISION=kind.precision, TOPS=triton.next_power_of_2(tops) if scaled else 1,
        **options_of(tile),
    )  # fmt: skip
    return rel_in, grad_in
