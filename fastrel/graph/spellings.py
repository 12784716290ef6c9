"""Operators that are others in one word, written as these: `.mT`, `hstack`, `addcmul`, any einsum of two, cosine similarity …"""

from __future__ import annotations

import itertools
import operator
import string
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from fastrel.graph import places
from fastrel.graph.nodes import insert_like, replace
from fastrel.graph.patterns import is_softmax_over_keys

aten = torch.ops.aten

#: What an operator is made of: given an `insert(target, *args)` and its own arguments, its result.
Spelling = Callable[..., "fx.Node | None"]

SPELLINGS: dict[Any, Spelling] = {**places.SPELLINGS}


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
            new = insert_like(node, target, *args)
            if any(is_active(x) for x in new.all_input_nodes):
                written.add(new)
            return new

        with graph.inserting_before(node):
            result = spelling(insert, *node.args, active=is_active, **node.kwargs)
        if result is not None:
            replace(node, result)
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


@_spelling(aten.max.other)
def _larger(insert: Any, u: fx.Node, v: fx.Node, **_: Any) -> fx.Node:
    return insert(aten.maximum.default, u, v)


@_spelling(aten.min.other)
def _smaller(insert: Any, u: fx.Node, v: fx.Node, **_: Any) -> fx.Node:
    return insert(aten.minimum.default, u, v)


@_spelling(aten.ravel.default)
def _ravel(insert: Any, x: fx.Node, **_: Any) -> fx.Node:
    return insert(aten.reshape.default, x, [-1])


@_spelling(aten.hstack.default)
def _hstack(insert: Any, parts: Sequence[fx.Node], **_: Any) -> fx.Node:
    return insert(aten.cat.default, parts, min(1, parts[0].meta["val"].dim() - 1))


@_spelling(aten.dstack.default)
def _dstack(insert: Any, parts: Sequence[fx.Node], **_: Any) -> fx.Node | None:
    if any(x.meta["val"].dim() < 2 for x in parts):
        return None
    wide = [insert(aten.unsqueeze.default, x, 2) if x.meta["val"].dim() == 2 else x for x in parts]
    return insert(aten.cat.default, wide, 2)


@_spelling(aten.column_stack.default)
def _column_stack(insert: Any, parts: Sequence[fx.Node], **_: Any) -> fx.Node:
    wide = [insert(aten.unsqueeze.default, x, 1) if x.meta["val"].dim() == 1 else x for x in parts]
    return insert(aten.cat.default, wide, 1)


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


@_spelling(aten.addcdiv.default)
def _addcdiv(insert: Any, x: fx.Node, a: fx.Node, b: fx.Node, value: float = 1, **_: Any) -> fx.Node:
    return insert(aten.add.Tensor, x, _scaled(insert, insert(aten.div.Tensor, a, b), value))


@_spelling(aten.lerp.Scalar)
def _between(insert: Any, u: fx.Node, v: fx.Node, weight: float, **_: Any) -> fx.Node:
    return insert(aten.add.Tensor, insert(aten.mul.Tensor, u, 1 - weight), insert(aten.mul.Tensor, v, weight))


@_spelling(aten.lerp.Tensor)
def _between_by(insert: Any, u: fx.Node, v: fx.Node, weight: fx.Node, **_: Any) -> fx.Node:
    rest = insert(aten.rsub.Scalar, weight, 1)
    return insert(aten.add.Tensor, insert(aten.mul.Tensor, u, rest), insert(aten.mul.Tensor, v, weight))


@_spelling(aten.mv.default)
def _mv(insert: Any, x: fx.Node, vector: fx.Node, **_: Any) -> fx.Node:
    return insert(aten.matmul.default, x, vector)


@_spelling(aten.inner.default)
def _inner(insert: Any, u: fx.Node, v: fx.Node, *, active: Any, **_: Any) -> fx.Node | None:
    if active(v) or v.meta["val"].dim() not in (1, 2):
        return None
    return insert(aten.matmul.default, u, v) if v.meta["val"].dim() == 1 else insert(aten.linear.default, u, v)


@_spelling(aten.tensordot.default)
def _tensordot(
    insert: Any, u: fx.Node, v: fx.Node, left: Sequence[int], right: Sequence[int], *, active: Any, **_: Any
) -> fx.Node | None:
    letters = iter(string.ascii_letters)
    names = [[next(letters) for _ in range(x.meta["val"].dim())] for x in (u, v)]
    for i, j in zip(left, right, strict=True):
        names[1][j] = names[0][i]
    result = [c for c in (*names[0], *names[1]) if (c in names[0]) != (c in names[1])]
    return _einsum(insert, f"{''.join(names[0])},{''.join(names[1])}->{''.join(result)}", (u, v), active=active)


