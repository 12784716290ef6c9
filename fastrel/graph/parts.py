"""What models compute in parts: a layer by columns of its weight, attention head by head."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from fastrel.graph import axes as axes_
from fastrel.graph.nodes import arguments, insert_like, is_view
from fastrel.graph.nodes import replace as replace_node
from fastrel.graph.patterns import IDENTITIES, is_softmax_over_keys, reads
from fastrel.graph.places import ZEROS

aten = torch.ops.aten

Labelled = Mapping[fx.Node, axes_.Axes]

#: Operators that return the parts of a value.
_CUTS = {aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.unbind.int}


@dataclass(frozen=True)
class _Sum:
    """u + … + Σ x_i W_iᵀ + b, with all W_i columns of one weight, or all x_i heads of one attention.

    `others`: u and what else is added; `inputs`, `weights`: x_i, and W_i as the model has it, and whether that is W_iᵀ [in_i, out];
    `bias`: the biases; `whole`: the weight, or what tells the attention.
    """

    whole: Any
    inputs: tuple[fx.Node, ...]
    weights: tuple[tuple[fx.Node, bool], ...]
    bias: tuple[fx.Node, ...] = ()
    others: tuple[fx.Node, ...] = ()

    def fits(self, other: _Sum) -> bool:
        """Whether the other one is of other columns of the same weight, and of other values."""
        places = {_place(w) for w, _ in self.weights}
        apart = places.isdisjoint(_place(w) for w, _ in other.weights)
        return self.whole == other.whole and apart and set(self.inputs).isdisjoint(other.inputs)


def layers_in_parts(graph: fx.Graph, axes: Labelled) -> bool:
    """x W[:, :n]ᵀ + y W[:, n:]ᵀ becomes [x, y] Wᵀ, one layer, and so do the output layers of heads; whether there was any."""
    known: dict[fx.Node, _Sum] = {}
    found = False
    for node in list(graph.nodes):
        if node not in axes:
            continue
        if node.target is not aten.add.Tensor:
            if (own := _layer(node, axes)) is not None:
                known[node] = own
            continue
        u, v = node.args
        if _is_constant(u, axes, known):
            u, v = v, u
        left, right = known.get(u), known.get(v)
        if left is not None and right is not None and left.fits(right) and not (left.others and right.others):
            whole = _Sum(
                left.whole,
                left.inputs + right.inputs,
                left.weights + right.weights,
                left.bias + right.bias,
                left.others + right.others,
            )
            with graph.inserting_before(node):
                result = _as_one(node, whole)
            replace_node(node, result)
            known[result] = whole
            found = True
        elif _is_constant(v, axes, known):
            if left is not None and (bias := _bias(v, node)) is not None:
                known[node] = replace(left, bias=left.bias + bias)
        elif right is not None and not right.others:
            known[node] = replace(right, others=(u,))
        elif left is not None and not left.others:
            known[node] = replace(left, others=(v,))
    return found


def _is_constant(x: Any, axes: Labelled, known: Mapping[fx.Node, _Sum]) -> bool:
    return not isinstance(x, fx.Node) or (x not in axes and x not in known)


def _layer(node: fx.Node, axes: Labelled) -> _Sum | None:
    """A layer whose weight is some columns of a larger one."""
    turned = node.target is aten.matmul.default
    bias: Any = None
    x: Any
    weight: Any
    if turned:
        x, weight = node.args
        if weight in axes or weight.meta["val"].dim() != 2:
            return None
    elif node.target is aten.linear.default:
        x, weight, bias = arguments(node, None, count=3)
    else:
        return None
    whole: Any = _cut_from(weight)
    part = weight.meta["val"]
    if whole.op == "call_function" or not is_columns(part.mT if turned else part, whole.meta["val"]):
        head = _head(x, axes)
        if head is None or x.meta["val"].dim() != 3:
            return None
        whole = head.attention(axes)
    return _Sum(whole, (x,), ((weight, turned),), () if bias is None else (bias,))


def is_columns(part: Tensor, whole: Tensor) -> bool:
    """Whether a weight [out, n] is a part of the inputs of a larger one, [out, in] or [in, out], or one of several, [h, ·, ·]."""
    if part.numel() >= whole.numel() or whole.dim() not in (2, 3):
        return False
    if whole.dim() == 3:
        return sorted(part.stride()) == sorted(whole.stride()[1:]) and part.numel() * whole.shape[0] == whole.numel()
    strides = whole.stride()
    return (part.stride() == strides and part.shape[0] == whole.shape[0]) or (
        part.stride() == strides[::-1] and part.shape[0] == whole.shape[1]
    )


def _cut_from(weight: Any) -> fx.Node:
    """The weight of which this one is a view."""
    while weight.op == "call_function" and (is_view(weight) or weight.target is operator.getitem or weight.target in _CUTS):
        weight = weight.args[0]
    return weight


def _place(weight: fx.Node) -> tuple[Any, ...]:
    """Which entries of which weight these are."""
    x = weight.meta["val"]
    return (_cut_from(weight), x.storage_offset(), tuple(x.shape), x.stride())


def _bias(x: Any, node: fx.Node) -> tuple[fx.Node, ...] | None:
    """A constant that is added as a bias; nothing where that is 0; None for others."""
    if not isinstance(x, fx.Node):
        return () if x == 0 else None
    if x.target in ZEROS:
        return ()
    return (x,) if x.meta["val"].shape == node.meta["val"].shape[-1:] else None


def _as_one(node: fx.Node, whole: _Sum) -> fx.Node:
    bias = None
    for x in whole.bias:
        bias = x if bias is None else insert_like(node, aten.add.Tensor, bias, x)
    joined = insert_like(node, aten.cat.default, list(whole.inputs), -1)
    parts = [insert_like(node, aten.transpose.int, w, 0, 1) if turned else w for w, turned in whole.weights]
    weight = insert_like(node, aten.cat.default, parts, 1)
    result = insert_like(node, aten.linear.default, joined, weight, *(() if bias is None else (bias,)))
    for x in whole.others:
        result = insert_like(node, aten.add.Tensor, x, result)
    return result


@dataclass(frozen=True)
class _Head:
    """A V of one head, [B, T, d], or [B, 1, T, d]: its map or queries and keys, its values, and what else it takes."""

    target: Any
    operands: tuple[fx.Node, ...]
    rest: tuple[Any, ...]
    options: tuple[tuple[str, Any], ...]

    def attention(self, axes: Labelled) -> tuple[Any, ...]:
        """What heads of one attention have in common: kind and sizes, and the one activation of which their values are made."""
        shapes = tuple(str(x.meta["val"].shape) for x in self.operands)
        return (self.target, self.rest, self.options, shapes, _origin(self.operands[-1], axes))


def heads_one_by_one(graph: fx.Graph, axes: Labelled) -> bool:
    """cat([A₁ V₁, A₂ V₂, …]) of heads that were computed one by one becomes A V of all heads; whether there was any."""
    found = False
    for node in list(graph.nodes):
        if node not in axes:
            continue
        parts, dim = _joined_parts(node)
        heads = [_head(x, axes) for x in parts]
        if len(parts) < 2 or not all(heads) or len({head.attention(axes) for head in heads if head}) > 1:
            continue
        ndim = parts[0].meta["val"].dim()
        stacked = node.target is aten.stack.default
        if dim != (ndim - 1 if ndim == 3 else 1) if not stacked else ndim != 3:
            continue
        with graph.inserting_before(node):
            result = _of_all(node, [head for head in heads if head], ndim)
            if not stacked and ndim == 3:
                result = insert_like(node, aten.transpose.int, result, 1, 2)
                result = insert_like(node, aten.flatten.using_ints, result, 2)
            elif stacked and dim != 1:
                order = [i for i in range(4) if i != 1]
                result = insert_like(node, aten.permute.default, result, [*order[:dim], 1, *order[dim:]])
        replace_node(node, result)
        found = True
    return found


def _joined_parts(node: fx.Node) -> tuple[list[fx.Node], int]:
    """What a value is joined of, and along which dimension: by cat, stack, or writing slices one after the other."""
    if node.target in (aten.cat.default, aten.stack.default):
        given, dim = arguments(node, 0, count=2)
        return list(given), dim % node.meta["val"].dim()
    parts: list[fx.Node] = []
    x: Any = node
    along, end = None, None
    while x.target is aten.slice_scatter.default:
        target, part, dim, start, stop, step = arguments(x, 0, None, None, 1, count=6)
        dim %= x.meta["val"].dim()
        size, start = x.meta["val"].shape[dim], start or 0
        stop = size if stop is None or stop > size else stop
        next_to = stop == (size if end is None else end) and along in (None, dim)
        if step != 1 or not all(isinstance(n, int) and n >= 0 for n in (size, start, stop)) or not next_to:
            return [], 0
        parts, along, end, x = [part, *parts], dim, start, target
    return (parts, along) if along is not None and end == 0 else ([], 0)


def _head(x: Any, axes: Labelled) -> _Head | None:
    while x.target in IDENTITIES and len(x.users) == 1:
        x = x.args[0]
    if len(x.users) != 1 or x not in axes or not _is_one_head(axes[x]):
        return None
    if x.target in (aten.matmul.default, aten.bmm.default):
        return _Head(x.target, x.args, (), ()) if is_softmax_over_keys(x.args[0]) else None
    if x.target is not aten.scaled_dot_product_attention.default:
        return None
    given = dict(x.kwargs)
    mask = given.get("attn_mask", x.args[3] if len(x.args) > 3 else None)
    if given.get("enable_gqa") or (mask is not None and mask.meta["val"].dim() != 2):
        return None
    return _Head(x.target, x.args[:3], x.args[3:], tuple(given.items()))


def _is_one_head(axes: axes_.Axes) -> bool:
    """[samples, tokens, features], or with a head of size 1 in between."""
    roles = [{role for _, role in axis} for axis in axes]
    return len(axes) in (3, 4) and roles[0] == {"batch"} and roles[1:-2] in ([], [set()]) and roles[-2] == {"token"}


def _origin(x: Any, axes: Labelled) -> Any:
    """What went into the layer that a value was cut out of."""
    while x in axes and x.op == "call_function":
        whole = [n for n in reads(x) if n in axes]
        if len(whole) != 1:
            return x
        if x.target in (aten.linear.default, aten.matmul.default, aten.addmm.default, aten.conv1d.default):
            return whole[0]
        if not (is_view(x) or x.target in IDENTITIES or x.target in (aten.add.Tensor, operator.getitem, *_CUTS)):
            return x
        x = whole[0]
    return x


def _of_all(node: fx.Node, heads: Sequence[_Head], ndim: int) -> fx.Node:
    """[B, h, T, d] of all heads."""

    def joined(values: Sequence[fx.Node]) -> fx.Node:
        if ndim == 3:
            values = [insert_like(node, aten.unsqueeze.default, x, 1) for x in values]
        return insert_like(node, aten.cat.default, list(values), 1)

    operands = [joined(values) for values in zip(*(head.operands for head in heads), strict=True)]
    first = heads[0]
    target: Callable[..., Any] = aten.matmul.default if first.target is aten.bmm.default else first.target
    result = insert_like(node, target, *operands, *first.rest)
    result.kwargs = dict(first.options)
    return result
