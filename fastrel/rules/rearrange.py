"""Index maps: views, permutations, picks and joins. Lanes go back to where their entries came from."""

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from fastrel.errors import UnsupportedModelError
from fastrel.graph import axes as axes_
from fastrel.graph.nodes import arguments, describe
from fastrel.reference import operators, pooling
from fastrel.rules.generic import divided_row, index_map
from fastrel.rules.reduce import pick
from fastrel.rules.registry import rule
from fastrel.transform.context import Context
from fastrel.transform.lanes import Lane, Lanes, Row, Rows
from fastrel.transform.rollout import operand_shares

aten = torch.ops.aten


#: Operators that pick entries by their size and say where these were.
PICKS = {
    aten.max.dim,
    aten.min.dim,
    aten.topk.default,
    aten.sort.default,
    aten.sort.stable,
    aten.kthvalue.default,
    aten.median.dim,
    aten.cummax.default,
    aten.cummin.default,
    aten.adaptive_max_pool1d.default,
    aten.adaptive_max_pool2d.default,
    aten.max_pool2d_with_indices.default,
    aten.adaptive_max_pool3d.default,
    aten.max_pool3d_with_indices.default,
}


#: Operators that return several runs of entries along a dimension.
CUTS = {
    aten.chunk.default,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.split.sizes,
    aten.tensor_split.sections,
    aten.tensor_split.indices,
}


def _ndim(x: Any) -> int:
    return x.meta["val"].dim()


@rule(*axes_.RESHAPES)
def reshape(t: Context, node: fx.Node, out: Lanes) -> None:
    """Dimensions merged, split, added or dropped."""
    (x,) = arguments(node, count=1)
    source, result = t.facts.sizes.shape(x), t.facts.sizes.shape(node)
    groups = axes_.groups(source, result)

    def back(lane: Lane, is_row: bool) -> Lane:
        rows = None
        if lane.rows:
            rows = _regroup_rows(lane.rows, groups, source, result)
            if rows is None and not is_row:
                rows = _merge_rows(t, x, node, lane.rows, groups)
            if rows is None:
                lane = t.dense(lane, node, is_row)
        if is_row:
            return Lane(_reshape_row(t, node, x, groups, lane.node, rows), rows)
        shape = list(t.shape(x))
        if rows:
            shape[rows.dim] = rows.length
        return Lane(_view(t, lane.node, shape), rows)

    t.index_map(x, out, back)


def _view(t: Context, lane: fx.Node, shape: Sequence[Any]) -> fx.Node:
    targets = t.emit.call(operator.getitem, t.emit.call(getattr, lane, "shape"), 0)
    return t.emit.call(aten.reshape.default, lane, [targets, *shape])


def _regroup_rows(rows: Rows, groups: Any, source: Sequence[int], result: Sequence[int]) -> Rows | None:
    """Where the rows are after the reshape is undone, if their dimension survives it."""
    for left, right in groups:
        if rows.dim not in right:
            continue
        real_left = [dim for dim in left if source[dim] != 1]
        real_right = [dim for dim in right if result[dim] != 1]
        if len(real_left) == 1 and real_right == [rows.dim]:
            return Rows(real_left[0], rows.start, rows.length)
    return None


def _merge_rows(t: Context, x: fx.Node, node: fx.Node, rows: Rows, groups: Any) -> Rows | None:
    """Rows of the first of several dimensions that are one feature dimension of x: v of a fused qkv, say."""
    for left, right in groups:
        if not right or rows.dim != right[0] or len(left) != 1 or not axes_.is_feature(t.axes(x)[left[0]]):
            continue
        inner = [node.meta["val"].shape[dim] for dim in right[1:]]
        if all(isinstance(size, int) for size in inner):
            return Rows(left[0], rows.start * math.prod(inner), rows.length * math.prod(inner))
    return None


def _reshape_row(t: Context, node: fx.Node, x: fx.Node, groups: Any, lane: fx.Node, rows: Rows | None) -> fx.Node:
    """A row has size 1 in feature dimensions; where a group mixes them with tokens it is divided among them, then summed."""
    before, after = t.axes(x), t.axes(node)
    shape, mixed = list(t.row_shape(x)), []
    for left, right in groups:
        roles = {axes_.is_feature(after[dim]) for dim in right if after[dim]}
        if len(roles) > 1 or {axes_.is_feature(before[dim]) for dim in left if before[dim]} != roles:
            mixed.append((left, right))
    if mixed:
        full = list(t.row_shape(node))
        for left, right in mixed:
            for dim in right:
                full[dim] = t.emit.size(node, dim)
            for dim in left:
                shape[dim] = t.emit.size(x, dim)
        lane = t.emit.call(divided_row, lane, *full)
    if rows:
        shape[rows.dim] = rows.length
    lane = _view(t, lane, shape)
    spread = [dim + 1 for left, _ in mixed for dim in left if axes_.is_feature(before[dim]) and before[dim]]
    return t.emit.call(aten.sum.dim_IntList, lane, spread, True) if spread else lane


