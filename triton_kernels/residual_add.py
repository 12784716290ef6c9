"""`residual_add`: one pass under the positive rules; under the official ones sums of chunks, then a pass that scales.

The chunks' sums lie side by side and are added up in order: no atomics, the same result at every run.
"""

import torch
import triton
import triton.language as tl
from fastrel.triton_kernels.launch import blocks, dense, on_its_device
from fastrel.triton_kernels.math import safe_divide, share
from torch import Tensor

BLOCK = 1024
#: Blocks that one program of the summing pass adds up.
RUN = 8


@triton.jit(do_not_specialize=["size", "total"])
def residual_share_kernel(
    u_ptr, v_ptr,  # [size]
    rel_ptr, beside_ptr, rel_u_ptr, rel_v_ptr,  # [targets, size]
    size, total,
    ADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < total
    b_u = tl.load(u_ptr + at % size, mask=inside, other=0.0).to(tl.float32)  # [BLOCK]
    b_v = tl.load(v_ptr + at % size, mask=inside, other=0.0).to(tl.float32)  # [BLOCK]
    b_rel = tl.load(rel_ptr + at, mask=inside, other=0.0)  # [BLOCK]
    if ADDED:
        b_rel += tl.load(beside_ptr + at, mask=inside, other=0.0)
    rel_u, rel_v = share(b_u, b_v, b_rel)
    tl.store(rel_u_ptr + at, rel_u, mask=inside)
    tl.store(rel_v_ptr + at, rel_v, mask=inside)


@triton.jit(do_not_specialize=["batch"])
def residual_sums_kernel(
    u_ptr, v_ptr,  # [batch, size]
    rel_ptr,  # [targets, batch, size]
    sums_ptr,  # [targets · batch, 3, chunks]
    batch, size,
    BLOCK: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    chunk, sample = tl.program_id(1), tl.program_id(0).to(tl.int64)
    value = (sample % batch) * size
    sum_u = tl.zeros((BLOCK,), tl.float32)
    sum_v = tl.zeros((BLOCK,), tl.float32)
    sum_rel = tl.zeros((BLOCK,), tl.float32)
    for step in range(RUN):
        at = (chunk.to(tl.int64) * RUN + step) * BLOCK + tl.arange(0, BLOCK)
        inside = at < size
        b_u = tl.load(u_ptr + value + at, mask=inside, other=0.0).to(tl.float32)  # [BLOCK]
        b_v = tl.load(v_ptr + value + at, mask=inside, other=0.0).to(tl.float32)  # [BLOCK]
        b_rel = tl.load(rel_ptr + sample * size + at, mask=inside, other=0.0)  # [BLOCK]
        s = safe_divide(b_rel, b_u + b_v, True)
        sum_u += b_u * s
        sum_v += b_v * s
        sum_rel += b_rel
    chunks = tl.num_programs(1)
    p_sums = sums_ptr + sample * 3 * chunks + chunk
    tl.store(p_sums, tl.sum(sum_u))
    tl.store(p_sums + chunks, tl.sum(sum_v))
    tl.store(p_sums + 2 * chunks, tl.sum(sum_rel))


@triton.jit(do_not_specialize=["batch"])
def residual_scale_kernel(
    u_ptr, v_ptr,  # [batch, size]
    rel_ptr, rel_u_ptr, rel_v_ptr,  # [targets, batch, size]
    sums_ptr,  # [targets · batch, 3, chunks]
    batch, size, chunks,
    BLOCK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, CHUNKS)
    p_sums = sums_ptr + sample * 3 * chunks + c
    sum_u = tl.sum(tl.load(p_sums, mask=c < chunks, other=0.0))
    sum_v = tl.sum(tl.load(p_sums + chunks, mask=c < chunks, other=0.0))
    sum_rel = tl.sum(tl.load(p_sums + 2 * chunks, mask=c < chunks, other=0.0))
    both = tl.abs(sum_u) + tl.abs(sum_v)
    factor_u = safe_divide(safe_divide(tl.abs(sum_u), both, True) * sum_rel, sum_u, True)
    factor_v = safe_divide(safe_divide(tl.abs(sum_v), both, True) * sum_rel, sum_v, True)
    at = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    value, lane = (sample % batch) * size + at, sample * size + at
    b_u = tl.load(u_ptr + value, mask=inside, other=0.0).to(tl.float32)  # [BLOCK]
    b_v = tl.load(v_ptr + value, mask=inside, other=0.0).to(tl.float32)  # [BLOCK]
    s = safe_divide(tl.load(rel_ptr + lane, mask=inside, other=0.0), b_u + b_v, True)
    tl.store(rel_u_ptr + lane, b_u * s * factor_u, mask=inside)
    tl.store(rel_v_ptr + lane, b_v * s * factor_v, mask=inside)


@on_its_device
def residual_add(u: Tensor, v: Tensor, rel: Tensor, batch_dim: int, rules: str) -> tuple[Tensor, Tensor]:
    """`fastrel::residual_add` for u, v of float32, bfloat16 or float16 and a lane of float32."""
    if rules == "positive":
        return residual_add_of_sum(u, v, rel, None)
    u, v, rel = (dense(x.movedim(d, d - batch_dim)) for x, d in ((u, batch_dim), (v, batch_dim), (rel, batch_dim + 1)))
    rel_u, rel_v = torch.empty_like(rel), torch.empty_like(rel)
    batch = len(u)
    size = u.numel() // batch
    samples, chunks = rel.shape[0] * batch, blocks(size, BLOCK * RUN)
    sums = torch.empty(samples, 3, chunks, dtype=torch.float32, device=u.device)
    residual_sums_kernel[samples, chunks](u, v, rel, sums, batch, size, BLOCK=BLOCK, RUN=RUN)
    residual_scale_kernel[samples, blocks(size, BLOCK)](
        u, v, rel, rel_u, rel_v, sums, batch, size, chunks, BLOCK=BLOCK, CHUNKS=triton.next_power_of_2(chunks)
    )
    return rel_u.movedim(1, batch_dim + 1), rel_v.movedim(1, batch_dim + 1)


@on_its_device
def residual_add_of_sum(u: Tensor, v: Tensor, rel: Tensor, beside: Tensor | None) -> tuple[Tensor, Tensor]:
    """`residual_add` under the positive rules of `rel` + `beside`, what two consumers of u + v give it."""
    u, v, rel = dense(u), dense(v), dense(rel)
    rel_u, rel_v = torch.empty_like(rel), torch.empty_like(rel)
    residual_share_kernel[(blocks(rel.numel(), BLOCK),)](
        u_ptr=u, v_ptr=v, rel_ptr=rel, beside_ptr=rel if beside is None else dense(beside), rel_u_ptr=rel_u, rel_v_ptr=rel_v,
        size=u.numel(), total=rel.numel(), ADDED=beside is not None, BLOCK=BLOCK,
    )  # fmt: skip
    return rel_u, rel_v
