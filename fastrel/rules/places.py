"""Values that are added up at places that an index names: poolings by segment, packed sequences, experts' tokens put back."""

from typing import Any

import torch
from torch import Tensor, fx

from fastrel.graph.nodes import arguments
from fastrel.graph.places import SUMS, is_sum
from fastrel.reference import operators, pooling
from fastrel.rules.generic import divided_row, generic, index_map, summed_features, vjp
from fastrel.rules.reduce import by_relevance
from fastrel.rules.registry import rule
from fastrel.transform.context import Context
from fastrel.transform.lanes import Lane, Lanes

aten = torch.ops.aten


@rule(*SUMS)
def added_up(t: Context, node: fx.Node, out: Lanes) -> None:
    """Each place is a sum: relevance by share of what adds up to its sign, as in a mean over tokens.

    A row goes to the tokens of a place by evidence where the method says so, else in equal parts; tokens that are 0 (padding) take
    nothing.
    """
    if not is_sum(node):  # entries put in the place of others
        return (index_map if node.target is aten.index_put.default else generic)(t, node, out)
    op: Any = node.target
    place, kwargs = SUMS[op], tuple(node.kwargs.items())
    x: Any = node.args[place]
    values = fx.map_arg(node.args, t.value)
    grad = rel = None
    if out.grad and t.wants(x):
        grad = Lane(t.emit.call(vjp, node.target, t.dense(out.grad, node).node, place, None, kwargs, *values))
    if out.rel and t.wants(x):
        rel = Lane(t.emit.call(shares_at_places, node.target, t.dense(out.rel, node).node, place, *values))
    features = t.features(x)
    by: Any = (grad.node, rel.node) if t.method.evidence and grad and rel else None

    def back(lane: Lane) -> Lane:
        full = t.emit.call(divided_row, t.dense(lane, node, is_row=True).node, *t.shape(node))
        return Lane(summed_features(t, x, t.emit.call(row_at_places, node.target, full, place, features, by, *values)))

    t.give(x, grad, rel, out.row and out.row.map(back))


@rule(aten.scatter_reduce.two, aten.index_reduce.default)
def largest(t: Context, node: fx.Node, out: Lanes) -> None:
    """The largest of what comes to each place: nothing reaches the others. A row goes where its features' relevance does."""
    base, _, _, source, reduce = arguments(node, count=5)
    x: Any = source
    if reduce not in ("amax", "amin") or t.is_active(base):
        return generic(t, node, out)
    kwargs, values = tuple(node.kwargs.items()), fx.map_arg(node.args, t.value)

    def back(lane: fx.Node) -> fx.Node:
        return t.emit.call(vjp, node.target, lane, 3, None, kwargs, *values)

    grad, rel = (Lane(back(t.dense(lane, node).node)) if lane and t.wants(x) else None for lane in (out.grad, out.rel))
    t.give(x, grad, rel, out.row and by_relevance(t, node, x, out, back))


def shares_at_places(op: Any, rel: Tensor, place: int, *values: Any) -> Tensor:
    """Relevance [K, *x] of what `op` adds up, its argument `place`."""
    return operators.pooling(lambda x: op(*values[:place], x, *values[place + 1 :]), values[place], rel)


def row_at_places(
    op: Any, row: Tensor, place: int, features: list[int], by: tuple[Tensor, Tensor] | None, *values: Any
) -> Tensor:
    """A row [K, *y] that was divided among features, back to [K, *x] of what `op` adds up; `by`: x's gradient and relevance."""
    x = values[place]
    seen = pooling.parts_of_eq_13(x, *by, features) if by else (x != 0).to(row.dtype)[None]
    if features and not by:
        seen = seen.amax([dim + 1 for dim in features], keepdim=True)
    return pooling.sums_at_places(
        lambda x: op(*values[:place], x, *values[place + 1 :]), row, seen.expand(len(seen), *x.shape)
    )
