"""Values that are added up, averaged or compared at places that an index names: `scatter_add`, `index_add`, `index_put` with
accumulation, `scatter_reduce`, `index_reduce`, as sums of a source into zeros, plus what was there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten

#: What adds up entries of a source, its argument of this number, at places of its first argument.
SUMS = {aten.index_add.default: 3, aten.scatter_add.default: 3, aten.index_put.default: 2}

#: Operators that make zeros.
ZEROS = {aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default}
_COPIES = {aten.expand.default, aten.clone.default, aten.to.dtype, aten.view.default}


def is_sum(node: fx.Node) -> bool:
    """Whether a node adds up entries of a source at places of zeros."""
    if node.target is aten.index_put.default and not (len(node.args) > 3 and node.args[3]):
        return False
    return node.target in SUMS and _is_zero(node.args[0])


def _is_zero(x: Any) -> bool:
    while x.target in _COPIES:
        x = x.args[0]
    return x.target in ZEROS


def _onto(insert: Any, base: fx.Node, added: Callable[[fx.Node], fx.Node]) -> fx.Node:
    """`added(zeros)`, plus what was there."""
    if _is_zero(base):
        return added(base)
    return insert(aten.add.Tensor, base, added(insert(aten.zeros_like.default, base)))


def _index_add(
    insert: Any, base: fx.Node, dim: int, index: fx.Node, source: fx.Node, alpha: float = 1, **_: Any
) -> fx.Node | None:
    if alpha == 1 and _is_zero(base):
        return None
    source = source if alpha == 1 else insert(aten.mul.Tensor, source, alpha)
    return _onto(insert, base, lambda zeros: insert(aten.index_add.default, zeros, dim, index, source))


def _scatter_add(insert: Any, base: fx.Node, dim: int, index: fx.Node, source: fx.Node, **_: Any) -> fx.Node | None:
    if _is_zero(base):
        return None
    return _onto(insert, base, lambda zeros: insert(aten.scatter_add.default, zeros, dim, index, source))


def _index_put(
    insert: Any, base: fx.Node, indices: Sequence[Any], values: fx.Node, accumulate: bool = False, **_: Any
) -> fx.Node | None:
    if not accumulate or _is_zero(base):
        return None
    return _onto(insert, base, lambda zeros: insert(aten.index_put.default, zeros, indices, values, True))


def _scatter(
    insert: Any, base: fx.Node, dim: int, index: fx.Node, source: fx.Node, *, reduce: str, **_: Any
) -> fx.Node | None:
    if reduce != "add":
        return None
    return _onto(insert, base, lambda zeros: insert(aten.scatter_add.default, zeros, dim, index, source))


def _scatter_reduce(
    insert: Any, base: fx.Node, dim: int, index: fx.Node, source: fx.Node, reduce: str, include_self: bool = True, **_: Any
) -> fx.Node | None:
    return _reduced(insert, aten.scatter_add.default, base, (dim, index), source, reduce, include_self)


def _index_reduce(
    insert: Any, base: fx.Node, dim: int, index: fx.Node, source: fx.Node, reduce: str, include_self: bool = True, **_: Any
) -> fx.Node | None:
    return _reduced(insert, aten.index_add.default, base, (dim, index), source, reduce, include_self)


def _reduced(
    insert: Any, target: Any, base: fx.Node, where: tuple[int, fx.Node], source: fx.Node, reduce: str, include_self: bool
) -> fx.Node | None:
    """A sum or a mean of what comes to each place, with what was there or, where anything comes, without; None for others."""
    if reduce not in ("sum", "mean"):
        return None
    count = insert(target, insert(aten.zeros_like.default, base), *where, insert(aten.ones_like.default, source))
    if not include_self and not _is_zero(base):
        base = insert(aten.masked_fill.Scalar, base, insert(aten.gt.Scalar, count, 0), 0)
    total = _onto(insert, base, lambda zeros: insert(target, zeros, *where, source))
    if reduce == "sum":
        return total
    count = insert(aten.add.Scalar, count, 1) if include_self else insert(aten.clamp_min.default, count, 1)
    return insert(aten.div.Tensor, total, count)


#: What these operators are made of, for `fastrel.graph.spellings`; None where one is to stay as it is.
SPELLINGS: dict[Any, Callable[..., fx.Node | None]] = {
    aten.index_add.default: _index_add,
    aten.scatter_add.default: _scatter_add,
    aten.index_put.default: _index_put,
    aten.scatter.reduce: _scatter,
    aten.scatter_reduce.two: _scatter_reduce,
    aten.index_reduce.default: _index_reduce,
}
