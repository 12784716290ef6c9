"""Pooling over tokens."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from fastrel.graph import axes as axes_
from fastrel.graph.nodes import arguments
from fastrel.graph.patterns import IDENTITIES
from fastrel.graph.poolings import chosen_by_size
from fastrel.reference import pooling
from fastrel.reference import rules as reference
from fastrel.rules.generic import statistic, vjp
from fastrel.rules.registry import rule
from fastrel.transform.context import Context
from fastrel.transform.lanes import Lane, Lanes, Row

aten = torch.ops.aten


@rule(aten.mean.dim)
def mean(t: Context, node: fx.Node, out: Lanes) -> None:
    """Mean over tokens: relevance by share, gradient and row in equal parts; where the method says so, a row by evidence."""
    x, dims, keep = arguments(node, False, count=3)
    ndim = x.meta["val"].dim()
    over = sorted(dim % ndim for dim in dims)
    shape = t.shape(x)

    grad = rel = None
    count: object = 1
    for dim in over:
        count = t.emit.arith("mul", count, shape[dim])
    if out.grad and t.wants(x):
        grad = Lane(t.emit.call(spread, _widened(t, node, out.grad, over, keep), count, *shape))
    if out.rel and t.wants(x):
        rel = Lane(t.emit.call(reference.mean, t.value(x), _widened(t, node, out.rel, over, keep), over, t.rules))

    def spread_row(lane: Lane) -> Lane:
        tokens: object = 1
        sizes = list(t.row_shape(x))
        for dim in over:
            if not axes_.is_feature(t.axes(x)[dim]):
                tokens = t.emit.arith("mul", tokens, shape[dim])
        return Lane(t.emit.call(spread, _widened(t, node, lane, over, keep, is_row=True), tokens, *sizes))

    shares = None if _centres(node, x) else pooled_evidence(t, x, grad, rel, over)

    def spread_by_evidence(lane: Lane) -> Lane:
        return Lane(t.emit.call(torch.mul, _widened(t, node, lane, over, keep, is_row=True), shares))

    t.give(x, grad, rel, out.row and out.row.map(spread_by_evidence if shares else spread_row))


def pooled_evidence(t: Context, x: fx.Node, grad: Lane | None, rel: Lane | None, over: list[int]) -> fx.Node | None:
    """The shares [K, *] of tokens that are pooled, if the method reads them by evidence; x's own lanes are dense."""
    features = t.features(x)
    tokens = [dim for dim in over if dim not in features]
    if not (t.method.evidence and grad and rel and tokens):
        return None
    return t.emit.call(pooling.evidence, t.value(x), grad.node, rel.node, tokens, features)


def _centres(node: fx.Node, x: fx.Node) -> bool:
    """Whether a mean of x is taken away from x again: that pools nothing, and its gradient cancels out, so that its signs are noise."""
    for user in node.users:
        if user.target is aten.sub.Tensor and user.args[0] is x:
            return True
        if user.target in (aten.unsqueeze.default, aten.expand.default, *IDENTITIES) and _centres(user, x):
            return True
    return False


def spread(lane: Tensor, count: int, *shape: int) -> Tensor:
    """A lane [K, *] divided into `count` equal parts over the dimensions that were averaged."""
    return (lane / count).expand(lane.shape[0], *shape)


