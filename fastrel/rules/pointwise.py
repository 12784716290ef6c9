"""Pointwise nodes: activation functions, residual adds, scalings and gates."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fastrel import ops
from fastrel.errors import UnsupportedModelError
from fastrel.graph.nodes import arguments, describe
from fastrel.graph.patterns import ACTIVATIONS, DIVISIONS, IDENTITIES, PRODUCTS
from fastrel.graph.zero import value_at_zero, vanishes
from fastrel.ops.steps import gelu, gelu_backward
from fastrel.reference import pooling
from fastrel.reference import rules as reference
from fastrel.reference.gradients import secant
from fastrel.rules.registry import rule
from fastrel.transform.context import Context
from fastrel.transform.lanes import Lane, Lanes, Row
from fastrel.transform.rollout import operand_shares

aten = torch.ops.aten


@rule(*IDENTITIES)
def identity(t: Context, node: fx.Node, out: Lanes) -> None:
    """Dropout at inference, copies, and casts: lanes have one dtype."""
    (x,) = arguments(node, count=1)
    t.give(x, *out)


#: op'(x) of common activation functions, to the bit what autograd computes, without it: `torch.export` follows these.
SLOPES: dict[Any, Callable[[Tensor], Tensor]] = {
    aten.relu.default: lambda x: aten.threshold_backward(torch.ones_like(x), x, 0),
    aten.tanh.default: lambda x: aten.tanh_backward(torch.ones_like(x), x.tanh()),
    aten.sigmoid.default: lambda x: aten.sigmoid_backward(torch.ones_like(x), x.sigmoid()),
    aten.silu.default: lambda x: aten.silu_backward(torch.ones_like(x), x),
    aten.hardswish.default: lambda x: aten.hardswish_backward(torch.ones_like(x), x),
}


def activation_grad(op: Any, lane: Tensor, x: Tensor, *args: Any) -> Tensor:
    """lane ⊙ op'(x), for lanes [K, *] of a pointwise op of x [*]."""
    keep = torch.is_grad_enabled() and x.requires_grad
    if op in SLOPES and not keep and not args:
        return lane * SLOPES[op](x)
    with torch.enable_grad():
        leaf = x if keep else x.detach().requires_grad_()
        (slope,) = torch.autograd.grad(op(leaf, *args).sum(), leaf, create_graph=keep)
    return lane * slope


def secant_grad(op: Any, lane: Tensor, x: Tensor, *args: Any) -> Tensor:
    """lane ⊙ (op(x) − op(0))/x, for lanes [K, *] of a pointwise op of x [*]."""
    return lane * secant(lambda value: op(value, *args), x)


@rule(*ACTIVATIONS)
def activation(t: Context, node: fx.Node, out: Lanes) -> None:
    """Relevance passes unchanged; the gradient is multiplied by the slope, by AttnLRP's rules that of the line from f(0) to f(x); where
    f(0) is not finite (logarithm, reciprocal) there is none, and the slope is the ordinary one."""
    x, *rest = arguments(node, count=len(node.args))
    rest += list(node.kwargs.values())

    def grad(lane: Lane) -> Lane:
        value, at_zero = t.value(x, lane.rows), value_at_zero(node)
        if t.method.attnlrp and at_zero == 0:
            return _ratio(t, lane, x, node, (*rest, "none")[0] if node.target is aten.gelu.default else "")
        if t.method.attnlrp and math.isfinite(at_zero):
            return Lane(t.emit.call(secant_grad, node.target, lane.node, value, *rest), lane.rows)
        if node.target is aten.gelu.default:
            return Lane(t.emit.call(gelu_backward, lane.node, value, *rest), lane.rows)
        return Lane(t.emit.call(activation_grad, node.target, lane.node, value, *rest), lane.rows)

    t.pass_through(x, out, grad)


def _ratio(t: Context, lane: Lane, x: fx.Node, y: fx.Node, gelu_form: str = "") -> Lane:
    """AttnLRP's rule for y = f(x). 16 bits of a gelu's y are too few: it is computed again."""
    values = t.value(x, lane.rows), t.value(y, lane.rows)
    if gelu_form and y.meta["val"].dtype in (torch.float16, torch.bfloat16):
        values = values[0], t.emit.call(gelu, values[0], gelu_form)
    return Lane(t.emit.call(ops.activation_ratio, lane.node, *values, gelu_form), lane.rows)


