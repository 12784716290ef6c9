"""The sweeps of `attention_relevance` as kernels: each alone, and those of queries and keys by programs of one launch."""

import triton
import triton.language as tl
from fastrel.triton_kernels.math import dot, operand, positive, safe_divide, sum_of_products, update_of


@triton.jit
def load_rows(p, row, rows, d, D: tl.constexpr, stride, PRECISION: tl.constexpr):
    """A tile [rows, D] of float32, as products in PRECISION take it, from the rows `row` of a matrix with d columns."""
    c = tl.arange(0, D)
    at = row.to(tl.int64)[:, None] * stride + c[None, :]
    tile = tl.load(p + at, mask=(row < rows)[:, None] & (c < d)[None, :], other=0.0)
    return operand(tile, tl.float32, PRECISION) if tile.dtype == tl.float32 else tile.to(tl.float32)


@triton.jit
def store_rows(p, row, rows, d, D: tl.constexpr, stride, x):
    """The counterpart of `load_rows`."""
    c = tl.arange(0, D)
    tl.store(p + row.to(tl.int64)[:, None] * stride + c[None, :], x, mask=(row < rows)[:, None] & (c < d)[None, :])


@triton.jit
def products_and_scores(
    b_q, b_k, i, j, queries, keys, p_mask, mask_row, mask_col, scale, query_start,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Q Kᵀ, the mask's bias, and scale Q Kᵀ + mask, −∞ where nothing is attended to, [BM, BN]."""
    product = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
    scores = product * scale
    bias = tl.zeros_like(scores)
    inside = (i < queries)[:, None] & (j < keys)[None, :]
    if MASK != 0:
        at = i.to(tl.int64)[:, None] * mask_row + j.to(tl.int64)[None, :] * mask_col
        b_mask = tl.load(p_mask + at, mask=inside, other=0)  # [BM, BN]
        if MASK == 1:
            inside = inside & (b_mask != 0)
        else:
            bias = b_mask.to(tl.float32)
            scores += bias
    if CAUSAL:
        inside = inside & (j[None, :] <= (query_start + i)[:, None])
    return product, bias, tl.where(inside, scores, -float("inf"))


@triton.jit
def official_scores_relevance(rel_attn, product, bias, scale, MASKED: tl.constexpr):
    """S₂ = R ⊘ Q Kᵀ with R the relevance of the scores; with a mask R = u ⊙ S, not yet scaled, and Σ u S, Σ bias S, Σ R_A of rows."""
    if MASKED:
        scaled = product * scale
        s = tl.where(rel_attn == 0.0, 0.0, safe_divide(rel_attn, scaled + bias, True))
        own, of_mask = scaled * s, tl.where(rel_attn == 0.0, 0.0, bias * s)
        sums = sum_of_products(own, 1), sum_of_products(of_mask, 1), sum_of_products(rel_attn, 1)
        return safe_divide(own, product, True), sums[0], sums[1], sums[2]
    else:
        nothing = tl.sum(tl.zeros_like(product), 1)
        return safe_divide(rel_attn, product, True), nothing, nothing, nothing


@triton.jit(do_not_specialize=["queries", "keys", "targets", "query_start"])
def attention_rows_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr,
    rel_ptr, grad_ptr,  # [targets, batch, heads, queries, d]
    lse_ptr,  # [batch, heads, queries]
    s_ptr,  # [targets, batch, heads, queries, d]
    delta_ptr,  # [targets, batch, heads, queries]
    heads, queries, keys, d, targets, scale, query_start,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    mask_batch, mask_head, mask_row, mask_col,
    rel_target, rel_batch, rel_head, rel_row, grad_target, grad_batch, grad_head, grad_row,
    REL: tl.constexpr, GRAD: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr, OFFICIAL: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(queries, BLOCK_M)
    i = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    part = (tl.program_id(0) // tiles).to(tl.int64)
    b, h = part // heads, part % heads
    b_q = load_rows(q_ptr + b * q_batch + h * q_head, i, queries, d, D, q_row, PRECISION)  # [BM, D]
    # In TF32, A in two parts: δ is subtracted from what it is the mean of, and denominators are worth their digits.
    SPLIT: tl.constexpr = PRECISION == "tf32"
    highest = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    out = tl.zeros((BLOCK_M, D), tl.float32)
    out_relevant = tl.zeros((BLOCK_M, D), tl.float32)
    p_mask = mask_ptr + b * mask_batch + h * mask_head
    for start in tl.range(0, keys, BLOCK_N, disable_licm=True):
        j = start + tl.arange(0, BLOCK_N)
        b_k = load_rows(k_ptr + b * k_batch + h * k_head, j, keys, d, D, k_row, PRECISION)  # [BN, D]
        b_v = load_rows(v_ptr + b * v_batch + h * v_head, j, keys, d, D, v_row, PRECISION)  # [BN, D]
        _, _, scores = products_and_scores(
            b_q, b_k, i, j, queries, keys, p_mask, mask_row, mask_col, scale, query_start, MASK, CAUSAL, PRECISION
        )
        top = tl.maximum(highest, tl.max(scores, 1))
        safe = tl.where(top == -float("inf"), 0.0, top)
        kept = tl.exp(highest - safe)
        attn = tl.exp(scores - safe[:, None])
        total = total * kept + tl.sum(attn, 1)
        if GRAD:
            out = dot(attn, b_v, out * kept[:, None], SPLIT, tl.float32, PRECISION)
        if REL:
            b_relevant = b_v if OFFICIAL else positive(b_v)
            out_relevant = dot(attn, b_relevant, out_relevant * kept[:, None], SPLIT, tl.float32, PRECISION)
        highest = top
    share = tl.where(total == 0.0, 0.0, 1.0 / tl.where(total == 0.0, 1.0, total))
    safe = tl.where(total == 0.0, 0.0, highest + tl.log(tl.where(total == 0.0, 1.0, total)))
    own = part * queries + i
    size = (tl.num_programs(0) // tiles).to(tl.int64) * queries
    tl.store(lse_ptr + own, safe, mask=i < queries)
    for target in range(targets):
        t = tl.cast(target, tl.int64)
        if REL:
            b_rel = load_rows(rel_ptr + t * rel_target + b * rel_batch + h * rel_head, i, queries, d, D, rel_row, "ieee")
            s = safe_divide(b_rel, out_relevant * share[:, None], OFFICIAL)
            store_rows(s_ptr + (t * size + part * queries) * d, i, queries, d, D, d, s)
        if GRAD:
            p_grad = grad_ptr + t * grad_target + b * grad_batch + h * grad_head
            b_grad = load_rows(p_grad, i, queries, d, D, grad_row, PRECISION)  # [BM, D]
            delta = sum_of_products(b_grad * out * share[:, None], 1)
            tl.store(delta_ptr + t * size + own, delta, mask=i < queries)


@triton.jit
def queries_sweep(
    tile, part, parts, q_ptr, k_ptr, v_ptr, mask_ptr, lse_ptr, s_ptr, delta_ptr, grad_ptr, rel_q_ptr, grad_q_ptr, sum_ptr,
    mask_sum_ptr, heads, queries, keys, d, scale, SHARE: tl.constexpr, query_start, lane_row,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    mask_batch, mask_head, mask_row, mask_col, grad_target, grad_batch, grad_head, grad_row,
    REL: tl.constexpr, GRAD: tl.constexpr, GRAD_IN: tl.constexpr, REL_IN: tl.constexpr, SUMS: tl.constexpr,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, OFFICIAL: tl.constexpr, UPDATE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Tile `tile` of the queries of sample and head `part`, of `parts` samples times heads, over all keys."""
    i, t = tile * BLOCK_M + tl.arange(0, BLOCK_M), tl.program_id(1).to(tl.int64)
    b, h = part // heads, part % heads
    own = (t * parts + part) * queries
    b_q = load_rows(q_ptr + b * q_batch + h * q_head, i, queries, d, D, q_row, PRECISION)  # [BM, D]
    b_lse = tl.load(lse_ptr + part * queries + i, mask=i < queries, other=0.0)  # [BM]
    rel_attn = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    grad_attn = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if REL:
        b_s = load_rows(s_ptr + own * d, i, queries, d, D, d, PRECISION)  # [BM, D]
    if GRAD:
        p_grad = grad_ptr + t * grad_target + b * grad_batch + h * grad_head
        b_grad = load_rows(p_grad, i, queries, d, D, grad_row, PRECISION)  # [BM, D]
        b_delta = tl.load(delta_ptr + own + i, mask=i < queries, other=0.0)  # [BM]
    grad_q = tl.zeros((BLOCK_M, D), tl.float32)
    rel_q = tl.zeros((BLOCK_M, D), tl.float32)
    sums = tl.zeros((BLOCK_M,), tl.float32)
    sum_own = tl.zeros((BLOCK_M,), tl.float32)
    sum_mask = tl.zeros((BLOCK_M,), tl.float32)
    sum_rel = tl.zeros((BLOCK_M,), tl.float32)
    p_mask = mask_ptr + b * mask_batch + h * mask_head
    for start in tl.range(0, keys, BLOCK_N, disable_licm=True):
        j = start + tl.arange(0, BLOCK_N)
        b_k = load_rows(k_ptr + b * k_batch + h * k_head, j, keys, d, D, k_row, PRECISION)  # [BN, D]
        b_v = load_rows(v_ptr + b * v_batch + h * v_head, j, keys, d, D, v_row, PRECISION)  # [BN, D]
        product, bias, scores = products_and_scores(
            b_q, b_k, i, j, queries, keys, p_mask, mask_row, mask_col, scale, query_start, MASK, CAUSAL, PRECISION
        )
        attn = tl.exp(scores - b_lse[:, None])
        if REL:
            b_relevant = b_v if OFFICIAL else positive(b_v)
            rel_attn = 0.5 * attn * tl.dot(b_s, tl.trans(b_relevant), input_precision=PRECISION)
        if GRAD:
            grad_attn = tl.dot(b_grad, tl.trans(b_v), input_precision=PRECISION)
        if SUMS:
            sums += tl.sum(update_of(attn, grad_attn, rel_attn, UPDATE), 1)
        if GRAD_IN:
            weighted = attn * (grad_attn - b_delta[:, None]) * scale
            grad_q = tl.dot(operand(weighted, tl.float32, PRECISION), b_k, grad_q, input_precision=PRECISION)
        if REL_IN and OFFICIAL:
            s_scores, row_own, row_mask, row_rel = official_scores_relevance(rel_attn, product, bias, scale, MASK != 0)
            rel_q = tl.dot(operand(s_scores, tl.float32, PRECISION), b_k, rel_q, input_precision=PRECISION)
            sum_own += row_own
            sum_mask += row_mask
            sum_rel += row_rel
    at = ((t * (parts // heads) + b) * queries * heads + h) * d
    if GRAD_IN:
        at_grad = (t * (parts // heads) + b) * queries * lane_row + h * d
        store_rows(grad_q_ptr + at_grad, i, queries, d, D, lane_row, grad_q * (SHARE * SHARE))
    if REL_IN and OFFICIAL:
        store_rows(rel_q_ptr + at, i, queries, d, D, heads * d, rel_q * b_q * 0.5)
        if MASK != 0:
            p_sum = mask_sum_ptr + own * 3 + i
            tl.store(p_sum, sum_own, mask=i < queries)
            tl.store(p_sum + queries, sum_mask, mask=i < queries)
            tl.store(p_sum + 2 * queries, sum_rel, mask=i < queries)
    if SUMS:
        tl.store(sum_ptr + own + i, sums / heads, mask=i < queries)


@triton.jit
def keys_sweep(
    tile, part, parts, q_ptr, k_ptr, v_ptr, mask_ptr, lse_ptr, s_ptr, delta_ptr, grad_ptr, row_ptr, rel_k_ptr, rel_v_ptr,
    grad_k_ptr, grad_v_ptr, through_ptr, heads, queries, keys, d, scale, SHARE: tl.constexpr, query_start, lane_row,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    mask_batch, mask_head, mask_row, mask_col, grad_target, grad_batch, grad_head, grad_row,
    REL: tl.constexpr, GRAD: tl.constexpr, GRAD_IN: tl.constexpr, REL_IN: tl.constexpr, ROW: tl.constexpr,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, OFFICIAL: tl.constexpr, UPDATE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Tile `tile` of the keys of sample and head `part`, of `parts` samples times heads, over all queries."""
    j, t = tile * BLOCK_N + tl.arange(0, BLOCK_N), tl.program_id(1).to(tl.int64)
    b, h = part // heads, part % heads
    own = (t * parts + part) * queries
    sample = t * (parts // heads) + b
    b_k = load_rows(k_ptr + b * k_batch + h * k_head, j, keys, d, D, k_row, PRECISION)  # [BN, D]
    b_v = load_rows(v_ptr + b * v_batch + h * v_head, j, keys, d, D, v_row, PRECISION)  # [BN, D]
    b_relevant = b_v if OFFICIAL else positive(b_v)
    rel_attn = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    grad_attn = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    grad_k = tl.zeros((BLOCK_N, D), tl.float32)
    grad_v = tl.zeros((BLOCK_N, D), tl.float32)
    rel_k = tl.zeros((BLOCK_N, D), tl.float32)
    rel_v = tl.zeros((BLOCK_N, D), tl.float32)
    through = tl.zeros((BLOCK_N,), tl.float32)
    p_mask = mask_ptr + b * mask_batch + h * mask_head
    for start in tl.range(0, queries, BLOCK_M, disable_licm=True):
        i = start + tl.arange(0, BLOCK_M)
        b_q = load_rows(q_ptr + b * q_batch + h * q_head, i, queries, d, D, q_row, PRECISION)  # [BM, D]
        b_lse = tl.load(lse_ptr + part * queries + i, mask=i < queries, other=0.0)  # [BM]
        product, bias, scores = products_and_scores(
            b_q, b_k, i, j, queries, keys, p_mask, mask_row, mask_col, scale, query_start, MASK, CAUSAL, PRECISION
        )
        attn = tl.exp(scores - b_lse[:, None])
        if REL:
            b_s = load_rows(s_ptr + own * d, i, queries, d, D, d, PRECISION)  # [BM, D]
            rel_attn = 0.5 * attn * tl.dot(b_s, tl.trans(b_relevant), input_precision=PRECISION)
        if GRAD:
            p_grad = grad_ptr + t * grad_target + b * grad_batch + h * grad_head
            b_grad = load_rows(p_grad, i, queries, d, D, grad_row, PRECISION)  # [BM, D]
            grad_attn = tl.dot(b_grad, tl.trans(b_v), input_precision=PRECISION)
        if ROW:
            b_row = tl.load(row_ptr + sample * queries + i, mask=i < queries, other=0.0)  # [BM]
            through += sum_of_products(b_row[:, None] * update_of(attn, grad_attn, rel_attn, UPDATE), 0)
        if GRAD_IN:
            grad_v = tl.dot(tl.trans(operand(attn, tl.float32, PRECISION)), b_grad, grad_v, input_precision=PRECISION)
            b_delta = tl.load(delta_ptr + own + i, mask=i < queries, other=0.0)  # [BM]
            weighted = attn * (grad_attn - b_delta[:, None]) * (scale * SHARE * SHARE if PRECISION == "ieee" else scale)
            grad_k = tl.dot(tl.trans(operand(weighted, tl.float32, PRECISION)), b_q, grad_k, input_precision=PRECISION)
        if REL_IN:
            rel_v = tl.dot(tl.trans(operand(attn, tl.float32, PRECISION)), b_s, rel_v, input_precision=PRECISION)
            if OFFICIAL:
                s_scores, _, _, _ = official_scores_relevance(rel_attn, product, bias, scale, MASK != 0)
                rel_k = tl.dot(tl.trans(operand(s_scores, tl.float32, PRECISION)), b_q, rel_k, input_precision=PRECISION)
    at = (sample * keys * heads + h) * d
    if GRAD_IN:
        at_grad = sample * keys * lane_row + h * d
        store_rows(
            grad_k_ptr + at_grad, j, keys, d, D, lane_row, grad_k if PRECISION == "ieee" else grad_k * (SHARE * SHARE)
        )
        store_rows(grad_v_ptr + at_grad, j, keys, d, D, lane_row, grad_v * SHARE)
    if REL_IN:
        store_rows(rel_v_ptr + at, j, keys, d, D, heads * d, rel_v * b_relevant * (0.5 if OFFICIAL else 1.0))
        if OFFICIAL:
            store_rows(rel_k_ptr + at, j, keys, d, D, heads * d, rel_k * b_k * 0.5)
    if ROW:
        tl.store(through_ptr + (t * parts + part) * keys + j, through / heads, mask=j < keys)


@triton.jit(do_not_specialize=["queries", "keys", "targets", "query_start"])
def attention_queries_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, lse_ptr, s_ptr, delta_ptr, grad_ptr,
    rel_q_ptr,  # [targets, batch, queries, heads, d]
    grad_q_ptr,  # the same, lane_row numbers from token to token
    sum_ptr,  # [targets, batch, heads, queries]
    mask_sum_ptr,  # [targets, batch, heads, 3, queries]
    heads, queries, keys, d, scale, SHARE: tl.constexpr, query_start, lane_row,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    mask_batch, mask_head, mask_row, mask_col, grad_target, grad_batch, grad_head, grad_row,
    REL: tl.constexpr, GRAD: tl.constexpr, GRAD_IN: tl.constexpr, REL_IN: tl.constexpr, SUMS: tl.constexpr,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, OFFICIAL: tl.constexpr, UPDATE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(queries, BLOCK_M)
    part, parts = (tl.program_id(0) // tiles).to(tl.int64), (tl.num_programs(0) // tiles).to(tl.int64)
    queries_sweep(
        tl.program_id(0) % tiles, part, parts, q_ptr, k_ptr, v_ptr, mask_ptr, lse_ptr, s_ptr,
        delta_ptr, grad_ptr, rel_q_ptr, grad_q_ptr, sum_ptr,
        mask_sum_ptr, heads, queries, keys, d, scale, SHARE, query_start, lane_row,
        q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
        mask_batch, mask_head, mask_row, mask_col, grad_target, grad_batch, grad_head, grad_row,
        REL, GRAD, GRAD_IN, REL_IN, SUMS, MASK, CAUSAL, OFFICIAL, UPDATE, PRECISION, BLOCK_M, BLOCK_N, D,
    )  # fmt: skip


@triton.jit(do_not_specialize=["queries", "keys", "targets", "query_start"])
def attention_keys_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, lse_ptr, s_ptr, delta_ptr, grad_ptr,
    row_ptr,  # [targets, batch, queries]
    rel_k_ptr, rel_v_ptr,  # [targets, batch, keys, heads, d]
    grad_k_ptr, grad_v_ptr,  # the same, lane_row numbers from token to token
    through_ptr,  # [targets, batch, heads, keys]
    heads, queries, keys, d, scale, SHARE: tl.constexpr, query_start, lane_row,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    mask_batch, mask_head, mask_row, mask_col, grad_target, grad_batch, grad_head, grad_row,
    REL: tl.constexpr, GRAD: tl.constexpr, GRAD_IN: tl.constexpr, REL_IN: tl.constexpr, ROW: tl.constexpr,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, OFFICIAL: tl.constexpr, UPDATE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(keys, BLOCK_N)
    part, parts = (tl.program_id(0) // tiles).to(tl.int64), (tl.num_programs(0) // tiles).to(tl.int64)
    keys_sweep(
        tl.program_id(0) % tiles, part, parts, q_ptr, k_ptr, v_ptr, mask_ptr, lse_ptr, s_ptr,
        delta_ptr, grad_ptr, row_ptr, rel_k_ptr, rel_v_ptr,
        grad_k_ptr, grad_v_ptr, through_ptr, heads, queries, keys, d, scale, SHARE, query_start, lane_row,
        q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
        mask_batch, mask_head, mask_row, mask_col, grad_target, grad_batch, grad_head, grad_row,
        REL, GRAD, GRAD_IN, REL_IN, ROW, MASK, CAUSAL, OFFICIAL, UPDATE, PRECISION, BLOCK_M, BLOCK_N, D,
    )  # fmt: skip


@triton.jit(do_not_specialize=["queries", "keys", "targets", "query_start"])
def attention_lanes_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, lse_ptr, s_ptr, delta_ptr, grad_ptr, row_ptr,
    rel_k_ptr, rel_v_ptr, grad_q_ptr, grad_k_ptr, grad_v_ptr, through_ptr,  # as the sweeps alone have them
    heads, queries, keys, d, scale, SHARE: tl.constexpr, query_start, q_lane_row, k_lane_row,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    mask_batch, mask_head, mask_row, mask_col, grad_target, grad_batch, grad_head, grad_row,
    REL: tl.constexpr, GRAD: tl.constexpr, ROW: tl.constexpr,
    APART: tl.constexpr,  # relevance of the keys has a sweep of its own
    MASK: tl.constexpr, CAUSAL: tl.constexpr, OFFICIAL: tl.constexpr, UPDATE: tl.constexpr, PRECISION: tl.constexpr,
    Q_M: tl.constexpr, Q_N: tl.constexpr, K_M: tl.constexpr, K_N: tl.constexpr, R_M: tl.constexpr, R_N: tl.constexpr,
    D: tl.constexpr,
):  # fmt: skip
    """Under the positive rules: the queries' sweep by the first programs of each head,
    the keys' by those after them. Neither waits for the other."""
    of_queries, of_keys = tl.cdiv(queries, Q_M), tl.cdiv(keys, K_N)
    of_relevance = tl.cdiv(keys, R_N) if APART else 0
    tiles = of_queries + of_keys + of_relevance
    tile, part = tl.program_id(0) % tiles, (tl.program_id(0) // tiles).to(tl.int64)
    parts = (tl.num_programs(0) // tiles).to(tl.int64)
    if tile < of_queries:
        queries_sweep(
            tile, part, parts, q_ptr, k_ptr, v_ptr, mask_ptr, lse_ptr, s_ptr, delta_ptr, grad_ptr, lse_ptr,
            grad_q_ptr, lse_ptr,
            lse_ptr, heads, queries, keys, d, scale, SHARE, query_start, q_lane_row,
            q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
            mask_batch, mask_head, mask_row, mask_col, grad_target, grad_batch, grad_head, grad_row,
            False, GRAD, True, False, False, MASK, CAUSAL, OFFICIAL, UPDATE, PRECISION, Q_M, Q_N, D,
        )  # fmt: skip
    elif tile < of_queries + of_keys:
        keys_sweep(
            tile - of_queries, part, parts, q_ptr, k_ptr, v_ptr, mask_ptr, lse_ptr, s_ptr, delta_ptr,
            grad_ptr, row_ptr, rel_k_ptr, rel_v_ptr,
            grad_k_ptr, grad_v_ptr, through_ptr, heads, queries, keys, d, scale, SHARE, query_start, k_lane_row,
            q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
            mask_batch, mask_head, mask_row, mask_col, grad_target, grad_batch, grad_head, grad_row,
            REL, GRAD, True, not APART, ROW, MASK, CAUSAL, OFFICIAL, UPDATE, PRECISION, K_M, K_N, D,
        )  # fmt: skip
    elif APART:
        keys_sweep(
            tile - of_queries - of_keys, part, parts, q_ptr, k_ptr, v_ptr, mask_ptr, lse_ptr, s_ptr,
            delta_ptr, grad_ptr, row_ptr, rel_k_ptr, rel_v_ptr,
            grad_k_ptr, grad_v_ptr, through_ptr, heads, queries, keys, d, scale, SHARE, query_start, k_lane_row,
            q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
            mask_batch, mask_head, mask_row, mask_col, grad_target, grad_batch, grad_head, grad_row,
            REL, False, False, True, False, MASK, CAUSAL, OFFICIAL, UPDATE, PRECISION, R_M, R_N, D,
        )  # fmt: skip
