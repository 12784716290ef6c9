"""Attention without a softmax: products A·V with any map A over tokens, and linear attention q (kᵀ v), whose map q kᵀ is implied."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import fx

from fastrel.graph import axes as axes_
from fastrel.graph.nodes import arguments, insert_like, replace
from fastrel.graph.patterns import ARITHMETIC, IDENTITIES, is_softmax_over_keys, reads

aten = torch.ops.aten

Labelled = Mapping[fx.Node, axes_.Axes]

MATRIX_PRODUCTS = {aten.matmul.default, aten.bmm.default}
_TURNS = {aten.transpose.int, aten.permute.default}

#: Operators through which a value goes on entry by entry, or in sums of its entries by constant weights.
_LINEAR = {
    *IDENTITIES,
    *ARITHMETIC,
    *_TURNS,
    *axes_.RESHAPES,
    aten.linear.default,
    aten.expand.default,
    aten.slice.Tensor,
    aten.narrow.default,
    aten.select.int,
    aten.cat.default,
}


def holds_tokens(axis: axes_.Axis) -> bool:
    """Whether tokens lie along a dimension, with others or not."""
    return any(role == "token" for _, role in axis)


def is_map_value(node: fx.Node, axes: Labelled) -> bool:
    """Whether a product of two activations is A·V: [*, Tq, Tk] over tokens on both sides (one query may be all) times [*, Tk, d]."""
    if (pair := _operands(node, axes)) is None:
        return False
    a, v = pair
    over = (
        (holds_tokens(a[-2]) or _is_one(a[-2])) and holds_tokens(a[-1]) and holds_tokens(v[-2]) and not holds_tokens(v[-1])
    )
    return over and not is_product_of_maps(node.args[0], axes)


def _is_one(axis: axes_.Axis) -> bool:
    """Whether a dimension is of one query."""
    return axes_.size_of(axis) == 1 and all(role != "feature" for _, role in axis)


def is_product_of_maps(x: Any, axes: Labelled) -> bool:
    """Whether a map is one over some tokens times one from these to others, as in Nyström's approximation."""
    while x.target in IDENTITIES:
        x = x.args[0]
    pair = _operands(x, axes)
    return pair is not None and all(holds_tokens(axis) for one in pair for axis in one[-2:])


def is_value_map(v: fx.Node, turned: fx.Node, axes: Labelled) -> bool:
    """Whether a product is V·Aᵀ: [*, d, Tk] times [*, Tk, Tq] (one query may be all)."""
    of_v, of_map = axes.get(v, ()), axes.get(turned, ())
    if len(of_v) < 2 or len(of_map) < 2 or holds_tokens(of_v[-2]) or not holds_tokens(of_v[-1]):
        return False
    return holds_tokens(of_map[-2]) and (holds_tokens(of_map[-1]) or _is_one(of_map[-1]))


def contracts_tokens(node: fx.Node, axes: Labelled) -> bool:
    """Whether a product of two activations is kᵀ v: [*, d, T] times [*, T, e], which holds no tokens any more."""
    if (pair := _operands(node, axes)) is None:
        return False
    k, v = pair
    over = holds_tokens(k[-1]) and holds_tokens(v[-2])
    return over and not holds_tokens(k[-2]) and axes_.size_of(k[-2]) > 1 and not holds_tokens(v[-1])


def _operands(node: fx.Node, axes: Labelled) -> tuple[axes_.Axes, axes_.Axes] | None:
    if node.target not in MATRIX_PRODUCTS:
        return None
    a, b = (axes.get(x, ()) for x in node.args)  # type: ignore[arg-type]
    return (a, b) if len(a) > 1 and len(b) > 1 else None


def brought_back(node: fx.Node, axes: Labelled) -> fx.Node | None:
    """The product kᵀ v over tokens of which one operand of a product is made linearly, when the other holds tokens along a dimension
    that the product keeps, or the running sum over tokens of which one is made; None where there is none."""
    if (pair := _operands(node, axes)) is None:
        return None
    (a, b), (of_a, of_b) = node.args, pair
    for x, kept, summed in ((b, of_a[-2], of_a[-1]), (a, of_b[-1], of_b[-2])):
        brings = holds_tokens(kept) and not holds_tokens(summed)
        for found in _linearly_made_of(x, axes):
            if (brings and contracts_tokens(found, axes)) or _runs_over_tokens(found, axes):
                return found
    return None


def _linearly_made_of(x: Any, axes: Labelled) -> Iterator[fx.Node]:
    """A value, what it is made of linearly, and what this is made of, as far as it is linear."""
    seen, todo = {x}, [x]
    while todo:
        node: fx.Node = todo.pop()
        yield node
        new = [y for y in reads(node) if y in axes and y not in seen] if node.target in _LINEAR else []
        if node.target in ARITHMETIC and len(new) > 1 and any(map(holds_tokens, axes[node])):
            new = []  # a residual sum: what it holds is the stream's
        if new:
            seen.update(new)
            todo += new


