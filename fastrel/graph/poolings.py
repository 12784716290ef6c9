"""Poolings over tokens that a model spells token by token, in runs of tokens, by an index or as a product: one reduction each."""

from __future__ import annotations

import itertools
import math
import operator
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from fastrel.graph import axes as axes_
from fastrel.graph.nodes import arguments, insert_call, insert_like
from fastrel.graph.nodes import replace as replace_node
from fastrel.graph.patterns import IDENTITIES

aten = torch.ops.aten

Labelled = Mapping[fx.Node, axes_.Axes]

#: What two parts of a pooling are joined by, and the reduction of the whole that this is.
_JOINS: dict[Any, Any] = {
    aten.add.Tensor: aten.sum.dim_IntList,
    aten.maximum.default: aten.amax.default,
    aten.minimum.default: aten.amin.default,
}
_SIZED: dict[Any, Any] = {aten.max.dim: aten.amax.default, aten.min.dim: aten.amin.default}
_FOUND_BY: dict[Any, Any] = {aten.argmax.default: aten.amax.default, aten.argmin.default: aten.amin.default}
_SPLITS = {aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default}


@dataclass(frozen=True)
class _Part:
    """A run of entries of a dimension of a value, reduced over it (which `keep`s it with size 1), times a factor.

    `stop`: None for the end. `whole`: where sizes vary, a cut of the value into parts, which are counted instead of entries.
    """

    whole: fx.Node
    dim: int
    start: int
    stop: int | None
    keep: bool = False
    factor: float = 1.0


def pooled_in_parts(graph: fx.Graph, axes: Labelled) -> bool:
    """x[:, 0] + x[:, 1] + … becomes x.sum(1), the maximum of them x.amax(1), be the parts tokens or reduced runs of tokens; whether
    there was any."""
    found, dead = False, set[fx.Node]()
    for node in reversed(list(graph.nodes)):
        if node.target not in _JOINS or node not in axes:
            continue
        if node.users and dead.issuperset(node.users):
            dead.add(node)
            continue
        parts = _parts(node)
        if parts is None or not axes_.are_tokens(axes.get(parts[0].whole, ((),) * (parts[0].dim + 1))[parts[0].dim]):
            continue
        with graph.inserting_before(node):
            result = _reduced(node, parts)
        replace_node(node, result)
        dead.update(x for x in node.all_input_nodes if not x.users)
        found = True
    return found


def _parts(joined: fx.Node) -> list[_Part] | None:
    """The parts of a pooling, of one value and in their order; None where they are no run of its entries, or weigh differently."""
    parts: list[_Part] = []
    todo: list[tuple[Any, float]] = [(joined, 1.0)]
    while todo:
        x, factor = todo.pop()
        if not isinstance(x, fx.Node):
            if x != 0 or joined.target is not aten.add.Tensor:
                return None
            continue  # where a sum of Python's begins
        if x.target is joined.target and not x.kwargs and len(x.args) == 2:
            todo += [(arg, factor) for arg in x.args]
            continue
        scale = _scale(x) if joined.target is aten.add.Tensor else None
        if scale is not None:
            todo.append((x.args[0], factor * scale))
            continue
        part = _part(x, _JOINS[joined.target])
        if part is None or (parts and (part.whole, part.dim, part.keep) != (parts[0].whole, parts[0].dim, parts[0].keep)):
            return None
        parts.append(replace(part, factor=part.factor * factor))
    parts.sort(key=lambda part: part.start)
    runs = all(a.stop == b.start for a, b in itertools.pairwise(parts))
    alike = all(math.isclose(part.factor, parts[0].factor, rel_tol=1e-9) for part in parts)
    whole = not parts or parts[0].whole.target not in _SPLITS or (parts[0].start, parts[-1].stop) == (0, None)
    return parts if len(parts) > 1 and runs and alike and whole else None


