"""Rearrangements without a rule of their own, and everything else that is differentiable: by automatic differentiation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from fastrel.errors import UnsupportedModelError
from fastrel.graph.nodes import describe
from fastrel.graph.patterns import LIKE_ANOTHER
from fastrel.reference import operators as reference
from fastrel.rules.pointwise import forked
from fastrel.rules.registry import rule
from fastrel.transform.context import Context
from fastrel.transform.lanes import Lane, Lanes

aten = torch.ops.aten

#: Index maps whose result may hold a constant, or another activation, beside entries of an operand.
MIXING_IN = {
    aten.pad.default,
    aten.constant_pad_nd.default,
    aten.index_put.default,
    aten.index_fill.int_Scalar,
    aten.index_copy.default,
    aten.masked_scatter.default,
    aten.scatter.src,
    aten.scatter.value,
    aten.fill.Scalar,
    aten.fill.Tensor,
    aten.diagonal_scatter.default,
    aten.im2col.default,
    aten.masked_fill.Scalar,
    aten.masked_fill.Tensor,
    aten.where.self,
    aten.where.ScalarOther,
    aten.tril.default,
    aten.triu.default,
    aten.slice_scatter.default,
    aten.select_scatter.default,
    aten.maximum.default,
    aten.minimum.default,
}

#: Operators whose result holds entries of the operand, each any number of times, and zeros or constants.
INDEX_MAPS = MIXING_IN | {
    aten.roll.default,
    aten.flip.default,
    aten.stack.default,
    aten.index.Tensor,
    aten.as_strided.default,
    aten.index_select.default,
    aten.gather.default,
    aten.take_along_dim.default,
    aten.repeat.default,
    aten.repeat_interleave.self_int,
    aten.expand.default,
    aten.expand_as.default,
    aten.broadcast_to.default,
    aten.unfold.default,
    aten.pixel_shuffle.default,
    aten.pixel_unshuffle.default,
    aten.channel_shuffle.default,
    aten.movedim.int,
    aten.movedim.intlist,
    aten.swapaxes.default,
    aten.swapdims.default,
    aten.t.default,
    aten.unsafe_chunk.default,
    aten.narrow.default,
    aten.diagonal.default,
}


def _places(t: Context, node: fx.Node) -> list[tuple[int, int | None, fx.Node]]:
    """Where a node's activations stand among its arguments: (argument, place in a list or None, the activation)."""
    found: list[tuple[int, int | None, fx.Node]] = []
    for i, arg in enumerate(node.args[:1] if node.target in LIKE_ANOTHER else node.args):
        if isinstance(arg, (list, tuple)):
            found += [(i, j, x) for j, x in enumerate(arg) if t.is_active(x)]
        elif t.is_active(arg):
            found.append((i, None, arg))  # type: ignore[arg-type]
    if any(t.is_active(x) for x in node.kwargs.values()):
        raise UnsupportedModelError(f"no relevance rule for {describe(node)}, an activation given by keyword")
    return found


def vjp(op: Any, lane: Tensor, argument: int, place: int | None, kwargs: tuple[tuple[str, Any], ...], *args: Any) -> Tensor:
    """lane [K, *out] through op, to one of its arguments [K, *in]."""
    f, x, others = _of_one(op, argument, place, kwargs, args)
    return reference.vjp(f, lane, x, *others)


def _of_one(op: Any, argument: int, place: int | None, kwargs: Any, args: tuple[Any, ...]) -> tuple[Any, Tensor, Any]:
    """op as a function of one of its arguments, or of one in a list of them: (function, that argument, all arguments)."""

    def f(x: Tensor, *given: Any) -> Any:
        changed = list(given)
        changed[argument] = x if place is None else [*given[argument][:place], x, *given[argument][place + 1 :]]
        return op(*changed, **dict(kwargs))

    return f, args[argument] if place is None else args[argument][place], args


def _arguments(t: Context, node: fx.Node) -> tuple[Any, ...]:
    return fx.map_arg(node.args, t.value)


@rule(*INDEX_MAPS)
def index_map(t: Context, node: fx.Node, out: Lanes) -> None:
    """R' = vjp(R): where entries go, their lanes come from; those of copies add up.

    A row is divided among the features that come from activations: what else a token holds, such as a constant in the place of
    some features, is no other token that could take a part of it.
    """
    kwargs = tuple(node.kwargs.items())
    values = _arguments(t, node)
    places = _places(t, node)
    for argument, place, x in places:

        def back(lane: Lane, is_row: bool, argument: int = argument, place: int | None = place, x: fx.Node = x) -> Lane:
            full = t.dense(lane, node, is_row).node
            if is_row:
                if node.target in MIXING_IN:
                    where = tuple((argument, place) for argument, place, _ in places)
                    full = t.emit.call(divided_among_taken, full, node.target, where, kwargs, *values)
                else:
                    full = t.emit.call(divided_row, full, *t.shape(node))
            moved = t.emit.call(vjp, node.target, full, argument, place, kwargs, *values)
            return Lane(summed_features(t, x, moved) if is_row else moved)

        t.index_map(x, out, back)


