"""Layers computed in parts: x W[:, :n]ᵀ + y W[:, n:]ᵀ is [x, y] Wᵀ, one layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastrel import functional
from fastrel.eager.kinds import move
from fastrel.eager.tape import Tape, handles, is_activation


@dataclass(frozen=True)
class Layer:
    """A value u + Σ x_i W_iᵀ + b with W_i [out, in_i] columns of one weight or x_i heads of one attention, which `whole` tells."""

    whole: tuple[Any, ...]
    parts: tuple[tuple[Tensor, Tensor], ...]
    bias: Tensor | float = 0.0
    other: Tensor | None = None


def of_columns(tape: Tape, out: Tensor, x: Tensor, given: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`out` = x Wᵀ + b, remembered where W [out, in] holds some columns of a larger weight; `given`: W as the model has it."""
    cut = tape.facts(given).whole
    whole = (id(cut),) if cut is not None and _are_columns(weight, cut) else tape.facts(x).head
    if whole is None:
        return out
    layer = Layer(whole, ((x, weight.detach()),), 0.0 if bias is None else bias.detach())
    return tape.know(out, layer=layer, root=tape.facts(out).root, origin=tape.facts(out).origin)


def _are_columns(weight: Tensor, whole: Tensor) -> bool:
    """Whether a weight [out, n] is a part of the inputs of a larger one, or one of several."""
    if weight.numel() >= whole.numel() or whole.dim() not in (2, 3) or weight.dim() != 2:
        return False
    if whole.dim() == 3:
        return weight.numel() * len(whole) == whole.numel()
    return len(weight) == whole.shape[int(weight.stride() != whole.stride())]


def of_one_head(tape: Tape, out: Tensor, values: Tensor, sizes: Sequence[int]) -> Tensor:
    """`out` = A V of one head, [B, T, d], remembered with what all heads of an attention have in common."""
    origin = tape.facts(values).origin
    key = id(values if origin is None else origin)
    return tape.know(out, head=(key, tuple(sizes), values.shape[-1]))


@handles("stack")
def stack(tape: Tape, tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    """A move; parts of one layer may be added up afterwards."""
    out = move(tape, "stack", torch.stack, (tensors, dim), {})
    of_layers = all(isinstance(x, Tensor) and tape.facts(x).layer is not None for x in tensors)
    return tape.know(out, stacked=(tuple(tensors), dim % out.dim())) if of_layers else out


def unstacked(tape: Tape, x: Tensor, dims: Sequence[int]) -> Tensor | None:
    """The sum over a dimension along which parts of one layer were stacked; None for others."""
    given = tape.facts(x).stacked
    if given is None or [dim % x.dim() for dim in dims] != [given[1]]:
        return None
    total: Tensor | None = given[0][0]
    for part in given[0][1:]:
        total = None if total is None else added(tape, total, part)
    return total


def added(tape: Tape, u: Tensor, v: Tensor) -> Tensor | None:
    """u + v of two activations where both are parts of one layer; None for others."""
    left, right = tape.facts(u).layer, tape.facts(v).layer
    if left is None or right is None or left.whole != right.whole or (left.other is not None and right.other is not None):
        return None
    parts = left.parts + right.parts
    places = {(w.data_ptr(), w.shape, w.stride()) for _, w in parts}
    if len(places) < len(parts) or len({id(x) for x, _ in parts}) < len(parts):
        return None
    joined = move(tape, "cat", torch.cat, ([x for x, _ in parts], -1), {})
    bias = left.bias + right.bias
    out = functional.linear(
        joined, torch.cat([w for _, w in parts], 1), bias if isinstance(bias, Tensor) else None, tape.rules
    )
    other = right.other if left.other is None else left.other
    if other is not None:
        out = functional.add(other, out, tape.rules, batch_dim=tape.batch_dim(out.shape))
    return tape.know(out, layer=Layer(left.whole, parts, bias, other))


def kept(tape: Tape, out: Tensor, u: Any, v: Any) -> Tensor:
    """`out` = u + v, remembered where one of them is a part of a layer and the other a bias or a value beside it."""
    for x, y in ((v, u), (u, v)):
        layer = tape.facts(x).layer if is_activation(x) else None
        if layer is None:
            continue
        if is_activation(y):
            if layer.other is not None:
                continue
            layer = replace(layer, other=y)
        elif isinstance(y, Tensor) and y.shape == out.shape[-1:]:
            layer = replace(layer, bias=layer.bias + y)
        elif bool(torch.as_tensor(y != 0).any()):
            continue
        facts = tape.facts(out)
        return tape.know(out, layer=layer, root=facts.root)
    return out
