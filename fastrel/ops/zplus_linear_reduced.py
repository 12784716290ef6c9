"""Linear layer with relevance products in bfloat16 or int8: `precision="mixed"` and `"low"`."""

import torch
from torch import Tensor

from fastrel.ops.library import define
from fastrel.reference.rules import safe_divide

#: A denominator below this share of Σ|x||w| is rounding: it must not blow S up.
FLOOR = 1 / 256


def _rounded(x: Tensor, int8: bool) -> Tensor:
    """x as the products see it: in bfloat16, or in int8 with one scale per row."""
    if not int8:
        return x.bfloat16().to(x.dtype)
    scale = x.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny) / 127
    return (x / scale).round() * scale


def _reference(
    x: Tensor,
    weight: Tensor,
    y: Tensor,
    bias: Tensor | None,
    rel: Tensor,
    grad: Tensor | None,
    int8: bool,
    bf16_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """`zplus_linear` under the positive rules, operands of its relevance products rounded, sums exact.

    In int8 the row scales of W are folded into S before it is rounded.
    x [*, in], weight [out, in], y [*, out], rel and grad [K, *, out] -> rel_in, grad_in [K, *, in].
    """
    w = _rounded(weight, int8)
    magnitude = _rounded(x.abs(), int8) @ w.abs().mT
    z = torch.maximum(((y if bias is None else y - bias) + magnitude) / 2, magnitude * FLOOR)
    s = safe_divide(rel, z)
    if int8:
        scale = weight.abs().amax(-1).clamp_min(torch.finfo(weight.dtype).tiny) / 127
        s = _rounded(s * scale, int8) / scale
    else:
        s = _rounded(s, int8)
    rel_in = (x * (s @ w) + x.abs() * (s @ w.abs())) / 2
    if grad is None:
        return rel_in, x.new_empty(0)
    return rel_in, _rounded(grad, False) @ _rounded(weight, False) if bf16_gradient else grad @ weight


def _fake(
    x: Tensor,
    weight: Tensor,
    y: Tensor,
    bias: Tensor | None,
    rel: Tensor,
    grad: Tensor | None,
    int8: bool,
    bf16_gradient: bool,
) -> tuple[Tensor, Tensor]:
    rel_in = rel.new_empty((*rel.shape[:-1], weight.shape[1]))
    return rel_in, x.new_empty(0) if grad is None else grad.new_empty((*grad.shape[:-1], weight.shape[1]))


zplus_linear_reduced = define(
    "zplus_linear_reduced(Tensor x, Tensor weight, Tensor y, Tensor? bias, Tensor rel, Tensor? grad, bool int8,"
    " bool bf16_gradient) -> (Tensor, Tensor)",
    _reference,
    _fake,
)
