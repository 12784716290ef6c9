"""A softmax that is written out: exp(x − m) / Σ exp(x − m), whatever m, exp(x − logsumexp(x)), a product divided by the sums."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from fastrel import functional
from fastrel.eager.kinds import unchanged
from fastrel.eager.tape import Tape, handles, is_activation


@dataclasses.dataclass(frozen=True)
class Part:
    """What a value is of the softmax of some scores over their last dimension."""

    scores: Tensor  # before anything was taken away from all of a row
    kind: str  # "shifted", "exponentials", "sums", "logarithm of sums", "logarithm"


def part_of(tape: Tape, x: Any) -> Part | None:
    """What is known of a value."""
    return tape.facts(x).softmax if is_activation(x) else None


def _remembered(tape: Tape, x: Tensor, scores: Tensor, kind: str) -> Tensor:
    return tape.also(x, softmax=Part(scores, kind))


def _is_one_per_row(x: Any, of: Tensor) -> bool:
    return isinstance(x, Tensor) and x.dim() == of.dim() and x.shape[-1] == 1 and bool(of.shape[-1] > 1)


def shifted(tape: Tape, out: Tensor, u: Any, v: Any) -> Tensor:
    """`out` = u − v, of which a softmax is that of u where v is one number for each row."""
    if not is_activation(u) or not _is_one_per_row(v, u) or out.shape != u.shape:
        return out
    known, by = part_of(tape, u), part_of(tape, v)
    scores = known.scores if known is not None and known.kind == "shifted" else u
    is_log = by is not None and by.kind == "logarithm of sums" and by.scores is scores
    return _remembered(tape, out, scores, "logarithm" if is_log else "shifted")


def summed(tape: Tape, out: Tensor, x: Tensor, over: list[int]) -> Tensor:
    """`out`, the sum of exponentials over their last dimension."""
    known = part_of(tape, x)
    if known is None or known.kind != "exponentials" or over != [x.dim() - 1]:
        return out
    return _remembered(tape, out, known.scores, "sums")


def logarithm_of_sums(tape: Tape, out: Tensor, x: Tensor, over: list[int]) -> Tensor:
    """`out`, log Σ exp(x) over the last dimension."""
    return _remembered(tape, out, x, "logarithm of sums") if over == [x.dim() - 1] else out


def divided(tape: Tape, value: Tensor, u: Tensor, v: Tensor) -> Tensor | None:
    """`value` = u / v as an attention map, where v are the sums of exponentials u; None for others."""
    top, below = part_of(tape, u), part_of(tape, v)
    if top is None or below is None or (top.kind, below.kind) != ("exponentials", "sums") or top.scores is not below.scores:
        return None
    return _map_of(tape, value, top.scores) if _is_one_per_row(v, u) else None


def _map_of(tape: Tape, value: Tensor, scores: Tensor) -> Tensor:
    return tape.know(functional.identity(value, scores), keys=-1)


@handles("exp")
def exp(tape: Tape, x: Tensor) -> Tensor:
    """Exponentials of scores, or a softmax of which x is the logarithm."""
    known = part_of(tape, x)
    if known is not None and known.kind == "logarithm":
        return _map_of(tape, x.detach().exp(), known.scores)
    scores = known.scores if known is not None and known.kind == "shifted" else x
    return _remembered(tape, unchanged(tape, "exp", torch.exp, (x,), {}), scores, "exponentials")


@handles("log_softmax")
def log_softmax(tape: Tape, x: Tensor, dim: int | None = None, *args: Any, **options: Any) -> Tensor:
    """The logarithm of a softmax."""
    out = unchanged(tape, "log_softmax", torch.log_softmax, (x, -1 if dim is None else dim), _dtype(args, options))
    return _remembered(tape, out, x, "logarithm") if dim in (-1, x.dim() - 1) else out


def _dtype(args: tuple[Any, ...], options: dict[str, Any]) -> dict[str, Any]:
    """The dtype among a log-softmax's options: of torch.log_softmax, or after _stacklevel of torch.nn.functional's."""
    dtype = options.get("dtype", next((arg for arg in args if isinstance(arg, torch.dtype)), None))
    return {} if dtype is None else {"dtype": dtype}


def weights_of(tape: Tape, a: Any) -> tuple[Tensor, Tensor] | None:
    """The attention map of exponentials that a product takes before they are divided by their sums, and these; None for others."""
    known = part_of(tape, a)
    if known is None or known.kind != "exponentials" or a.dim() < 3:
        return None
    sums = a.detach().sum(-1, keepdim=True)
    return _map_of(tape, a.detach() / sums, known.scores), sums
