"""Pooling by gates: each token's weight is made of that token alone and no softmax, as σ(w·x) is. As a product over tokens it would
pass for attention of one query."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from fastrel.graph import axes as axes_
from fastrel.graph.mixing import MATRIX_PRODUCTS, brought_back, holds_tokens
from fastrel.graph.nodes import insert_like, replace
from fastrel.graph.patterns import ACTIVATIONS, SOFTMAXES, is_softmax_over_keys, reads

aten = torch.ops.aten

Labelled = Mapping[fx.Node, axes_.Axes]

_LAYERS = {aten.linear.default, aten.addmm.default, aten.conv1d.default, aten.conv2d.default}

#: How many gates one product may hold; each becomes a sum of its own.
MOST_GATES = 64


def gates_as_weights(graph: fx.Graph, axes: Labelled) -> bool:
    """g x, of gates g [B, n, T] and values x [B, T, d], and xᵀ gᵀ become (g_i · x).sum(1) for each gate; whether there was any."""
    kept: set[fx.Node | None] = set()  # kᵀ v of linear attention
    if any(_gates(node, axes) for node in graph.nodes):
        kept = {brought_back(node, axes) for node in graph.nodes}
    found = False
    for node in list(graph.nodes):
        if node in kept or (gates := _gates(node, axes)) is None:
            continue
        side, count = gates
        with graph.inserting_before(node):
            insert = functools.partial(insert_like, node)
            gate, x = node.args if side == 1 else node.args[::-1]
            values: Any = x if side == 1 else insert(aten.transpose.int, x, 1, 2)
            sums = []
            for i in range(count):
                own = insert(aten.squeeze.dim, gate, side) if count == 1 else insert(aten.select.int, gate, side, i)
                weight = insert(aten.unsqueeze.default, own, 2)
                sums.append(insert(aten.sum.dim_IntList, insert(aten.mul.Tensor, weight, values), [1]))
            result = insert(aten.unsqueeze.default, sums[0], side) if count == 1 else insert(aten.stack.default, sums, side)
        replace(node, result)
        found = True
    return found


def _gates(node: fx.Node, axes: Labelled) -> tuple[int, int] | None:
    """Of which dimension the gates of a product are (1: they are its left operand; 2: its right one), and how many; None for others."""
    if node.target not in MATRIX_PRODUCTS or any(x not in axes or len(axes[x]) != 3 for x in node.args):  # type: ignore[index]
        return None
    for side, (gate, x) in ((1, node.args), (2, node.args[::-1])):
        of_gate, of_x = axes[gate], axes[x]  # type: ignore[index]
        over = holds_tokens(of_gate[3 - side]) and holds_tokens(of_x[side])
        if not over or holds_tokens(of_gate[side]) or holds_tokens(of_x[3 - side]):
            continue
        count = gate.meta["val"].shape[side]  # type: ignore[union-attr]
        if isinstance(count, int) and count <= MOST_GATES and _is_gate(gate, count, _numbers_per_token(of_x), axes):
            return side, count
    return None


def _is_gate(gate: Any, count: int, width: int, axes: Labelled) -> bool:
    """Whether a value of `count` numbers for each token is made of no softmax over tokens and of no product of what others hold, back
    to layers and to values as wide as those that it weighs. Several are gates only where they are shaped by a function, lest every
    product of keys and values be one."""
    shaped, todo, seen = count == 1, [gate], {gate}
    while todo:
        node = todo.pop()
        if node.target in MATRIX_PRODUCTS and all(x in axes for x in node.args):
            return False
        if node.target in SOFTMAXES and holds_tokens(axes[node][node.args[1]]):
            return False
        shaped = shaped or node.target in ACTIVATIONS or node.target in SOFTMAXES
        if node.target in _LAYERS or node.target in MATRIX_PRODUCTS:
            continue
        new = {x for x in reads(node) if x in axes and _numbers_per_token(axes[x]) < width} - seen
        seen |= new
        todo += new
    return shaped and not is_softmax_over_keys(gate)


def _numbers_per_token(of: axes_.Axes) -> int:
    return math.prod(size for axis in of for size, role in axis if role == "feature")
