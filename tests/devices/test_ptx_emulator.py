"""The emulator of PTX itself: what instructions mean, by the PTX ISA, and what it must not let pass, in kernels written by hand."""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiled kernels only", allow_module_level=True)

from tests.devices.ptx import formats, machine, warp
from tests.devices.ptx.faults import PtxError, UnknownInstructionError
from tests.devices.ptx.instructions import Program
from tests.devices.ptx.scalar import RULES

#: %rd1, %rd2, …: addresses of the arguments; %r1: number of the thread; %rd9 and %r9: 4 times that.
MODULE = """
.visible .entry written({parameters}
)
.reqntid {threads}
{{
	.loc	1 1 0                          // by_hand.py:1:0
{loads}
	mov.u32 	%r1, %tid.x;
	mul.wide.u32 	%rd9, %r1, 4;
	shl.b32 	%r9, %r1, 2;
{body}
	ret;
}}
"""


def launch(body: str, *arguments: Tensor, threads: int = 32, blocks: int = 1, shared: int = 1024) -> None:
    """Run statements between the module's first and last ones."""
    parameters = ",".join(f"\n	.param .u64 written_param_{i}" for i in range(len(arguments)))
    loads = "\n".join(f"	ld.param.b64 	%rd{i + 1}, [written_param_{i}];" for i in range(len(arguments)))
    text = MODULE.format(parameters=parameters, threads=threads, loads=loads, body=body)
    extents = [(x.data_ptr(), x.data_ptr() + x.numel() * x.element_size()) for x in arguments]
    Program.of(text).run((blocks, 1), shared, [x.data_ptr() for x in arguments], extents)


def of_each_thread(body: str, threads: int = 32) -> np.ndarray:
    """%r2 of each thread, as bits."""
    out = torch.zeros(threads, dtype=torch.int32)
    launch(f"{body}\n	add.s64 	%rd9, %rd1, %rd9;\n	st.global.b32 [ %rd9 + 0 ], {{ %r2 }};", out, threads=threads)
    return out.numpy().view(np.uint32)


