"""`attention_relevance`: softmax attention without a map in memory, in FlashAttention's tiles.

Three sweeps (`attention_sweeps`), A recomputed in each from q, k and the log-sum-exp of its rows:

rows: a tile of queries over all keys. Log-sum-exp, S = R ⊘ (A V'), δ = Σ_d g ⊙ (A V).
queries: a tile of queries over all keys. g_Q = D K with D = scale A ⊙ (g Vᵀ − δ); official R_Q; Σ_k M where rows are scaled.
keys: a tile of keys over all queries. R_V, g_V, g_K, official R_K, and `through` = Σ_q row_q M_q.

V' = V⁺ under the positive rules, V under the official ones; R_A = ½ A ⊙ (S V'ᵀ). Each head leaves its own part of M; the parts are
added up in order.

A mask is an operand of a residual add under the official rules: relevance of the scores is scaled by sums over the whole sample.
Q and K take it linearly, so the queries' sweep leaves the sums, and the factor is applied to what both sweeps made.
"""

from typing import Any

import torch
import triton
from fastrel.triton_kernels import attention_products, configs
from fastrel.triton_kernels.attention_sweeps import (
    attention_keys_kernel,
    attention_lanes_kernel,
    attention_queries_kernel,
    attention_rows_kernel,
)
from fastrel.triton_kernels.launch import (
    ALL_REGISTERS,
    blocks,
    capability,
    dense,
    float32_precision,
    on_its_device,
    with_unit_stride,
)
from fastrel.triton_kernels.math import UPDATES
from torch import Tensor

from fastrel.ops.attention import mask_factor

#: Largest head for which three TF32 products fit into registers; larger ones are multiplied in float32 itself, or by the vendor's
#: library (`attention_products`).
MAX_TF32X3 = 64

#: Kinds of masks: none, True where a key is attended to, a bias of the scores.
NO_MASK, KEEP, BIAS = 0, 1, 2

#: What strides of a tensor [batch, heads, rows, d] are of.
ROWS = ("batch", "head", "row")


