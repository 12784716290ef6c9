"""Formats of numbers as bits: bfloat16, float8, TF32, and roundings that numpy does not have."""

from __future__ import annotations

import numpy as np


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    """float32 of the bits of bfloat16."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bfloat16(x: np.ndarray) -> np.ndarray:
    """Bits of bfloat16, float32 rounded to nearest, ties to even."""
    bits = x.view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(x), np.uint32(0x7FFF), rounded).astype(np.uint16)


def tf32_ties_away(x: np.ndarray) -> np.ndarray:
    """float32 rounded to TF32, ties away from zero: `cvt.rna.tf32.f32`."""
    bits = x.view(np.uint32)
    return np.where(np.isfinite(x), (bits + 0x1000) & np.uint32(0xFFFFE000), bits).view(np.float32)


def tf32_cut_off(bits: np.ndarray) -> np.ndarray:
    """What a tensor core takes of 32 bits as TF32: not the low 13."""
    return (bits & np.uint32(0xFFFFE000)).view(np.float32)


def toward_zero(x: np.ndarray, dtype: type[np.floating]) -> np.ndarray:
    """x in a narrower dtype, what does not fit cut off; beyond its largest number, that number."""
    near = x.astype(dtype)
    return np.where(np.abs(near.astype(x.dtype)) > np.abs(x), np.nextafter(near, dtype(0)), near)


def _float8_values() -> np.ndarray:
    """Magnitudes of float8_e4m3fn by their codes 0 … 126 (OCP 8-bit floating point specification, table 1)."""
    codes = np.arange(127)
    exponent, mantissa = codes >> 3, codes & 7
    return np.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7))


FLOAT8 = _float8_values()


def from_float8(bits: np.ndarray) -> np.ndarray:
    """float32 of the bits of float8_e4m3fn."""
    code = bits & 0x7F
    magnitude = np.where(code == 0x7F, np.nan, FLOAT8[np.minimum(code, 126)])
    return np.where(bits & 0x80, -magnitude, magnitude).astype(np.float32)


def to_float8(x: np.ndarray) -> np.ndarray:
    """Bits of float8_e4m3fn, to nearest, ties to even, 448 for all that is larger: `.rn.satfinite`."""
    wide = np.abs(x.astype(np.float64))
    above = np.searchsorted(FLOAT8, wide).clip(1, 126)
    below = above - 1
    middle = (FLOAT8[above] + FLOAT8[below]) / 2
    code = np.where((wide > middle) | ((wide == middle) & (above % 2 == 0)), above, below)
    code = np.where(np.isnan(x), 0x7F, code)
    return (code | np.where(np.signbit(x), 0x80, 0)).astype(np.uint8)
