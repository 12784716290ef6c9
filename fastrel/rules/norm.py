"""Normalisation layers pass relevance unchanged."""

from typing import Any

import torch
from torch import fx

from fastrel import ops
from fastrel.lanes import Lane, Lanes
from fastrel.rules import rule
from fastrel.transform import Transform

aten = torch.ops.aten


@rule(aten.layer_norm.default)
def layer_norm(t: Transform, node: fx.Node, out: Lanes) -> None:
    """Identity for relevance; the ordinary gradient."""
    x, shape, weight, _, eps = (*node.args, *(None, None, 1e-5)[len(node.args) - 2 :])[:5]
    dims = len(shape)  # type: ignore[arg-type]

    def grad(lane: Lane) -> Lane:
        normalized_from = x.meta["val"].dim() - dims  # type: ignore[union-attr]
        if lane.rows and lane.rows.dim >= normalized_from:
            lane = t.dense(lane, node)
        scale: Any = t.value(weight) if isinstance(weight, fx.Node) else None
        value = t.value(x, lane.rows)  # type: ignore[arg-type]
        return Lane(t.emit.call(ops.layer_norm_backward, lane.node, value, scale, dims, eps), lane.rows)

    t.pass_through(x, out, grad)