def _runs_over_tokens(node: fx.Node, axes: Labelled) -> bool:
    """Whether a value is a running sum over tokens of products k ⊗ v of two activations."""
    whole = axes.get(node.args[0]) if node.target is aten.cumsum.default else None  # type: ignore[arg-type]
    if whole is None or not holds_tokens(whole[node.args[1]]):  # type: ignore[index]
        return False
    summed: Any = _base(node.args[0])
    return summed.target in {*MATRIX_PRODUCTS, aten.mul.Tensor} and all(
        isinstance(x, fx.Node) and x in axes for x in summed.args[:2]
    )


def linear_attention(graph: fx.Graph, axes: Labelled) -> bool:
    """q (kᵀ v) becomes (q kᵀ) v, and (vᵀ k) qᵀ becomes vᵀ (k qᵀ): the map over tokens is formed; whether there was any."""
    found = False
    for node in list(graph.nodes):
        if (pair := _operands(node, axes)) is None:
            continue
        a, b = node.args
        of_a, of_b = pair
        with graph.inserting_before(node):
            insert = partial(insert_like, node, aten.matmul.default)
            result: fx.Node | None = None
            if holds_tokens(of_a[-2]) and not holds_tokens(of_a[-1]) and (parts := _factors(node, b, axes)):
                k, v, scaled = parts
                result = insert(scaled(insert(a, k)), v)
            elif holds_tokens(of_b[-1]) and not holds_tokens(of_b[-2]) and (parts := _factors(node, a, axes)):
                v, k, scaled = parts
                b, k = (insert_like(node, aten.transpose.int, x, -2, -1) for x in (b, k))
                result = insert(v, insert_like(node, aten.transpose.int, scaled(insert(b, k)), -2, -1))
        if result is not None:
            replace(node, result)
            found = True
    return found


def _factors(node: fx.Node, x: Any, axes: Labelled) -> tuple[fx.Node, fx.Node, Callable[[fx.Node], fx.Node]] | None:
    """k, v and what scales their product k v over tokens to make x, an operand of `node`; None where x is none."""
    insert = partial(insert_like, node)
    scales: list[tuple[Any, Any]] = []
    spread: list[int] = []
    turned = False
    while x in axes and not contracts_tokens(x, axes):
        ndim = x.meta["val"].dim()
        if x.target is aten.transpose.int and {dim % ndim for dim in x.args[1:]} == {ndim - 2, ndim - 1}:
            turned = not turned
        elif x.target is aten.unsqueeze.default and x.args[1] % ndim < ndim - 2:
            spread.append(x.args[1] % ndim)
        elif x.target in ARITHMETIC and (scale := _scale(x, axes)) is not None:
            scales.append(scale)
            x = next(y for y in x.args if y in axes)
            continue
        elif x.target not in IDENTITIES:
            return None
        x = x.args[0]
    if x not in axes:
        return None
    k, v = x.args
    if turned:
        k, v = (insert(aten.transpose.int, y, -2, -1) for y in (v, k))
    for dim in reversed(spread):
        k, v = (insert(aten.unsqueeze.default, y, dim) for y in (k, v))

    def scaled(scores: fx.Node) -> fx.Node:
        for target, factor in reversed(scales):
            scores = insert(target, scores, factor)
        return scores

    return k, v, scaled


def _scale(x: fx.Node, axes: Labelled) -> tuple[Any, Any] | None:
    """The operator and the constant by which a product was scaled as a whole, or head by head."""
    if x.target not in (aten.mul.Tensor, aten.div.Tensor, aten.mul.Scalar, aten.div.Scalar) or x.kwargs:
        return None
    left, right = x.args
    if right in axes and x.target is aten.mul.Tensor:
        left, right = right, left
    if right in axes or left not in axes:
        return None
    value = right.meta["val"] if isinstance(right, fx.Node) else None
    sizes = value.shape[-2:] if isinstance(value, torch.Tensor) else ()
    return (x.target, right) if all(isinstance(n, int) and n == 1 for n in sizes) else None


def ones_beside_values(graph: fx.Graph, axes: Labelled) -> bool:
    """Of A [v, 1] the columns A v and the last, which is the sum over keys, apart; whether there was any."""
    found = False
    for node in list(graph.nodes):
        if node.target is not aten.slice.Tensor or node not in axes:
            continue
        product, order = _unmoved(node.args[0])
        if not is_map_value(product, axes) or (values := _without_ones(product.args[1], axes)) is None:
            continue
        ndim, width = len(order), product.meta["val"].shape[-1]
        _, dim, start, stop, step = arguments(node, 0, None, None, 1, count=5)
        if order[dim % ndim] != ndim - 1 or not isinstance(width, int):
            continue
        columns = range(width)[slice(start, stop, step)]
        with graph.inserting_before(node):
            insert = partial(insert_like, node)
            if columns == range(width - 1):
                part = insert(product.target, product.args[0], values)
            elif columns == range(width - 1, width):
                part = insert(aten.sum.dim_IntList, product.args[0], [-1], True)
            else:
                continue
            result = part if order == sorted(order) else insert(aten.permute.default, part, order)
        replace(node, result)
        found = True
    return found


