"""Pooling over tokens: what each has of the result."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastrel.reference.operators import vjp
from fastrel.reference.rules import safe_divide


def logsumexp(x: Tensor, rel: Tensor, dims: Sequence[int]) -> Tensor:
    """log Σ exp x over `dims`, which rel keeps with size 1: R' = R ⊙ softmax(x), the weight of each entry in the gradient."""
    top = x.amax(tuple(dims), keepdim=True)
    weights = (x - top).exp()
    return rel * (weights / weights.sum(tuple(dims), keepdim=True))


def token_weights(x: Tensor, weight: Tensor | None, dims: Sequence[int], features: Sequence[int]) -> Tensor:
    """The share of each token in Σ over `dims` of x = weight ⊙ (what is summed): |weight| where it is a constant, else equal
    parts; tokens that are 0 in every feature have none. Size 1 in `features`; shares sum to 1 over `dims`."""
    size = x if weight is None else weight.expand_as(x).to(x.dtype).abs()
    if weight is None:
        size = (x != 0).to(x.dtype).amax(tuple(features), keepdim=True) if features else (x != 0).to(x.dtype)
    elif features:
        size = size.mean(tuple(features), keepdim=True)
    over = tuple(dim for dim in dims if dim not in features)
    total = size.sum(over, keepdim=True) if over else size
    count = size.numel() / total.numel()
    return torch.where(total > 0, size / torch.where(total > 0, total, 1.0), 1.0 / count)


def evidence(x: Tensor, grad: Tensor, rel: Tensor, over: Sequence[int], features: Sequence[int]) -> Tensor:
    """The share of each token in what is pooled over dimensions `over`: E(x ∇ ⊙ R)⁺, summed over `features`, which keep size 1.

    Pooling is an attention map of one query whose values are the tokens x [*]: its gradient at a token is Σ x ∇ over features, its
    relevance Σ R, and they make its part of eq. (13). `grad` and `rel` are x's, [K, *]; shares [K, *] sum to 1 over `over`, in equal
    parts among tokens that are not 0 where nothing is positive.
    """
    equal = token_weights(x, None, over, features)
    over = tuple(dim + 1 for dim in over)
    weights = parts_of_eq_13(x, grad, rel, features)
    total = weights.sum(over, keepdim=True)
    return torch.where(total > 0, weights / torch.where(total > 0, total, 1.0), equal)


def parts_of_eq_13(x: Tensor, grad: Tensor, rel: Tensor, features: Sequence[int]) -> Tensor:
    """(Σ x ∇ · Σ R)⁺ of tokens that are pooled, sums over `features`, which keep size 1. [*], [K, *], [K, *] -> [K, *]."""
    dims = tuple(dim + 1 for dim in features)
    slopes = x * grad
    if dims:
        slopes, rel = slopes.sum(dims, keepdim=True), rel.sum(dims, keepdim=True)
    return (slopes * rel).clamp(min=0)


def tokens_read(row: Tensor) -> Tensor:
    """Over how many tokens a row [K, B, *] is spread: (Σ r)²/Σ r², [K, B]; 1 where it is 0."""
    tokens = row.flatten(2)
    squares = tokens.square().sum(2)
    return torch.where(squares > 0, tokens.sum(2).square() / torch.where(squares > 0, squares, 1.0), 1.0)


def evidence_of_entries(x: Tensor, grad: Tensor, rel: Tensor) -> Tensor:
    """(x ∇ R)⁺ of every entry: by its sums two values that make one (two texts' vectors) share a row. [*], [K, *], [K, *] -> [K, *]."""
    return (x * grad * rel).clamp(min=0)


def sums_at_places(sums: Callable[[Tensor], Tensor], row: Tensor, weights: Tensor) -> Tensor:
    """A row [K, *y] of y = sums(x), entries of x added up at places, divided among the entries of each place by `weights` [K, *x] ≥ 0,
    in equal parts where all are 0."""
    ones = torch.ones_like(weights[0])
    count = sums(ones)
    found = []
    for own, weight in zip(row, weights.expand(len(row), *ones.shape), strict=True):
        total = sums(weight)
        by_weight = weight * vjp(sums, torch.where(total > 0, own / torch.where(total > 0, total, 1.0), 0.0), ones)
        equally = vjp(sums, torch.where((total > 0) | (count == 0), 0.0, own / count.clamp_min(1)), ones)
        found.append(by_weight + equally)
    return torch.stack(found)


def evidence_of_windows(
    f: Callable[[Tensor], Tensor],
    x: Tensor,
    grad: Tensor,
    rel: Tensor,
    row: Tensor,
    over: Sequence[int],
    features: Sequence[int],
) -> Tensor:
    """A row [K, *y], size 1 in `features`, of y = f(x), sums W x of tokens over dimensions `over` with weights W ≥ 0: back to x.

    A pooling is an attention map W [windows, tokens], the same for all samples and features, whose gradient is x ∇y and whose
    relevance is x⁺ ⊙ (R ⊘ f(x⁺)) (of entries with the result's sign): what each token gets of a window's row is its part of eq. (13),
    normalised over the window, or its weight where nothing is positive. grad, rel: y's, [K, *y].
    """
    rest = [dim for dim in range(x.dim()) if dim not in over and dim not in features]
    weights = _weights_of_windows(f, x, over)
    value, y = (_samples_features_tokens(z[None], rest, features, over) for z in (x, f(x)))
    grad, rel, row = (_samples_features_tokens(z, rest, features, over) for z in (grad, rel, row))
    slopes = weights * (grad.mT @ value)
    shares = torch.zeros_like(slopes)
    for sign in (1, -1):
        part = (sign * value).clamp(min=0)
        s = safe_divide(rel * (sign * y > 0), part @ weights.mT)
        shares += weights * (s.mT @ part)
    shares = (slopes * shares).clamp(min=0)
    total = shares.sum(-1, keepdim=True)
    shares = torch.where(total > 0, shares / torch.where(total > 0, total, 1.0), weights / weights.sum(-1, keepdim=True))
    back = row @ shares  # [K, samples, 1, tokens]
    order = [*rest, *features, *over]
    shape = [1 if dim in features else x.shape[dim] for dim in order]
    return back.reshape(len(back), *shape).permute(0, *(order.index(dim) + 1 for dim in range(x.dim())))


def _weights_of_windows(f: Callable[[Tensor], Tensor], x: Tensor, over: Sequence[int]) -> Tensor:
    """W [windows, tokens] of f, which does the same to every sample and feature: what it makes of each token alone."""
    tokens = math.prod(x.shape[dim] for dim in over)
    one_by_one = torch.eye(tokens, dtype=x.dtype, device=x.device)
    alone = one_by_one.reshape(tokens, *(x.shape[dim] if dim in over else 1 for dim in range(1, x.dim())))
    return f(alone).reshape(tokens, -1).mT


def _samples_features_tokens(x: Tensor, rest: Sequence[int], features: Sequence[int], over: Sequence[int]) -> Tensor:
    """[K, *] -> [K, samples, features, tokens], each of them several dimensions in their order."""
    sizes = [math.prod(x.shape[dim + 1] for dim in dims) for dims in (rest, features, over)]
    return x.permute(0, *(dim + 1 for dim in (*rest, *features, *over))).reshape(len(x), *sizes)
