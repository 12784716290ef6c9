"""Sums, products of entries, reductions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrel import functional
from fastrel.eager import exponentials, parts, runs
from fastrel.eager.kinds import generic, move, unchanged
from fastrel.eager.tape import Tape, handles, is_activation
from fastrel.errors import UnsupportedModelError


def _plain(x: Any) -> Any:
    return x.detach() if isinstance(x, Tensor) else x


@handles("add", "radd")
def add(tape: Tape, u: Any, v: Any, *, alpha: float = 1) -> Tensor:
    """Residual adds, position embeddings, masks; x·f(x) + g(x) is an activation function of x."""
    if alpha != 1:
        return add(tape, u, mul(tape, v, alpha) if is_activation(v) else alpha * v)
    u, v = (u, v) if is_activation(u) else (v, u)
    of_u, of_v = tape.facts(u), tape.facts(v)
    both_maps = {"keys": of_u.keys, "mixed": of_u.mixed or of_v.mixed} if of_u.keys and of_u.keys == of_v.keys else {}
    if is_activation(v):
        if of_u.root is of_v.root:
            return tape.of_root(u.detach() + v.detach(), u)
        if (one := parts.added(tape, u, v)) is not None or (one := _of_tokens(tape, u, v)) is not None:
            return one
        batch_dim = tape.batch_dim(torch.broadcast_shapes(u.shape, v.shape))
        return parts.kept(tape, tape.know(functional.add(u, v, tape.rules, batch_dim=batch_dim), **both_maps), u, v)
    if isinstance(v, Tensor) and tape.rules != "positive":
        return functional.add_constant(u, v, tape.rules)
    out = tape.pointwise(u.detach() + v, u)
    out = tape.know(out, **both_maps) if both_maps else parts.kept(tape, out, u, v)
    return tape.also(out, run=of_u.run) if not isinstance(v, Tensor) and v == 0 else out


def _of_tokens(tape: Tape, u: Tensor, v: Tensor) -> Tensor | None:
    """u + v of two sums of one value's tokens, as the sum of all of them; None for others."""
    run = runs.joined(tape.facts(u).run, tape.facts(v).run)
    if run is None or u.shape != v.shape or tape.batch_dim(run.whole.shape) == 1:
        return None
    tokens = run.whole
    if run.stop - run.start < tokens.shape[1]:
        tokens = move(tape, "narrow", torch.narrow, (tokens, 1, run.start, run.stop - run.start), {})
    out = sum_(tape, tokens, 1, run.keep)
    return tape.also(out if run.factor == 1 else mul(tape, out, run.factor), run=run)


@handles("sub", "subtract")
def sub(tape: Tape, u: Any, v: Any, *, alpha: float = 1) -> Tensor:
    """u − v as u + (−v)."""
    minus = tape.pointwise(-v.detach(), v) if is_activation(v) else -v
    out = add(tape, u, minus, alpha=alpha)
    return exponentials.shifted(tape, out, u, v) if alpha == 1 else out


@handles("rsub")
def rsub(tape: Tape, v: Any, u: Any, *, alpha: float = 1) -> Tensor:
    """u − v."""
    return sub(tape, u, v, alpha=alpha)


@handles("mul", "rmul", "multiply")
def mul(tape: Tape, u: Any, v: Any) -> Tensor:
    """Constants and the scales of norms pass relevance unchanged, x·f(x) is an activation function of x, others are gates."""
    u, v = (u, v) if is_activation(u) else (v, u)
    of_u, of_v = tape.facts(u), tape.facts(v)
    if not is_activation(v):
        return tape.also(tape.keep_map(tape.pointwise(u.detach() * v, u), u, v), run=runs.scaled(of_u.run, v))
    if of_u.scale != of_v.scale:
        x, scale = (u, v) if of_v.scale else (v, u)
        return tape.keep_map(functional.identity(x.detach() * scale.detach(), x), x, scale)
    if of_u.root is of_v.root:
        return tape.of_root(u.detach() * v.detach(), u)
    return tape.keep_map(functional.mul(u, v), *((u, v) if of_u.keys else (v, u)))


@handles("cosine_similarity")
def cosine_similarity(tape: Tape, x1: Tensor, x2: Tensor, dim: int = 1, eps: float = 1e-8) -> Tensor:
    """The sum of the product of both, each divided by its norm, which passes relevance unchanged."""
    dim = dim if dim < 0 else dim - max(x1.dim(), x2.dim())  # of both as they are broadcast
    units = [
        unchanged(tape, "normalize", F.normalize, (x,), {"dim": dim, "eps": eps})
        if is_activation(x)
        else F.normalize(x, dim=dim, eps=eps)
        for x in (x1, x2)
    ]
    return sum_(tape, mul(tape, *units), dim)


