"""Pooling over tokens: what each has of the result."""

from collections.abc import Sequence

import torch
from torch import Tensor


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
    parts where nothing is positive.
    """
    features, over = tuple(dim + 1 for dim in features), tuple(dim + 1 for dim in over)
    slopes = x * grad
    if features:
        slopes, rel = slopes.sum(features, keepdim=True), rel.sum(features, keepdim=True)
    weights = (slopes * rel).clamp(min=0)
    total = weights.sum(over, keepdim=True)
    count = weights[0].numel() // total[0].numel()
    return torch.where(total > 0, weights / torch.where(total > 0, total, 1.0), 1.0 / count)