def _scale(x: fx.Node) -> float | None:
    """The number by which a value is multiplied; None for what is no product with a number."""
    if x.target not in (aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar) or x.kwargs:
        return None
    factor = x.args[1]
    if not isinstance(factor, (int, float)) or not factor:
        return None
    return 1 / factor if x.target in (aten.div.Tensor, aten.div.Scalar) else float(factor)


def _part(x: fx.Node, reduction: Any) -> _Part | None:
    """A part as one entry, or as a run that is reduced."""
    if (one := _entry(x)) is not None:
        return one
    given: Any = x.args[0] if x.target is operator.getitem and x.args[1] == 0 else x
    averaged = given.target is aten.mean.dim and reduction is aten.sum.dim_IntList
    target = reduction if averaged else given.target if given is x else _SIZED.get(given.target)
    if target is not reduction or given.kwargs:
        return None
    run, dims, keep = arguments(given, None, False, count=3)
    dims = [dims] if isinstance(dims, int) else dims
    if not dims or len(dims) != 1:
        return None
    ndim = run.meta["val"].dim()
    part = _run(run, dims[0] % ndim)
    if part is None or (averaged and (part.stop is None or part.whole.target in _SPLITS)):
        return None
    return replace(part, keep=keep, factor=1 / (part.stop - part.start) if averaged and part.stop else 1.0)


def _entry(x: fx.Node) -> _Part | None:
    """x[:, i], as an entry by itself or one of all that a value was cut into, and x[:, i : i + 1]."""
    call: Any = x.args[0] if x.target is operator.getitem else x
    if x.target is aten.select.int or (x is not call and call.target is aten.unbind.int):
        whole, dim = arguments(call, 0, count=2)
        dim %= whole.meta["val"].dim()
        place = _from_the_start(x.args[2] if x is call else x.args[1], _known(whole.meta["val"].shape[dim]))
        return None if place is None else _Part(_uncut(whole), dim, place, place + 1)
    if x.target is aten.slice.Tensor or (x is not call and call.target in _SPLITS):
        for dim in range(x.meta["val"].dim()):
            part = _run(x, dim)
            if part is not None and part.whole is not x and part.stop == part.start + 1:
                return None if part.whole.target in _SPLITS else replace(part, keep=True)
    return None


def _run(x: fx.Node, dim: int) -> _Part | None:
    """What a run of entries of a dimension was cut out of: the value itself, where it is no run of another one."""
    x = _uncut(x)
    size = _known(x.meta["val"].shape[dim])
    if x.target is aten.slice.Tensor:
        whole, along, start, stop, step = arguments(x, 0, None, None, 1, count=5)
        if along % whole.meta["val"].dim() == dim and step == 1:
            begin = _from_the_start(start or 0, _known(whole.meta["val"].shape[dim]))
            if begin is None or (size is None and stop not in (None, sys.maxsize)):
                return None
            return _Part(_uncut(whole), dim, begin, None if size is None else begin + size)
    call: Any = x.args[0] if x.target is operator.getitem else None
    if call is not None and call.target in _SPLITS:
        whole, _, along = arguments(call, 0, count=3)
        if along % whole.meta["val"].dim() == dim:
            lengths = [_known(part.shape[dim]) for part in call.meta["val"][: x.args[1]]]
            known = [length for length in (*lengths, size) if length is not None]
            if len(known) > len(lengths):
                return _Part(_uncut(whole), dim, sum(known[:-1]), sum(known))
            last = len(call.meta["val"]) - 1
            return _Part(call, dim, int(x.args[1]), None if x.args[1] == last else int(x.args[1]) + 1)  # type: ignore
    return _Part(x, dim, 0, size)


def _from_the_start(place: Any, size: int | None) -> int | None:
    """A place counted from the start; None where that is not known."""
    if not isinstance(place, int) or place >= 0:
        return place if isinstance(place, int) else None
    return None if size is None else max(0, place + size)


def _known(size: Any) -> int | None:
    """A size as a number, also where it was a symbol until something asked for it; None for one that varies."""
    return int(str(size)) if str(size).isdigit() else None