@handles("pairwise_distance")
def pairwise_distance(tape: Tape, x1: Any, x2: Any, p: float = 2, eps: float = 1e-6, keepdim: bool = False) -> Tensor:
    """The norm of the difference."""
    return vector_norm(tape, add(tape, sub(tape, x1, x2), eps), p, -1, keepdim)


@handles("div", "truediv", "divide", "true_divide")
def div(tape: Tape, u: Any, v: Any, *, rounding_mode: str | None = None) -> Tensor:
    """By a constant, by what a norm divides by, and f(x)/g(x)."""
    if rounding_mode is not None:
        raise UnsupportedModelError(f"no relevance function for a division with rounding_mode={rounding_mode!r}")
    value = _plain(u) / _plain(v)
    if not is_activation(v):
        by = 1 / v if isinstance(v, (int, float)) and v else None
        return tape.also(tape.keep_map(tape.pointwise(value, u), u, v), run=runs.scaled(tape.facts(u).run, by))
    if not is_activation(u):
        return tape.pointwise(value, v)
    if (attention := exponentials.divided(tape, value, u, v)) is not None:
        return attention
    if tape.facts(v).scale and not tape.facts(u).scale:
        return tape.keep_map(functional.identity(value, u), u, v)
    if tape.facts(u).root is tape.facts(v).root:
        return tape.of_root(value, u)
    raise UnsupportedModelError("no relevance function for a division by an activation")


# Reductions.


def _dims(x: Tensor, dim: Any) -> list[int]:
    return list(range(x.dim())) if dim is None else [dim] if isinstance(dim, int) else list(dim)


def _statistic(tape: Tape, out: Tensor, x: Tensor, dim: Any = None, keepdim: bool = False) -> Tensor:
    """A reduction of x; over its features it makes the number per token that a norm which is spelled out divides by."""
    over = [d % x.dim() for d in _dims(x, dim)]
    return tape.know(out, scale=x.dim() - 1 in over if keepdim else over == [x.dim() - 1])


def _by_share(
    tape: Tape, f: Callable[..., Tensor], x: Tensor, dim: Any, keepdim: bool, dtype: torch.dtype | None
) -> Tensor:
    dims, given = _dims(x, dim), x if dtype in (None, x.dtype) else functional.identity(x.detach().to(dtype), x)
    out = functional.reduction(lambda x: f(x, dims, keepdim), given, dims, keepdim, tape.rules)
    return _statistic(tape, out, x, dim, keepdim)


