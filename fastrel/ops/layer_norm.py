"""Gradient of layer normalisation for lanes with a leading target dimension."""

import torch
from torch import Tensor

from fastrel.ops.library import define


def _reference(grad: Tensor, x: Tensor, weight: Tensor | None, dims: int, eps: float, frozen: bool = False) -> Tensor:
    """grad [K, *], x [*], normalised over the last `dims` dimensions with `weight` -> [K, *].

    frozen: AttnLRP's rule (Achtibat et al., ICML 2024), the standard deviation a constant.
    """
    over = tuple(range(-dims, 0))
    centred = x - x.mean(over, keepdim=True)
    variance = centred.square().mean(over, keepdim=True)
    # Squares that overflow would make the gradient 0, which looks like an answer.
    rstd = torch.where(variance.isinf(), torch.nan, (variance + eps).rsqrt())
    g = grad if weight is None else grad * weight
    out = g - g.mean(over, keepdim=True)
    if not frozen:
        normed = centred * rstd
        out = out - normed * (g * normed).mean(over, keepdim=True)
    return rstd * out


def _fake(grad: Tensor, x: Tensor, weight: Tensor | None, dims: int, eps: float, frozen: bool = False) -> Tensor:
    return grad.new_empty(grad.shape)


layer_norm_backward = define(
    "layer_norm_backward(Tensor grad, Tensor x, Tensor? weight, int dims, float eps, bool frozen=False) -> Tensor",
    _reference,
    _fake,
)