def _without_ones(x: Any, axes: Labelled) -> fx.Node | None:
    """v of a value [v, 1]."""
    x, order = _unmoved(x)
    if order != sorted(order):
        return None
    if x.target in (aten.pad.default, aten.constant_pad_nd.default):
        value = x.args[-1] if len(x.args) == (4 if x.target is aten.pad.default else 3) else 0
        return x.args[0] if list(x.args[1]) == [0, 1] and value == 1 else None
    if x.target is aten.cat.default and len(x.args[0]) == 2:
        v, one = x.args[0]
        last = x.args[1:] and x.args[1] in (-1, x.meta["val"].dim() - 1)
        of_ones = one.target in (aten.ones_like.default, aten.new_ones.default, aten.ones.default)
        return v if last and of_ones and v in axes and one.meta["val"].shape[-1] == 1 else None
    return None


def normalised_afterwards(graph: fx.Graph, axes: Labelled) -> bool:
    """(A v) / c with c of queries and keys, one for each query, becomes (A / c) v: A as it is normalised; whether there was any."""
    found = False
    for node in list(graph.nodes):
        for mixed, c in _quotients(node):
            if mixed not in axes or c not in axes:
                continue
            product, order = _unmoved(mixed)
            if not is_map_value(product, axes) or is_softmax_over_keys(product.args[0]):
                continue
            attn, values = product.args
            if len(axes[c]) != len(order) or not _normalises(c, product, axes):
                continue
            back = [order.index(i) for i in range(len(order))]
            if c.meta["val"].shape[order.index(len(order) - 1)] != 1:
                continue
            with graph.inserting_before(node):
                insert = partial(insert_like, node)
                by = c if back == sorted(back) else insert(aten.permute.default, c, back)
                by = by if node.target is aten.div.Tensor else insert(aten.reciprocal.default, by)
                result = insert(product.target, insert(aten.div.Tensor, attn, by), values)
                result = result if order == sorted(order) else insert(aten.permute.default, result, order)
            replace(node, result)
            found = True
            break
    return found


def _quotients(node: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
    if node.target in (aten.div.Tensor, aten.mul.Tensor) and all(isinstance(x, fx.Node) for x in node.args):
        yield node.args[:2]  # type: ignore[misc]
        if node.target is aten.mul.Tensor:
            yield node.args[1::-1]  # type: ignore[misc]


def _unmoved(x: Any) -> tuple[fx.Node, list[int]]:
    """What a value is a permutation of, and where its dimensions are there."""
    order = list(range(x.meta["val"].dim()))
    while x.target in IDENTITIES or x.target in _TURNS or _is_whole(x):
        if x.target in _TURNS:
            ndim = len(order)
            moved = list(range(ndim))
            if x.target is aten.permute.default:
                moved = [dim % ndim for dim in x.args[1]]
            else:
                i, j = (dim % ndim for dim in x.args[1:])
                moved[i], moved[j] = j, i
            order = [moved[dim] for dim in order]
        x = x.args[0]
    return x, order


def _is_whole(x: fx.Node) -> bool:
    """Whether a value is all of another, `x[:]`."""
    if x.target is not aten.slice.Tensor:
        return False
    whole: Any = x.args[0]
    return str(x.meta["val"].shape) == str(whole.meta["val"].shape)


def _normalises(c: fx.Node, product: fx.Node, axes: Labelled) -> bool:
    """Whether a value is made of the map A of a product A v, or of all that A's scores are made of, and not of v."""
    attn, values = product.args
    scores: Any = attn
    while scores.target not in MATRIX_PRODUCTS:
        sources = [x for x in reads(scores) if x in axes] if scores.target in _LINEAR else []
        if len(sources) != 1:
            break
        scores = sources[0]
    made_of = _upstream(c, axes)
    if product in made_of or values in made_of:
        return False
    pair = [_base(x) for x in scores.args] if scores.target in MATRIX_PRODUCTS else [attn]
    return attn in made_of or scores in made_of or all(x in made_of for x in pair)


def _base(x: Any) -> Any:
    while x.target in IDENTITIES or x.target in _TURNS or x.target in axes_.RESHAPES:
        x = x.args[0]
    return x


def _upstream(x: fx.Node, axes: Labelled) -> set[fx.Node]:
    seen, todo = {x}, [x]
    while todo:
        new = [y for y in reads(todo.pop()) if y in axes and y not in seen]
        seen.update(new)
        todo += new
    return seen
