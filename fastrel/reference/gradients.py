"""The gradient of `frozen_attribution`: AttnLRP's rules (Achtibat et al., ICML 2024), as functions of the forward pass.

Each gives the value that the plain function gives; what autograd finds behind it is the rule.
"""

import torch
from torch import Tensor


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Layer normalisation over the last dimension with its standard deviation a constant."""
    deviation = (x.var(-1, correction=0, keepdim=True) + eps).sqrt().detach()
    y = (x - x.mean(-1, keepdim=True)) / deviation
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def slope(x: Tensor, y: Tensor) -> Tensor:
    """y/x, 0 where x is 0."""
    return torch.where(x == 0, 0.0, y / torch.where(x == 0, 1.0, x))


def activation(x: Tensor, y: Tensor) -> Tensor:
    """y = f(x) with the slope y/x."""
    return y.detach() + slope(x, y).detach() * (x - x.detach())


def half(x: Tensor) -> Tensor:
    """x as an operand of a product of two activations, which takes half of the gradient."""
    return x / 2 + x.detach() / 2