@rule(aten.add.Tensor, aten.add_.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar)
def add(t: Context, node: fx.Node, out: Lanes) -> None:
    """u ± v. Two activations share the relevance (residual add); a constant takes none of it.

    Not so in the published code, where constants (position embeddings, masks) take their share, which is then dropped.
    """
    u, v = arguments(node, count=2)
    if node.kwargs.get("alpha", 1) != 1:
        raise UnsupportedModelError(f"{describe(node)} with alpha={node.kwargs['alpha']}")
    minus = node.target in (aten.sub.Tensor, aten.sub.Scalar)
    operands = [x for x in (u, v) if t.is_active(x)]
    rels: list[Lane | None] = [out.rel] * len(operands)
    shares = len(operands) == 2 or (t.published and isinstance(u, fx.Node) and isinstance(v, fx.Node))
    if out.rel and shares and any(t.wants(x) for x in operands):
        if len(operands) == 2 and t.facts.roots[node] is not node:
            rels = [None, None]
            t.give(t.facts.roots[node], rel=out.rel)
        else:
            rels = [rel for x, rel in zip((u, v), _share(t, node, out.rel, minus), strict=True) if x in operands]
    grads = [out.grad] * len(operands)
    if out.grad and minus and operands[-1] is v and t.wants(v):
        grads[-1] = Lane(t.emit.call(torch.neg, out.grad.node), out.grad.rows)
    rows = forked(t, out.row, node, operands, rels, grads)
    for x, grad, rel, row in zip(operands, grads, rels, rows, strict=True):
        _give_broadcast(t, x, node, Lanes(grad, rel, row))


def forked(
    t: Context,
    row: Row | None,
    node: fx.Node,
    operands: Sequence[fx.Node],
    rels: Sequence[Lane | None],
    grads: Sequence[Lane | None] = (),
) -> list[Row | None]:
    """The row of a sum for each of its operands, charged by their relevance where that is known: streams by their evidence, where
    `grads` are given and the method says so."""
    if row is None or len(rels) == 1:
        return [row] * len(rels)
    streams = t.facts.are_streams(operands, t.stretch.every)
    shares = None
    first = t.axes(node)[0]
    if all(rels) and len(first) == 1 and first[0][1] == "batch":
        lanes = [rel.node for rel in rels if rel]
        if streams and t.method.evidence and grads and all(grads):
            lanes = [_evidence(t, node, *given) for given in zip(operands, grads, rels, strict=True)]
        shares = tuple(t.emit.parts(t.emit.call(operand_shares, *lanes), len(lanes)))
    return [*t.rollout.fork(row, len(rels), shares, streams)]


def _evidence(t: Context, node: fx.Node, x: fx.Node, grad: Lane | None, rel: Lane | None) -> fx.Node:
    """The evidence of an operand's entries [K, *]."""
    assert grad
    assert rel
    return t.emit.call(pooling.evidence_of_entries, t.value(x), t.dense(grad, node).node, t.dense(rel, node).node)


def _share(t: Context, node: fx.Node, rel: Lane, minus: bool) -> list[Lane | None]:
    u, v = arguments(node, count=2)
    ndim = node.meta["val"].dim()
    values = [t.value(x, rel.rows, ndim) for x in (u, v)]
    for i, x in enumerate((u, v)):
        if not t.is_active(x):
            values[i] = t.emit.call(without_exclusions, values[i])
        if x.meta["val"].shape != node.meta["val"].shape:
            values[i] = t.emit.call(expand_like, values[i], rel.node)
    if minus:
        values[1] = t.emit.call(torch.neg, values[1])
    batch = next((i for i, axis in enumerate(t.axes(node)) if any(role == "batch" for _, role in axis)), 0)
    call = t.emit.call(ops.residual_add, *values, rel.node, batch, t.rules)
    return [Lane(part, rel.rows) for part in t.emit.parts(call, 2)]


def without_exclusions(mask: Tensor) -> Tensor:
    """A constant operand without -inf, by which masks exclude a key: it takes no part, for no relevance is there."""
    return mask.masked_fill(mask == -torch.inf, 0.0)


def expand_like(x: Tensor, lane: Tensor) -> Tensor:
    """x with the shape of a lane [K, *] without its K."""
    return x.expand(lane.shape[1:])


