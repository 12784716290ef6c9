"""Normalisation layers pass relevance unchanged."""

from typing import Any

import torch
from torch import Tensor, fx

from fastrel import ops
from fastrel.graph.nodes import arguments
from fastrel.rules.generic import vjp
from fastrel.rules.registry import rule
from fastrel.transform.context import Context
from fastrel.transform.lanes import Lane, Lanes

aten = torch.ops.aten


@rule(aten.layer_norm.default)
def layer_norm(t: Context, node: fx.Node, out: Lanes) -> None:
    """Identity for relevance; the ordinary gradient, or AttnLRP's."""
    x, shape, weight, _, eps = arguments(node, None, None, 1e-5, count=5)
    dims = len(shape)

    def grad(lane: Lane) -> Lane:
        normalized_from = x.meta["val"].dim() - dims
        if lane.rows and lane.rows.dim >= normalized_from:
            lane = t.dense(lane, node)
        scale = None if weight is None else t.value(weight)
        value = t.value(x, lane.rows)
        return Lane(t.emit.call(ops.layer_norm_backward, lane.node, value, scale, dims, eps, t.method.attnlrp), lane.rows)

    t.pass_through(x, out, grad)


@rule(aten.batch_norm.default, aten._native_batch_norm_legit_no_training.default)
def batch_norm(t: Context, node: fx.Node, out: Lanes) -> None:
    """Identity for relevance; at inference an affine function of each feature."""
    x, weight, _, _, variance, *rest = arguments(node, count=len(node.args))
    eps = rest[2] if node.target is aten.batch_norm.default else rest[1]  # after (training and) momentum
    gamma = None if weight is None else t.value(weight)

    def grad(lane: Lane) -> Lane:
        return Lane(t.emit.call(batch_norm_backward, t.dense(lane, node).node, gamma, t.value(variance), eps))

    t.pass_through(x, out, grad)


def batch_norm_backward(grad: Tensor, weight: Tensor | None, variance: Tensor, eps: float) -> Tensor:
    """grad [K, B, C, ...] times weight / sqrt(variance + eps) of its feature."""
    scale = (variance + eps).rsqrt() if weight is None else weight * (variance + eps).rsqrt()
    return grad * scale.to(grad.dtype).reshape(1, 1, -1, *(1,) * (grad.dim() - 3))


@rule(aten.group_norm.default, aten.rms_norm.default, aten.instance_norm.default, aten.prelu.default)
def other_norm(t: Context, node: fx.Node, out: Lanes) -> None:
    """Identity for relevance (also PReLU, whose slope is learned); the ordinary gradient."""
    x: Any = node.args[0]
    values: Any = fx.map_arg(node.args, t.value)

    def grad(lane: Lane) -> Lane:
        if t.method.attnlrp and node.target is aten.rms_norm.default:
            _, shape, weight, eps = arguments(node, None, None, count=4)
            eps = torch.finfo(x.meta["val"].dtype).eps if eps is None else eps
            scale = None if weight is None else t.value(weight)
            dense = t.dense(lane, node).node
            return Lane(t.emit.call(frozen_rms_norm_backward, dense, t.value(x), scale, len(shape), eps))
        if t.method.attnlrp and node.target is aten.group_norm.default:
            _, groups, weight, _, eps, _ = arguments(node, None, None, 1e-5, True, count=6)
            scale = None if weight is None else t.value(weight)
            parts = t.emit.call(torch.unflatten, t.value(x), 1, [groups, -1])
            grouped = t.emit.call(by_group, t.dense(lane, node).node, groups, scale)
            dims = x.meta["val"].dim() - 1
            through = t.emit.call(ops.layer_norm_backward, grouped, parts, None, dims, eps, True)
            return Lane(t.emit.call(torch.flatten, through, 2, 3))
        return Lane(t.emit.call(vjp, node.target, t.dense(lane, node).node, 0, None, tuple(node.kwargs.items()), *values))

    t.pass_through(x, out, grad)


def by_group(grad: Tensor, groups: int, weight: Tensor | None) -> Tensor:
    """grad [K, B, C, *] times the weight of its channel, [K, B, groups, C / groups, *]."""
    scaled = grad if weight is None else grad * weight.reshape(-1, *(1,) * (grad.dim() - 3))
    return scaled.unflatten(2, (groups, -1))


def frozen_rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor | None, dims: int, eps: float) -> Tensor:
    """AttnLRP's rule: the gradient with the root mean square taken as a constant."""
    scale = (x.square().mean(tuple(range(-dims, 0)), keepdim=True) + eps).rsqrt()
    return grad * (scale if weight is None else scale * weight)
