"""Linear layers: eq. (5)."""

from typing import Any

import torch
from torch import Tensor, fx

from fastrel import ops
from fastrel.errors import UnsupportedModelError
from fastrel.graph import axes as axes_
from fastrel.graph.nodes import arguments, describe
from fastrel.reference import rules as reference
from fastrel.reference.operators import layer
from fastrel.rules.generic import vjp
from fastrel.rules.registry import rule
from fastrel.transform.context import Context
from fastrel.transform.lanes import Lane, Lanes, Row

aten = torch.ops.aten

#: Up to so many tokens of a sample, products stay in float32: rounding the weight would cost more than it saves.
FEW_TOKENS = 8

#: Layers with fewer inputs or outputs stay in float32: their sums are too short for rounding to average out.
FEW_FEATURES = 256

#: Layers with more stay in float32: their int8 sums could exceed 32 bits.
MANY_FEATURES = 65536


@rule(aten.linear.default)
def linear(t: Context, node: fx.Node, out: Lanes) -> None:
    """x Wᵀ + b: relevance by the z+ rule, gradient g W."""
    x, weight, bias = arguments(node, None, count=3)
    if t.is_active(weight):
        raise UnsupportedModelError(f"{describe(node)} has a weight that depends on the input")
    grad = rel = None
    if t.wants(x):
        grad, rel = _back(t, node, x, t.value(weight), t.value(bias) if isinstance(bias, fx.Node) else None, out)
    t.give(x, grad, rel, _row(t, node, x, weight, out.row))


def _row(t: Context, node: fx.Node, x: fx.Node, weight: fx.Node, row: Row | None, turned: bool = False) -> Row | None:
    """The row as it is; of a layer over tokens, each token's is divided among those that it is made of, by |W|.

    `turned`: the weight is [in, out].

    Raises:
        UnsupportedModelError: what a layer makes of tokens is neither seen to be tokens again nor one number.
    """
    if row is None:
        return None
    if axes_.is_feature(t.axes(node)[-1]):
        read, made = t.axes(x)[-2:], t.axes(node)[-1]
        if axes_.size_of(made) > 1 and axes_.are_tokens(read[-1]) and len(read) > 1 and axes_.has_features(read[-2]):
            raise UnsupportedModelError(
                f"{describe(node)} mixes tokens, and what it makes is not turned back to where they were"
            )
        return row

    def back(lane: Lane) -> Lane:
        w = t.emit.call(aten.t.default, t.value(weight)) if turned else t.value(weight)
        return Lane(t.emit.call(divided_by_weights, t.dense(lane, node, is_row=True).node, w))

    return row.map(back)


def divided_by_weights(row: Tensor, weight: Tensor) -> Tensor:
    """A row [K, *, out] in parts |W_oi| / Σ_i |W_oi| to what a layer W [out, in] reads, [K, *, in]."""
    size = weight.abs()
    total = size.sum(1, keepdim=True)
    return row @ (size / total.where(total > 0, 1.0))


@rule(aten.addmm.default)
def addmm(t: Context, node: fx.Node, out: Lanes) -> None:
    """b + x W: a linear layer with its weight the other way round."""
    bias, x, weight = arguments(node, count=3)
    if t.is_active(weight) or t.is_active(bias) or node.kwargs:
        raise UnsupportedModelError(f"{describe(node)} that is not x W + b with a constant weight and bias")
    times_parameter(t, node, x, weight, bias, out)


def times_parameter(t: Context, node: fx.Node, x: fx.Node, weight: fx.Node, bias: Any, out: Lanes) -> None:
    """x W + b with W [in, out]."""
    grad = rel = None
    if t.wants(x):
        turned = t.emit.call(aten.t.default, t.value(weight))
        grad, rel = _back(t, node, x, turned, t.value(bias) if bias is not None else None, out)
    t.give(x, grad, rel, _row(t, node, x, weight, out.row, turned=True))


def times_parameters(t: Context, node: fx.Node, x: fx.Node, weight: fx.Node, out: Lanes) -> None:
    """x W with W [*, in, out], a weight for each head or group: eq. (5) for each; what several of them read adds up."""
    if t.row_shape(x) != t.row_shape(node):
        raise UnsupportedModelError(f"{describe(node)}: weights [.., in, out] that are not one for each head")
    grad = rel = None
    if t.wants(x):
        turned = t.emit.call(aten.transpose.int, t.value(weight), -2, -1)
        lead = [t.emit.size(x, dim) for dim in range(x.meta["val"].dim() - 2)]
        if out.grad:
            lane = t.emit.call(torch.matmul, t.dense(out.grad, node).node, turned)
            grad = Lane(t.emit.call(sum_lead, lane, *lead))
        if out.rel:
            lane = t.emit.call(reference.linear, t.value(x), turned, t.dense(out.rel, node).node, t.rules)
            rel = Lane(t.emit.call(sum_lead, lane, *lead))
    t.give(x, grad, rel, out.row)


