"""Sums over tokens that a model adds up one by one or run by run, and values whose features come before their tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

#: Moves that may swap a value's last two dimensions, and those after which it is not known which hold features.
_TURNS = {"mT", "transpose", "permute", "swapaxes", "swapdims", "movedim", "moveaxis"}
_REGROUPS = {"view", "reshape", "flatten", "unflatten", "view_as", "reshape_as", "squeeze", "unsqueeze"}
_CUTS = {"getitem", "select", "narrow", "unbind", "chunk", "split", "split_with_sizes", "tensor_split"}


@dataclass(frozen=True)
class Run:
    """Tokens start … stop of a value [B, T, D]; `summed` over them, which keep their dimension with size 1 or not, times a factor."""

    whole: Tensor
    start: int
    stop: int
    summed: bool = False
    keep: bool = False
    factor: float = 1.0

    def total(self, keep: bool, factor: float = 1.0) -> Run:
        """The sum over these tokens."""
        return replace(self, summed=True, keep=keep, factor=factor)


def cut(name: str, x: Tensor, y: Tensor) -> Run | None:
    """The tokens of x that y, which a move made of it, is a view of: one of them, or several in their order; None for others."""
    if name not in _CUTS or x.dim() != 3 or not x.stride(1) or y.dtype != x.dtype:
        return None
    away, one = int(y.storage_offset() - x.storage_offset()), y.dim() == 2
    start = away // x.stride(1)
    length = 1 if one else int(y.shape[1])
    same = (y.shape[0], y.shape[-1]) == (x.shape[0], x.shape[2]) and y.dim() in (2, 3) and 0 < length < x.shape[1]
    if not same or away % x.stride(1) or not 0 <= start <= x.shape[1] - length:
        return None
    if y.stride() != ((x.stride(0), x.stride(2)) if one else x.stride()) or y.untyped_storage().data_ptr() != (
        x.untyped_storage().data_ptr()
    ):
        return None
    return Run(x, start, start + length, summed=length == 1, keep=not one)


def joined(u: Run | None, v: Run | None) -> Run | None:
    """The tokens of two sums of one value's tokens that lie beside each other and weigh the same; None for others."""
    if u is None or v is None or not u.summed or not v.summed:
        return None
    u, v = sorted((u, v), key=lambda run: run.start)
    alike = u.whole is v.whole and u.keep == v.keep and math.isclose(u.factor, v.factor, rel_tol=1e-9)
    return replace(u, stop=v.stop) if alike and u.stop == v.start else None


def turned(name: str, x: Tensor, y: Tensor, before: bool | None) -> bool | None:
    """Whether the features of y, which a move made of x, come before its last dimension; None where that is not known."""
    if name in _REGROUPS:
        return None
    if name in _TURNS and x.dim() > 2 and y.shape == x.mT.shape and y.stride() == x.mT.stride() != x.stride():
        return None if before is None else not before
    return before


def scaled(run: Run | None, factor: Any) -> Run | None:
    """The same times a number."""
    known = run is not None and run.summed and isinstance(factor, (int, float)) and factor
    return replace(run, factor=run.factor * factor) if known and run else None
