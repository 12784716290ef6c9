"""A softmax that is written out: exp(x − m) / Σ exp(x − m), whatever m, with c beside the sum, exp of a log-softmax or of
x − logsumexp(x), a product divided by the sums."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from fastrel.graph import axes as axes_
from fastrel.graph.patterns import IDENTITIES

aten = torch.ops.aten

_MOVES = {*IDENTITIES, *axes_.RESHAPES, aten.expand.default, aten.expand_as.default}


def softmax_of(node: fx.Node, insert: Callable[..., fx.Node]) -> fx.Node | None:
    """The same value by a softmax, written by `insert(target, *args)`; None where the node is none that was written out."""
    if node.target is aten.exp.default:
        log: Any = node.args[0]
        if log.target is aten.log_softmax.int and len(log.args) == 2 and not log.kwargs:
            return insert(aten.softmax.int, log.args[0], log.args[1])
        if log.target is aten.sub.Tensor and not log.kwargs and isinstance(log.args[1], fx.Node):
            total = _without_moves(log.args[1])
            over: Any = total.args[1] if total.target is aten.logsumexp.default else ()
            if len(over) == 1 and _is_same(total.args[0], log.args[0]) and _is_of_one_dtype(node, log.args[0], total):
                dim = over[0] % log.meta["val"].dim()
                return insert(aten.softmax.int, log.args[0], dim) if _is_one_along(log.args[1], log, dim) else None
        return None
    if node.target is not aten.div.Tensor or not all(isinstance(x, fx.Node) for x in node.args) or node.kwargs:
        return None
    top, below = (_plain(x) for x in node.args)
    total, sink = _parted(below)
    if total.target is not aten.sum.dim_IntList:
        return None
    dims: Any = total.args[1]
    summed = _plain(total.args[0])
    ndim = summed.meta["val"].dim()
    if (
        summed.target is not aten.exp.default
        or not dims
        or len(dims) != 1
        or total.kwargs
        or not _is_of_one_dtype(node, summed, total)
    ):
        return None
    dim = dims[0] % ndim
    scores: Any = summed.args[0]
    if sink is not None and dim < ndim - 1:
        return None
    if _is_same(top, summed) and _is_one_along(below, top, dim):
        return _of_scores(insert, scores, dim, sink)
    if top.target in (aten.matmul.default, aten.bmm.default) and dim == ndim - 1:
        weights, values = top.args
        if _is_same(_plain(weights), summed) and _is_one_along(below, weights, dim):
            return insert(top.target, _of_scores(insert, scores, dim, sink), values)
    return None


def _parted(below: fx.Node) -> tuple[fx.Node, Any]:
    """A divisor Σ exp(x) + c as the sum and log c, which is the score of a sink; (the sum, None) without c."""
    if below.target is not aten.add.Tensor or below.kwargs:
        return _without_moves(below), None
    for total, other in (below.args[:2], below.args[1::-1]):
        plain = _plain(total) if isinstance(total, fx.Node) else None
        if plain is None or plain.target is not aten.sum.dim_IntList:
            continue
        if isinstance(other, fx.Node) and _plain(other).target is aten.exp.default:
            return plain, _plain(other).args[0]
        if isinstance(other, (int, float)) and other > 0:
            return plain, math.log(other)
    return below, None


def _of_scores(insert: Callable[..., fx.Node], scores: fx.Node, dim: int, sink: Any) -> fx.Node:
    """exp(x) / Σ exp(x); over the last dimension, exp(x) / (Σ exp(x) + exp(sink)): a softmax of one more key, without it."""
    if sink is None:
        return insert(aten.softmax.int, _unshifted(scores, dim), dim)
    one = insert(aten.slice.Tensor, scores, -1, 0, 1)
    column = insert(
        *((aten.expand_as.default, sink, one) if isinstance(sink, fx.Node) else (aten.full_like.default, one, sink))
    )
    every = insert(aten.softmax.int, insert(aten.cat.default, [scores, column], -1), -1)
    return insert(aten.slice.Tensor, every, -1, 0, -1)


def _is_of_one_dtype(*nodes: fx.Node) -> bool:
    return len({node.meta["val"].dtype for node in nodes}) == 1


def _plain(x: Any) -> fx.Node:
    while x.target in IDENTITIES:
        x = x.args[0]
    return x


def _without_moves(x: fx.Node) -> fx.Node:
    while x.target in _MOVES:
        x = x.args[0]  # type: ignore[assignment]
    return x


def _is_same(a: Any, b: Any, depth: int = 8) -> bool:
    """Whether two values are one, if need be computed twice, in a few steps."""
    if a is b or not isinstance(a, fx.Node) or not isinstance(b, fx.Node):
        return bool(a is b or (not isinstance(a, fx.Node) and a == b))
    if torch.Tag.nondeterministic_seeded in getattr(a.target, "tags", ()):
        return False
    if a.op != "call_function" or a.target is not b.target or len(a.args) != len(b.args) or a.kwargs != b.kwargs:
        return False
    return depth > 0 and all(_is_same(x, y, depth - 1) for x, y in zip(a.args, b.args, strict=True))


def _is_one_along(x: fx.Node, whole: Any, dim: int) -> bool:
    """Whether x has the sizes of another value, but 1 in a dimension."""
    expected = [1 if i == dim else size for i, size in enumerate(whole.meta["val"].shape)]
    return [str(size) for size in x.meta["val"].shape] == [str(size) for size in expected]


def _unshifted(x: Any, dim: int) -> fx.Node:
    """x without what was taken away from all entries alike, to which a softmax is blind: their maximum."""
    while x.target in (*IDENTITIES, aten.sub.Tensor) and not x.kwargs:
        if x.target is aten.sub.Tensor and not (isinstance(x.args[1], fx.Node) and _is_one_along(x.args[1], x, dim)):
            break
        inner: Any = x.args[0]
        if (
            not isinstance(inner, fx.Node)
            or not _is_of_one_dtype(inner, x)
            or str(inner.meta["val"].shape) != str(x.meta["val"].shape)
        ):
            break
        x = inner
    return x
