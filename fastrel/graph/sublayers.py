"""What an attention block makes of the values that it mixed: an output layer, the residual add, a norm of the sum."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fastrel.errors import UnsupportedModelError
from fastrel.graph import axes as axes_
from fastrel.graph.nodes import arguments, describe
from fastrel.graph.patterns import IDENTITIES, reads

aten = torch.ops.aten

_MOVES = {*IDENTITIES, *axes_.RESHAPES, aten.permute.default, aten.transpose.int}


@dataclass(frozen=True)
class Sublayer:
    """norm(x + γ ⊙ (W m + b)), m the mixed values with their heads side by side.

    `merged`: m; `weight`: W [out, in]; `scales`: what γ is a product of, parameters and numbers; `stream`: x, of which the values
    were made; `total`: the sum; `norm`: the layer norm that is all that reads it (None: the sum itself goes on).
    """

    merged: fx.Node
    weight: fx.Node
    scales: tuple[Any, ...]
    stream: fx.Node
    total: fx.Node
    norm: fx.Node | None


def sublayer(mixed: fx.Node, value: fx.Node, active: Collection[fx.Node]) -> Sublayer:
    """The rest of the block that mixes `value` into `mixed`; `active`: what depends on the model's input.

    Raises:
        UnsupportedModelError: it is none of this form.
    """
    merged, layer = _along(mixed, _MOVES)
    if layer is None or layer.target is not aten.linear.default or layer.args[0] is not merged:
        raise UnsupportedModelError(f"{describe(mixed)}: no output layer reads the heads' values side by side")
    weight: Any = layer.args[1]
    scales: list[Any] = []
    x, reader = _along(layer, IDENTITIES)
    while reader is not None and reader.target in (aten.mul.Tensor, aten.mul.Scalar):
        factor = next((y for y in reader.args[:2] if y is not x), x)
        if factor in active:
            break
        scales.append(factor)
        x, reader = _along(reader, IDENTITIES)
    stream: Any = None
    if reader is not None and reader.target is aten.add.Tensor and not reader.kwargs:
        stream = next((y for y in reader.args if y is not x), None)
    if weight in active or stream not in active or not _leads_to(stream, value):
        raise UnsupportedModelError(f"{describe(mixed)}: its output is not added to what the block reads")
    assert reader is not None
    end, norm = _along(reader, IDENTITIES)
    if norm is not None and norm.target is aten.layer_norm.default and len(arguments(norm, count=2)[1]) == 1:
        return Sublayer(merged, weight, tuple(scales), stream, reader, norm)
    if any(y.target is aten.add.Tensor and all(z in active for z in y.args[:2]) for y in _readers(end)):
        return Sublayer(merged, weight, tuple(scales), stream, reader, None)
    raise UnsupportedModelError(
        f"{describe(reader)}: what an attention block adds up to goes neither on nor into a layer norm"
    )


def _along(x: fx.Node, through: Collection[Any]) -> tuple[fx.Node, fx.Node | None]:
    """x moved on through some operators as long as nothing else reads it, and what alone reads it then, if it is one."""
    while len(found := _readers(x)) == 1:
        if found[0].target not in through:
            return x, found[0]
        x = found[0]
    return x, None


def _readers(x: fx.Node) -> list[fx.Node]:
    """What reads the entries of a value, not its sizes alone."""
    sizes = (int, torch.SymInt)
    return [user for user in x.users if x in reads(user) and not isinstance(user.meta.get("val"), sizes)]


def _leads_to(stream: fx.Node, value: fx.Node) -> bool:
    """Whether a value is made of the stream."""
    seen, todo = {value}, [value]
    while todo:
        node = todo.pop()
        if node is stream:
            return True
        new = [x for x in reads(node) if x not in seen and not x < stream]
        seen.update(new)
        todo += new
    return False