@rule(aten.sum.dim_IntList, aten.std.correction, aten.var.correction, aten.std.dim, aten.var.dim)
def total(t: Context, node: fx.Node, out: Lanes) -> None:
    """A sum, also of weighted or masked values, and the spread of values: relevance by share of what adds up to its sign.

    A row goes to each token by its constant weight, in equal parts where it has none; tokens that are 0 (padding) take nothing. Of
    entries that were chosen by their size it goes back entry by entry, as from the largest.
    """
    if not (out.rel or out.row):
        return statistic(t, node, out)
    x: Any = node.args[0]
    over, keep = _over(node), node.meta["val"].dim() == x.meta["val"].dim()
    grad = rel = None
    if out.rel and t.wants(x):
        rel = Lane(t.emit.call(reference.mean, t.value(x), _widened(t, node, out.rel, over, keep), over, t.rules))
    if out.grad and t.wants(x):
        values: Any = fx.map_arg(node.args, t.value)
        lane = t.dense(out.grad, node).node
        grad = Lane(t.emit.call(vjp, node.target, lane, 0, None, tuple(node.kwargs.items()), *values))
    if (mask := chosen_by_size(x, over)) is not None:

        def back(lane: fx.Node) -> fx.Node:
            return t.emit.call(among_chosen, _widened(t, node, Lane(lane), over, keep), t.value(mask), over)

        return t.give(x, grad, rel, out.row and by_relevance(t, node, x, out, back))
    shares = pooled_evidence(t, x, grad, rel, over)
    t.give(x, grad, rel, out.row and _row_by_weight(t, node, x, out.row, over, keep, shares))


def among_chosen(lane: Tensor, mask: Tensor, over: list[int]) -> Tensor:
    """A lane [K, *], size 1 in dimensions `over`, in equal parts among the entries there that a mask [*] chooses."""
    chosen = mask.to(lane.dtype)
    return lane * (chosen / chosen.sum(over, keepdim=True).clamp_min(1))


@rule(aten.linalg_vector_norm.default, aten.norm.ScalarOpt_dim)
def norm(t: Context, node: fx.Node, out: Lanes) -> None:
    """(Σ |x|ᵖ)^(1/p): as a sum of |x|ᵖ, an activation function of it."""
    x, p, given = arguments(node, 2, None, count=3)
    p = 2 if p is None else p
    whole = node.kwargs.get("dtype") is None and len(node.args) < 5
    if not (out.rel or out.row) or not whole or not isinstance(p, (int, float)) or not 0 < p < math.inf:
        return statistic(t, node, out)
    ndim = x.meta["val"].dim()
    over = sorted(dim % ndim for dim in ([given] if isinstance(given, int) else given or range(ndim)))
    keep = node.meta["val"].dim() == ndim
    grad = rel = None
    if out.rel and t.wants(x):
        parts = t.emit.call(torch.pow, t.emit.call(torch.abs, t.value(x)), p)
        rel = Lane(t.emit.call(reference.mean, parts, _widened(t, node, out.rel, over, keep), over, t.rules))
    if out.grad and t.wants(x):
        values, lane = fx.map_arg(node.args, t.value), t.dense(out.grad, node).node
        grad = Lane(t.emit.call(vjp, node.target, lane, 0, None, tuple(node.kwargs.items()), *values))
    shares = pooled_evidence(t, x, grad, rel, over)
    t.give(x, grad, rel, out.row and _row_by_weight(t, node, x, out.row, over, keep, shares))


@rule(aten.logsumexp.default)
def logsumexp(t: Context, node: fx.Node, out: Lanes) -> None:
    """log Σ exp: every lane by softmax; a row by that of its features' relevance."""
    x: Any = node.args[0]
    over, keep = _over(node), node.meta["val"].dim() == x.meta["val"].dim()

    def back(lane: Lane) -> Lane:
        return Lane(t.emit.call(pooling.logsumexp, t.value(x), _widened(t, node, lane, over, keep), over))

    grad, rel = (back(lane) if lane and t.wants(x) else None for lane in (out.grad, out.rel))
    t.give(x, grad, rel, out.row and by_relevance(t, node, x, out, lambda full: back(Lane(full)).node))


def _over(node: fx.Node) -> list[int]:
    ndim = node.args[0].meta["val"].dim()  # type: ignore[union-attr]
    given: Any = node.args[1] if len(node.args) > 1 else None
    return sorted(dim % ndim for dim in ([given] if isinstance(given, int) else given or range(ndim)))