def sum_to(lane: Tensor, *shape: int) -> Tensor:
    """A lane [K, *] summed over the dimensions along which a value of this shape was broadcast."""
    lead = lane.dim() - 1 - len(shape)
    lane = lane.sum(list(range(1, 1 + lead))) if lead else lane
    return lane.sum_to_size(lane.shape[0], *shape)


def _give_broadcast(t: Context, x: fx.Node, node: fx.Node, lanes: Lanes) -> None:
    """Lanes of an operand that was broadcast to the node's shape are summed back."""
    if x.meta["val"].shape == node.meta["val"].shape:
        return t.give(x, *lanes)

    def shrink(lane: Lane | None, is_row: bool = False) -> Lane | None:
        if lane is None:
            return None
        shape = t.row_shape(x) if is_row else t.shape(x)
        return Lane(t.emit.call(sum_to, t.dense(lane, node, is_row).node, *shape))

    row = lanes.row and lanes.row.map(lambda lane: shrink(lane, is_row=True) or lane)
    t.give(x, shrink(lanes.grad), shrink(lanes.rel), row)


@rule(*PRODUCTS)
def mul(t: Context, node: fx.Node, out: Lanes) -> None:
    """u · v. Constant factors and scales of norms pass relevance unchanged; of two activations (a gate) each takes half."""
    u, v = arguments(node, count=2)
    divide = node.target in DIVISIONS
    both = t.is_active(u) and t.is_active(v)
    scales = [t.facts.is_scale(x) for x in (u, v)] if both else [False, False]
    scaled = both and scales[0] != scales[1]
    if divide and both and t.facts.roots[node] is node:
        # What a value is divided by normalises it, as a norm's scale does.
        scales, scaled = [False, True], True
    rel = out.rel
    if both and not scaled and t.method.attnlrp and out.grad:
        out = _attnlrp_product(t, node, out, out.grad)
    if both and rel and not scaled:
        if t.facts.roots[node] is not node:
            t.give(t.facts.roots[node], rel=rel)
            rel = None
        else:
            rel = Lane(t.emit.call(reference.gate, rel.node), rel.rows)
    # The scale of a norm passes no relevance on: normalisation is the identity.
    passing = [t.is_active(x) and not (scaled and is_scale) for x, is_scale in ((u, scales[0]), (v, scales[1]))]
    carriers = [x for x, passes in zip((u, v), passing, strict=True) if passes]
    row_of = iter(forked(t, out.row, node, carriers, [rel] * len(carriers)))
    for x, other, passes in ((u, v, passing[0]), (v, u, passing[1])):
        if not t.is_active(x):
            continue
        grad = None
        frozen = scaled and not passes and t.method.attnlrp  # AttnLRP takes what a norm divides by as a constant
        if out.grad and t.wants(x) and not frozen:
            rows, ndim = out.grad.rows, node.meta["val"].dim()
            factor = t.value(other, rows, ndim) if isinstance(other, fx.Node) else other
            lane = t.emit.call(torch.div if divide and x is u else torch.mul, out.grad.node, factor)
            if divide and x is v:
                value = t.value(v, rows, ndim)
                lane = t.emit.call(torch.neg, t.emit.call(torch.div, lane, t.emit.call(torch.mul, value, value)))
            grad = Lane(lane, rows)
        _give_broadcast(t, x, node, Lanes(grad, rel if passes else None, next(row_of) if passes else None))


def _attnlrp_product(t: Context, node: fx.Node, out: Lanes, grad: Lane) -> Lanes:
    """AttnLRP's rules for a gate, half to each factor, and for x·σ(x), an activation function like others where it is 0 at 0."""
    root = t.facts.roots[node]
    if root is node:
        return out._replace(grad=Lane(t.emit.call(torch.mul, grad.node, 0.5), grad.rows))
    if not vanishes(node, root):
        return out
    t.give(root, grad=_ratio(t, grad, root, node))
    return out._replace(grad=None)


@rule(aten.rsub.Scalar)
def rsub(t: Context, node: fx.Node, out: Lanes) -> None:
    """c − x."""
    t.pass_through(node.args[0], out, lambda lane: Lane(t.emit.call(torch.neg, lane.node), lane.rows))
