"""Linear layer: relevance by eq. (5) and gradient, from three and one matrix products."""

import torch
from torch import Tensor

from fastrel.ops.library import define
from fastrel.reference.rules import Rules, linear, safe_divide


def _reference(
    x: Tensor,
    weight: Tensor,
    y: Tensor | None,
    bias: Tensor | None,
    rel: Tensor,
    grad: Tensor | None,
    rules: Rules,
) -> tuple[Tensor, Tensor]:
    """x⁺w⁺ + x⁻w⁻ = (xw + |x||w|)/2, so Z = ½(xWᵀ + |x||W|ᵀ) and R' = ½(x ⊙ (S W) + |x| ⊙ (S|W|)).

    xWᵀ is the layer's own output without its bias: passing `y` saves that product.
    x [*, in], weight [out, in], y [*, out], rel and grad [K, *, out] -> rel_in, grad_in [K, *, in].
    """
    grad_in = x.new_empty(0) if grad is None else grad @ weight
    if rules == "original_lrp":
        return linear(x, weight, rel, rules), grad_in
    x_abs, w_abs = x.abs(), weight.abs()
    signed = x @ weight.mT if y is None else y if bias is None else y - bias
    magnitude = x_abs @ w_abs.mT
    twice = signed + magnitude
    # No more than the rounding of its terms: 0.
    z = torch.where(twice < magnitude * (8 * torch.finfo(x.dtype).eps), 0.0, twice / 2)
    s = safe_divide(rel, z, rules)
    rel_in = x_abs * (s @ w_abs + torch.where(x < 0, -1.0, 1.0).to(x.dtype) * (s @ weight)) / 2
    return rel_in, grad_in


def _fake(
    x: Tensor,
    weight: Tensor,
    y: Tensor | None,
    bias: Tensor | None,
    rel: Tensor,
    grad: Tensor | None,
    rules: Rules,
) -> tuple[Tensor, Tensor]:
    rel_in = rel.new_empty((*rel.shape[:-1], weight.shape[1]))
    return rel_in, x.new_empty(0) if grad is None else grad.new_empty((*grad.shape[:-1], weight.shape[1]))


zplus_linear = define(
    "zplus_linear(Tensor x, Tensor weight, Tensor? y, Tensor? bias, Tensor rel, Tensor? grad, str rules)"
    " -> (Tensor, Tensor)",
    _reference,
    _fake,
)
