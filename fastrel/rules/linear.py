"""Linear layers: eq. (5)."""

from typing import Any

import torch
from torch import fx

from fastrel import ops
from fastrel.errors import UnsupportedModelError
from fastrel.lanes import Lane, Lanes, arguments
from fastrel.rules import rule
from fastrel.transform import Transform, describe

aten = torch.ops.aten


@rule(aten.linear.default)
def linear(t: Transform, node: fx.Node, out: Lanes) -> None:
    """x Wᵀ + b: relevance by the z+ rule, gradient g W."""
    x, weight, bias = arguments(node, None, count=3)
    if t.is_active(weight):
        raise UnsupportedModelError(f"{describe(node)} has a weight that depends on the input")
    grad = rel = None
    if t.wants(x):
        grad, rel = _back(t, node, x, t.value(weight), t.value(bias) if isinstance(bias, fx.Node) else None, out)
    t.give(x, grad, rel, out.row)


def _back(t: Transform, node: fx.Node, x: fx.Node, weight: fx.Node, bias: Any, out: Lanes) -> tuple[Any, Any]:
    feature = node.meta["val"].dim() - 1
    rel, grad = out.rel, out.grad
    if rel and rel.rows and rel.rows.dim == feature:
        # Relevance of some output features only (v of a fused qkv): a linear layer of those.
        own = rel.rows
        part = [
            t.emit.call(aten.narrow.default, value, 0, own.start, own.length) if value else None for value in (weight, bias)
        ]
        y = t.emit.call(aten.narrow.default, t.value(node), feature, own.start, own.length)
        rel_in = t.emit.parts(t.emit.call(ops.zplus_linear, t.value(x), part[0], y, part[1], rel.node, None, t.rules), 2)[0]
        return _back(t, node, x, weight, bias, out._replace(rel=None))[0], Lane(rel_in)
    if grad and grad.rows and (grad.rows.dim == feature or (rel and grad.rows != rel.rows)):
        grad = t.dense(grad, node)
    if rel and grad and rel.rows != grad.rows:
        rel = t.dense(rel, node)
    if rel is None:
        return (Lane(t.emit.call(torch.matmul, grad.node, weight), grad.rows) if grad else None), None
    values = (t.value(x, rel.rows), weight, t.value(node, rel.rows), bias)
    call = t.emit.call(ops.zplus_linear, *values, rel.node, grad.node if grad else None, t.rules)
    rel_in, grad_in = t.emit.parts(call, 2)
    return (Lane(grad_in, rel.rows) if grad else None), Lane(rel_in, rel.rows)
