"""`rollout_row`: one step of eq. (14) on one row, plain and with the rows of I + M scaled to sum 1."""

import torch
import triton
import triton.language as tl
from fastrel.triton_kernels.launch import ALL_REGISTERS, blocks, dense, on_its_device
from torch import Tensor

BLOCK_Q, BLOCK_K = 32, 64


@triton.jit(do_not_specialize=["queries", "keys", "maps"])
def rollout_kept_kernel(
    row_ptr,  # [rows, queries]
    m_ptr,  # [maps, queries, keys]
    kept_ptr,  # [rows, queries]
    queries, keys, maps,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(1) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    row = tl.program_id(0).to(tl.int64)
    total = tl.full((BLOCK_Q,), 1.0, tl.float32)
    for start in range(0, keys, BLOCK_K):
        j = start + tl.arange(0, BLOCK_K)
        at = ((row % maps) * queries + i)[:, None] * keys + j[None, :]
        total += tl.sum(tl.load(m_ptr + at, mask=(i < queries)[:, None] & (j < keys)[None, :], other=0.0), 1)  # [BQ, BK]
    b_row = tl.load(row_ptr + row * queries + i, mask=i < queries, other=0.0)  # [BQ]
    tl.store(kept_ptr + row * queries + i, b_row / total, mask=i < queries)


@triton.jit(do_not_specialize=["queries", "keys", "maps"])
def rollout_through_kernel(
    kept_ptr,  # [rows, queries]
    m_ptr,  # [maps, queries, keys]
    through_ptr,  # [rows, keys]
    queries, keys, maps,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    j = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCK_K,), tl.float32)
    for start in range(0, queries, BLOCK_Q):
        i = start + tl.arange(0, BLOCK_Q)
        b_kept = tl.load(kept_ptr + row * queries + i, mask=i < queries, other=0.0)  # [BQ]
        at = ((row % maps) * queries + i)[:, None] * keys + j[None, :]
        b_m = tl.load(m_ptr + at, mask=(i < queries)[:, None] & (j < keys)[None, :], other=0.0)  # [BQ, BK]
        total += tl.sum(b_kept[:, None] * b_m, 0)
    tl.store(through_ptr + row * keys + j, total, mask=j < keys)


@on_its_device
def rollout_row(row: Tensor, m: Tensor, normalize: bool) -> tuple[Tensor, Tensor]:
    """`fastrel::rollout_row` in float32."""
    row, m = dense(row), dense(m)
    queries, keys = m.shape[-2:]
    rows, maps = row.numel() // queries, m.numel() // (queries * keys)
    kept = torch.empty_like(row) if normalize else row
    blocks_ = {"BLOCK_Q": BLOCK_Q, "BLOCK_K": BLOCK_K, **ALL_REGISTERS}
    if normalize:
        rollout_kept_kernel[rows, blocks(queries, BLOCK_Q)](row, m, kept, queries, keys, maps, **blocks_)
    through = torch.empty(*row.shape[:-1], keys, dtype=torch.float32, device=row.device)
    rollout_through_kernel[rows, blocks(keys, BLOCK_K)](kept, m, through, queries, keys, maps, **blocks_)
    return (kept if normalize else row.new_empty(0)), through
