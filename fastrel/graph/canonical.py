"""Canonical graphs: models that spell one thing in several ways become alike, so that rules need to know only one.

Each rewrite is done once, right after capture; what the model returns stays what it returns.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fastrel.graph import axes as axes_
from fastrel.graph import mixing, parts, poolings
from fastrel.graph.gates import gates_as_weights
from fastrel.graph.nodes import arguments, insert_call, insert_like, replace
from fastrel.graph.patterns import IDENTITIES, is_attention_value, is_softmax_over_keys
from fastrel.graph.queries import learned_queries
from fastrel.graph.softmax import softmax_of
from fastrel.graph.spellings import spell_out

aten = torch.ops.aten

Labelled = dict[fx.Node, axes_.Axes]
Rewrite = Callable[[fx.Graph, Labelled], bool]

#: In the order in which they are applied.
REWRITES: list[Rewrite] = []


def rewrite(function: Rewrite) -> Rewrite:
    """Register a rewrite of a graph, given the axes of its values; it returns whether it changed anything."""
    REWRITES.append(function)
    return function


def canonicalise(graph: fx.Graph, axes: Callable[[], Labelled]) -> None:
    """Apply all rewrites to a graph; `axes()` labels it as it is then."""
    found = axes()
    for one in REWRITES:
        if one(graph, found):
            graph.eliminate_dead_code()  # what only a replaced node read
            found = axes()


@rewrite
def joined_with_nothing(graph: fx.Graph, axes: Labelled) -> bool:
    """cat([empty, x]) is x (a cache of keys that holds none yet); whether there was any."""
    found = False
    for node in list(graph.nodes):
        if node.target is not aten.cat.default:
            continue
        dim = node.args[1] if len(node.args) > 1 else 0
        parts = [x for x in node.args[0] if not _is_empty(x, dim)]
        if len(parts) == 1 and len(node.args[0]) > 1 and parts[0].meta["val"].dtype == node.meta["val"].dtype:
            with graph.inserting_before(node):  # in the layout that the model's own has
                only = insert_call(graph, aten.contiguous.default, parts[0])
            replace(node, only)
            found = True
    return found


def _is_empty(x: fx.Node, dim: int) -> bool:
    shape = x.meta["val"].shape
    return shape == (0,) or (bool(shape) and isinstance(shape[dim], int) and shape[dim] == 0)


@rewrite
def computed_once(graph: fx.Graph, axes: Labelled) -> bool:
    """A layer that a model computes twice of one value (w(x) · σ(w(x))) becomes one; whether there was any."""
    first: dict[Any, fx.Node] = {}
    found = False
    for node in list(graph.nodes):
        if node.target not in (aten.linear.default, aten.addmm.default):
            continue
        before = first.setdefault((node.target, node.args, *node.kwargs.items()), node)
        if before is not node:
            replace(node, before)
            found = True
    return found


@rewrite
def looked_up(graph: fx.Graph, axes: Labelled) -> bool:
    """table[ids], table.index_select(0, ids) and one_hot(ids) @ table become embeddings; whether there was any."""
    found = False
    for node in list(graph.nodes):
        table, ids = _look_up(node)
        if ids is None or table in axes or table.meta["val"].dim() != 2 or not table.meta["val"].is_floating_point():
            continue
        if not ids.meta["val"].dim() or _is_of_experts(node, ids, axes):
            continue
        with graph.inserting_before(node):
            if node.target is aten.index.Tensor:  # −1 is the last row; an embedding has none
                ids = insert_call(graph, aten.remainder.Scalar, ids, table.meta["val"].shape[0])
            inner = ids.args[0] if ids.target in axes_.RESHAPES and ids.meta["val"].dim() == 1 else ids
            result = insert_like(node, aten.embedding.default, table, inner)
            if inner is not ids:  # the tokens of all samples in one dimension
                result = insert_call(graph, aten.flatten.using_ints, result, 0, inner.meta["val"].dim() - 1)
        replace(node, result)
        found = True
    return found


def _is_of_experts(looked_up: fx.Node, ids: fx.Node, axes: Labelled) -> bool:
    """Whether a look-up is what a chosen expert adds to its tokens: its indices are chosen by values, and others it is added to."""
    if not all(user.target in (aten.add.Tensor, aten.mul.Tensor) for user in looked_up.users):
        return False
    if any(x not in axes for user in looked_up.users for x in user.args if x is not looked_up):
        return False
    return _comes_from(ids, axes)


def _comes_from(x: fx.Node, axes: Labelled) -> bool:
    """Whether a value that is no activation is made of some, not of their sizes alone."""
    seen, todo = {x}, [x]
    while todo:
        new = {x for x in todo.pop().all_input_nodes if isinstance(x.meta.get("val"), (Tensor, tuple, list))} - seen
        if any(x in axes for x in new):
            return True
        seen |= new
        todo += new
    return False


def _look_up(node: fx.Node) -> tuple[Any, Any]:
    """The table and the indices of a look-up in another spelling; (None, None) for anything else."""
    if node.target is aten.index.Tensor and len(node.args[1]) == 1:  # type: ignore[arg-type]
        table, ids = node.args[0], node.args[1][0]  # type: ignore[index]
    elif node.target is aten.index_select.default and node.args[1] == 0:
        table, _, ids = node.args
    elif node.target in (aten.matmul.default, aten.linear.default) and len(node.args) == 2:
        ids, table = node.args
        while isinstance(ids, fx.Node) and (ids.target in IDENTITIES or ids.target is aten.one_hot.default):
            if ids.target is aten.one_hot.default:
                return (table, ids.args[0]) if node.target is aten.matmul.default else (None, None)
            ids = ids.args[0]
        return None, None
    else:
        return None, None
    whole = isinstance(ids, fx.Node) and ids.meta["val"].dtype in (torch.int32, torch.int64)
    return (table, ids) if whole and isinstance(table, fx.Node) else (None, None)


@rewrite
def spelled_out(graph: fx.Graph, axes: Labelled) -> bool:
    """Operators that are others in one word become these; whether there was any."""
    return spell_out(graph, axes.__contains__)


rewrite(poolings.pooled_in_parts)
rewrite(poolings.picked_by_index)
rewrite(poolings.one_column_over_tokens)


@rewrite
def pairs_as_complex_numbers(graph: fx.Graph, axes: Labelled) -> bool:
    """Pairs (a, b) turned by a constant c as view_as_real(view_as_complex(·) · c), as in rotary positions: the same in real numbers;
    whether there was any."""
    found = False
    for node in list(graph.nodes):
        if node.target is not aten.view_as_real.default or node.args[0].target is not aten.mul.Tensor:
            continue
        for whole, factor in (node.args[0].args[:2], node.args[0].args[1::-1]):
            if getattr(whole, "target", None) is not aten.view_as_complex.default or whole.args[0] not in axes:
                continue
            if not isinstance(factor, fx.Node) or not factor.meta["val"].is_complex() or _comes_from(factor, axes):
                continue
            insert = functools.partial(insert_like, node)
            with graph.inserting_before(node):
                turn = insert(aten.view_as_real.default, insert(aten.resolve_conj.default, factor))
                (a, b), (c, d) = ([insert(aten.select.int, x, -1, i) for i in (0, 1)] for x in (whole.args[0], turn))
                products = [insert(aten.mul.Tensor, x, y) for x, y in ((a, c), (b, d), (a, d), (b, c))]
                real = insert(aten.sub.Tensor, *products[:2])
                imaginary = insert(aten.add.Tensor, *products[2:])
                turned = insert(aten.stack.default, [real, imaginary], -1)
            replace(node, turned)
            found = True
            break
    return found


@rewrite
def softmax_written_out(graph: fx.Graph, axes: Labelled) -> bool:
    """exp(x) / Σ exp(x), also divided after the product with values, becomes softmax(x); whether there was any."""
    found = False
    for node in list(graph.nodes):
        if node not in axes:
            continue
        with graph.inserting_before(node):
            result = softmax_of(node, functools.partial(insert_like, node))
        if result is not None:
            replace(node, result)
            found = True
    return found


@rewrite
def sums_of_a_stack(graph: fx.Graph, axes: Labelled) -> bool:
    """stack([u, v, …], d).sum(d) becomes u + v + …, and a mean that divided by their number; whether there was any."""
    found = False
    for node in list(graph.nodes):
        if node.target not in (aten.sum.dim_IntList, aten.mean.dim) or node not in axes or len(node.args) > 2:
            continue
        stacked: Any = node.args[0]
        if stacked.target is not aten.stack.default:
            continue
        parts, dim = arguments(stacked, 0, count=2)
        over: Any = node.args[1]
        ndim = stacked.meta["val"].dim()
        if len(over) != 1 or over[0] % ndim != dim % ndim or stacked not in axes:
            continue
        if {role for _, role in axes[stacked][dim]} != {"feature"}:
            continue  # tokens one by one
        with graph.inserting_before(node):
            total = parts[0]
            for part in parts[1:]:
                total = insert_like(node, aten.add.Tensor, total, part)
            if node.target is aten.mean.dim:
                total = insert_like(node, aten.div.Tensor, total, len(parts))
        replace(node, total)
        found = True
    return found


rewrite(parts.layers_in_parts)


@rewrite
def softmax_over_the_last(graph: fx.Graph, axes: Labelled) -> bool:
    """softmax(x, 1)ᵀ becomes softmax(xᵀ, -1), a map with its keys where maps have them; whether there was any."""
    found = False
    for node in list(graph.nodes):
        if node.target not in (aten.transpose.int, aten.permute.default) or node.args[0] not in axes:
            continue
        attn, ndim = node.args[0], node.meta["val"].dim()
        if attn.target is not aten.softmax.int or (dim := attn.args[1] % ndim) == ndim - 1:
            continue
        order = list(range(ndim))
        if node.target is aten.permute.default:
            order = [i % ndim for i in node.args[1]]
        else:
            i, j = (i % ndim for i in node.args[1:])
            order[i], order[j] = order[j], order[i]
        if order[-1] != dim:
            continue
        with graph.inserting_before(node):
            scores = insert_call(graph, node.target, attn.args[0], *node.args[1:])
            turned = insert_like(node, aten.softmax.int, scores, -1)
        replace(node, turned)
        found = True
    return found


@rewrite
def weighted_sums_as_products(graph: fx.Graph, axes: Labelled) -> bool:
    """(softmax(w, 1) · x).sum(1), of [B, T, 1] and [B, T, D], and the same turned, become softmax(wᵀ) x, attention pooling; whether
    there was any."""
    found = False
    for node in list(graph.nodes):
        if node.target is not aten.sum.dim_IntList or node.args[0].target is not aten.mul.Tensor:
            continue
        product = node.args[0]
        if product.meta["val"].dim() != 3 or len(node.args[1]) != 1 or (over := node.args[1][0] % 3) == 0:
            continue
        for weights, x in (product.args[:2], product.args[1::-1]):
            if not isinstance(weights, fx.Node) or weights not in axes or x not in axes:
                continue
            if not mixing.holds_tokens(axes[weights][over]):
                continue  # a softmax over features
            with graph.inserting_before(node):
                if (attn := _pooling_map(graph, weights, over)) is None:
                    continue
                values = x if over == 1 else insert_call(graph, aten.transpose.int, x, 1, 2)
                result = insert_like(node, aten.matmul.default, attn, values)
                if node.meta["val"].dim() == 2:
                    result = insert_call(graph, aten.squeeze.dim, result, 1)
                elif over == 2:
                    result = insert_call(graph, aten.transpose.int, result, 1, 2)
            replace(node, result)
            found = True
            break
    return found


def _pooling_map(graph: fx.Graph, weights: fx.Node, over: int) -> fx.Node | None:
    """The map [B, 1, T] of weights [B, T, 1] (over: 1) or [B, 1, T] (2) that are a softmax over tokens; None for others."""
    if weights.meta["val"].dim() != 3 or weights.meta["val"].shape[3 - over] != 1:
        return None
    attn: Any = weights
    while attn.target in IDENTITIES:
        attn = attn.args[0]
    if attn.target is aten.transpose.int and {dim % 3 for dim in attn.args[1:]} == {1, 2}:
        return _pooling_map(graph, attn.args[0], 3 - over)
    if attn.target in axes_.RESHAPES and is_softmax_over_keys(attn.args[0]):
        shape, whole = attn.args[0].meta["val"].shape, weights.meta["val"].shape
        if [str(size) for size in shape] == [
            str(whole[0]),
            str(whole[over]),
        ]:  # of each sample its tokens, not of parts of them
            return insert_call(graph, aten.unsqueeze.default, attn.args[0], 1)
    if attn.target is not aten.softmax.int or attn.args[1] % 3 != over:
        return None
    scores = attn.args[0] if over == 2 else insert_call(graph, aten.transpose.int, attn.args[0], 1, 2)
    return insert_call(graph, aten.softmax.int, scores, -1)


rewrite(mixing.linear_attention)
rewrite(gates_as_weights)


@rewrite
def maps_on_the_left(graph: fx.Graph, axes: Labelled) -> bool:
    """V Aᵀ becomes (A Vᵀ)ᵀ; whether there was any."""
    found = False
    for node in list(graph.nodes):
        if node.target not in (aten.matmul.default, aten.bmm.default):
            continue
        v, turned = node.args
        with graph.inserting_before(node):
            attn = _turned_back(graph, v, turned, axes)
        if attn is None:
            continue
        with graph.inserting_before(node):
            values = insert_call(graph, aten.transpose.int, v, -2, -1)
            product = insert_like(node, node.target, attn, values)
            # In the layout that the model's own product has.
            result = insert_call(graph, aten.contiguous.default, insert_call(graph, aten.transpose.int, product, -2, -1))
        replace(node, result)
        found = True
    return found


def _turned_back(graph: fx.Graph, v: Any, turned: Any, axes: Labelled) -> fx.Node | None:
    """A of a product V Aᵀ, be its right operand a transpose, a softmax of columns or another map; None where that is no map over
    tokens."""
    if not isinstance(turned, fx.Node) or turned not in axes:
        return None
    ndim = turned.meta["val"].dim()
    if turned.target is aten.transpose.int and {dim % ndim for dim in turned.args[1:]} == {ndim - 2, ndim - 1}:
        attn: Any = turned.args[0]
        if is_softmax_over_keys(attn) or mixing.is_value_map(v, turned, axes):
            return attn
    if turned.target is not aten.softmax.int or turned.args[1] % ndim != ndim - 2:
        return insert_call(graph, aten.transpose.int, turned, -2, -1) if mixing.is_value_map(v, turned, axes) else None
    if axes_.is_feature(axes[turned][-2]):
        return None
    scores = insert_call(graph, aten.transpose.int, turned.args[0], -2, -1)
    return insert_call(graph, aten.softmax.int, scores, -1)


rewrite(learned_queries)
rewrite(mixing.ones_beside_values)
rewrite(mixing.normalised_afterwards)
rewrite(parts.heads_one_by_one)


@rewrite
def heads_beside_tokens(graph: fx.Graph, axes: Labelled) -> bool:
    """Give fused attention its heads next to its tokens; whether there was any that had them elsewhere.

    [B, h, windows, T, d] becomes [B, windows, h, T, d], and [B·h, T, d] becomes [B, h, T, d].
    """
    found = False
    for node in list(graph.nodes):
        if node.target is not aten.scaled_dot_product_attention.default or node.args[0] not in axes:
            continue
        q = axes[node.args[0]]
        merged = [size for size, role in q[0] if role != "batch"]
        windows = len(q) == 5 and axes_.is_feature(q[1]) and len(node.args) == 3
        if windows and (not axes_.is_feature(q[2]) or (q[1] and not q[2])):  # a single window has size 1
            there: Any = (aten.transpose.int, 1, 2)
            back = there
        elif len(q) == 3 and merged and q[0][0][1] == "batch":
            there, back = (aten.unflatten.int, 0, [-1, math.prod(merged)]), (aten.flatten.using_ints, 0, 1)
        else:
            continue

        def moved(x: Any, how: Any) -> Any:
            if not isinstance(x, fx.Node) or x.meta["val"].dim() < 3:
                return x
            new = graph.call_function(how[0], (x, *how[1:]))
            new.meta = {**x.meta, "val": how[0](x.meta["val"], *how[1:])}
            return new

        with graph.inserting_before(node):
            node.args = tuple(moved(x, there) for x in node.args)
            node.kwargs = {name: moved(x, there) for name, x in node.kwargs.items()}
        node.meta["val"] = there[0](node.meta["val"], *there[1:])
        with graph.inserting_after(node):
            result = moved(node, back)
        node.replace_all_uses_with(result, delete_user_cb=lambda user, result=result: user is not result)
        found = True
    return found


@rewrite
def heads_in_dimension_one(graph: fx.Graph, axes: Labelled) -> bool:
    """Give A·V spelled out the form [batch and windows, heads, T, ·]; whether there was any with heads elsewhere.

    [B·h, windows, T, ·] and [B, h, windows, T, ·] have them elsewhere.
    """
    found = False
    for node in list(graph.nodes):
        is_map = is_attention_value(node) or mixing.is_map_value(node, axes)
        if not is_map or node.args[0] not in axes or node.args[0].meta["val"].dim() < 4:
            continue
        lead = axes[node.args[0]][:-2]
        plain = len(lead) == 2 and axes_.is_feature(lead[1]) and not any(role == "feature" for _, role in lead[0])
        factors = [factor for axis in lead for factor in axis]
        static = all(isinstance(n, int) for n in node.args[0].meta["val"].shape[1 : len(lead)])
        if plain or sum(role == "batch" for _, role in factors) != 1 or factors[0][1] != "batch" or not static:
            continue
        if not lead[0] or any(x.meta["val"].dim() != len(lead) + 2 for x in node.args):
            continue
        with graph.inserting_before(node):
            there = functools.partial(_heads_in_one, lead)
            product = insert_like(node, node.target, there(node.args[0]), there(node.args[1]))
            result = _heads_back(lead, product)
        replace(node, result)
        found = True
    return found


def _order(lead: Sequence[axes_.Axis]) -> list[int]:
    """The factors of leading dimensions in the order: batch and windows, heads."""
    factors = [factor for axis in lead for factor in axis]
    return sorted(range(len(factors)), key=lambda i: factors[i][1] == "feature")


def _heads_in_one(lead: Sequence[axes_.Axis], x: Any) -> fx.Node:
    """[*lead, T, ·] -> [batch and windows, heads, T, ·]."""
    graph, factors = x.graph, [factor for axis in lead for factor in axis]
    sizes = [math.prod(size for size, _ in axis) for axis in lead[1:]]
    if any(size != n for size, n in zip(x.meta["val"].shape[1:], sizes, strict=False)):  # one value for several heads
        x = insert_call(graph, aten.expand.default, x, [-1, *sizes, -1, -1])
    for dim in reversed(range(len(lead))):
        if not lead[dim]:
            x = insert_call(graph, aten.squeeze.dim, x, dim)
        elif len(lead[dim]) > 1:
            parts = [-1 if role == "batch" else size for size, role in lead[dim]]
            x = insert_call(graph, aten.unflatten.int, x, dim, parts)
    count, order = len(factors), _order(lead)
    if order != sorted(order):
        x = insert_call(graph, aten.permute.default, x, [*order, count, count + 1])
    outer = sum(role != "feature" for _, role in factors)
    if count > outer:
        x = insert_call(graph, aten.flatten.using_ints, x, outer, count - 1)
    else:
        x = insert_call(graph, aten.unsqueeze.default, x, count)
    return insert_call(graph, aten.flatten.using_ints, x, 0, outer - 1)


def _heads_back(lead: Sequence[axes_.Axis], x: fx.Node) -> fx.Node:
    """The other way round."""
    graph, factors = x.graph, [factor for axis in lead for factor in axis]
    sizes = [-1 if role == "batch" else size for size, role in factors]
    count, order = len(factors), _order(lead)
    outer = sum(role != "feature" for _, role in factors)
    if count > outer:
        x = insert_call(graph, aten.unflatten.int, x, 1, [sizes[i] for i in order[outer:]])
    else:
        x = insert_call(graph, aten.squeeze.dim, x, 1)
    x = insert_call(graph, aten.unflatten.int, x, 0, [sizes[i] for i in order[:outer]])
    if order != sorted(order):
        x = insert_call(graph, aten.permute.default, x, [*(order.index(i) for i in range(count)), count, count + 1])
    for dim, axis in enumerate(lead):
        if not axis:
            x = insert_call(graph, aten.unsqueeze.default, x, dim)
        elif len(axis) > 1:
            x = insert_call(graph, aten.flatten.using_ints, x, dim, dim + len(axis) - 1)
    return x