def scalar(opcode: str, *values: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        return RULES[opcode].function(
            *(np.asarray(x, dtype) for x, dtype in zip(values, RULES[opcode].operands, strict=True))
        )


# Matrices. Rows and columns of fragments are written as the ISA has them, "Matrix Fragments for mma.m16n8k…".

PLACES: dict[str, tuple[int, Callable[[int, int, int], tuple[int, int]], Callable[[int, int, int], tuple[int, int]]]] = {
    "tf32": (1, lambda g, t, i: (g if i in (0, 2) else g + 8, t if i in (0, 1) else t + 4),
             lambda g, t, i: (t if i == 0 else t + 4, g)),
    "bf16": (2, lambda g, t, i: (g if i in (0, 1, 4, 5) else g + 8, t * 2 + (i & 1) + (0 if i < 4 else 8)),
             lambda g, t, i: (t * 2 + (i & 1) + (0 if i < 2 else 8), g)),
    "e4m3": (4, lambda g, t, i: (g if i < 4 or 8 <= i < 12 else g + 8, t * 4 + (i & 3) + (0 if i < 8 else 16)),
             lambda g, t, i: (t * 4 + (i & 3) + (0 if i < 4 else 16), g)),
}  # fmt: skip


def _bits(kind: str, x: Tensor) -> int:
    if kind == "tf32":
        return int(x.view(torch.int32)) & 0xFFFFFFFF
    if kind == "bf16":
        return int(x.bfloat16().view(torch.int16)) & 0xFFFF
    return int(x.to(torch.float8_e4m3fn).view(torch.uint8))


@pytest.mark.parametrize("kind", PLACES)
def test_products_of_matrices_by_fragments(kind: str) -> None:
    """Two warps, small integers, which all formats hold and whose sums are exact."""
    each, at_a, at_b = PLACES[kind]
    a, b, c = (torch.randint(-3, 4, shape).float() for shape in ((2, 16, 8 * each), (2, 8 * each, 8), (2, 16, 8)))
    registers_a, registers_b = np.zeros((4, 64), np.uint32), np.zeros((2, 64), np.uint32)
    registers_c = np.zeros((4, 64), np.float32)
    for lane in range(64):
        w, g, t = lane // 32, lane % 32 // 4, lane % 4
        for held, matrix, at in ((registers_a, a, at_a), (registers_b, b, at_b)):
            for i in range(len(held) * each):
                held[i // each, lane] |= _bits(kind, matrix[w][at(g, t, i)]) << (32 // each * (i % each))
        for i in range(4):
            registers_c[i, lane] = c[w, g if i < 2 else g + 8, t * 2 + (i & 1)]
    result = np.stack(warp.multiply(kind, list(registers_a), list(registers_b), list(registers_c)))
    expected = c + a @ b
    for lane in range(64):
        w, g, t = lane // 32, lane % 32 // 4, lane % 4
        for i in range(4):
            assert result[i, lane] == expected[w, g if i < 2 else g + 8, t * 2 + (i & 1)], (kind, lane, i)


def _first_product(a: float, b: float, c: float) -> float:
    """c + a b in TF32."""
    one = [np.zeros(32, np.float32) for _ in range(6)]
    one[0][0], one[4][0] = a, b
    start = [np.full(32, c, np.float32) for _ in range(4)]
    return float(
        warp.multiply("tf32", [x.view(np.uint32) for x in one[:4]], [x.view(np.uint32) for x in one[4:]], start)[0][0]
    )


def test_a_tensor_core_cuts_off_operands_and_sums() -> None:
    assert _first_product(1 + 2.0**-11, 1, 0) == 1
    assert _first_product(1 + 2.0**-10, 1, 0) == 1 + 2.0**-10
    assert _first_product(1.5 * 2.0**-24, 1, 1) == 1  # to nearest it would be 1 + 2^-23
    assert _first_product(-1.5 * 2.0**-24, 1, -1) == -1


def _matrices(count: int, transposed: bool) -> tuple[np.ndarray, str]:
    """Rows of 8 × 8 numbers of 16 bits in shared memory, 80 bytes from matrix to matrix and row to row unlike each other."""
    store = """
	add.s64 	%rd3, %rd2, %rd9;
	ld.global.b32 { %r3 }, [ %rd3 + 0 ];
	mov.b32 	%r4, global_smem;
	shl.b32 	%r5, %r1, 4;
	add.s32 	%r5, %r4, %r5;
"""
    values = np.arange(32 * 8, dtype=np.uint16).reshape(4, 8, 8)
    for i in range(4):
        low, high = "%rs1", "%rs2"
        store += f"""
	mul.lo.s32 	%r6, %r1, 8;
	add.s32 	%r6, %r6, {2 * i};
	cvt.u16.u32 	{low}, %r6;
	add.s32 	%r6, %r6, 1;
	cvt.u16.u32 	{high}, %r6;
	mov.b32 	%r7, {{{low}, {high}}};
	st.shared::cta.b32 [ %r5 + {4 * i} ], %r7;
"""
    registers = ", ".join(f"%r{20 + i}" for i in range(count))
    trans = ".trans" if transposed else ""
    return (
        values,
        f"{store}	bar.sync 	0;\n	ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {{{registers}}}, [%r5];\n",
    )


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [2, 4])
def test_matrices_are_loaded_by_rows_whose_addresses_lanes_hold(count: int, transposed: bool) -> None:
    """A lane gets numbers 2 (lane mod 4) and the next of row ⌊lane/4⌋, transposed of column ⌊lane/4⌋."""
    values, body = _matrices(count, transposed)
    given = torch.zeros(32, dtype=torch.int32)
    for i in range(count):
        out = torch.zeros(32, dtype=torch.int32)
        tail = f"	add.s64 	%rd4, %rd1, %rd9;\n	st.global.b32 [ %rd4 + 0 ], {{ %r{20 + i} }};"
        launch(body + tail, out, given)
        pairs = out.numpy().view(np.uint16).reshape(32, 2)
        matrix = values[i].T if transposed else values[i]
        expected = [[matrix[lane // 4, 2 * (lane % 4)], matrix[lane // 4, 2 * (lane % 4) + 1]] for lane in range(32)]
        assert np.array_equal(pairs, expected)


def test_shuffles() -> None:
    """By the ISA's shfl.sync: the operand c holds the last lane in its low bits, and which bits of a lane name its segment above."""
    lane = np.arange(32)
    assert np.array_equal(of_each_thread("	shfl.sync.bfly.b32 	%r2, %r1, 5, 31, -1;"), lane ^ 5)
    assert np.array_equal(of_each_thread("	shfl.sync.idx.b32 	%r2, %r1, 7, 31, -1;"), np.full(32, 7))
    segments = ((32 - 8) << 8) | 31
    assert np.array_equal(of_each_thread(f"	shfl.sync.idx.b32 	%r2, %r1, 3, {segments}, -1;"), lane // 8 * 8 + 3)
    clamped = np.where((lane ^ 4) <= 27, lane ^ 4, lane)
    assert np.array_equal(of_each_thread("	shfl.sync.bfly.b32 	%r2, %r1, 4, 27, -1;"), clamped)
    by_lane = "	xor.b32 	%r3, %r1, 1;\n	shfl.sync.idx.b32 	%r2, %r1, %r3, 31, -1;"
    assert np.array_equal(of_each_thread(by_lane), lane ^ 1)


# Numbers.


def test_every_float8_is_torchs() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    assert np.array_equal(
        formats.from_float8(codes.numpy()), codes.view(torch.float8_e4m3fn).float().numpy(), equal_nan=True
    )
    x = torch.cat([torch.randn(4000) * 100, torch.linspace(-(2.0**-5), 2.0**-5, 1001), torch.tensor([448.0, 463.0, -0.0])])
    expected = x.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
    assert np.array_equal(formats.to_float8(x.numpy()), expected.numpy())
    assert formats.to_float8(np.float32([1e9, -1e9, np.nan])).tolist() == [0x7E, 0xFE, 0x7F]


def test_roundings() -> None:
    x = torch.cat([torch.randn(1000), torch.tensor([1 + 2.0**-8, 1 + 3 * 2.0**-8, torch.inf, torch.nan])])
    ours = formats.from_bfloat16(formats.to_bfloat16(x.numpy()))
    assert np.array_equal(ours, x.bfloat16().float().numpy(), equal_nan=True)
    ties = np.float32([1 + 2.0**-11, 1 + 3 * 2.0**-11, -1 - 2.0**-11])
    assert formats.tf32_ties_away(ties).tolist() == [1 + 2.0**-10, 1 + 2.0**-9, -1 - 2.0**-10]
    assert scalar("cvt.rz.f16.f32", [1 + 2.0**-10 - 2.0**-20, -1e9, np.inf]).tolist() == [1.0, -65504.0, np.inf]
    assert scalar("cvt.rn.bf16x2.f32", [1.0], [2.0])[0] == 0x3F804000
    assert scalar("cvt.rn.satfinite.e4m3x2.f16x2", [0x3C004000])[0] == 0x3840  # 1.0 above 2.0


NAN = float("nan")

#: opcode, operands, result
MEANINGS = [
    ("max.f32", ([NAN, 1, NAN], [2, NAN, NAN]), [2, 1, NAN]),
    ("max.NaN.f32", ([NAN, 1, 3], [2, NAN, 2]), [NAN, NAN, 3]),
    ("min.NaN.f32", ([NAN, 1, 3], [2, NAN, 2]), [NAN, NAN, 2]),
    ("setp.eq.f32", ([NAN, 1], [NAN, 1]), [False, True]),
    ("setp.lt.f32", ([NAN, 1], [1, 2]), [False, True]),
    ("setp.le.f32", ([NAN, 1, 2], [1, 1, 1]), [False, True, False]),
    ("setp.num.f32", ([NAN, 1], [1, 2]), [False, True]),
    ("setp.lt.u32", ([0xFFFFFFFF], [1]), [False]),
    ("setp.lt.s32", ([-1], [1]), [True]),
    ("div.s32", ([-7, 7, -8], [2, -2, 2]), [-3, -3, -4]),
    ("rem.s64", ([-7, 7], [2, -2]), [-1, 1]),
    ("rem.u32", ([0xFFFFFFFF], [10]), [5]),
    ("mul.wide.s32", ([-3], [1 << 30]), [-3 << 30]),
    ("mul.wide.u32", ([0xFFFFFFFF], [2]), [0x1FFFFFFFE]),
    ("mul.lo.s32", ([1 << 30], [6]), [-(1 << 31)]),
    ("mad.wide.s32", ([-2], [3], [1 << 40]), [(1 << 40) - 6]),
    ("shr.s32", ([-8, -8], [1, 40]), [-4, -1]),
    ("shr.u32", ([0x80000000, 1], [31, 32]), [1, 0]),
    ("shl.b32", ([3, 3], [31, 32]), [0x80000000, 0]),
    ("bfe.u32", ([0xABCD], [4], [8]), [0xBC]),
    ("bfe.s32", ([0xF0], [4], [4]), [-1]),
    ("prmt.b32", ([0x33221100], [0x77665544], [0x3340]), [0x33334400]),
    ("prmt.b32", ([0x80], [0], [0x8888]), [0xFFFFFFFF]),
    ("selp.f32", ([1, 1], [2, 2], [True, False]), [1, 2]),
    ("ex2.approx.f32", ([-np.inf, -140, 0, 3, 200], ), [0, 2.0**-140, 1, 8, np.inf]),
    ("fma.rn.ftz.f32", ([1e-40, 1e-20], [1e30, 1e-20], [1, 0]), [1, 0]),
    ("fma.rn.f32", ([1 + 2.0**-23], [1 - 2.0**-23], [-1]), [-(2.0**-46)]),
    ("cvt.s64.s32", ([-5], ), [-5]),
    ("cvt.u64.u32", ([0xFFFFFFFF], ), [0xFFFFFFFF]),
]  # fmt: skip


@pytest.mark.parametrize(("opcode", "operands", "expected"), MEANINGS, ids=[f"{m[0]} {i}" for i, m in enumerate(MEANINGS)])
def test_what_an_instruction_means(opcode: str, operands: tuple[list[float], ...], expected: list[float]) -> None:
    result = scalar(opcode, *operands)
    assert np.array_equal(result, np.asarray(expected).astype(result.dtype), equal_nan=result.dtype.kind == "f")


def test_a_narrow_number_in_a_wide_register_keeps_its_sign() -> None:
    body = "	mov.b16 	%rs1, 255;\n	cvt.s16.s8 	%rs2, %rs1;\n	cvt.u32.u16 	%r2, %rs2;"
    assert set(of_each_thread(body).tolist()) == {0xFFFF}
    body = "	mov.b32 	%r3, {%rs1, %rs2};\n	mov.b32 	{_, %rs3}, %r3;\n	cvt.u32.u16 	%r2, %rs3;"
    assert set(of_each_thread(f"	mov.b16 	%rs1, 7;\n	mov.b16 	%rs2, -2;\n{body}").tolist()) == {0xFFFE}


# Control.

LOOP = """
	mov.b32 	%r2, 0;
	mov.b32 	%r3, 0;
$L__loop:
	add.s32 	%r3, %r3, 1;
	add.s32 	%r2, %r2, %r3;
	setp.lt.s32 	%p1, %r3, %r1;
	@%p1 bra 	$L__loop;
"""


def test_threads_that_part_meet_again() -> None:
    """Each thread goes round as often as its number says; then a shuffle needs them all."""
    rounds = np.maximum(np.arange(32), 1)
    sums = rounds * (rounds + 1) // 2
    shuffled = of_each_thread(f"{LOOP}	shfl.sync.bfly.b32 	%r2, %r2, 1, 31, -1;")
    assert np.array_equal(shuffled, sums[np.arange(32) ^ 1])


BRANCH = """
	setp.lt.s32 	%p1, %r1, {first};
	@!%p1 bra 	$L__end;
	{statement}
$L__end:
	mov.b32 	%r2, 1;
"""


@pytest.mark.parametrize(
    "statement", ["bar.sync 	0;", "bar.warp.sync 	-1;", "shfl.sync.bfly.b32 	%r3, %r1, 1, 31, -1;"]
)
def test_who_parts_from_the_others_keeps_them_waiting(statement: str) -> None:
    of_each_thread(BRANCH.format(first=64, statement=statement), threads=64)
    with pytest.raises(PtxError, match=r"line \d+ \(by_hand.py:1\): thread 16 of block 0 is (elsewhere|not there)"):
        of_each_thread(BRANCH.format(first=16, statement=statement), threads=64)


def test_a_warp_may_part_as_a_whole_but_not_from_a_barrier() -> None:
    of_each_thread(BRANCH.format(first=32, statement="shfl.sync.bfly.b32 	%r3, %r1, 1, 31, -1;"), threads=64)
    with pytest.raises(PtxError, match="elsewhere when the rest of its block is at a barrier"):
        of_each_thread(BRANCH.format(first=32, statement="bar.sync 	0;"), threads=64)


def test_what_is_not_known_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnknownInstructionError, match=r"does not know add\.f64"):
        of_each_thread("	add.f64 	%rd2, %rd2, %rd2;")
    with pytest.raises(UnknownInstructionError, match=r"is not understood: \.shared"):
        of_each_thread("	.shared .b8 x[16];")
    with pytest.raises(PtxError, match="reads %r7, which nobody has written"):
        of_each_thread("	add.s32 	%r2, %r7, 1;")
    monkeypatch.setattr(machine, "MOST", 100)
    with pytest.raises(PtxError, match="more than 100 instructions"):
        of_each_thread("$L__loop:\n	mov.b32 	%r2, 1;\n	bra.uni 	$L__loop;")


# Memory.


def test_global_memory_has_bounds_and_alignment() -> None:
    x = torch.arange(32, dtype=torch.int32)
    body = "	add.s64 	%rd2, %rd1, %rd9;\n	ld.global{vector} {{ {to} }}, [ %rd2 + {offset} ];"
    launch(body.format(vector=".b32", to="%r2", offset=0), x)
    with pytest.raises(PtxError, match="thread 31 of block 0 an address in global memory outside of all buffers"):
        launch(body.format(vector=".b32", to="%r2", offset=4), x)
    with pytest.raises(PtxError, match="thread 0 of block 0 an address in global memory outside of all buffers"):
        launch(body.format(vector=".b32", to="%r2", offset=-4), x)
    with pytest.raises(PtxError, match="thread 1 of block 0 an address in global memory that is no multiple of 8 bytes"):
        launch(body.format(vector=".v2.b32", to="%r2, %r3", offset=0), x)


def test_blocks_have_no_order() -> None:
    """A block neither reads nor changes what another one writes; the same number from both is no change."""
    store = "	mov.u32 	%r3, {value};\n	add.s64 	%rd2, %rd1, %rd9;\n	st.global.b32 [ %rd2 + 0 ], {{ %r3 }};"
    launch(store.format(value="%r1"), torch.zeros(32, dtype=torch.int32), blocks=2)
    with pytest.raises(PtxError, match="writes where another block wrote something else"):
        launch(store.format(value="%ctaid.x"), torch.zeros(32, dtype=torch.int32), blocks=2)
    apart = """
	mov.u32 	%r3, %ctaid.x;
	setp.eq.b32 	%p1, %r3, 0;
	add.s64 	%rd2, %rd1, %rd9;
	@%p1 st.global.b32 [ %rd2 + 0 ], { %r1 };
	@!%p1 ld.global.b32 { %r2 }, [ %rd2 + 0 ];
"""
    with pytest.raises(PtxError, match="thread 0 of block 1 reads what another block wrote"):
        launch(apart, torch.zeros(32, dtype=torch.int32), blocks=2)


#: Each thread writes its own word of shared memory, then reads that of thread `other`.
EXCHANGE = """
	mov.b32 	%r4, global_smem;
	add.s32 	%r5, %r4, %r9;
	st.shared::cta.b32 [ %r5 + 0 ], %r1;
	{between}
	xor.b32 	%r6, %r9, {distance};
	add.s32 	%r6, %r4, %r6;
	ld.shared.b32 	%r2, [%r6];
	{after}
	st.shared::cta.b32 [ %r5 + 0 ], %r2;
"""


@pytest.mark.parametrize("barrier", ["", "bar.warp.sync 	-1;", "bar.sync 	0;"])
@pytest.mark.parametrize("distance", [0, 4, 128])
def test_shared_memory_needs_barriers(distance: int, barrier: str) -> None:
    """None for a thread's own word, any for that of a thread of the same warp, the block's for that of another warp."""
    enough = {0: 0, 4: 1, 128: 2}[distance] <= {"": 0, "bar.warp.sync 	-1;": 1, "bar.sync 	0;": 2}[barrier]
    for between, after, message in (
        (barrier, "bar.sync 	0;", "reads what another (thread|warp) wrote, and no barrier between"),
        ("bar.sync 	0;", barrier, "overwrites what another (thread|warp) read, and no barrier between"),
    ):
        body = EXCHANGE.format(between=between, after=after, distance=distance)
        if enough:
            assert np.array_equal(of_each_thread(body, threads=64), np.arange(64) ^ (distance // 4))
        else:
            with pytest.raises(PtxError, match=message):
                of_each_thread(body, threads=64)


def test_one_word_written_by_many() -> None:
    """With one number it is that; with several it is one of them."""
    body = "	mov.b32 	%r4, global_smem;\n	mov.b32 	%r2, 1;\n	st.shared::cta.b32 [ %r4 + 0 ], {value};"
    of_each_thread(body.format(value="%r2"))
    with pytest.raises(PtxError, match="writes where another thread wrote something else"):
        of_each_thread(body.format(value="%r1"))


def test_shared_memory_has_bounds_alignment_and_what_was_written() -> None:
    body = "	mov.b32 	%r4, global_smem;\n	add.s32 	%r5, %r4, %r9;\n	ld.shared{what}, [%r5+{offset}];"
    for what, offset, message in (
        (".b32 	%r2", 0, "reads shared memory that nobody has written"),
        (".b32 	%r2", 2, "an address in shared memory that is no multiple of 4 bytes"),
        (".v2.b32 	{%r2, %r3}", 0, "thread 1 of block 0 an address in shared memory that is no multiple of 8 bytes"),
        (".b32 	%r2", 900, "thread 31 of block 0 an address in shared memory outside of its 1024 bytes"),
    ):
        with pytest.raises(PtxError, match=message):
            of_each_thread(body.format(what=what, offset=offset))


#: Two groups of copies of one word per thread, the second of zeros; a wait; what a neighbour copied in the first.
COPIES = """
	mov.b32 	%r4, global_smem;
	add.s32 	%r5, %r4, %r9;
	add.s64 	%rd3, %rd2, %rd9;
	mov.b32 	%r6, 4;
	mov.b32 	%r7, 0;
	cp.async.ca.shared.global [ %r5 + 0 ], [ %rd3 + 0 ], 0x4, %r6;
	cp.async.commit_group;
	cp.async.ca.shared.global [ %r5 + 256 ], [ %rd3 + 65536 ], 0x4, %r7;
	cp.async.commit_group;
	{wait}
	{barrier}
	xor.b32 	%r8, %r9, 4;
	add.s32 	%r8, %r4, %r8;
	ld.shared.b32 	%r2, [%r8+{offset}];
	add.s64 	%rd4, %rd1, %rd9;
	st.global.b32 [ %rd4 + 0 ], {{ %r2 }};
"""


def _copied(wait: str, offset: int = 0, barrier: str = "bar.sync 	0;") -> list[int]:
    out, given = torch.full((64,), -1, dtype=torch.int32), torch.arange(64, dtype=torch.int32)
    launch(COPIES.format(wait=wait, offset=offset, barrier=barrier), out, given, threads=64)
    return out.tolist()


def test_copies_land_when_their_group_was_waited_for() -> None:
    neighbours = [i ^ 1 for i in range(64)]
    assert _copied("cp.async.wait_group 	1;") == neighbours
    assert _copied("cp.async.wait_group 	0;", offset=256) == [0] * 64
    for wait, offset in (("", 0), ("cp.async.wait_group 	2;", 0), ("cp.async.wait_group 	1;", 256)):
        with pytest.raises(PtxError, match="reads shared memory that a copy is on its way to: no wait for its group"):
            _copied(wait, offset)
    with pytest.raises(PtxError, match=r"reads what another (thread|warp) wrote, and no barrier between"):
        _copied("cp.async.wait_group 	0;", barrier="")


def test_copies_do_not_land_on_what_is_read() -> None:
    """A stage of a pipeline is refilled before everybody has read it."""
    read = "	ld.shared.b32 	%r2, [%r8];\n	cp.async.ca.shared.global [ %r5 + 0 ], [ %rd3 + 0 ], 0x4, %r6;"
    body = COPIES.format(wait="cp.async.wait_group 	0;", barrier="bar.sync 	0;", offset=0).replace(
        "	ld.shared.b32 	%r2, [%r8+0];", read
    )
    with pytest.raises(PtxError, match=r"overwrites what another (thread|warp) read"):
        launch(body, torch.zeros(64, dtype=torch.int32), torch.arange(64, dtype=torch.int32), threads=64)