@handles("mean")
def mean(tape: Tape, x: Tensor, dim: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Tensor:
    """By share, over tokens or features."""
    out = _by_share(tape, torch.mean, x, dim, keepdim, dtype)
    return _total(tape, out, x, dim, keepdim, 1 / x.shape[1] if x.dim() > 1 and x.shape[1] else 1.0)


def _total(tape: Tape, out: Tensor, x: Tensor, dim: Any, keepdim: bool, factor: float) -> Tensor:
    """`out` is the sum of x over its tokens, times a factor; that is remembered, or that it is something else."""
    if x.dim() != 3 or [d % 3 for d in _dims(x, dim)] != [1] or out.dtype != x.dtype:
        return out
    run = tape.facts(x).run
    run = runs.Run(x, 0, x.shape[1]) if run is None or run.summed else run
    return tape.also(out, run=run.total(keepdim, factor))


@handles("sum")
def sum_(tape: Tape, x: Tensor, dim: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Tensor:
    """As `mean`; parts of a layer that were stacked add up to it."""
    whole = None if keepdim or dtype is not None else parts.unstacked(tape, x, _dims(x, dim))
    if whole is not None:
        return whole
    out = _total(tape, _by_share(tape, torch.sum, x, dim, keepdim, dtype), x, dim, keepdim, 1.0)
    return exponentials.summed(tape, out, x, [d % x.dim() for d in _dims(x, dim)])


@handles("var")
def var(tape: Tape, x: Tensor, *args: Any, **options: Any) -> Tensor:
    """As `mean`."""
    return _spread(tape, torch.var, x, *args, **options)


@handles("std")
def std(tape: Tape, x: Tensor, *args: Any, **options: Any) -> Tensor:
    """As `mean`."""
    return _spread(tape, torch.std, x, *args, **options)


def _spread(tape: Tape, f: Callable[..., Tensor], x: Tensor, *args: Any, **options: Any) -> Tensor:
    given = (options.pop("dim"), *args) if "dim" in options else args
    over = None if not given or isinstance(given[0], bool) else given[0]
    with torch.no_grad():
        kept = f(x.detach(), *given, **options).dim() == x.dim()
    out = functional.reduction(lambda x: f(x, *given, **options), x, _dims(x, over), kept, tape.rules)
    return _statistic(tape, out, x, over, kept)


@handles("logsumexp")
def logsumexp(tape: Tape, x: Tensor, dim: Any, keepdim: bool = False) -> Tensor:
    """By softmax."""
    out = tape.know(functional.logsumexp(x, _dims(x, dim), keepdim))
    return exponentials.logarithm_of_sums(tape, out, x, [d % x.dim() for d in _dims(x, dim)])


@handles("nansum")
def nansum(tape: Tape, x: Tensor, dim: Any = None, keepdim: bool = False) -> Tensor:
    """The sum of what is no NaN."""
    return sum_(tape, move(tape, "masked_fill", torch.masked_fill, (x, x.detach().isnan(), 0), {}), dim, keepdim)


@handles("nanmean")
def nanmean(tape: Tape, x: Tensor, dim: Any = None, keepdim: bool = False) -> Tensor:
    """The mean of what is no NaN."""
    return div(tape, nansum(tape, x, dim, keepdim), (~x.detach().isnan()).sum(_dims(x, dim), keepdim))


@handles("var_mean")
def var_mean(tape: Tape, x: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """Both, each by its own rule."""
    over = options.get("dim", args[0] if args and not isinstance(args[0], bool) else None)
    return var(tape, x, *args, **options), mean(tape, x, over, options.get("keepdim", False))


@handles("diff")
def diff(tape: Tape, x: Tensor, n: int = 1, dim: int = -1) -> Tensor:
    """Each entry less the one before."""
    for _ in range(n):
        length = x.shape[dim] - 1
        later, earlier = (move(tape, "narrow", torch.narrow, (x, dim, i, length), {}) for i in (1, 0))
        x = sub(tape, later, earlier)
    return x


@handles("norm")
def norm(tape: Tape, x: Tensor, p: Any = None, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Tensor:
    """The older spelling of `vector_norm`."""
    if p == "nuc":
        raise UnsupportedModelError("no relevance function for the nuclear norm")
    return vector_norm(tape, x, 2 if p in (None, "fro") else p, dim, keepdim, dtype=dtype)


@handles("vector_norm", "linalg_vector_norm")
def vector_norm(
    tape: Tape, x: Tensor, ord: Any = 2, dim: Any = None, keepdim: bool = False, *, dtype: Any = None
) -> Tensor:
    """As `mean`."""
    out = generic(tape, "vector_norm", torch.linalg.vector_norm, (x, ord, dim, keepdim), {"dtype": dtype})
    return _statistic(tape, out, x, dim, keepdim)


@handles("amax")
def amax(tape: Tape, x: Tensor, dim: Any = (), keepdim: bool = False) -> Tensor:
    """Autograd gives the largest entries all, equals in equal parts."""
    return _statistic(tape, x.amax(dim, keepdim), x, dim or None, keepdim)


@handles("amin")
def amin(tape: Tape, x: Tensor, dim: Any = (), keepdim: bool = False) -> Tensor:
    """As `amax`."""
    return _statistic(tape, x.amin(dim, keepdim), x, dim or None, keepdim)


@handles("glu")
def glu(tape: Tape, x: Tensor, dim: int = -1) -> Tensor:
    """a σ(b) of two halves, a gate."""
    a, b = move(tape, "chunk", torch.chunk, (x, 2, dim), {})
    return mul(tape, a, unchanged(tape, "sigmoid", torch.sigmoid, (b,), {}))


@handles("lerp")
def lerp(tape: Tape, u: Any, v: Any, weight: Any) -> Tensor:
    """(1 − weight) u + weight v."""
    rest = sub(tape, 1, weight) if is_activation(weight) else 1 - weight
    parts = [mul(tape, x, by) if is_activation(x) or is_activation(by) else x * by for x, by in ((u, rest), (v, weight))]
    return add(tape, *parts)


@handles("addcdiv")
def addcdiv(tape: Tape, x: Any, a: Any, b: Any, *, value: float = 1) -> Tensor:
    """x + value a / b."""
    ratio = div(tape, a, b) if is_activation(a) or is_activation(b) else a / b
    return add(tape, x, mul(tape, ratio, value) if is_activation(ratio) else ratio * value)


@handles("addcmul")
def addcmul(tape: Tape, x: Any, a: Any, b: Any, *, value: float = 1) -> Tensor:
    """x + value a b."""
    product = mul(tape, a, b) if is_activation(a) or is_activation(b) else a * b
    return add(tape, x, mul(tape, product, value) if is_activation(product) else product * value)