def sum_lead(lane: Tensor, *lead: int) -> Tensor:
    """A lane [K, *, m, n] summed to the leading sizes that an operand has."""
    return lane.sum_to_size(lane.shape[0], *lead, *lane.shape[-2:])


@rule("aten._grouped_mm.default", "transformers.grouped_mm_fallback.default")
def grouped(t: Context, node: fx.Node, out: Lanes) -> None:
    """Experts: x [S, in] times W [E, in, out], of which offsets say from which row on each is taken."""
    x, weight, offsets = arguments(node, None, count=3)
    offsets = node.kwargs.get("offs", offsets)
    if offsets is None or x.meta["val"].dim() != 2 or t.is_active(weight):
        raise UnsupportedModelError(f"{describe(node)} that is not x W of constant weights, with offsets")
    grad = rel = None
    if t.wants(x):
        values = t.value(x), t.value(weight), t.value(offsets)
        if out.grad:
            grad = Lane(t.emit.call(vjp, node.target, t.dense(out.grad, node).node, 0, None, (), *values))
        if out.rel:
            rel = Lane(t.emit.call(of_groups, node.target, t.dense(out.rel, node).node, *values, t.rules))
    t.give(x, grad, rel, out.row)


def of_groups(op: Any, rel: Tensor, x: Tensor, weight: Tensor, offsets: Tensor, rules: reference.Rules) -> Tensor:
    """Relevance [K, S, in] by `reference.operators.layer`, of rel [K, S, out]."""
    return layer(lambda a, w: op(a, w, offsets), x, weight, rel, rules)


def _back(t: Context, node: fx.Node, x: fx.Node, weight: fx.Node, bias: Any, out: Lanes) -> tuple[Any, Any]:
    feature = node.meta["val"].dim() - 1
    rel, grad = out.rel, out.grad
    sizes = x.meta["val"].shape[-1], node.meta["val"].shape[-1]
    fits = min(sizes) >= FEW_FEATURES and max(sizes) <= MANY_FEATURES
    if rel and rel.rows and rel.rows.dim == feature:
        # Relevance of some output features only (v of a fused qkv): a linear layer of those.
        own = rel.rows
        part = [
            t.emit.call(aten.narrow.default, value, 0, own.start, own.length) if value else None for value in (weight, bias)
        ]
        y = t.emit.call(aten.narrow.default, t.value(node), feature, own.start, own.length)
        rel_in = _both(t, (t.value(x), part[0], y, part[1]), rel.node, None, fits)[0]
        return _back(t, node, x, weight, bias, out._replace(rel=None))[0], Lane(rel_in)
    if grad and grad.rows and (grad.rows.dim == feature or (rel and grad.rows != rel.rows)):
        grad = t.dense(grad, node)
    if rel and grad and rel.rows != grad.rows:
        rel = t.dense(rel, node)
    if rel is None:
        if grad is None:
            return None, None
        if t.products.bf16_gradient and grad.rows is None and fits:
            return Lane(t.emit.call(ops.reduced_matmul, grad.node, _reduced(t, weight, "gradient")[0])), None
        return Lane(t.emit.call(torch.matmul, grad.node, weight), grad.rows), None
    values = (t.value(x, rel.rows), weight, t.value(node, rel.rows), bias)
    few = rel.rows.length <= FEW_TOKENS if rel.rows else feature == 1
    rel_in, grad_in = _both(t, values, rel.node, grad.node if grad else None, fits and not few)
    return (Lane(grad_in, rel.rows) if grad else None), Lane(rel_in, rel.rows)


def _both(t: Context, values: tuple[Any, ...], rel: fx.Node, grad: fx.Node | None, fits: bool) -> list[fx.Node]:
    """Both lanes through the layer, in reduced products where they are asked for and the layer's size suits them."""
    if not (t.products.relevance and fits):
        return t.emit.parts(t.emit.call(ops.zplus_linear, *values, rel, grad, t.rules), 2)
    x, weight, y, bias = values
    w, w_abs, scales = _reduced(t, weight, t.products.relevance)
    w_grad = weight if grad else None
    if grad and t.products.bf16_gradient:
        w_grad = w if t.products.relevance == "bfloat16" else _reduced(t, weight, "gradient")[0]
    call = t.emit.call(ops.zplus_linear_reduced, x, w, w_abs, scales, w_grad, y, bias, rel, grad)
    call.meta["purpose"] = t.products.relevance
    return t.emit.parts(call, 2)


def _reduced(t: Context, weight: fx.Node, purpose: str) -> list[fx.Node]:
    return t.emit.parts(t.emit.call(ops.reduced_weight, weight, purpose), 3)
