"""Gradient of layer normalisation for lanes with a leading target dimension."""

import torch
from torch import Tensor

from fastrel.ops.library import define


def _reference(grad: Tensor, x: Tensor, weight: Tensor | None, dims: int, eps: float) -> Tensor:
    """grad [K, *], x [*], normalised over the last `dims` dimensions with `weight` -> [K, *]."""
    over = tuple(range(-dims, 0))
    centred = x - x.mean(over, keepdim=True)
    variance = centred.square().mean(over, keepdim=True)
    # Squares that overflow would make the gradient 0, which looks like an answer.
    rstd = torch.where(variance.isinf(), torch.nan, (variance + eps).rsqrt())
    normed = centred * rstd
    g = grad if weight is None else grad * weight
    return rstd * (g - g.mean(over, keepdim=True) - normed * (g * normed).mean(over, keepdim=True))


def _fake(grad: Tensor, x: Tensor, weight: Tensor | None, dims: int, eps: float) -> Tensor:
    return grad.new_empty(grad.shape)


layer_norm_backward = define(
    "layer_norm_backward(Tensor grad, Tensor x, Tensor? weight, int dims, float eps) -> Tensor", _reference, _fake
)
