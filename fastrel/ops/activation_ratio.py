"""AttnLRP's rule for activation functions y = f(x), relevance unchanged: in terms of gradients, the slope y/x."""

import torch
from torch import Tensor

from fastrel.ops.library import define


def _reference(grad: Tensor, x: Tensor, y: Tensor, gelu: str = "") -> Tensor:
    """grad [K, *] ⊙ y/x, 0 where x [*] is 0. gelu: the name of its form where f is gelu: y/x is then known from x alone."""
    return grad * torch.where(x == 0, 0.0, y / torch.where(x == 0, 1.0, x))


def _fake(grad: Tensor, x: Tensor, y: Tensor, gelu: str = "") -> Tensor:
    return grad.new_empty(grad.shape)


activation_ratio = define(
    'activation_ratio(Tensor grad, Tensor x, Tensor y, str gelu="") -> Tensor',
    _reference,
    _fake,
)
