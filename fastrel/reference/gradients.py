"""The gradient of `frozen_attribution`: AttnLRP's rules (Achtibat et al., ICML 2024), as functions of the forward pass.

Each gives the value that the plain function gives; what autograd finds behind it is the rule.
"""

from collections.abc import Callable

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


#: Nearer to 0 than this a secant is the tangent halfway: there the difference of two values of f is little more than rounding.
NEAR = 1e-5


def secant(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """(f(x) − f(0))/x: y/x for a function that is not 0 at 0 (sigmoid, exp, softplus). What f is there is a constant, as a bias is,
    and takes nothing; in y/x it would grow without bound. Calculated in float64, of x's dtype."""
    keep = torch.is_grad_enabled() and x.requires_grad
    wide = x.double() if keep else x.detach().double()
    with torch.enable_grad():
        half = wide / 2 if keep else (wide / 2).requires_grad_()
        (tangent,) = torch.autograd.grad(f(half).sum(), half, create_graph=keep)
    far = wide.abs() > NEAR
    rise = f(wide) - f(torch.zeros_like(wide))
    return torch.where(far, rise / torch.where(far, wide, 1.0), tangent).to(x.dtype)


def activation(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """y = f(x) with its secant for a slope."""
    return f(x).detach() + secant(f, x.detach()) * (x - x.detach())


def half(x: Tensor) -> Tensor:
    """x as an operand of a product of two activations, which takes half of the gradient."""
    return x / 2 + x.detach() / 2
