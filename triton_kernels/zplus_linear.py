"""`zplus_linear` and `zplus_linear_reduced`: two products with everything around them fused into their tiles.

The first forms Z and ends in S = R ⊘ Z; the second forms S W⁺, S W⁻ and g W from one pass over the weight and ends in
R' = x⁺ ⊙ (S W⁺) + x⁻ ⊙ (S W⁻). Operands are cast to `DOT` as they are loaded; sums are float32.
"""

import torch
import triton
import triton.language as tl
from fastrel.triton_kernels import configs
from fastrel.triton_kernels.launch import INTERPRETED, blocks, capability, precision
from fastrel.triton_kernels.math import ROUNDING, negative, positive, safe_divide
from torch import Tensor

#: Largest number of float8_e4m3fn.
FLOAT8_MAX = 448.0


@triton.jit
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
    n,
    outs,
    ins,
    targets,
    w_row,
    w_col,
    HAS_OUTPUT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SCALED: tl.constexpr,
    OFFICIAL: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    o = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_m, in_o = m < n, o < outs
    row = m.to(tl.int64)
    z = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if SCALED:
        b_x_scale = tl.load(x_scale_ptr + m, mask=in_m, other=1.0)  # [BM]
        b_w_scale = tl.load(w_scale_ptr + o, mask=in_o, other=1.0)  # [BN]
    for start in range(0, ins, BLOCK_K):
        i = start + tl.arange(0, BLOCK_K)
        in_i = i < ins
        b_x = tl.load(x_ptr + row[:, None] * ins + i[None, :], mask=in_m[:, None] & in_i[None, :], other=0.0)  # [BM, BK]
        p_w = w_ptr + o.to(tl.int64)[None, :] * w_row + i.to(tl.int64)[:, None] * w_col
        b_w = tl.load(p_w, mask=in_o[None, :] & in_i[:, None], other=0.0)  # [BK, BN]
        b_x, b_w = b_x.to(tl.float32), b_w.to(tl.float32)
        if SCALED:
            b_x = b_x / b_x_scale[:, None]
        if HAS_OUTPUT:
            z = tl.dot(tl.abs(b_x).to(DOT), tl.abs(b_w).to(DOT), z, input_precision=PRECISION)
        else:
            z = tl.dot(positive(b_x).to(DOT), positive(b_w).to(DOT), z, input_precision=PRECISION)
            z = tl.dot(negative(b_x).to(DOT), negative(b_w).to(DOT), z, input_precision=PRECISION)
    inside = in_m[:, None] & in_o[None, :]
    at = row[:, None] * outs + o[None, :]
    if HAS_OUTPUT:
        b_y = tl.load(y_ptr + at, mask=inside, other=0.0).to(tl.float32)  # [BM, BN]
        if HAS_BIAS:
            b_y -= tl.load(bias_ptr + o, mask=in_o, other=0.0).to(tl.float32)[None, :]
        twice = b_y + z
        z = tl.where(twice < z * ROUNDING, 0.0, twice * 0.5)
    if SCALED:
        z = z * b_x_scale[:, None] * b_w_scale[None, :]
    size = n.to(tl.int64) * outs
    for t in range(targets):
        b_rel = tl.load(rel_ptr + t * size + at, mask=inside, other=0.0)  # [BM, BN]
        s = safe_divide(b_rel, z, OFFICIAL)
        if SCALED:
            s = s * b_w_scale[None, :]
            tops = tl.num_programs(1)
            p_top = top_ptr + (t * n + row) * tops + tl.program_id(1)
            tl.store(p_top, tl.max(tl.where(inside, tl.abs(s), 0.0), 1), mask=in_m)
        tl.store(s_ptr + t * size + at, s, mask=inside)