@rule(aten.permute.default)
def permute(t: Context, node: fx.Node, out: Lanes) -> None:
    """Dimensions reordered."""
    x, dims = arguments(node, count=2)
    _permute(t, x, out, [dim % _ndim(node) for dim in dims])


@rule(aten.transpose.int)
def transpose(t: Context, node: fx.Node, out: Lanes) -> None:
    """Two dimensions swapped."""
    x, a, b = arguments(node, count=3)
    order = list(range(_ndim(node)))
    order[a], order[b] = order[b], order[a]
    _permute(t, x, out, order)


def _permute(t: Context, x: Any, out: Lanes, order: list[int]) -> None:
    inverse = [order.index(dim) for dim in range(len(order))]

    def back(lane: Lane, is_row: bool) -> Lane:
        rows = Rows(order[lane.rows.dim], lane.rows.start, lane.rows.length) if lane.rows else None
        return Lane(t.emit.call(aten.permute.default, lane.node, [0, *(dim + 1 for dim in inverse)]), rows)

    t.index_map(x, out, back)


@rule(aten.select.int)
def select(t: Context, node: fx.Node, out: Lanes) -> None:
    """One entry of a dimension, for instance the CLS token: nothing reaches the others."""
    x, dim, index = arguments(node, count=3)
    _pick(t, node, x, out, dim % _ndim(x), index)


def _pick(t: Context, node: fx.Node, x: fx.Node, out: Lanes, dim: int, index: int) -> None:
    feature = axes_.is_feature(t.axes(x)[dim])
    if t.published and out.rel and not feature and t.wants(x):
        out = out._replace(rel=Lane(t.published_share(t.value(node), t.dense(out.rel, node).node)))
    place = _from_the_start(t, x, dim, index)
    if place is None:
        return index_map(t, node, out)
    index = place

    def back(lane: Lane, is_row: bool) -> Lane:
        if lane.rows:
            lane = t.dense(lane, node, is_row)
        picked = t.emit.call(aten.unsqueeze.default, lane.node, dim + 1)
        if is_row:
            return Lane(picked) if feature else t.dense(Lane(picked, Rows(dim, index, 1)), x, is_row=True)
        return Lane(picked, Rows(dim, index, 1))

    t.index_map(x, out, back)


def _from_the_start(t: Context, x: fx.Node, dim: int, index: Any) -> int | None:
    """An index counted from the start of a dimension; None where that depends on sizes that vary."""
    if isinstance(index, int) and index < 0:
        index = t.emit.arith("add", t.emit.size(x, dim), index) if isinstance(x.meta["val"].shape[dim], int) else None
    return index if isinstance(index, int) else None


@rule(aten.slice.Tensor)
def slice_(t: Context, node: fx.Node, out: Lanes) -> None:
    """A run of entries of a dimension."""
    x, dim, start, _, step = arguments(node, 0, None, None, 1, count=5)
    dim %= _ndim(x)
    if x.meta["val"].shape[dim] == node.meta["val"].shape[dim]:
        return t.give(x, *out)
    _keep_samples(t, node, x, dim)
    length, begin = node.meta["val"].shape[dim], _from_the_start(t, x, dim, start or 0)
    if step != 1 or not isinstance(length, int) or begin is None:
        return index_map(t, node, out)
    _narrow(t, node, x, out, dim, begin, length)


def _keep_samples(t: Context, node: fx.Node, x: fx.Node, dim: int) -> None:
    """Raise UnsupportedModelError where a node parts what lies along a dimension of x that holds samples: then several of what is there
    are one sample, and which is not known."""
    if any(role == "batch" for _, role in t.axes(x)[dim]):
        raise UnsupportedModelError(
            f"{describe(node)} parts samples that the model joined along the batch; call its encoder for each input by itself, "
            "which gives the same numbers"
        )


def _narrow(t: Context, node: fx.Node, x: fx.Node, out: Lanes, dim: int, start: int, length: int) -> None:
    feature = axes_.is_feature(t.axes(x)[dim])

    def back(lane: Lane, is_row: bool) -> Lane:
        if is_row and feature:
            return lane
        rows = Rows(dim, start, length)
        if lane.rows and lane.rows.dim == dim:
            rows = Rows(dim, start + lane.rows.start, lane.rows.length)
        elif lane.rows:
            lane = t.dense(lane, node, is_row)
        moved = Lane(lane.node, rows)
        return t.dense(moved, x, is_row=True) if is_row else moved

    t.index_map(x, out, back)


@rule(operator.getitem)
def getitem(t: Context, node: fx.Node, out: Lanes) -> None:
    """One of the parts that unbind, chunk or split makes."""
    whole, index = arguments(node, count=2)
    if whole.target is aten.unbind.int:
        x, dim = arguments(whole, 0, count=2)
        return _pick(t, node, x, out, dim % _ndim(x), index)
    if whole.target in CUTS:
        x, _, dim = arguments(whole, 0, count=3)
        dim %= _ndim(x)
        _keep_samples(t, whole, x, dim)
        lengths = [part.shape[dim] for part in whole.meta["val"]]
        if all(isinstance(length, int) for length in lengths):
            return _narrow(t, node, x, out, dim, sum(lengths[:index]), lengths[index])

        def back(lane: Lane, is_row: bool) -> Lane:
            sizes = t.row_shape(x) if is_row else t.shape(x)
            cut = [t.emit.size(x, dim) if i == dim else size for i, size in enumerate(sizes)]
            options = fx.map_arg(whole.args[1:], t.value)
            return Lane(t.emit.call(put_back, t.dense(lane, node, is_row).node, whole.target, index, cut, *options))

        return t.index_map(x, out, back)
    if whole.target in PICKS and index == 0:
        return pick(t, node, whole, out)
    raise UnsupportedModelError(f"no relevance rule for {describe(whole)}")