def _widened(t: Context, node: fx.Node, lane: Lane | None, over: list[int], keep: bool, is_row: bool = False) -> fx.Node:
    """A lane with size 1 in the dimensions that were summed."""
    assert lane
    wide = t.dense(lane, node, is_row).node
    for dim in () if keep else over:
        wide = t.emit.call(aten.unsqueeze.default, wide, dim + 1)
    return wide


def _row_by_weight(
    t: Context, node: fx.Node, x: fx.Node, row: Row, over: list[int], keep: bool, shares: fx.Node | None
) -> Row:
    features, weight = t.features(x), _constant_factor(t, x)
    if all(dim in features for dim in over):
        return row.map(lambda lane: Lane(_widened(t, node, lane, over, keep, is_row=True)))
    if shares is None:
        given = None if weight is None else t.value(weight)
        shares = t.emit.call(pooling.token_weights, t.value(x), given, over, features)
    return row.map(lambda lane: Lane(t.emit.call(torch.mul, _widened(t, node, lane, over, keep, is_row=True), shares)))


def _constant_factor(t: Context, x: fx.Node) -> fx.Node | None:
    """The constant by which the tokens of a value were multiplied last."""
    if x.target is not aten.mul.Tensor:
        return None
    return next((w for w in x.args if isinstance(w, fx.Node) and not t.is_active(w) and w.meta["val"].dim()), None)


def by_relevance(t: Context, node: fx.Node, x: fx.Node, out: Lanes, back: Callable[[fx.Node], fx.Node]) -> Row:
    """A row that goes back entry by entry, divided among features in proportion to their relevance (or gradient)."""
    assert out.row
    lanes = [t.dense(lane, node).node for lane in (out.rel, out.grad) if lane]
    both = t.method.evidence and len(lanes) == 2
    by = t.emit.call(pooling.evidence_of_entries, t.value(node), *reversed(lanes)) if both else next(iter(lanes), None)
    features, own = ([dim + 1 for dim in t.features(value)] for value in (node, x))

    def moved(lane: Lane) -> Lane:
        dense = t.dense(lane, node, is_row=True).node
        full = back(t.emit.call(weighted_row, dense, by, features, *t.shape(node)))
        return Lane(t.emit.call(aten.sum.dim_IntList, full, own, True) if own else full)

    return out.row.map(moved)


def weighted_row(row: Tensor, by: Tensor | None, features: list[int], *shape: int) -> Tensor:
    """A row [K, *], size 1 in `features`, divided among them in proportion to |by|, equally without it."""
    full = row.expand(row.shape[0], *shape)
    weights = torch.ones_like(full) if by is None else by.abs()
    sums = weights.sum(features, keepdim=True) if features else weights
    equal = torch.ones_like(full) if not features else torch.ones_like(full) / full[0].numel() * sums[0].numel()
    return full * torch.where(sums > 0, weights / torch.where(sums > 0, sums, 1.0), equal)


@rule(aten.amax.default, aten.amin.default, aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default)
def extreme(t: Context, node: fx.Node, out: Lanes) -> None:
    """The largest entry: nothing reaches the others. A row goes where its features' relevance does."""
    pick(t, node, node, out)


def pick(t: Context, node: fx.Node, whole: fx.Node, out: Lanes) -> None:
    """Entries that `whole` picks by their size; `node` is its result, or the first of several."""
    x: Any = whole.args[0]
    options, kwargs = whole.args[1:], tuple(whole.kwargs.items())

    def back(lane: fx.Node) -> fx.Node:
        return t.emit.call(vjp, whole.target, lane, 0, None, kwargs, t.value(x), *options)

    lanes = [Lane(back(t.dense(lane, node).node)) if lane and t.wants(x) else None for lane in (out.grad, out.rel)]
    t.give(x, lanes[0], lanes[1], out.row and by_relevance(t, node, x, out, back))
