"""Values that are added up, averaged or compared at places that an index names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastrel import functional
from fastrel.eager.arithmetic import add, div, mul
from fastrel.eager.kinds import move
from fastrel.eager.tape import Tape, handles, is_activation
from fastrel.errors import UnsupportedModelError


def accumulates(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Whether a function that may write over entries adds to them in this call."""
    if name == "index_put":
        return bool(kwargs.get("accumulate", args[3] if len(args) > 3 else False))
    return name == "scatter" and kwargs.get("reduce") is not None


def _onto(tape: Tape, base: Tensor, added: Callable[[Tensor, Tensor], Tensor], source: Any) -> Tensor:
    """`added(zeros, source)`, a sum of parts of the source in each place, plus what was there."""
    zeros = torch.zeros_like(base.detach())
    if not is_activation(source):
        return add(tape, base, added(zeros, source))
    total = tape.know(functional.pooling(lambda x: added(zeros.to(x.dtype), x), source))
    return add(tape, total, base) if is_activation(base) or bool(base.any()) else total


@handles("index_add")
def index_add(tape: Tape, base: Tensor, dim: int, index: Tensor, source: Any, *, alpha: float = 1) -> Tensor:
    """A sum in each place."""
    source = source if alpha == 1 else mul(tape, source, alpha) if is_activation(source) else source * alpha
    return _onto(tape, base, lambda zeros, x: zeros.index_add(dim, index, x), source)


@handles("scatter_add")
def scatter_add(tape: Tape, base: Tensor, dim: int, index: Tensor, src: Any) -> Tensor:
    """A sum in each place."""
    return _onto(tape, base, lambda zeros, x: zeros.scatter_add(dim, index, x), src)


@handles("scatter")
def scatter(tape: Tape, base: Tensor, dim: int, index: Tensor, src: Any, *, reduce: str | None = None) -> Tensor:
    """A move, or a sum in each place."""
    if reduce is None:
        return move(tape, "scatter", torch.scatter, (base, dim, index, src), {})
    if reduce != "add":
        raise UnsupportedModelError(f"no relevance function for scatter with reduce={reduce!r}")
    return scatter_add(tape, base, dim, index, src)


@handles("index_put")
def index_put(tape: Tape, base: Tensor, indices: Any, values: Any, accumulate: bool = False) -> Tensor:
    """A move, or a sum in each place."""
    if not accumulate:
        return move(tape, "index_put", torch.index_put, (base, indices, values), {})
    return _onto(tape, base, lambda zeros, x: zeros.index_put(indices, x, accumulate=True), values)


@handles("scatter_reduce")
def scatter_reduce(
    tape: Tape, base: Tensor, dim: int, index: Tensor, src: Any, reduce: str, *, include_self: bool = True
) -> Tensor:
    """A sum, a mean or the largest in each place."""
    return _reduced(tape, torch.scatter_reduce, torch.scatter_add, (base, dim, index, src), reduce, include_self)


@handles("index_reduce")
def index_reduce(
    tape: Tape, base: Tensor, dim: int, index: Tensor, source: Any, reduce: str, *, include_self: bool = True
) -> Tensor:
    """A sum, a mean or the largest in each place."""
    return _reduced(tape, torch.index_reduce, torch.index_add, (base, dim, index, source), reduce, include_self)


def _reduced(
    tape: Tape, function: Any, sums: Any, given: tuple[Tensor, int, Tensor, Any], reduce: str, include_self: bool
) -> Tensor:
    base, dim, index, source = given
    name = function.__name__
    if reduce in ("amax", "amin"):
        return move(tape, name, function, (*given, reduce), {"include_self": include_self})
    if reduce not in ("sum", "mean"):
        raise UnsupportedModelError(f"no relevance function for {name} with reduce={reduce!r}")
    count = sums(torch.zeros_like(base.detach()), dim, index, torch.ones_like(source.detach()))
    if not include_self:
        base = base.masked_fill(count > 0, 0)
    total = _onto(tape, base, lambda zeros, x: sums(zeros, dim, index, x), source)
    return total if reduce == "sum" else div(tape, total, count + 1 if include_self else count.clamp(min=1))
