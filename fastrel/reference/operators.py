"""Relevance rules of operators that are given as functions: picks and maxima, averages over windows, and anything else.

They are written with J, the Jacobian of the operator f at x, of which automatic differentiation gives the products R J (`vjp`).
Relevances [..., *f(x)] may carry leading dimensions (several targets of one input).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastrel.reference.rules import Rules, safe_divide


def vjp(f: Callable[..., Any], rel: Tensor, x: Tensor, *others: Any) -> Tensor:
    """R J for f(x, *others) and its derivatives with respect to x. rel [..., *f(x)] -> [..., *x].

    Where f returns several tensors, rel is that of the first. Differentiable where autograd records and an argument requires it.
    """
    tensors = [t for t in (rel, x, *others) if isinstance(t, Tensor)]
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    with torch.enable_grad():
        leaf = x.to(rel.dtype) if keep and x.requires_grad else x.detach().to(rel.dtype).requires_grad_()
        y = f(leaf, *others)
        y = y[0] if isinstance(y, tuple) else y
        lead = rel.shape[: rel.dim() - y.dim()]
        results = [
            torch.autograd.grad(y, leaf, r, retain_graph=True, create_graph=keep, allow_unused=True)[0]
            for r in rel.reshape(lead.numel(), *y.shape)
        ]
        stacked = torch.stack([torch.zeros_like(leaf) if r is None else r for r in results]).reshape(*lead, *x.shape)
    return stacked if keep else stacked.detach()


def layer(
    f: Callable[[Tensor, Tensor], Tensor], x: Tensor, weight: Tensor, rel: Tensor, rules: Rules = "positive"
) -> Tensor:
    """Eq. (5) of a layer f(x, weight) that is linear in both: convolutions, products with a weight of each head or expert.

    Z = f(x⁺, W⁺) + f(x⁻, W⁻),  S = R ⊘ Z,  R' = x⁺ ⊙ (S J_{W⁺}) + x⁻ ⊙ (S J_{W⁻}).
    """
    parts = [(x.clamp(min=0), weight.clamp(min=0)), (x.clamp(max=0), weight.clamp(max=0))]
    s = safe_divide(rel, sum(f(a, w) for a, w in parts), rules)  # type: ignore[arg-type]
    return sum(a * vjp(f, s, a, w) for a, w in parts)  # type: ignore[return-value]


def index_map(f: Callable[[Tensor], Tensor], x: Tensor, rel: Tensor, rules: Rules = "positive") -> Tensor:
    """Entries of x in other places, any number of times, or the largest of several: R' = R J, where they came from.

    The largest takes all; among equals the one that f picks, or all in equal parts where f is amax.
    official: x ⊙ ((R ⊘ f(x)) J), whose 1e-9 matters.
    """
    return vjp(f, rel, x) if rules == "positive" else x * vjp(f, safe_divide(rel, f(x), rules), x)


def pooling(f: Callable[[Tensor], Tensor], x: Tensor, rel: Tensor) -> Tensor:
    """Averages or sums over windows, interpolation: by share among what has the result's sign, as in a mean.

    σ = sign f(x), p = (σx)⁺, R' = p ⊙ ((R ⊘ f(p)) J).
    """
    y = f(x)
    total = torch.zeros(*rel.shape[: rel.dim() - y.dim()], *x.shape, dtype=rel.dtype, device=rel.device)
    for sign in (1, -1):
        part = (sign * x).clamp(min=0)
        s = safe_divide(rel * (sign * y > 0), f(part))
        total += part * vjp(f, s, part)
    return total


def generic(f: Callable[[Tensor], Tensor], x: Tensor, rel: Tensor, operands: int = 1) -> Tensor:
    """Any differentiable operator: R' = x ⊙ ((R ⊘ f(x)) J), the same part of it for each of its `operands` activations.

    Its sums have signs, so that the published code's `safe_divide` is taken under every rule set.
    """
    return x * vjp(f, safe_divide(rel, f(x), "official"), x) / operands