@on_its_device
def attention_relevance(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    rel: Tensor | None,
    grad: Tensor | None,
    row: Tensor | None,
    scale: float,
    is_causal: bool,
    query_start: int,
    rules: str,
    update: str,
    normalize: bool,
    inputs: bool,
    halves: bool = False,
    parts: bool = False,
) -> tuple[Tensor, ...]:
    """`fastrel::attention_relevance` for q, k, v of float32, bfloat16 or float16 with head sizes to 128, lanes of float32.

    parts: `through` as the heads' own parts [K, B, h, Tk], not yet added up.
    """
    (batch, heads, queries, d), keys = q.shape, k.shape[2]
    given = rel if rel is not None else grad if grad is not None else row
    targets = 1 if given is None else len(given)
    official = rules == "official"
    narrow = all(x.dtype in (torch.bfloat16, torch.float16) for x in (q, k, v))
    multiply = "tf32" if narrow and not torch.version.hip else float32_precision()
    width, where = max(16, triton.next_power_of_2(d)), capability(q.device)
    if multiply == "tf32x3" and width > MAX_TF32X3:
        if not official and configs.heads_by_library(d, batch * queries, where):
            options = (scale, is_causal, query_start, update, normalize, inputs, halves)
            *lanes, through = attention_products.attention(q, k, v, mask, rel, grad, row, *options)
            return *lanes, through.unsqueeze(2) if parts and row is not None else through
        multiply = "ieee"
    q, k, v = (with_unit_stride(x) for x in (q, k, v))
    rel, grad = (None if x is None else with_unit_stride(x) for x in (rel, grad))
    none = torch.empty(0, dtype=torch.float32, device=q.device)

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=q.device)

    def lane(wanted: bool, tokens: int) -> Tensor:
        """[targets, batch, heads, tokens, d] with the heads of a token side by side."""
        return empty(targets, batch, tokens, heads, d).transpose(2, 3) if wanted else none

    wants_rel, wants_grad = inputs and rel is not None, inputs and grad is not None
    rel_q, rel_k = lane(wants_rel and official, queries), lane(wants_rel and official, keys)
    rel_v = lane(wants_rel, keys)
    if wants_grad and queries == keys:
        # Side by side, as a layer that made q, k and v in one has them: its lanes need no joining.
        grads = empty(targets, batch, queries, 3, heads, d)
        grad_q, grad_k, grad_v = (grads.select(3, i).transpose(2, 3) for i in range(3))
    else:
        grad_q, grad_k, grad_v = lane(wants_grad, queries), lane(wants_grad, keys), lane(wants_grad, keys)
    lse = empty(batch, heads, queries)
    s = none if rel is None else empty(targets, batch, heads, queries, d)
    delta = none if grad is None else empty(targets, batch, heads, queries)

    kind = NO_MASK if mask is None else KEEP if mask.dtype == torch.bool else BIAS
    mask_values = q if mask is None else mask.view(torch.uint8) if kind == KEEP else mask
    grad_values, grad_strides = (q, (0, 0, 0, 0)) if grad is None else (grad, grad.stride()[:4])
    values = {
        "q_ptr": q, "k_ptr": k, "v_ptr": v, "mask_ptr": mask_values, "lse_ptr": lse, "s_ptr": s, "delta_ptr": delta,
        "grad_ptr": grad_values, "heads": heads, "queries": queries, "keys": keys, "d": d, "scale": scale,
        "query_start": query_start,
        **_strides("q", q.stride()), **_strides("k", k.stride()), **_strides("v", v.stride()), **_mask_strides(mask),
        **_strides("grad", grad_strides, ("target", *ROWS)),
    }  # fmt: skip
    options = {
        "REL": rel is not None, "GRAD": grad is not None, "MASK": kind, "CAUSAL": is_causal, "OFFICIAL": official,
        "PRECISION": multiply, "D": width,
    }  # fmt: skip

    registers = {} if multiply == "ieee" else ALL_REGISTERS

    def tiled(sweep: str) -> tuple[configs.Tile, dict[str, Any]]:
        tile = configs.attention(multiply, width, sweep, where)
        return tile, {"BLOCK_M": tile.m, "BLOCK_N": tile.n, "num_warps": tile.warps, "num_stages": tile.stages, **registers}

    tile, blocking = tiled("rows")
    attention_rows_kernel[(blocks(queries, tile.m) * batch * heads,)](
        **values, rel_ptr=q if rel is None else rel, targets=targets,
        **_strides("rel", (0, 0, 0, 0) if rel is None else rel.stride(), ("target", *ROWS)), **options, **blocking,
    )  # fmt: skip
    options |= {"UPDATE": UPDATES[update], "SHARE": 0.5 if halves else 1.0}
    sums = empty(targets, batch, heads, queries) if row is not None and normalize else none
    mask_sums = empty(targets, batch, heads, 3, queries) if mask is not None and wants_rel and official else none
    # What a sweep computes: lanes that go in, and M. Else than in TF32 under the positive rules, all lanes at once would spill.
    together = multiply == "tf32" and not official
    sweeps = [(wants_grad, wants_rel, True)] if together else [(wants_grad, False, True), (False, wants_rel, False)]
    plain = mask is None and not is_causal and not official and not sums.numel() and not torch.version.hip
    tiles = configs.together(multiply, width, batch * queries, where) if plain and wants_grad and wants_rel else None
    if tiles:
        of_queries, of_keys, of_relevance = tiles[0], tiles[1], tiles[-1]
        programs = blocks(queries, of_queries.m) + blocks(keys, of_keys.n)
        programs += 0 if together else blocks(keys, of_relevance.n)
        through = none if row is None else empty(targets, batch, heads, keys)
        attention_lanes_kernel[programs * batch * heads, targets](
            **values, q_lane_row=grad_q.stride(-2), k_lane_row=grad_k.stride(-2), row_ptr=none if row is None else dense(row),
            rel_k_ptr=rel_k, rel_v_ptr=rel_v, grad_q_ptr=grad_q, grad_k_ptr=grad_k, grad_v_ptr=grad_v, through_ptr=through,
            **options, ROW=row is not None, APART=not together, Q_M=of_queries.m, Q_N=of_queries.n,
            K_M=of_keys.m, K_N=of_keys.n, R_M=of_relevance.m, R_N=of_relevance.n,
            num_warps=of_queries.warps, num_stages=of_queries.stages, **registers,
        )  # fmt: skip
        return rel_q, rel_k, rel_v, grad_q, grad_k, grad_v, none, _of_heads(through, row, parts)
    for grad_in, rel_in, update_in in sweeps:
        rel_in, sums_in = rel_in and official, update_in and sums.numel() > 0
        tile, blocking = tiled("queries relevance" if rel_in and not grad_in else "queries")
        if grad_in or rel_in or sums_in:
            attention_queries_kernel[blocks(queries, tile.m) * batch * heads, targets](
                **values, lane_row=grad_q.stride(-2) if wants_grad else 0,
                rel_q_ptr=rel_q, grad_q_ptr=grad_q, sum_ptr=sums, mask_sum_ptr=mask_sums,
                GRAD_IN=grad_in, REL_IN=rel_in, SUMS=sums_in, **_of_lanes(options, grad_in, rel_in, sums_in), **blocking,
            )  # fmt: skip
    kept, weights = none, row
    if row is not None:
        weights = dense(row)
        if normalize:
            kept = weights = weights / (1 + sums.sum(2))
    through = none if row is None else empty(targets, batch, heads, keys)
    for grad_in, rel_in, update_in in sweeps:
        row_in = update_in and row is not None
        of_gradient = "keys official" if official else "keys"
        tile, blocking = tiled(of_gradient if grad_in else "keys relevance" if rel_in else "keys row")
        if grad_in or rel_in or row_in:
            attention_keys_kernel[blocks(keys, tile.n) * batch * heads, targets](
                **values, lane_row=grad_k.stride(-2) if wants_grad else 0,
                row_ptr=none if weights is None else weights, rel_k_ptr=rel_k, rel_v_ptr=rel_v,
                grad_k_ptr=grad_k, grad_v_ptr=grad_v, through_ptr=through, GRAD_IN=grad_in, REL_IN=rel_in, ROW=row_in,
                **_of_lanes(options, grad_in, rel_in, row_in), **blocking,
            )  # fmt: skip
    if mask_sums.numel():
        factor = mask_factor(mask_sums.sum((2, 4))).view(targets, batch, 1, 1, 1)
        rel_q, rel_k = rel_q * factor, rel_k * factor
    return rel_q, rel_k, rel_v, grad_q, grad_k, grad_v, kept, _of_heads(through, row, parts)


def _of_heads(through: Tensor, row: Tensor | None, parts: bool) -> Tensor:
    return through if row is None or parts else through.sum(2)


def _of_lanes(options: dict[str, Any], grad_in: bool, rel_in: bool, update_in: bool) -> dict[str, Any]:
    """Options of a sweep that needs only some of the lanes."""
    return {**options, "REL": options["REL"] and (rel_in or update_in), "GRAD": options["GRAD"] and (grad_in or update_in)}


def _strides(name: str, strides: tuple[int, ...], of: tuple[str, ...] = ROWS) -> dict[str, int]:
    """Strides of a tensor [batch, heads, rows, d], by the kernels' names for them."""
    return {f"{name}_{part}": stride for part, stride in zip(of, strides, strict=False)}


def _mask_strides(mask: Tensor | None) -> dict[str, int]:
    """Strides of a mask that broadcasts to [batch, heads, queries, keys], 0 where it does."""
    shape, strides = ((), ()) if mask is None else (mask.shape, mask.stride())
    own = [0 if size == 1 else stride for size, stride in zip(shape, strides, strict=True)]
    return _strides("mask", (*[0] * (4 - len(own)), *own), (*ROWS, "col"))
