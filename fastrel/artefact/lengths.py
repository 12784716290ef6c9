"""How long texts may be. The uncompiled program refuses longer ones; compiled code would read past the end of a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fastrel.engine import Call
from fastrel.graph.axes import RESHAPES
from fastrel.graph.patterns import IDENTITIES

aten = torch.ops.aten

#: What gives on the numbers that it gets, in another shape or dtype.
_SAME_NUMBERS = {*IDENTITIES, *RESHAPES, aten.slice.Tensor, aten.expand.default}

#: Longer texts are not asked about.
FURTHEST = 1 << 20


def source_of(index: fx.Node) -> fx.Node:
    """Where an embedding's indices come from: an input's node where they are its own numbers."""
    while index.target in _SAME_NUMBERS:
        index = index.args[0]  # type: ignore[assignment]
    return index


def longest(call: Call) -> int | None:
    """The largest size of the dimensions that vary besides the batch; None: any.

    It is what the graph's guards take, and what tables of positions hold, whose indices are computed on the CPU for a text as long as
    the table.
    """
    varies = [_varies(node) for node in call.captured.inputs]
    if not any(varies):
        return None
    limit = _by_guards(call, varies)
    for node in call.captured.graph.nodes:
        if node.target is not aten.embedding.default or source_of(node.args[1]) in call.captured.inputs:
            continue
        rows = int(node.args[0].meta["val"].shape[0])
        highest = int(_computed(call, node.args[1], _resized(call.tensors, varies, rows)).max())
        if highest >= rows - 1:  # else it is no table of positions: of kinds of tokens, or of distances that end somewhere
            limit = min(limit, 2 * rows - 1 - highest)
    return None if limit >= FURTHEST else limit


def _varies(node: fx.Node) -> list[int]:
    shape = node.meta["val"].shape
    return [dim for dim, size in enumerate(shape) if dim and not isinstance(size, int)]


def _resized(tensors: Sequence[Tensor], varies: Sequence[list[int]], size: int) -> list[Tensor]:
    """Inputs on the CPU with another size, their own numbers again and again."""
    found = []
    for x, dims in zip(tensors, varies, strict=True):
        x = x.detach().cpu()
        for dim in dims:
            x = x.index_select(dim, torch.arange(size) % x.shape[dim])
        found.append(x)
    return found


def _by_guards(call: Call, varies: Sequence[list[int]]) -> int:
    def accepted(size: int) -> bool:
        shapes = [
            [size if dim in dims else n for dim, n in enumerate(x.shape)]
            for x, dims in zip(call.tensors, varies, strict=True)
        ]
        return call.captured.guards.accept([torch.empty(shape, device="meta") for shape in shapes])

    low = max(x.shape[dim] for x, dims in zip(call.tensors, varies, strict=True) for dim in dims)
    high = low
    while high < FURTHEST and accepted(high):
        low, high = high, 2 * high
    while high - low > 1 and high < FURTHEST:
        middle = (low + high) // 2
        low, high = (middle, high) if accepted(middle) else (low, middle)
    return FURTHEST if high >= FURTHEST else low


def _computed(call: Call, node: fx.Node, inputs: Sequence[Tensor]) -> Tensor:
    """The value of a node that depends on little, for these inputs."""
    placeholders = [one for one in call.captured.graph.nodes if one.op == "placeholder"]
    known: dict[fx.Node, Any] = dict(zip(placeholders, [*call.values[: len(call.captured.owners)], *inputs], strict=True))

    def value(one: fx.Node) -> Any:
        if one not in known:
            args, kwargs = fx.node.map_arg((one.args, one.kwargs), value)
            kwargs = {**kwargs, "device": torch.device("cpu")} if kwargs.get("device") else kwargs
            assert callable(one.target)
            known[one] = one.target(*(x.cpu() if isinstance(x, Tensor) else x for x in args), **kwargs)
        return known[one]

    with torch.no_grad():
        return value(node)
