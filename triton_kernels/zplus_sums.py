"""Z of several linear layers in one launch: it depends on values alone, so that what few rows leave idle of a GPU is filled by the
other layers of a block, and S = R ⊘ Z is formed where the second product reads it."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from fastrel.triton_kernels import configs
from fastrel.triton_kernels.launch import blocks, capability, dense, on_its_device
from fastrel.triton_kernels.math import tile_of
from fastrel.triton_kernels.zplus_kinds import REDUCED, has_exact_output, kind_of, options_of, rows_of
from fastrel.triton_kernels.zplus_shares import signed_sums
from torch import Tensor

#: How many layers one launch takes at most: those of a block.
LAYERS = 4

#: A layer: x [*, ins], weight [outs, ins] (of bfloat16 where products are reduced), its output [*, outs] or None, bias or None.
Layer = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


@triton.jit
def sums_tile(
    program, x_ptr, w_ptr, y_ptr, bias_ptr, z_ptr, n, outs, ins, x_row, y_row, w_row, w_col,
    HAS_OUTPUT: tl.constexpr, HAS_BIAS: tl.constexpr, REDUCED: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    block_m, block_n = tile_of(program, tl.cdiv(n, BLOCK_M), tl.cdiv(outs, BLOCK_N), GROUP)
    m = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    z = signed_sums(
        x_ptr, w_ptr, y_ptr, bias_ptr, x_ptr, x_ptr, m, o, n, outs, ins, x_row, y_row, w_row, w_col,
        HAS_OUTPUT, HAS_BIAS, False, REDUCED, DOT, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    p_z = z_ptr + m.to(tl.int64)[:, None] * outs + o[None, :]
    tl.store(p_z, z, mask=(m < n)[:, None] & (o < outs)[None, :])


@triton.jit
def tiles(n, outs, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    return tl.cast(tl.cdiv(n, BLOCK_M), tl.int64) * tl.cdiv(outs, BLOCK_N)


@triton.jit(do_not_specialize=["n_0", "n_1", "n_2", "n_3"])
def zplus_sums_kernel(
    x_0_ptr, w_0_ptr, y_0_ptr, bias_0_ptr, z_0_ptr, n_0, outs_0, ins_0, x_row_0, y_row_0, w_row_0, w_col_0,
    x_1_ptr, w_1_ptr, y_1_ptr, bias_1_ptr, z_1_ptr, n_1, outs_1, ins_1, x_row_1, y_row_1, w_row_1, w_col_1,
    x_2_ptr, w_2_ptr, y_2_ptr, bias_2_ptr, z_2_ptr, n_2, outs_2, ins_2, x_row_2, y_row_2, w_row_2, w_col_2,
    x_3_ptr, w_3_ptr, y_3_ptr, bias_3_ptr, z_3_ptr, n_3, outs_3, ins_3, x_row_3, y_row_3, w_row_3, w_col_3,
    LAYERS: tl.constexpr, HAS_OUTPUT: tl.constexpr,
    BIASES: tl.constexpr,  # bit i: layer i has one
    REDUCED: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Programs 0 … belong to layer 0, those after them to layer 1, and so on. [n, outs] = [n, ins] by [outs, ins] each."""
    program = tl.program_id(0)
    end_0 = tiles(n_0, outs_0, BLOCK_M, BLOCK_N)
    end_1 = end_0 + tiles(n_1, outs_1, BLOCK_M, BLOCK_N)
    end_2 = end_1 + tiles(n_2, outs_2, BLOCK_M, BLOCK_N)
    if program < end_0:
        sums_tile(
            program, x_0_ptr, w_0_ptr, y_0_ptr, bias_0_ptr, z_0_ptr, n_0, outs_0, ins_0, x_row_0, y_row_0, w_row_0, w_col_0,
            HAS_OUTPUT, (BIASES & 1) != 0, REDUCED, DOT, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K, GROUP,
        )  # fmt: skip
    if LAYERS > 1:  # noqa: SIM102  (a constant, and a number)
        if (program >= end_0) & (program < end_1):
            sums_tile(
                (program - end_0).to(tl.int32),
                x_1_ptr, w_1_ptr, y_1_ptr, bias_1_ptr, z_1_ptr, n_1, outs_1, ins_1, x_row_1, y_row_1, w_row_1, w_col_1,
                HAS_OUTPUT, (BIASES & 2) != 0, REDUCED, DOT, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K, GROUP,
            )  # fmt: skip
    if LAYERS > 2:  # noqa: SIM102  (a constant, and a number)
        if (program >= end_1) & (program < end_2):
            sums_tile(
                (program - end_1).to(tl.int32),
                x_2_ptr, w_2_ptr, y_2_ptr, bias_2_ptr, z_2_ptr, n_2, outs_2, ins_2, x_row_2, y_row_2, w_row_2, w_col_2,
                HAS_OUTPUT, (BIASES & 4) != 0, REDUCED, DOT, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K, GROUP,
            )  # fmt: skip
    if LAYERS > 3:  # noqa: SIM102  (a constant, and a number)
        if program >= end_2:
            sums_tile(
                (program - end_2).to(tl.int32),
                x_3_ptr, w_3_ptr, y_3_ptr, bias_3_ptr, z_3_ptr, n_3, outs_3, ins_3, x_row_3, y_row_3, w_row_3, w_col_3,
                HAS_OUTPUT, (BIASES & 8) != 0, REDUCED, DOT, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K, GROUP,
            )  # fmt: skip


