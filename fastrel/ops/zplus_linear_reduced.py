"""Linear layer with relevance products in bfloat16, int8 or float8: `precision="mixed"` and `"low"`."""

from typing import Literal

import torch
from torch import Tensor

from fastrel.ops.library import define
from fastrel.reference.rules import safe_divide

#: A denominator below this share of Σ|x||w| is rounding: it must not blow S up.
FLOOR = 1 / 256

#: What a weight is prepared for: relevance products in one of two dtypes, or the gradient's product in bfloat16.
Purpose = Literal["bfloat16", "int8", "float8", "gradient"]

#: Dtypes of 8 bits, which need a scale per row: by their largest number.
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


def _scales(x: Tensor, dtype: torch.dtype) -> Tensor:
    """What each row [*, n] is divided by to fill an 8-bit dtype."""
    return x.abs().amax(-1).clamp_min(torch.finfo(x.dtype).tiny) / LARGEST[dtype]


def _rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x as the products see it: in bfloat16, or in 8 bits with one scale per row."""
    if dtype not in LARGEST:
        return x.bfloat16().to(x.dtype)
    scale = _scales(x, dtype)[..., None]
    scaled = x / scale
    return (scaled.round() if dtype == torch.int8 else scaled.to(dtype).to(x.dtype)) * scale


def _reduced_weight(weight: Tensor, purpose: Purpose) -> tuple[Tensor, Tensor, Tensor]:
    """weight [out, in] -> W, |W|, scales: bfloat16; 8 bits, W = w · scales[out]; only bfloat16 W for the gradient."""
    none = weight.new_empty(0)
    if purpose == "gradient":
        return weight.bfloat16(), none, none
    if purpose == "bfloat16":
        return weight.bfloat16(), weight.abs().bfloat16(), none
    dtype = torch.int8 if purpose == "int8" else torch.float8_e4m3fn
    scales = _scales(weight, dtype)
    scaled = weight / scales[:, None]
    scaled = scaled.round() if purpose == "int8" else scaled
    return scaled.to(dtype), scaled.abs().to(dtype), scales


def _reduced_weight_fake(weight: Tensor, purpose: Purpose) -> tuple[Tensor, Tensor, Tensor]:
    dtype = {"int8": torch.int8, "float8": torch.float8_e4m3fn}.get(purpose, torch.bfloat16)
    none, w = weight.new_empty(0), weight.new_empty(weight.shape, dtype=dtype)
    magnitude = none if purpose == "gradient" else torch.empty_like(w)
    return w, magnitude, weight.new_empty(weight.shape[0]) if dtype in LARGEST else none


#: Depends on the weight alone: `fastrel.weights` keeps its results.
reduced_weight = define(
    "reduced_weight(Tensor weight, str purpose) -> (Tensor, Tensor, Tensor)", _reduced_weight, _reduced_weight_fake
)


def _reference(
    x: Tensor,
    w: Tensor,
    w_abs: Tensor,
    scales: Tensor,
    w_grad: Tensor | None,
    y: Tensor,
    bias: Tensor | None,
    rel: Tensor,
    grad: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`zplus_linear` under the positive rules, operands of its relevance products rounded, sums exact.

    w, w_abs, scales: of `reduced_weight`; in 8 bits the scales of W's rows are folded into S before it is rounded. The
    gradient's product is in bfloat16 where w_grad is.
    x [*, in], w [out, in], y [*, out], rel and grad [K, *, out] -> rel_in, grad_in [K, *, in].
    """
    scaled = w.dtype in LARGEST
    wide, wide_abs = w.to(x.dtype), w_abs.to(x.dtype)
    magnitude = _rounded(x.abs(), w.dtype) @ wide_abs.mT
    if scaled:
        magnitude = magnitude * scales
    z = torch.maximum(((y if bias is None else y - bias) + magnitude) / 2, magnitude * FLOOR)
    s = safe_divide(rel, z)
    s = _rounded(s * scales if scaled else s, w.dtype)
    rel_in = (x * (s @ wide) + x.abs() * (s @ wide_abs)) / 2
    if grad is None or w_grad is None:
        return rel_in, x.new_empty(0)
    return rel_in, reduced_matmul(grad, w_grad)


def reduced_matmul(grad: Tensor, weight: Tensor) -> Tensor:
    """grad [K, *, out] @ weight [out, in], rounded to bfloat16 first where the weight is bfloat16."""
    return (grad.to(weight.dtype) @ weight).to(grad.dtype)


def _fake(
    x: Tensor,
    w: Tensor,
    w_abs: Tensor,
    scales: Tensor,
    w_grad: Tensor | None,
    y: Tensor,
    bias: Tensor | None,
    rel: Tensor,
    grad: Tensor | None,
) -> tuple[Tensor, Tensor]:
    rel_in = rel.new_empty((*rel.shape[:-1], w.shape[1]))
    return rel_in, x.new_empty(0) if grad is None else grad.new_empty((*grad.shape[:-1], w.shape[1]))


zplus_linear_reduced = define(
    "zplus_linear_reduced(Tensor x, Tensor w, Tensor w_abs, Tensor scales, Tensor? w_grad, Tensor y, Tensor? bias,"
    " Tensor rel, Tensor? grad) -> (Tensor, Tensor)",
    _reference,
    _fake,
)