def _uncut(x: fx.Node) -> fx.Node:
    """x of x[:], as indexing leaves it."""
    while x.target is aten.slice.Tensor and str(x.args[0].meta["val"].shape) == str(x.meta["val"].shape):  # type: ignore[union-attr]
        x = x.args[0]  # type: ignore[assignment]
    return x


def _reduced(node: fx.Node, parts: list[_Part]) -> fx.Node:
    first, stop = parts[0], parts[-1].stop
    run = _uncut(first.whole.args[0]) if first.whole.target in _SPLITS else first.whole  # type: ignore[arg-type]
    if first.start or stop not in (None, _known(run.meta["val"].shape[first.dim])):
        run = insert_like(node, aten.slice.Tensor, run, first.dim, first.start, sys.maxsize if stop is None else stop)
    result = insert_like(node, _JOINS[node.target], run, [first.dim], first.keep)
    return result if first.factor == 1 else insert_like(node, aten.mul.Tensor, result, first.factor)


def picked_by_index(graph: fx.Graph, axes: Labelled) -> bool:
    """x.gather(1, x.argmax(1, keepdim=True)) becomes x.amax(1, keepdim=True); whether there was any."""
    found = False
    for node in list(graph.nodes):
        if node.target is aten.gather.default:
            x, dim, index = arguments(node, count=3)
        elif node.target is aten.take_along_dim.default and len(node.args) == 3:
            x, index, dim = node.args
        else:
            continue
        if x not in axes or dim is None or not axes_.are_tokens(axes[x][dim := dim % x.meta["val"].dim()]):
            continue
        if (reduction := index_of(index, x, dim)) is None:
            continue
        with graph.inserting_before(node):
            result = insert_like(node, reduction, x, [dim], True)
        replace_node(node, result)
        found = True
    return found


def index_of(index: fx.Node, x: fx.Node, dim: int) -> Any:
    """amax or amin, where an index of size 1 in a dimension says where this entry of x is; None for others."""
    wide = index.target is aten.unsqueeze.default
    if wide:
        if index.args[1] % index.meta["val"].dim() != dim:
            return None
        index = _uncut(index.args[0])  # type: ignore[arg-type]
    call: Any = index
    if index.target is operator.getitem and index.args[1] == 1:
        call = index.args[0]
    reduction = {**_SIZED, **_FOUND_BY}.get(call.target)
    if reduction is None or (call is index) != (call.target in _FOUND_BY):
        return None
    source, over, keep = arguments(call, None, False, count=3)
    if over is None or bool(keep) == wide or over % x.meta["val"].dim() != dim:
        return None
    return reduction if plain(source) is plain(x) else None


def plain(x: Any) -> Any:
    """A value before it was copied."""
    while x.target in IDENTITIES:
        x = x.args[0]
    return x


def one_column_over_tokens(graph: fx.Graph, axes: Labelled) -> bool:
    """xᵀ w, of tokens that come last and a constant column of weights, becomes (xᵀ · w).sum(-1), pooling by constant weights; whether
    there was any."""
    found = False
    for node in list(graph.nodes):
        if node.target not in (aten.matmul.default, aten.linear.default) or node.args[0] not in axes:
            continue
        x, weight, bias = arguments(node, None, count=3)
        if not isinstance(weight, fx.Node) or weight in axes or bias in axes or not _reads_tokens(axes[x]):
            continue
        shape, turned = weight.meta["val"].shape, node.target is aten.matmul.default
        if len(shape) > 2 or (len(shape) == 2 and shape[1 if turned else 0] != 1):
            continue
        with graph.inserting_before(node):
            if len(shape) == 2 and turned:
                weight = insert_call(graph, aten.transpose.int, weight, 0, 1)
            product = insert_like(node, aten.mul.Tensor, x, weight)
            result = insert_like(node, aten.sum.dim_IntList, product, [-1], len(shape) == 2)
            if bias is not None:
                result = insert_like(node, aten.add.Tensor, result, bias)
        replace_node(node, result)
        found = True
    return found


def _reads_tokens(x: axes_.Axes) -> bool:
    return len(x) > 1 and axes_.are_tokens(x[-1]) and axes_.has_features(x[-2])