@on_its_device
def zplus_sums(*parts: Tensor | None, reduced: bool) -> list[Tensor | None]:
    """Z [n, outs] of up to four layers, x, weight, output and bias of each in `parts`; None for each of them where a launch of its own
    is better: of layers that do not multiply alike, and of so many rows that one layer fills the GPU."""
    layers: Sequence[Layer] = [parts[i : i + 4] for i in range(0, len(parts), 4)]  # type: ignore[misc]
    weights = {w.dtype for _, w, _, _ in layers}
    widest = max(x.numel() // w.shape[1] for x, w, _, _ in layers)
    exact = {reduced or has_exact_output(w, y) for _, w, y, _ in layers}
    if len(weights) > 1 or len(exact) > 1 or widest >= configs.MANY_ROWS:
        return [None] * len(layers)
    (dtype,), (from_output,) = weights, exact
    kind = REDUCED[dtype] if reduced else kind_of(dtype)
    device = layers[0][0].device
    tile = configs.product(configs.SHARES, kind.name, widest, capability(device))
    arguments: dict[str, Tensor | int] = {}
    biases, programs, found = 0, 0, []
    for i in range(LAYERS):
        x, w, y, bias = layers[min(i, len(layers) - 1)]
        (outs, ins), rows = w.shape, rows_of(x, w.shape[1])
        if i < len(layers):
            found.append(torch.empty((len(rows), outs), dtype=torch.float32, device=device))
            programs += blocks(len(rows), tile.m) * blocks(outs, tile.n)
            biases |= (bias is not None and from_output) << i
        own = rows_of(y, outs) if from_output and y is not None else found[-1]
        arguments |= {
            f"x_{i}_ptr": rows, f"w_{i}_ptr": w, f"y_{i}_ptr": own, f"z_{i}_ptr": found[-1],
            f"bias_{i}_ptr": dense(bias) if bias is not None and from_output else found[-1],
            f"n_{i}": len(rows), f"outs_{i}": outs, f"ins_{i}": ins,
            f"x_row_{i}": rows.stride(0), f"y_row_{i}": own.stride(0), f"w_row_{i}": w.stride(0), f"w_col_{i}": w.stride(1),
        }  # fmt: skip
    zplus_sums_kernel[(programs,)](
        **arguments, LAYERS=len(layers), HAS_OUTPUT=from_output, BIASES=biases, REDUCED=reduced,
        DOT=kind.dot, PRECISION=kind.precision, **options_of(tile),
    )  # fmt: skip
    return list(found)
