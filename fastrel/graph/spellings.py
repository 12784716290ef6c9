"""Operators that are others in one word, written as these: `.mT`, `hstack`, `addcmul`, any einsum of two, cosine similarity …"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from fastrel.graph.nodes import insert_call

aten = torch.ops.aten

#: What an operator is made of: given an `insert(target, *args)` and its own arguments, its result.
Spelling = Callable[..., "fx.Node | None"]

SPELLINGS: dict[Any, Spelling] = {}


def _spelling(*targets: Any) -> Callable[[Spelling], Spelling]:
    def register(function: Spelling) -> Spelling:
        SPELLINGS.update(dict.fromkeys(targets, function))
        return function

    return register


def spell_out(graph: fx.Graph, active: Callable[[fx.Node], bool]) -> bool:
    """Write all such operators of activations as what they are made of; whether there was any."""
    found, written = False, set[fx.Node]()

    def is_active(x: fx.Node) -> bool:
        return x in written or active(x)

    for node in list(graph.nodes):
        spelling = SPELLINGS.get(node.target)
        if spelling is None or not any(is_active(x) for x in node.all_input_nodes):
            continue

        def insert(target: Any, *args: Any, node: fx.Node = node) -> fx.Node:
            new = insert_call(graph, target, *args)
            new.meta |= {name: x for name, x in node.meta.items() if name != "val"}
            if any(is_active(x) for x in new.all_input_nodes):
                written.add(new)
            return new

        with graph.inserting_before(node):
            result = spelling(insert, *node.args, active=is_active, **node.kwargs)
        if result is not None:
            node.replace_all_uses_with(result)
            graph.erase_node(node)
            found = True
    return found


@_spelling(aten.mT.default, aten.mH.default, aten.adjoint.default)
def _transposed(insert: Any, x: fx.Node, **_: Any) -> fx.Node:
    return insert(aten.transpose.int, x, -2, -1)


@_spelling(aten.t.default)
def _t(insert: Any, x: fx.Node, **_: Any) -> fx.Node | None:
    return insert(aten.transpose.int, x, 0, 1) if x.meta["val"].dim() == 2 else None


@_spelling(aten.numpy_T.default)
def _reversed(insert: Any, x: fx.Node, **_: Any) -> fx.Node:
    return insert(aten.permute.default, x, list(reversed(range(x.meta["val"].dim()))))


@_spelling(aten.swapaxes.default, aten.swapdims.default)
def _swapped(insert: Any, x: fx.Node, a: int, b: int, **_: Any) -> fx.Node:
    return insert(aten.transpose.int, x, a, b)


@_spelling(aten.movedim.int, aten.movedim.intlist, aten.moveaxis.int, aten.moveaxis.intlist)
def _moved(insert: Any, x: fx.Node, source: Any, destination: Any, **_: Any) -> fx.Node:
    count = x.meta["val"].dim()
    sources, places = ([dims] if isinstance(dims, int) else dims for dims in (source, destination))
    goes = {place % count: dim % count for dim, place in zip(sources, places, strict=True)}
    rest = iter(sorted(set(range(count)) - set(goes.values())))
    return insert(aten.permute.default, x, [goes[i] if i in goes else next(rest) for i in range(count)])


@_spelling(aten.hstack.default)
def _hstack(insert: Any, parts: Sequence[fx.Node], **_: Any) -> fx.Node:
    return insert(aten.cat.default, parts, min(1, parts[0].meta["val"].dim() - 1))


@_spelling(aten.tile.default)
def _tile(insert: Any, x: fx.Node, times: Sequence[int], **_: Any) -> fx.Node:
    return insert(aten.repeat.default, x, [1] * (x.meta["val"].dim() - len(times)) + list(times))


@_spelling(aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding)
def _padded_in_words(
    insert: Any, x: fx.Node, weight: fx.Node, bias: Any = None, stride: Any = 1, padding: str = "valid", dilation: Any = 1,
    groups: int = 1, **_: Any,
) -> fx.Node:  # fmt: skip
    """valid: none. same: around, and what is odd at the end."""
    window = weight.meta["val"].shape[2:]
    stride, each = ([x] * len(window) if isinstance(x, int) else list(x) for x in (stride, dilation))
    total = [d * (int(k) - 1) if padding == "same" else 0 for d, k in zip(each, window, strict=True)]
    odd = [n % 2 for n in total]
    if any(odd):
        x = insert(aten.constant_pad_nd.default, x, [side for n in reversed(odd) for side in (0, n)])
    target = {1: aten.conv1d.default, 2: aten.conv2d.default, 3: aten.conv3d.default}[len(window)]
    return insert(target, x, weight, bias, stride, [n // 2 for n in total], each, groups)


@_spelling(aten.copy.default)
def _copied(insert: Any, x: fx.Node, source: fx.Node, *_: Any, **__: Any) -> fx.Node:
    """What is written over x, in its shape and dtype."""
    old, new = x.meta["val"], source.meta["val"]
    if str(new.shape) != str(old.shape):
        source = insert(aten.expand_as.default, source, x)
    return source if new.dtype == old.dtype else insert(aten.to.dtype, source, old.dtype)


@_spelling(aten.add.Tensor)
def _scaled_sum(insert: Any, u: fx.Node, v: Any, alpha: float = 1, **_: Any) -> fx.Node | None:
    if alpha == 1 or not isinstance(v, fx.Node):
        return None
    return insert(aten.add.Tensor, u, insert(aten.mul.Tensor, v, alpha))


@_spelling(aten.sub.Tensor)
def _scaled_difference(insert: Any, u: fx.Node, v: Any, alpha: float = 1, **_: Any) -> fx.Node | None:
    return _scaled_sum(insert, u, v, -alpha) if alpha != 1 else None


def _scaled(insert: Any, x: fx.Node, factor: Any) -> fx.Node:
    return x if factor == 1 else insert(aten.mul.Tensor, x, factor)


@_spelling(aten.addcmul.default)
def _addcmul(insert: Any, x: fx.Node, a: fx.Node, b: fx.Node, value: float = 1, **_: Any) -> fx.Node:
    return insert(aten.add.Tensor, x, _scaled(insert, insert(aten.mul.Tensor, a, b), value))


@_spelling(aten.baddbmm.default)
def _baddbmm(insert: Any, x: fx.Node, a: fx.Node, b: fx.Node, beta: float = 1, alpha: float = 1, **_: Any) -> fx.Node:
    product = _scaled(insert, insert(aten.bmm.default, a, b), alpha)
    return insert(aten.add.Tensor, product, _scaled(insert, x, beta)) if beta else product


@_spelling(aten.glu.default)
def _glu(insert: Any, x: fx.Node, dim: int = -1, **_: Any) -> fx.Node | None:
    size = x.meta["val"].shape[dim]
    if not isinstance(size, int):
        return None
    halves = insert(aten.split.Tensor, x, size // 2, dim)
    a, b = (insert(operator.getitem, halves, i) for i in range(2))
    return insert(aten.mul.Tensor, a, insert(aten.sigmoid.default, b))


@_spelling(aten.cosine_similarity.default)
def _cosine(insert: Any, u: fx.Node, v: fx.Node, dim: int = 1, eps: float = 1e-8, **_: Any) -> fx.Node:
    """The sum of the product of both, each divided by its norm."""
    units = []
    for x in (u, v):
        norm = insert(aten.linalg_vector_norm.default, x, 2, [dim], True)
        units.append(insert(aten.div.Tensor, x, insert(aten.clamp_min.default, norm, eps)))
    return insert(aten.sum.dim_IntList, insert(aten.mul.Tensor, *units), [dim])


@_spelling(aten.tensor_split.sections, aten.tensor_split.indices)
def _tensor_split(insert: Any, x: fx.Node, how: Any, dim: int = 0, **_: Any) -> fx.Node | None:
    size = x.meta["val"].shape[dim]
    if not isinstance(size, int):
        return None
    if isinstance(how, int):
        lengths = [size // how + (i < size % how) for i in range(how)]
    else:
        ends = [0, *(min(max(i + size if i < 0 else i, 0), size) for i in how), size]
        lengths = [max(0, b - a) for a, b in itertools.pairwise(ends)]
    return insert(aten.split_with_sizes.default, x, lengths, dim)


@_spelling(aten.einsum.default)
def _einsum(insert: Any, equation: str, operands: Sequence[fx.Node], *, active: Any, **_: Any) -> fx.Node | None:
    """Two operands with one summed index: a matrix product, or a linear layer where one is a constant matrix."""
    inputs, arrow, result = equation.replace(" ", "").partition("->")
    names = inputs.split(",")
    if len(operands) != 2 or "." in equation or not arrow or any(len(set(name)) < len(name) for name in (*names, result)):
        return None
    (a, left), (b, right) = zip(operands, names, strict=True)
    if not active(a) and not set(left) & set(right) & set(result):
        (a, left), (b, right) = (b, right), (a, left)
    batch = [c for c in result if c in left and c in right]
    rows, columns = ([c for c in result if c in own and c not in other] for own, other in ((left, right), (right, left)))
    summed = [c for c in left if c in right and c not in result]
    if len(summed) != 1 or {*left, *right} != {*batch, *rows, *columns, *summed} or len(columns) > 1:
        return None
    if not batch and not active(b) and len(columns) == 1:
        turned = _ordered(insert, b, right, [*columns, *summed])
        product = insert(aten.linear.default, _ordered(insert, a, left, [*rows, *summed]), turned)
        return _ordered(insert, product, [*rows, *columns], list(result))
    if len(rows) > 1:
        return None
    a = _ordered(insert, a, left, [*batch, *rows, *summed])
    b = _ordered(insert, b, right, [*batch, *summed, *columns])
    a = a if rows else insert(aten.unsqueeze.default, a, -2)
    b = b if columns else insert(aten.unsqueeze.default, b, -1)
    product = insert(aten.matmul.default, a, b)
    if not columns:
        product = insert(aten.squeeze.dim, product, -1)
    if not rows:
        product = insert(aten.squeeze.dim, product, -1 if not columns else -2)
    return _ordered(insert, product, [*batch, *rows, *columns], list(result))


def _ordered(insert: Any, x: fx.Node, names: Sequence[str], wanted: Sequence[str]) -> fx.Node:
    order = [list(names).index(name) for name in wanted]
    if order == list(range(len(order))):
        return x
    moved = [i for i, place in enumerate(order) if place != i]
    if len(moved) == 2:
        return insert(aten.transpose.int, x, *moved)
    return insert(aten.permute.default, x, order)
