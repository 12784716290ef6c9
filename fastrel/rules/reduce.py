"""Pooling over tokens."""

import torch
from torch import Tensor, fx

from fastrel.graph import axes as axes_
from fastrel.graph.nodes import arguments
from fastrel.reference import rules as reference
from fastrel.rules.registry import rule
from fastrel.transform.context import Context
from fastrel.transform.lanes import Lane, Lanes

aten = torch.ops.aten


@rule(aten.mean.dim)
def mean(t: Context, node: fx.Node, out: Lanes) -> None:
    """Mean over tokens: relevance by share, gradient and row in equal parts."""
    x, dims, keep = arguments(node, False, count=3)
    ndim = x.meta["val"].dim()
    over = sorted(dim % ndim for dim in dims)
    shape = t.shape(x)

    def widen(lane: Lane, is_row: bool = False) -> fx.Node:
        node_ = t.dense(lane, node, is_row).node
        for dim in () if keep else over:
            node_ = t.emit.call(aten.unsqueeze.default, node_, dim + 1)
        return node_

    grad = rel = None
    count: object = 1
    for dim in over:
        count = t.emit.arith("mul", count, shape[dim])
    if out.grad and t.wants(x):
        grad = Lane(t.emit.call(spread, widen(out.grad), count, *shape))
    if out.rel and t.wants(x):
        rel = Lane(t.emit.call(reference.mean, t.value(x), widen(out.rel), over, t.rules))

    def spread_row(lane: Lane) -> Lane:
        tokens: object = 1
        sizes = list(t.row_shape(x))
        for dim in over:
            if not axes_.is_feature(t.axes(x)[dim]):
                tokens = t.emit.arith("mul", tokens, shape[dim])
        return Lane(t.emit.call(spread, widen(lane, True), tokens, *sizes))

    t.give(x, grad, rel, out.row and out.row.map(spread_row))


def spread(lane: Tensor, count: int, *shape: int) -> Tensor:
    """A lane [K, *] divided into `count` equal parts over the dimensions that were averaged."""
    return (lane / count).expand(lane.shape[0], *shape)
