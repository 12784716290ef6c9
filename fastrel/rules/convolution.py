"""Convolutions and pooling: the patch embedding that reads the image, convolutional stems, patch merging."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from fastrel.errors import UnsupportedModelError
from fastrel.graph import axes as axes_
from fastrel.graph.nodes import arguments, describe
from fastrel.reference.convolution import convolution as conv_relevance
from fastrel.reference.convolution import pixel_convolution, transposed_convolution
from fastrel.reference.operators import pooling as pool_relevance
from fastrel.reference.pooling import evidence_of_windows
from fastrel.rules.generic import divided_row, vjp
from fastrel.rules.reduce import pooled_evidence
from fastrel.rules.registry import rule
from fastrel.transform.context import Context
from fastrel.transform.lanes import Lane, Lanes

aten = torch.ops.aten


_TURNED = (aten.conv_transpose1d.default, aten.conv_transpose2d.input)


@rule(aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, *_TURNED)
def convolution(t: Context, node: fx.Node, out: Lanes) -> None:
    """A linear layer over windows of tokens: eq. (5), and z^B for the first one, which reads the image itself."""
    one = [1] * (node.meta["val"].dim() - 2)
    none = [0] * len(one)
    turned = node.target in _TURNED
    if turned:  # stride, padding, output padding, groups, dilation
        x, weight, _, *options = arguments(node, None, one, none, none, 1, one, count=8)
    else:  # stride, padding, dilation, groups
        x, weight, _, *options = arguments(node, None, one, none, one, 1, count=7)
    pixels = t.facts.enters(x)
    plain = (
        len(one) == 2
        and not turned
        and not any(_numbers(options[1]))
        and set(_numbers(options[2])) == {1}
        and options[3] == 1
    )
    grad = rel = row = None
    if t.wants(x):
        value, kernel = t.value(x), t.value(weight)
        args = (value, kernel, None, *options)
        if out.grad:
            grad = Lane(t.emit.call(vjp, node.target, t.dense(out.grad, node).node, 0, None, (), *args))
        if out.rel and pixels and not plain:
            raise UnsupportedModelError(f"no pixel rule for {describe(node)}, which overlaps, pads, groups or reads films")
        if out.rel and pixels:
            rel = Lane(t.emit.call(pixel_convolution, value, kernel, t.dense(out.rel, node).node, _numbers(options[0])))
        elif out.rel:
            dense = t.dense(out.rel, node).node
            formula = transposed_convolution if turned else conv_relevance
            rel = Lane(t.emit.call(formula, value, kernel, dense, t.rules, *options))
    if out.row:
        channels = t.axes(x)[1]
        if options[3] == 1 and not pixels and channels and all(role == "token" for _, role in channels):
            raise UnsupportedModelError(
                f"{describe(node)} mixes tokens, which lie along its channels; write it as a linear layer"
            )
        sizes, window = list(t.shape(x)), list(weight.meta["val"].shape[2:])
        for dim, size in enumerate(window, 2):  # features that stay what they are are one number of a row
            sizes[dim] = t.row_shape(x)[dim] if size == 1 else sizes[dim]
        row = out.row.map(lambda lane: _row_back(t, node, lane, sizes, window, options))
    t.give(x, grad, rel, row)


def _numbers(option: Any) -> list[int]:
    return list(option) if isinstance(option, (list, tuple)) else [option]


def _row_back(t: Context, node: fx.Node, lane: Lane, sizes: Any, window: list[int], options: Any) -> Lane:
    dense = t.dense(lane, node, is_row=True).node
    return Lane(t.emit.call(spread_windows, node.target, dense, [sizes[0], 1, *sizes[2:]], window, *options))


def spread_windows(op: Any, row: Tensor, shape: list[int], window: list[int], *options: Any) -> Tensor:
    """A row [K, B, 1, *tokens] in equal parts over the tokens that each token was made of; options as of `op`."""
    kernel, ones = row.new_ones(1, 1, *window), row.new_ones(shape)
    ungrouped = (*options[:3], 1, *options[4:])
    return vjp(op, row / op(ones, kernel, None, *ungrouped), 0, None, (), ones, kernel, None, *ungrouped)


#: Sums of tokens by the same weights ≥ 0 for every sample and feature.
_WINDOWS = {
    aten.avg_pool1d.default,
    aten.avg_pool2d.default,
    aten.avg_pool3d.default,
    aten.adaptive_avg_pool2d.default,
    aten.adaptive_avg_pool3d.default,
    aten.adaptive_avg_pool1d.default,
    aten.cumsum.default,
}


@rule(
    *_WINDOWS,
    aten.upsample_bilinear2d.vec,
    aten.upsample_bicubic2d.vec,
    aten.upsample_nearest2d.vec,
    aten.upsample_nearest1d.vec,
    aten.upsample_linear1d.vec,
    aten.col2im.default,
)
def pooling(t: Context, node: fx.Node, out: Lanes) -> None:
    """Averages over windows, windows added up, running sums: relevance by share among what has the result's sign, as in a mean.

    A row goes to the tokens of each window by evidence where the method says so, else by their weights.
    """
    x, *options = arguments(node, count=len(node.args))
    kwargs = tuple(node.kwargs.items())
    grad = rel = row = None
    if t.wants(x):
        value = t.value(x)
        if out.grad:
            grad = Lane(t.emit.call(vjp, node.target, t.dense(out.grad, node).node, 0, None, kwargs, value, *options))
        if out.rel:
            dense = t.dense(out.rel, node).node
            rel = Lane(t.emit.call(window_shares, node.target, dense, value, kwargs, *options))
    if out.row:
        row = out.row.map(_way_back(t, node, x, out, grad, rel))
    t.give(x, grad, rel, row)


def _way_back(
    t: Context, node: fx.Node, x: fx.Node, out: Lanes, grad: Lane | None, rel: Lane | None
) -> Callable[[Lane], Lane]:
    """What moves a row of a pooling to x, whose lanes are given: by evidence where the method says so, else by weights."""
    options, kwargs = node.args[1:], tuple(node.kwargs.items())
    over = [dim for dim in _pooled(node, x) if not _is_left_alone(t, node, x, dim)]
    features = [dim for dim in t.features(x) if dim not in over]
    # The entries of a window lie with the features, among which a row that has their full number is divided.
    windows = node.target is aten.col2im.default
    sizes, full = t.shape(x) if windows else t.row_shape(x), t.shape(node) if windows else ()

    def by_weight(lane: Lane) -> Lane:
        dense = t.dense(lane, node, is_row=True).node
        dense = t.emit.call(divided_row, dense, *full) if windows else dense
        return Lane(t.emit.call(pool_row, node.target, dense, list(sizes), kwargs, *options))

    if not windows and all(node.meta["val"].shape[dim] == 1 for dim in over):  # all tokens at once, as a mean
        shares = pooled_evidence(t, x, grad, rel, over)
        if shares:
            return lambda lane: Lane(t.emit.call(torch.mul, t.dense(lane, node, is_row=True).node, shares))
        return by_weight
    of_features = any(axes_.is_feature(t.axes(x)[dim]) and t.axes(x)[dim] for dim in over)
    if not (t.method.evidence and grad and rel) or node.target not in _WINDOWS or 0 in over or of_features:
        return by_weight
    lanes = [t.dense(lane, node).node for lane in (out.grad, out.rel) if lane]

    def by_evidence(lane: Lane) -> Lane:
        dense = t.dense(lane, node, is_row=True).node
        given = (dense, t.value(x), *lanes, over, features, kwargs, *options)
        return Lane(t.emit.call(row_by_evidence, node.target, *given))

    return by_evidence


def _pooled(node: fx.Node, x: fx.Node) -> list[int]:
    """The dimensions of x that a pooling is over."""
    ndim = x.meta["val"].dim()
    if node.target is aten.cumsum.default:
        return [node.args[1] % ndim]
    return list(range(2, ndim))


def _is_left_alone(t: Context, node: fx.Node, x: fx.Node, dim: int) -> bool:
    """Whether features lie in a dimension of which each window holds one."""
    if dim < 2 or not axes_.is_feature(t.axes(x)[dim]) or not t.axes(x)[dim]:
        return False
    size: Any = node.args[1]
    if node.target in (aten.avg_pool2d.default, aten.avg_pool3d.default):
        return [size, *[size] * dim][dim - 2] == 1 if isinstance(size, int) else size[(dim - 2) % len(size)] == 1
    adaptive = node.target in (aten.adaptive_avg_pool2d.default, aten.adaptive_avg_pool3d.default)
    return adaptive and str(node.meta["val"].shape[dim]) == str(x.meta["val"].shape[dim])


def row_by_evidence(
    op: Any,
    row: Tensor,
    x: Tensor,
    grad: Tensor,
    rel: Tensor,
    over: list[int],
    features: list[int],
    kwargs: Any,
    *options: Any,
) -> Tensor:
    """A row by what each token of a window has of it."""
    return evidence_of_windows(lambda part: op(part, *options, **dict(kwargs)), x, grad, rel, row, over, features)


def pool_row(op: Any, row: Tensor, shape: list[int], kwargs: Any, *options: Any) -> Tensor:
    """A row in equal parts over the tokens of each window."""
    ones = row.new_ones(shape)
    return vjp(op, row / op(ones, *options, **dict(kwargs)), 0, None, kwargs, ones, *options)


def window_shares(op: Any, rel: Tensor, x: Tensor, kwargs: Any, *options: Any) -> Tensor:
    """Relevance [K, *in] by `reference.operators.pooling`, of rel [K, *out]."""
    return pool_relevance(lambda part: op(part, *options, **dict(kwargs)), x, rel)
