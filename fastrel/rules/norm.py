"""Normalisation layers pass relevance unchanged."""

import torch
from torch import Tensor, fx

from fastrel import ops
from fastrel.lanes import Lane, Lanes, arguments
from fastrel.rules import rule
from fastrel.transform import Transform

aten = torch.ops.aten


@rule(aten.layer_norm.default)
def layer_norm(t: Transform, node: fx.Node, out: Lanes) -> None:
    """Identity for relevance; the ordinary gradient."""
    x, shape, weight, _, eps = arguments(node, None, None, 1e-5, count=5)
    dims = len(shape)

    def grad(lane: Lane) -> Lane:
        normalized_from = x.meta["val"].dim() - dims
        if lane.rows and lane.rows.dim >= normalized_from:
            lane = t.dense(lane, node)
        scale = None if weight is None else t.value(weight)
        value = t.value(x, lane.rows)
        if t.method.attnlrp:
            return Lane(t.emit.call(frozen_layer_norm_backward, lane.node, value, scale, dims, eps), lane.rows)
        return Lane(t.emit.call(ops.layer_norm_backward, lane.node, value, scale, dims, eps), lane.rows)

    t.pass_through(x, out, grad)


def frozen_layer_norm_backward(grad: Tensor, x: Tensor, weight: Tensor | None, dims: int, eps: float) -> Tensor:
    """AttnLRP's rule: the gradient with the standard deviation taken as a constant."""
    over = tuple(range(-dims, 0))
    rstd = (x.var(over, correction=0, keepdim=True) + eps).rsqrt()
    g = (grad if weight is None else grad * weight) * rstd
    return g - g.mean(over, keepdim=True)