def put_back(lane: torch.Tensor, op: Any, index: int, shape: list[int], *options: Any) -> torch.Tensor:
    """A lane [K, *] of the part `index` that `op` cuts out of a value of this shape, with zeros elsewhere."""
    zeros = lane.new_zeros(shape)
    return operators.vjp(lambda x: op(x, *options)[index], lane, zeros)


@rule(aten.cat.default)
def cat(t: Context, node: fx.Node, out: Lanes) -> None:
    """Values joined along a dimension: each takes its own part.

    A row is divided among parts that are features: among heads by their sizes, among values that no longer have tokens
    (CLS beside the mean over patches, two towers' outputs) by their relevance, or evidence if the method says so. Where
    attention's output and that of an MLP beside it go through one layer, they are what a block adds up to, like the operands of a sum.
    """
    parts, dim = arguments(node, 0, count=2)
    dim %= _ndim(node)
    feature = axes_.is_feature(t.axes(node)[dim])
    lengths = [t.emit.size(x, dim) for x in parts]
    active = [i for i, x in enumerate(parts) if t.is_active(x)]
    shares: list[Any] = [None] * len(parts)
    rows: list[Row | None] = [out.row] * len(parts)
    if out.row and feature:
        groups = _what_adds_up(t, node, parts, active)
        for group, row in zip(groups, t.rollout.fork(out.row, len(groups)), strict=True):
            own = _shares(t, node, parts, dim, lengths, group, out)
            for i in group:
                rows[i], shares[i] = row, own[i]
    start: Any = 0
    for i, (x, length) in enumerate(zip(parts, lengths, strict=True)):

        def back(lane: Lane, is_row: bool, begin: Any = start, length: Any = length, share: Any = shares[i]) -> Lane:
            if is_row and feature:
                return Lane(t.emit.call(scaled_row, lane.node, share), lane.rows)
            full = t.dense(lane, node, is_row)
            return Lane(t.emit.call(aten.narrow.default, full.node, dim + 1, begin, length))

        if i in active:
            t.index_map(x, out._replace(row=rows[i]), back)
        start = t.emit.arith("add", start, length)


def _what_adds_up(t: Context, node: fx.Node, parts: Sequence[fx.Node], active: list[int]) -> list[list[int]]:
    """The parts as what a block adds up to: attention's outputs apart from what it computes of the same tokens beside them; else all
    as one."""
    joined = [parts[i] for i in active]
    if _pooled(t, node) or len({t.facts.sources[x] for x in joined}) > 1:
        return [active]
    attends = t.facts.own_attention(joined, t.stretch.blocks)
    groups = [[i for i, own in zip(active, attends, strict=True) if own == which] for which in (False, True)]
    return groups if all(groups) else [active]


def _pooled(t: Context, node: fx.Node) -> bool:
    """Whether a value has no tokens any more: one dimension of samples, all others of features."""
    axes = t.axes(node)
    return len(axes[0]) == 1 and all(axes_.is_feature(axis) for axis in axes[1:])


def _shares(
    t: Context, node: fx.Node, parts: Sequence[fx.Node], dim: int, lengths: list[Any], active: list[int], out: Lanes
) -> list[Any]:
    """What each of some parts that are features takes of a row: a number, or [K, B]; parts that are constants take nothing."""
    if _pooled(t, node) and out.rel:
        lane, begin, own = t.dense(out.rel, node).node, 0, []
        if t.method.evidence and out.grad:
            lane = t.emit.call(pooling.evidence_of_entries, t.value(node), t.dense(out.grad, node).node, lane)
        for i, length in enumerate(lengths):
            if i in active:
                own.append(t.emit.call(aten.narrow.default, lane, dim + 1, begin, length))
            begin = t.emit.arith("add", begin, length)
        given = iter(t.emit.parts(t.emit.call(operand_shares, *own), len(own)))
        return [next(given) if i in active else 0.0 for i in range(len(parts))]
    if all(isinstance(lengths[i], int) for i in active):
        total = sum(lengths[i] for i in active)
        return [lengths[i] / total if i in active else 0.0 for i in range(len(parts))]
    return [1 / len(active)] * len(parts)


def scaled_row(row: torch.Tensor, share: torch.Tensor | float) -> torch.Tensor:
    """A row [K, B, …] times a share, a number or [K, B]."""
    return row * (share if isinstance(share, float) else share.reshape(*share.shape, *([1] * (row.dim() - 2))))