def chosen_by_size(x: fx.Node, over: list[int]) -> fx.Node | None:
    """The mask of x = y · (y == y.amax(over)), of where(y == y.amax(over), y, 0) and of y · one_hot(y.argmax(over)); None for other
    values."""
    for y, mask in _masked(x):
        inner = plain(mask)
        if inner.target in (aten.eq.Tensor, aten.ge.Tensor, aten.le.Tensor):
            sides = [plain(side) for side in inner.args[:2]]
            if any(plain(y) is a and _is_extreme(b, a, over) for a, b in (sides, sides[::-1])):
                return mask
        elif len(over) == 1 and _is_one_hot(inner, plain(y), over[0]):
            return mask
    return None


def _masked(x: fx.Node) -> Iterator[tuple[Any, Any]]:
    """A value and a mask, either way round, of which another value is the product."""
    if x.target is aten.where.self or x.target is aten.where.ScalarOther:
        mask, y, other = x.args
        zero = other == 0 if not isinstance(other, fx.Node) else other.target in _ZEROS or _is_zero_constant(other)
        if zero and isinstance(y, fx.Node):
            yield y, mask
    elif x.target is aten.mul.Tensor:
        for y, mask in (x.args, x.args[::-1]):
            if isinstance(y, fx.Node) and isinstance(mask, fx.Node):
                yield y, mask


_ZEROS = {aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default}


def _is_zero_constant(x: fx.Node) -> bool:
    return x.target in (aten.scalar_tensor.default, aten.full.default, aten.full_like.default) and 0 in x.args


def _is_extreme(z: fx.Node, y: fx.Node, over: list[int]) -> bool:
    """Whether z is y.amax(over) or y.amin(over), kept as wide as y."""
    while z.target in (aten.expand.default, aten.expand_as.default, *IDENTITIES):
        z = z.args[0]  # type: ignore[assignment]
    call: Any = z.args[0] if z.target is operator.getitem and z.args[1] == 0 else z
    wide = False
    if call.target is aten.unsqueeze.default:
        place, call, wide = call.args[1] % call.meta["val"].dim(), call.args[0], True
        call = call.args[0] if call.target is operator.getitem and call.args[1] == 0 else call
        if [place] != over:
            return False
    if call.target not in (aten.amax.default, aten.amin.default, *_SIZED):
        return False
    source, dims, keep = arguments(call, None, False, count=3)
    dims = [dims] if isinstance(dims, int) else dims or []
    same = sorted(dim % y.meta["val"].dim() for dim in dims) == over
    return same and bool(keep) != wide and plain(source) is y


def _is_one_hot(code: fx.Node, y: fx.Node, dim: int) -> bool:
    """Whether a value is one_hot(y.argmax(dim)) with its places moved to this dimension."""
    order = list(range(y.meta["val"].dim()))
    while code.target in (aten.transpose.int, aten.mT.default, aten.permute.default, *IDENTITIES):
        if code.target in (aten.transpose.int, aten.mT.default):
            swapped = list(range(len(order)))
            i, j = (int(d) % len(order) for d in code.args[1:3] or (-2, -1))  # type: ignore
            swapped[i], swapped[j] = j, i
            order = [swapped[d] for d in order]
        elif code.target is aten.permute.default:
            order = [code.args[1][d] % len(order) for d in order]  # type: ignore
        code = code.args[0]  # type: ignore[assignment]
    if code.target is not aten.one_hot.default or code.meta["val"].dim() != len(order):
        return False
    index: Any = code.args[0]
    rest = [d for i, d in enumerate(order) if i != dim]
    if order[dim] != len(order) - 1 or rest != sorted(rest):
        return False
    call: Any = index.args[0] if index.target is operator.getitem and index.args[1] == 1 else index
    if call.target not in (*_SIZED, *_FOUND_BY):
        return False
    source, over, keep = arguments(call, None, False, count=3)
    return over is not None and over % len(order) == dim and not keep and plain(source) is y