@triton.jit
def zplus_back_kernel(
    x_ptr,  # [n, ins]
    s_ptr,  # [lanes, outs], lanes = targets · n
    grad_ptr,  # [lanes, outs]
    w_ptr,  # [outs, ins]
    w_grad_ptr,  # [outs, ins]
    rel_in_ptr,  # [lanes, ins]
    grad_in_ptr,  # [lanes, ins]
    s_scale_ptr,  # [lanes]
    lanes,
    n,
    outs,
    ins,
    w_row,
    w_col,
    w_grad_row,
    w_grad_col,
    HAS_GRAD: tl.constexpr,
    OWN_WEIGHT: tl.constexpr,  # the gradient's product takes the same weight
    SCALED: tl.constexpr,
    DOT: tl.constexpr,
    DOT_GRAD: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    lane = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    i = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_lane, in_i = lane < lanes, i < ins
    row = lane.to(tl.int64)
    c_pos = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    c_neg = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    c_grad = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if SCALED:
        b_scale = tl.load(s_scale_ptr + lane, mask=in_lane, other=1.0)  # [BM]
    for start in range(0, outs, BLOCK_K):
        o = start + tl.arange(0, BLOCK_K)
        in_o = o < outs
        at, inside = row[:, None] * outs + o[None, :], in_lane[:, None] & in_o[None, :]
        in_w = in_o[:, None] & in_i[None, :]
        far, near = o.to(tl.int64)[:, None], i.to(tl.int64)[None, :]
        b_s = tl.load(s_ptr + at, mask=inside, other=0.0).to(tl.float32)  # [BM, BK]
        b_w = tl.load(w_ptr + far * w_row + near * w_col, mask=in_w, other=0.0).to(tl.float32)  # [BK, BN]
        if SCALED:
            b_s = b_s / b_scale[:, None]
        c_pos = tl.dot(b_s.to(DOT), positive(b_w).to(DOT), c_pos, input_precision=PRECISION)
        c_neg = tl.dot(b_s.to(DOT), negative(b_w).to(DOT), c_neg, input_precision=PRECISION)
        if HAS_GRAD:
            b_grad = tl.load(grad_ptr + at, mask=inside, other=0.0)  # [BM, BK]
            if not OWN_WEIGHT:
                b_w = tl.load(w_grad_ptr + far * w_grad_row + near * w_grad_col, mask=in_w, other=0.0)  # [BK, BN]
            c_grad = tl.dot(b_grad.to(DOT_GRAD), b_w.to(DOT_GRAD), c_grad, input_precision=PRECISION)
    inside = in_lane[:, None] & in_i[None, :]
    b_x = tl.load(x_ptr + (row % n)[:, None] * ins + i[None, :], mask=inside, other=0.0).to(tl.float32)  # [BM, BN]
    rel = positive(b_x) * c_pos + negative(b_x) * c_neg
    if SCALED:
        rel = rel * b_scale[:, None]
    at = row[:, None] * ins + i[None, :]
    tl.store(rel_in_ptr + at, rel, mask=inside)
    if HAS_GRAD:
        tl.store(grad_in_ptr + at, c_grad, mask=inside)


def zplus_linear(
    x: Tensor, weight: Tensor, y: Tensor | None, bias: Tensor | None, rel: Tensor, grad: Tensor | None, rules: str
) -> tuple[Tensor, Tensor]:
    """`fastrel::zplus_linear` with operands of float32, bfloat16 or float16 and lanes of float32.

    Values of 16 bits are multiplied in TF32, which holds them exactly, and Z is then formed from both signed products;
    in float32 it is formed from the layer's own output where that is given.
    """
    none = x.new_empty(0, dtype=rel.dtype)
    from_output = y is not None and y.dtype == torch.float32 and weight.dtype == torch.float32
    return _launch(x, weight, none, None if grad is None else weight, y if from_output else None, bias, rel, grad, rules)


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
    """`fastrel::zplus_linear_reduced` in bfloat16 or float8_e4m3fn. |W| is formed in registers, Z from both signed products."""
    return _launch(x, w, scales, w_grad, None, None, rel, grad, "positive")


def _launch(
    x: Tensor,
    w: Tensor,
    scales: Tensor,
    w_grad: Tensor | None,
    y: Tensor | None,
    bias: Tensor | None,
    rel: Tensor,
    grad: Tensor | None,
    rules: str,
) -> tuple[Tensor, Tensor]:
    outs, ins = w.shape
    x, rel = x.reshape(-1, ins).contiguous(), rel.contiguous()
    n, targets = len(x), len(rel)
    lanes = targets * n
    scaled = scales.numel() > 0
    kind = "float8" if scaled else "bfloat16" if w.dtype == torch.bfloat16 and x.dtype == torch.float32 else "float32"
    # The interpreter computes bfloat16 on bit patterns: it multiplies in float32 instead.
    dot = tl.float32 if INTERPRETED or kind == "float32" else tl.float8e4nv if scaled else tl.bfloat16
    dot_grad = tl.float32 if INTERPRETED or kind == "float32" else tl.bfloat16
    stored = torch.float32 if INTERPRETED or kind == "float32" else torch.bfloat16
    multiply = precision(x, w)
    where = capability(x.device)
    tile = configs.of(configs.SHARES[kind], where)
    none = scales if scaled else rel
    tops = blocks(outs, tile.n)
    s = torch.empty(rel.shape, dtype=stored, device=x.device)
    x_scale = x.float().abs().amax(1).clamp_min(1e-30) / FLOAT8_MAX if scaled else none
    top = torch.empty(targets, n, tops, dtype=torch.float32, device=x.device) if scaled else none
    y = None if y is None else y.reshape(n, outs).contiguous()
    zplus_shares_kernel[blocks(n, tile.m), tops](
        x, w, none if y is None else y, none if bias is None else bias, rel, s, x_scale, none, top,
        n, outs, ins, targets, *w.stride(),
        HAS_OUTPUT=y is not None, HAS_BIAS=y is not None and bias is not None, SCALED=scaled, OFFICIAL=rules == "official",
        DOT=dot, PRECISION=multiply, BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    s_scale = top.amax(2).clamp_min(1e-30) / FLOAT8_MAX if scaled else none
    rel_in = torch.empty(*rel.shape[:-1], ins, dtype=torch.float32, device=x.device)
    grad_in = torch.empty_like(rel_in) if grad is not None else rel_in.new_empty(0)
    tile = configs.of(configs.BACK[kind], where)
    own = w_grad is None or w_grad is w
    gradient_weight = w if w_grad is None else w_grad
    zplus_back_kernel[blocks(lanes, tile.m), blocks(ins, tile.n)](
        x, s, none if grad is None else grad.contiguous(), w, gradient_weight, rel_in, grad_in, s_scale,
        lanes, n, outs, ins, *w.stride(), *gradient_weight.stride(),
        HAS_GRAD=grad is not None, OWN_WEIGHT=own, SCALED=scaled, DOT=dot, DOT_GRAD=dot_grad, PRECISION=multiply,
        BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return rel_in, grad_in
