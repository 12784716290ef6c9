"""Instructions that every thread executes on its own registers: "PTX ISA", Integer Arithmetic, Floating Point, Comparison and
Selection, Logic and Shift, and Data Movement and Conversion Instructions.

A rule is a function of numpy arrays and the types of its result and operands. Approximations (`ex2.approx`, `div.full`,
`sqrt.approx`) are rounded to nearest here; a device may err by 2 units in the last place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tests.devices.ptx import formats

#: Types of PTX as numpy holds them. bfloat16 is held as its bits.
TYPES: dict[str, np.dtype] = {
    **{f"{kind}{8 * n}": np.dtype(f"{code}{n}") for kind, code in (("b", "u"), ("u", "u"), ("s", "i")) for n in (1, 2, 4, 8)},
    "f16": np.dtype(np.float16), "f32": np.dtype(np.float32), "bf16": np.dtype(np.uint16), "pred": np.dtype(bool),
}  # fmt: skip


@dataclass(frozen=True)
class Rule:
    """result = function(*operands)."""

    function: Callable[..., np.ndarray]
    result: np.dtype
    operands: tuple[np.dtype, ...]


RULES: dict[str, Rule] = {}


def _rule(opcode: str, function: Callable[..., np.ndarray], result: str, *operands: str) -> None:
    RULES[opcode] = Rule(function, TYPES[result], tuple(TYPES[name] for name in operands))


def _same(opcode: str, function: Callable[..., np.ndarray], types: str, count: int = 2) -> None:
    """`opcode.type` for operands and result of that type."""
    for name in types.split():
        _rule(f"{opcode}.{name}", function, name, *[name] * count)


def _flushed(x: np.ndarray) -> np.ndarray:
    """Subnormal numbers as zero, with their sign: `.ftz`."""
    return np.where(np.abs(x) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), x), x)


def _fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """The product is exact in float64; the sum is rounded there first, which shows in one case of 2^29."""
    return (a.astype(np.float64) * b + c).astype(np.float32)


def _shifted(shift: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    """Shifts by more than the width shift everything out: `shl`, `shr`."""

    def rule(a: np.ndarray, by: np.ndarray) -> np.ndarray:
        width = 8 * a.dtype.itemsize
        most = width - 1
        out = shift(a, np.minimum(by, most).astype(a.dtype))
        gone = np.right_shift(a, a.dtype.type(most)) if a.dtype.kind == "i" else a.dtype.type(0)
        return np.where(by >= width, gone, out)

    return rule


def _quotient(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Rounded towards zero; by 0 unspecified, here all ones."""
    safe = np.where(b == 0, b.dtype.type(1), b)
    floor = a // safe
    return np.where(b == 0, ~b, floor + ((floor < 0) & (floor * safe != a)))


