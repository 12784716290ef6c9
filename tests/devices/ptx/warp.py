"""Instructions that the 32 lanes of a warp execute together: `shfl.sync`, `ldmatrix`, `mma.sync`.

Arrays of all threads are seen as [warps, 32].
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tests.devices.ptx import formats

LANES = np.arange(32)

#: "Matrix Fragments for mma": the group of four lanes that a lane is in, and which of them it is.
GROUP, IN_GROUP = LANES // 4, LANES % 4


def lanes(x: np.ndarray) -> np.ndarray:
    """[warps, 32]."""
    return x.reshape(-1, 32)


def shuffle(mode: str, values: np.ndarray, by: np.ndarray, clamp: int) -> np.ndarray:
    """`shfl.sync` with a member mask of all lanes, "PTX ISA", Data Movement: shfl.sync. A lane out of range keeps its own."""
    segment, by = (clamp >> 8) & 31, lanes(by).astype(np.int64) & 31
    last = (LANES & segment) | (clamp & 31 & ~segment)
    source = LANES ^ by if mode == "bfly" else (LANES & segment) | (by & ~segment)
    return np.take_along_axis(lanes(values), np.where(source <= last, source, LANES), 1).ravel()


def matrix_rows(addresses: np.ndarray, matrix: int, transposed: bool) -> list[np.ndarray]:
    """Where each lane finds its part of a matrix of 8 × 8 numbers of 16 bits, "PTX ISA", Warp-level matrix load: ldmatrix.

    Lanes 8 i … 8 i + 7 hold the addresses of the rows of matrix i. A lane gets two neighbours of a row, as one address of 32
    bits; transposed, two neighbours of a column, as two addresses of 16 bits.
    """
    rows = lanes(addresses)[:, 8 * matrix : 8 * matrix + 8]
    if transposed:
        return [(rows[:, 2 * IN_GROUP + i] + (2 * GROUP).astype(addresses.dtype)).ravel() for i in range(2)]
    return [(rows[:, GROUP] + (4 * IN_GROUP).astype(addresses.dtype)).ravel()]


def _tf32(bits: np.ndarray) -> np.ndarray:
    return formats.tf32_cut_off(bits)[..., None]


def _bfloat16(bits: np.ndarray) -> np.ndarray:
    return formats.from_bfloat16(np.stack([bits & 0xFFFF, bits >> 16], -1))


def _float8(bits: np.ndarray) -> np.ndarray:
    return formats.from_float8(np.stack([(bits >> shift) & 0xFF for shift in (0, 8, 16, 24)], -1))


#: How the 32 bits of an operand's register are numbers, by type.
OPERANDS: dict[str, Callable[[np.ndarray], np.ndarray]] = {"tf32": _tf32, "bf16": _bfloat16, "e4m3": _float8}


def multiply(kind: str, a: list[np.ndarray], b: list[np.ndarray], c: list[np.ndarray]) -> list[np.ndarray]:
    """`mma.sync.aligned.m16n8k8/16/32.row.col.f32`, "PTX ISA", Warp-level Matrix Instructions: mma, Matrix Fragments.

    a: four registers of operands [threads] as bits, b: two, c: four of float32. With e numbers to a register and lane = 4 g + t,
    register r of A holds row g + 8 (r mod 2), columns e t + 4 e ⌊r/2⌋ + 0 … e − 1; of B rows e t + 4 e r + …, column g; of C row
    g + 8 ⌊r/2⌋, column 2 t + r mod 2.

    Products are exact. The sum is cut off to float32 once per instruction, as tensor cores do (Fasi et al., PeerJ CS 7:e330); float8
    is summed with 13 bits behind the leading one (DeepSeek-V3, arXiv:2412.19437, §3.3.2).
    """
    unpack = OPERANDS[kind]
    parts_a, parts_b = ([unpack(lanes(x)).astype(np.float64) for x in operand] for operand in (a, b))
    warps, each = parts_a[0].shape[0], parts_a[0].shape[-1]
    matrix_a, matrix_b = np.empty((warps, 16, 8 * each)), np.empty((warps, 8 * each, 8))
    total = np.empty((warps, 16, 8))
    inner = each * IN_GROUP[:, None] + np.arange(each)
    for r, part in enumerate(parts_a):
        matrix_a[:, (GROUP + 8 * (r % 2))[:, None], inner + 4 * each * (r // 2)] = part
    for r, part in enumerate(parts_b):
        matrix_b[:, inner + 4 * each * r, GROUP[:, None]] = part
    for r, part in enumerate(c):
        total[:, GROUP + 8 * (r // 2), 2 * IN_GROUP + r % 2] = lanes(part)
    total += matrix_a @ matrix_b
    out = formats.toward_zero(total, np.float32)
    if kind == "e4m3":
        out = (out.view(np.uint32) & np.uint32(0xFFFFFC00)).view(np.float32)
    return [out[:, GROUP + 8 * (r // 2), 2 * IN_GROUP + r % 2].ravel() for r in range(4)]
