"""Learned queries: scores (x Qᵀ)ᵀ of parameters Q with tokens x, as the product Q xᵀ that they are in other spellings."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from fastrel.graph import axes as axes_
from fastrel.graph.nodes import arguments, insert_like, replace
from fastrel.graph.patterns import ARITHMETIC, IDENTITIES

aten = torch.ops.aten

_SCALINGS = {*IDENTITIES, *ARITHMETIC, aten.masked_fill.Scalar, aten.masked_fill.Tensor}


def learned_queries(graph: fx.Graph, axes: Mapping[fx.Node, axes_.Axes]) -> bool:
    """softmax((x Qᵀ)ᵀ), x [B, T, D] and several queries Q [n, D], becomes softmax(Q xᵀ); whether there was any."""
    found = False
    for node in list(graph.nodes):
        layer = _turned(node)
        if layer is None or layer not in axes or not _becomes_a_map(node):
            continue
        x, weight, bias = arguments(layer, None, count=3)
        queries = weight.meta["val"].shape[0]
        if x not in axes or weight in axes or axes_.is_feature(axes[x][1]) or not isinstance(queries, int) or queries < 2:
            continue
        insert = functools.partial(insert_like, node)
        with graph.inserting_before(node):
            keys = insert(aten.transpose.int, x, 1, 2)
            scores = insert(aten.matmul.default, insert(aten.unsqueeze.default, weight, 0), keys)
            if bias is not None:
                scores = insert(aten.add.Tensor, scores, insert(aten.unsqueeze.default, bias, 1))
        replace(node, scores)
        found = True
    return found


def _turned(node: fx.Node) -> Any:
    """The layer [B, T, n] of which a node is [B, n, T]; None for others."""
    if node.target is aten.permute.default:
        turns = list(node.args[1]) in ([0, 2, 1], [0, -1, 1], [0, -1, -2])  # type: ignore[arg-type]
    else:
        turns = node.target is aten.transpose.int and {dim % 3 for dim in node.args[1:]} == {1, 2}  # type: ignore[operator]
    layer: Any = node.args[0] if turns else None
    return layer if turns and layer.target is aten.linear.default and layer.meta["val"].dim() == 3 else None


def _becomes_a_map(node: fx.Node) -> bool:
    """Whether all that is made of some scores is a softmax over their last dimension."""
    ends = True
    for user in node.users:
        if user.target in _SCALINGS and user.meta["val"].dim() == 3:
            ends = ends and _becomes_a_map(user)
        else:
            ends = ends and user.target is aten.softmax.int and user.args[1] in (-1, 2)
    return ends and bool(node.users)
