"""AttnLRP's rule for activation functions y = f(x), relevance unchanged: in terms of gradients, the slope y/x."""

from torch import Tensor

from fastrel.ops.library import define
from fastrel.reference.gradients import slope


def _reference(grad: Tensor, x: Tensor, y: Tensor, gelu: str = "") -> Tensor:
    """grad [K, *] ⊙ y/x, 0 where x [*] is 0. gelu: the name of its form where f is gelu: y/x is then known from x alone."""
    return grad * slope(x, y)


def _fake(grad: Tensor, x: Tensor, y: Tensor, gelu: str = "") -> Tensor:
    return grad.new_empty(grad.shape)


activation_ratio = define(
    'activation_ratio(Tensor grad, Tensor x, Tensor y, str gelu="") -> Tensor',
    _reference,
    _fake,
)