@_spelling(aten.glu.default)
def _glu(insert: Any, x: fx.Node, dim: int = -1, **_: Any) -> fx.Node | None:
    size = x.meta["val"].shape[dim]
    if not isinstance(size, int):
        return None
    halves = insert(aten.split.Tensor, x, size // 2, dim)
    a, b = (insert(operator.getitem, halves, i) for i in range(2))
    return insert(aten.mul.Tensor, a, insert(aten.sigmoid.default, b))


@_spelling(aten.cosine_similarity.default)
def _cosine(insert: Any, u: fx.Node, v: fx.Node, dim: int = 1, eps: float = 1e-8, **_: Any) -> fx.Node | None:
    """The sum of the product of both, each divided by its norm."""
    dim = dim if dim < 0 else dim - max(x.meta["val"].dim() for x in (u, v))  # of both as they are broadcast
    if any(-dim > x.meta["val"].dim() for x in (u, v)) or len({str(x.meta["val"].shape[dim]) for x in (u, v)}) > 1:
        return None
    units = []
    for x in (u, v):
        norm = insert(aten.linalg_vector_norm.default, x, 2, [dim], True)
        units.append(insert(aten.div.Tensor, x, insert(aten.clamp_min.default, norm, eps)))
    return insert(aten.sum.dim_IntList, insert(aten.mul.Tensor, *units), [dim])


@_spelling(aten.pairwise_distance.default)
def _distance(
    insert: Any, u: fx.Node, v: fx.Node, p: float = 2, eps: float = 1e-6, keep: bool = False, **_: Any
) -> fx.Node:
    apart = insert(aten.add.Scalar, insert(aten.sub.Tensor, u, v), eps)
    return insert(aten.linalg_vector_norm.default, apart, p, [-1], keep)


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


@_spelling(aten.diff.default)
def _diff(
    insert: Any, x: fx.Node, n: int = 1, dim: int = -1, prepend: Any = None, append: Any = None, **_: Any
) -> fx.Node | None:
    """Each entry less the one before."""
    if prepend is not None or append is not None:
        return None
    for _i in range(n):
        later, earlier = insert(aten.slice.Tensor, x, dim, 1, sys.maxsize), insert(aten.slice.Tensor, x, dim, 0, -1)
        x = insert(aten.sub.Tensor, later, earlier)
    return x


@_spelling(aten.nansum.default)
def _nansum(insert: Any, x: fx.Node, dims: Any = None, keep: bool = False, **options: Any) -> fx.Node | None:
    if options.get("dtype") is not None:
        return None
    known = insert(aten.masked_fill.Scalar, x, insert(aten.isnan.default, x), 0)
    return insert(aten.sum.dim_IntList, known, dims, keep)


@_spelling(aten.nanmean.default)
def _nanmean(insert: Any, x: fx.Node, dims: Any = None, keep: bool = False, **options: Any) -> fx.Node | None:
    total = _nansum(insert, x, dims, keep, **options)
    known = insert(aten.logical_not.default, insert(aten.isnan.default, x))
    return total and insert(aten.div.Tensor, total, insert(aten.sum.dim_IntList, known, dims, keep))


@_spelling(aten.einsum.default)
def _einsum(insert: Any, equation: str, operands: Sequence[fx.Node], *, active: Any, **_: Any) -> fx.Node | None:
    """Of one operand sums; of two a matrix product, a linear layer where one is a constant matrix, or a product entry by entry; of
    more, of the first two and then of the others."""
    named = _named_dimensions(equation, operands)
    if named is None:
        return None
    *names, result = named
    if len(operands) > 2:
        kept = "".join(c for c in dict.fromkeys(names[0] + names[1]) if c in "".join((*names[2:], result)))
        begun = _einsum(insert, f"{names[0]},{names[1]}->{kept}", operands[:2], active=active)
        if begun is None:
            return None
        return _einsum(insert, f"{','.join((kept, *names[2:]))}->{result}", (begun, *operands[2:]), active=active)
    if len(operands) == 1:
        return _summed(insert, operands[0], names[0], result, result)
    (a, left), (b, right) = zip(operands, names, strict=True)
    if not active(a) and (not set(left) & set(right) & set(result) or set(left) <= set(right)):
        (a, left), (b, right) = (b, right), (a, left)
    if (
        active(a) and active(b) and any(is_softmax_over_keys(x) for x in (a, b))
    ):  # a map stays one: summed after the product
        kept = result + "".join(c for c in left + right if (c in left) != (c in right) and c not in result)
        if kept != result:
            unsummed = _einsum(insert, f"{left},{right}->{kept}", (a, b), active=active)
            return None if unsummed is None else _summed(insert, unsummed, kept, result, result)
    a, left = _alone(insert, a, left, {*right, *result})
    b, right = _alone(insert, b, right, {*left, *result})
    batch = [c for c in result if c in left and c in right]
    rows, columns = ([c for c in result if c in own and c not in other] for own, other in ((left, right), (right, left)))
    summed = [c for c in left if c in right and c not in result]
    if not summed:
        u, v = (_beside(insert, x, own, result) for x, own in ((a, left), (b, right)))
        return insert(aten.mul.Tensor, u, v)
    sizes = {**dict(zip(right, b.meta["val"].shape, strict=True)), **dict(zip(left, a.meta["val"].shape, strict=True))}
    if not batch and not active(b) and columns:
        turned = _ordered(insert, b, right, [*columns, *summed])
        turned = _merged(insert, _merged(insert, turned, len(columns), len(summed)), 0, len(columns))
        x = _merged(insert, _ordered(insert, a, left, [*rows, *summed]), len(rows), len(summed))
        product = _parted(insert, insert(aten.linear.default, x, turned), len(rows), [sizes[c] for c in columns])
        return None if product is None else _ordered(insert, product, [*rows, *columns], list(result))
    of_tokens = left[0] in right or left[-1] not in summed or not all(isinstance(sizes[c], int) for c in (*batch, *summed))
    if not active(b) and not columns and of_tokens:
        return _weighted_sum(insert, (a, left), (b, right), result)
    if not active(b) and batch:
        return _of_each(insert, (a, left), (b, right), (batch, rows, summed, columns), sizes, result)
    first = len(batch)
    a = _ordered(insert, a, left, [*batch, *rows, *summed])
    b = _ordered(insert, b, right, [*batch, *summed, *columns])
    a = _merged(insert, _merged(insert, a, first + len(rows), len(summed)), first, len(rows))
    b = _merged(insert, _merged(insert, b, first + len(summed), len(columns)), first, len(summed))
    a = a if rows else insert(aten.unsqueeze.default, a, -2)
    b = b if columns else insert(aten.unsqueeze.default, b, -1)
    whole: fx.Node | None = insert(aten.matmul.default, a, b)
    if not columns:
        whole = insert(aten.squeeze.dim, whole, -1)
    if not rows:
        whole = insert(aten.squeeze.dim, whole, -1 if not columns else -2)
    for names_ in (columns, rows):  # the last first: places before it stay
        place = first + (len(rows) > 0 if names_ is columns else 0)
        whole = whole and _parted(insert, whole, place, [sizes[c] for c in names_])
    return whole and _ordered(insert, whole, [*batch, *rows, *columns], list(result))


def _beside(insert: Any, x: fx.Node, names: str, result: str) -> fx.Node:
    """x with its dimensions where a result has them, and size 1 for those that it lacks."""
    x = _ordered(insert, x, names, [c for c in result if c in names])
    for i, c in enumerate(result):
        x = x if c in names else insert(aten.unsqueeze.default, x, i)
    return x


def _weighted_sum(insert: Any, x: tuple[fx.Node, str], weights: tuple[fx.Node, str], result: str) -> fx.Node:
    """Entries of x, samples and tokens among its dimensions, times constant weights, added up."""
    (a, left), (b, right) = x, weights
    b = _ordered(insert, b, right, [c for c in left if c in right])
    for i, c in enumerate(left):
        if c not in right:
            b = insert(aten.unsqueeze.default, b, i)
    return _summed(insert, insert(aten.mul.Tensor, a, b), left, result, result)


def _of_each(
    insert: Any, x: tuple[fx.Node, str], weights: tuple[fx.Node, str], names: Sequence[list[str]], sizes: Any, result: str
) -> fx.Node | None:
    """x W with a constant matrix for each head or expert: [*rows, heads, row, in] times [heads, in, out]."""
    (a, left), (b, right), (batch, rows, summed, columns) = x, weights, names
    before = [*rows[:-1], *batch, *rows[-1:]]
    a = _merged(insert, _ordered(insert, a, left, [*before, *summed]), len(before), len(summed))
    b = _merged(insert, _ordered(insert, b, right, [*batch, *summed, *columns]), len(batch) + len(summed), len(columns))
    b = _merged(insert, b, len(batch), len(summed))
    a = a if rows else insert(aten.unsqueeze.default, a, -2)
    b = b if columns else insert(aten.unsqueeze.default, b, -1)
    product = insert(aten.matmul.default, a, b)
    product = product if rows else insert(aten.squeeze.dim, product, -2)
    whole = _parted(insert, product, len(before), [sizes[c] for c in columns])
    whole = whole if columns else insert(aten.squeeze.dim, product, -1)
    return whole and _ordered(insert, whole, [*before, *columns], list(result))


@_spelling(aten.sum.dim_IntList)
def _of_pairs(
    insert: Any, x: fx.Node, dims: Any = None, keep: bool = False, *, active: Any, **options: Any
) -> fx.Node | None:
    """(u[:, :, None] * v[:, None]).sum(-1), of each pair of tokens: a matrix product."""
    factors = []
    while x.target in (aten.mul.Tensor, aten.div.Tensor) and not _are_active(x, active):  # by a number
        if isinstance(x.args[1], fx.Node) and (x.args[1].meta["val"].dim() or active(x.args[1])):
            return None
        factors.append((x.target, x.args[1]))
        x = x.args[0]  # type: ignore[assignment]
    if x.target is not aten.mul.Tensor or not _are_active(x, active) or not dims or options:
        return None
    ndim = x.meta["val"].dim()
    over = {dim % ndim for dim in dims}
    operands = [_unexpanded(y, ndim) for y in x.args]
    own = [{i for i, size in enumerate(y.meta["val"].shape) if not _is_one(size)} for y in operands]
    u, v = operands
    if any(y.meta["val"].dim() != ndim for y in operands) or not (own[0] - own[1] - over and own[1] - own[0] - over):
        return None
    if not over <= own[0] & own[1]:
        return None
    names = string.ascii_letters[:ndim]
    nobody = [i for i in range(ndim) if i not in own[0] | own[1]]
    left, right = ([i for i in range(ndim) if i in mine] for mine in own)
    u, v = (_squeezed(insert, y, [i for i in range(ndim) if i not in mine]) for y, mine in zip((u, v), own, strict=True))
    result = [i for i in range(ndim) if i not in over and i not in nobody]
    equation = ",".join("".join(names[i] for i in side) for side in (left, right))
    found = _einsum(insert, f"{equation}->{''.join(names[i] for i in result)}", (u, v), active=active)
    for i in sorted([*nobody, *(over if keep else ())]) if found is not None else ():
        found = insert(aten.unsqueeze.default, found, i - sum(j in over and not keep for j in range(i)))
    for target, factor in reversed(factors) if found is not None else ():
        found = insert(target, found, factor)
    return found


def _are_active(x: fx.Node, active: Any) -> bool:
    return all(isinstance(y, fx.Node) and active(y) for y in x.args)


def _is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1


def _unexpanded(x: Any, ndim: int) -> fx.Node:
    """x before its sizes of 1 were enlarged."""
    while x.target is aten.expand.default and x.args[0].meta["val"].dim() == ndim:
        x = x.args[0]
    return x


def _squeezed(insert: Any, x: fx.Node, dims: list[int]) -> fx.Node:
    if x.target is aten.unsqueeze.default and dims == [x.args[1] % x.meta["val"].dim()]:
        return x.args[0]  # type: ignore[return-value]
    return insert(aten.squeeze.dims, x, dims) if dims else x


def _named_dimensions(equation: str, operands: Sequence[fx.Node]) -> list[str] | None:
    """A name for each dimension of the operands and of the result, the dots and a result that is not written included; None where a
    dimension has the name of another."""
    inputs, arrow, result = equation.replace(" ", "").partition("->")
    names = inputs.split(",")
    if not arrow:
        letters = inputs.replace(",", "").replace(".", "")
        result = "..." * ("." in inputs) + "".join(sorted(c for c in set(letters) if letters.count(c) == 1))
    counts = [x.meta["val"].dim() - len(name) + 3 for x, name in zip(operands, names, strict=True) if "." in name]
    if len(set(counts)) > 1:
        return None
    dots = [c for c in string.ascii_letters if c not in equation][: counts[0] if counts else 0]
    names = [name.replace("...", "".join(dots)) for name in (*names, result)]
    shapes = [x.meta["val"].shape for x in operands]
    for c in dots:  # sizes of 1 stand for any
        if len({str(shape[name.index(c)]) for shape, name in zip(shapes, names, strict=False) if c in name}) > 1:
            return None
    return None if any(len(set(name)) < len(name) for name in names) else names


def _summed(insert: Any, x: fx.Node, names: str, kept: Any, wanted: Sequence[str]) -> fx.Node:
    """x without the dimensions that are not kept, in the order that is wanted."""
    over = [i for i, c in enumerate(names) if c not in kept]
    x = insert(aten.sum.dim_IntList, x, over) if over else x
    return _ordered(insert, x, [c for c in names if c in kept], wanted)


def _alone(insert: Any, x: fx.Node, names: str, known: set[str]) -> tuple[fx.Node, str]:
    """An operand without the dimensions that nothing else has: their sum."""
    kept = "".join(c for c in names if c in known)
    return _summed(insert, x, names, kept, kept), kept


def _merged(insert: Any, x: fx.Node, start: int, count: int) -> fx.Node:
    """`count` dimensions as one."""
    return x if count < 2 else insert(aten.flatten.using_ints, x, start, start + count - 1)


def _parted(insert: Any, x: fx.Node, dim: int, sizes: Sequence[Any]) -> fx.Node | None:
    """A dimension as several; None where more than one size is not known."""
    if len(sizes) < 2:
        return x
    known = [size if isinstance(size, int) else -1 for size in sizes]
    return insert(aten.unflatten.int, x, dim, known) if known.count(-1) < 2 else None


def _ordered(insert: Any, x: fx.Node, names: Sequence[str], wanted: Sequence[str]) -> fx.Node:
    order = [list(names).index(name) for name in wanted]
    if order == list(range(len(order))):
        return x
    moved = [i for i, place in enumerate(order) if place != i]
    if len(moved) == 2:
        return insert(aten.transpose.int, x, *moved)
    return insert(aten.permute.default, x, order)


@_spelling(operator.getitem)
def _part(insert: Any, whole: fx.Node, index: int, **_: Any) -> fx.Node | None:
    """The variance or the mean of var_mean, the least or the largest of aminmax, each by an operator of its own."""
    if whole.target is aten.aminmax.default and whole.kwargs.get("dim") is not None:
        target = aten.amax.default if index else aten.amin.default
        return insert(target, whole.args[0], [whole.kwargs["dim"]], bool(whole.kwargs.get("keepdim", False)))
    if whole.target not in (aten.var_mean.correction, aten.var_mean.dim):
        return None
    given = {a.name: a.default_value for a in whole.target._schema.arguments if a.has_default_value()}
    given |= dict(zip((a.name for a in whole.target._schema.arguments), whole.args, strict=False)) | dict(whole.kwargs)
    x, dims, keep = given["self"], given["dim"], given["keepdim"]
    unbiased = given.get("unbiased", given.get("correction", 1) in (None, 1))
    if dims is None or given.get("correction") not in (None, 0, 1):
        return None
    return insert(aten.mean.dim, x, dims, keep) if index else insert(aten.var.dim, x, dims, unbiased, keep)


@_spelling(aten.matmul.default, aten.bmm.default)
def _with_a_constant(insert: Any, weights: fx.Node, x: fx.Node, *, active: Any, **_: Any) -> fx.Node | None:
    """A constant row [.., 1, T] times values [.., T, D] is their weighted sum: pooling by a mask. Values [T, D] times weights
    [h, D, d] are values [1, T, D]. A weight [out, in] times values [.., in, T] is a layer."""
    missing = x.meta["val"].dim() - weights.meta["val"].dim()
    if active(weights) and not active(x) and missing > 0 and weights.meta["val"].dim() > 1:
        for _i in range(missing):
            weights = insert(aten.unsqueeze.default, weights, 0)
        return insert(aten.matmul.default, weights, x)
    if active(weights) or not active(x) or x.meta["val"].dim() < 3 or weights.meta["val"].dim() < 2:
        return None
    rows = weights.meta["val"].shape[-2]
    if weights.meta["val"].dim() == 2 and isinstance(rows, int) and rows > 1:
        return insert(
            aten.transpose.int, insert(aten.linear.default, insert(aten.transpose.int, x, -2, -1), weights), -2, -1
        )
    if not isinstance(rows, int) or rows != 1:
        return None
    product = insert(aten.mul.Tensor, x, insert(aten.transpose.int, weights, -2, -1))
    return insert(aten.sum.dim_IntList, product, [-2], True)