def _remainder(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return a - _quotient(a, b) * b


def _field(a: np.ndarray, at: np.ndarray, length: np.ndarray) -> np.ndarray:
    """`bfe`: bits of a field, the sign of a signed one repeated."""
    assert (at + length <= 32).all()
    assert (length > 0).all()
    up = (32 - at - length).astype(a.dtype)
    return ((a << up) >> (32 - length).astype(a.dtype)).astype(a.dtype)


def _permuted(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    """`prmt` without a mode: each byte is one of b's and a's eight, or eight times its sign."""
    both, out = (b.astype(np.uint64) << 32) | a, np.uint64(0)
    for i in range(4):
        choice = (selector >> (4 * i)).astype(np.uint64)
        byte = (both >> (8 * (choice & 7))) & 0xFF
        out = out | (np.where(choice & 8, (byte >> 7) * 0xFF, byte) << np.uint64(8 * i))
    return out.astype(np.uint32)


_same("add", np.add, "f32 s32 s64")
_same("sub", np.subtract, "f32 s32")
_same("mul", np.multiply, "f32")
_same("mul.lo", np.multiply, "s32 s64")
_same("mad.lo", lambda a, b, c: a * b + c, "s32 s64", 3)
for _signed, _wide in (("s32", "s64"), ("u32", "u64")):
    _to = TYPES[_wide]
    _rule(f"mul.wide.{_signed}", lambda a, b, to=_to: a.astype(to) * b.astype(to), _wide, _signed, _signed)
    _rule(f"mad.wide.{_signed}", lambda a, b, c, to=_to: a.astype(to) * b.astype(to) + c, _wide, _signed, _signed, _wide)
_same("div", _quotient, "s32")
_same("rem", _remainder, "s32 u32 s64")
_same("neg", np.negative, "f32 s32", 1)
_same("abs", np.abs, "f32 f16", 1)
_same("abs", lambda a: a & np.uint16(0x7FFF), "bf16", 1)
_same("min", np.minimum, "s32")
_same("max", np.fmax, "f32")  # a NaN gives way to a number
_same("max.NaN", np.maximum, "f16 f32")
_same("min.NaN", np.minimum, "f32")
_same("max.NaN", lambda a, b: formats.to_bfloat16(np.maximum(formats.from_bfloat16(a), formats.from_bfloat16(b))), "bf16")
_same("fma.rn", _fma, "f32", 3)
_same("fma.rn.ftz", lambda a, b, c: _flushed(_fma(_flushed(a), _flushed(b), _flushed(c))), "f32", 3)
_same("div.full", np.divide, "f32")
_same("abs.ftz", lambda a: _flushed(np.abs(a)), "f32", 1)
_same("ex2.approx.ftz", lambda a: _flushed(np.exp2(_flushed(a).astype(np.float64)).astype(np.float32)), "f32", 1)
_same("ex2.approx", lambda a: np.exp2(a.astype(np.float64)).astype(np.float32), "f32", 1)
_same("sqrt.approx.ftz", lambda a: np.sqrt(_flushed(a)), "f32", 1)

_same("and", np.bitwise_and, "b16 b32 b64 pred")
_same("or", np.bitwise_or, "b16 b32 b64 pred")
_same("xor", np.bitwise_xor, "b32")
for _bits in ("16", "32", "64"):
    _rule(f"shl.b{_bits}", _shifted(np.left_shift), f"b{_bits}", f"b{_bits}", "u32")
for _name in ("s16", "s32", "u16", "u32"):
    _rule(f"shr.{_name}", _shifted(np.right_shift), _name, _name, "u32")
for _name in ("s32", "u32"):
    _rule(f"bfe.{_name}", _field, _name, _name, "u32", "u32")
_rule("prmt.b32", _permuted, "b32", "b32", "b32", "b32")

for _name, _types, _compare in (
    ("lt", "f32 s32 u32 s64", np.less), ("le", "f32 s32 s64", np.less_equal), ("gt", "f32 s32 s64", np.greater),
    ("ge", "f32 s32", np.greater_equal),
    ("eq", "b32 f16 f32", np.equal), ("ne", "b16 b32 b64", np.not_equal),
    ("num", "f16 f32", lambda a, b: ~(np.isnan(a) | np.isnan(b))),
):  # fmt: skip
    for _type in _types.split():
        _rule(f"setp.{_name}.{_type}", _compare, "pred", _type, _type)
for _name in ("b16", "b32", "f32"):
    _rule(f"selp.{_name}", lambda a, b, p: np.where(p, a, b), _name, _name, _name, "pred")
_same("mov", lambda a: a, "b16 b32 b64 u16 u32 pred", 1)

for _to_name, _from_name in (("s16", "s8"), ("s64", "s32"), ("u16", "u32"), ("u32", "u16"), ("u32", "u64"), ("u64", "u32")):
    _rule(f"cvt.{_to_name}.{_from_name}", lambda a, to=TYPES[_to_name]: a.astype(to), _to_name, _from_name)
_rule("cvt.rn.f32.s32", lambda a: a.astype(np.float32), "f32", "s32")
_rule("cvt.f32.f16", lambda a: a.astype(np.float32), "f32", "f16")
_rule("cvt.rz.f16.f32", lambda a: formats.toward_zero(a, np.float16), "f16", "f32")
_rule("cvt.f32.bf16", formats.from_bfloat16, "f32", "bf16")
_rule("cvt.rn.bf16.f32", formats.to_bfloat16, "bf16", "f32")
_rule("cvt.rna.tf32.f32", formats.tf32_ties_away, "f32", "f32")


def _packed_bfloat16(high: np.ndarray, low: np.ndarray) -> np.ndarray:
    """The first operand goes to the upper half."""
    return (formats.to_bfloat16(high).astype(np.uint32) << 16) | formats.to_bfloat16(low)


def _packed_float8(pair: np.ndarray) -> np.ndarray:
    halves = pair.view(np.uint16).view(np.float16).reshape(-1, 2)
    return formats.to_float8(halves.astype(np.float32)).view(np.uint16)[:, 0]


def _unpacked_float8(pair: np.ndarray) -> np.ndarray:
    return formats.from_float8(pair.view(np.uint8).reshape(-1, 2)).astype(np.float16).view(np.uint32)[:, 0]


_rule("cvt.rn.bf16x2.f32", _packed_bfloat16, "b32", "f32", "f32")
_rule("cvt.rn.satfinite.e4m3x2.f16x2", _packed_float8, "b16", "b32")
_rule("cvt.rn.f16x2.e4m3x2", _unpacked_float8, "b32", "b16")