def statistic(t: Context, node: fx.Node, out: Lanes) -> None:
    """What a spelled-out norm divides by: the ordinary gradient, and no relevance reaches it."""
    if out.rel or out.row:
        return generic(t, node, out)
    x, values = node.args[0], _arguments(t, node)
    if out.grad and t.wants(x):
        lane = t.dense(out.grad, node).node
        t.give(x, grad=Lane(t.emit.call(vjp, node.target, lane, 0, None, tuple(node.kwargs.items()), *values)))


def divided_row(row: Tensor, *shape: int) -> Tensor:
    """A row [K, *], size 1 in feature dimensions, in equal parts over the features of a value."""
    full = row.expand(row.shape[0], *shape)
    return full * (row.numel() / max(full.numel(), 1))


def divided_among_taken(row: Tensor, op: Any, where: tuple[tuple[int, int | None], ...], kwargs: Any, *args: Any) -> Tensor:
    """A row [K, *], size 1 in feature dimensions, in equal parts over the features that op takes from its activations."""
    taken: Any = sum(_taken(*_of_one(op, argument, place, kwargs, args)) for argument, place in where)
    features = [dim for dim in range(taken.dim()) if row.shape[dim + 1] == 1 < taken.shape[dim]]
    count = taken.to(row.dtype).sum(features, keepdim=True) if features else taken.to(row.dtype)
    return row / count.where(count > 0, 1.0) * (taken > 0)


def _taken(f: Any, x: Tensor, others: Any) -> Tensor:
    """Which entries of f(x) come from x: 1 there and 0 elsewhere."""
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        y = f(leaf, *others)
        seed = torch.zeros_like(y).requires_grad_()
        (back,) = torch.autograd.grad(y, leaf, seed, create_graph=True)
        # Where all is overwritten, the way back does not depend on what comes.
        return torch.autograd.grad(back.sum(), seed)[0] if back.requires_grad else torch.zeros_like(y)


def summed_features(t: Context, x: fx.Node, row: fx.Node) -> fx.Node:
    """A row that was divided among features, back to size 1 there."""
    dims = [dim + 1 for dim in t.features(x)]
    return t.emit.call(aten.sum.dim_IntList, row, dims, True) if dims else row


def share(op: Any, rel: Tensor, count: int, argument: int, place: int | None, kwargs: Any, *args: Any) -> Tensor:
    """Relevance [K, *in] of one of an operator's `count` activations, of rel [K, *out]."""
    f, x, others = _of_one(op, argument, place, kwargs, args)
    return reference.generic(lambda leaf: f(leaf, *others), x, rel, count)


def generic(t: Context, node: fx.Node, out: Lanes) -> None:
    """Any differentiable operator: R' = x ⊙ vjp(R ⊘ f(x)), the gradient by vjp. Reported, because its sums have signs.

    A row passes only where the operator leaves the tokens where they are.
    """
    if not isinstance(node.meta.get("val"), Tensor) or not hasattr(node.target, "_schema"):
        raise UnsupportedModelError(f"no relevance rule for {describe(node)}")
    t.generic.append(describe(node))
    kwargs, values, places = tuple(node.kwargs.items()), _arguments(t, node), _places(t, node)
    operands = [x for _, _, x in places]
    for (argument, place, x), row in zip(places, forked(t, out.row, node, operands, [None] * len(places)), strict=True):
        grad = rel = None
        if t.wants(x):
            where = (argument, place, kwargs)
            if out.grad:
                grad = Lane(t.emit.call(vjp, node.target, t.dense(out.grad, node).node, *where, *values))
            if out.rel:
                dense = t.dense(out.rel, node).node
                rel = Lane(t.emit.call(share, node.target, dense, len(places), *where, *values))
        if out.row and (t.row_shape(x) != t.row_shape(node) or _mixes_tokens(t, node, argument, place, x)):
            raise UnsupportedModelError(f"no relevance rule for {describe(node)}: it moves or mixes tokens")
        t.give(x, grad, rel, row)


def _mixes_tokens(t: Context, node: fx.Node, argument: int, place: int | None, x: fx.Node) -> bool:
    """Whether changing the first token of an operand changes others of the result: tried on small random values."""
    axes = t.axes(node)
    tokens = [dim for dim, axis in enumerate(axes) if any(role == "token" for _, role in axis)]
    values: dict[fx.Node, Any] = {}
    generator = torch.Generator().manual_seed(0)  # a seed for all would be one for every GPU, too

    def sample(n: fx.Node) -> Any:
        value = n.meta["val"]
        if isinstance(value, Tensor):
            shape = [size if isinstance(size, int) else 2 for size in value.shape]
            values[n] = (
                torch.randn(shape, dtype=value.dtype, generator=generator, device="cpu")
                if value.is_floating_point()
                else torch.zeros(shape, dtype=value.dtype, device="cpu")
            )
            return values[n]
        return value if isinstance(value, (int, float, bool)) else 2

    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            args: list[Any] = list(fx.map_arg(node.args, sample))
            kwargs = dict(fx.map_arg(node.kwargs, sample))
            before = node.target(*args, **kwargs)  # type: ignore[operator]
            changed = values[x].clone()
            first = tuple(slice(0, 1) if dim in tokens else slice(None) for dim in range(changed.dim()))
            changed[first] += 1
            args[argument] = changed if place is None else [*args[argument][:place], changed, *args[argument][place + 1 :]]
            moved = node.target(*args, **kwargs) != before  # type: ignore[operator]
    except (RuntimeError, IndexError, TypeError):
        return True
    moved[first] = False
    return bool(moved.any())
