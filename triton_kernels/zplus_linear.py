"""`zplus_linear` and `zplus_linear_reduced`: two products with everything around them fused into their tiles.

The first forms Z and ends in S = R ⊘ Z (`zplus_shares`); the second forms S W⁺, S W⁻ and g W from one pass over the weight and ends
in R' = x⁺ ⊙ (S W⁺) + x⁻ ⊙ (S W⁻) (`zplus_back`). What they multiply in is the operator's (`zplus_kinds`); sums are float32. Where
there are many rows, torch's own products are faster (`zplus_products`).
"""

import torch
from fastrel.triton_kernels import configs, zplus_products
from fastrel.triton_kernels.activation import through_gelu
from fastrel.triton_kernels.launch import capability, on_its_device
from fastrel.triton_kernels.zplus_back import fused
from fastrel.triton_kernels.zplus_kinds import REDUCED, has_exact_output, kind_of
from torch import Tensor


@on_its_device
def zplus_linear(
    x: Tensor,
    weight: Tensor,
    y: Tensor | None,
    bias: Tensor | None,
    rel: Tensor,
    grad: Tensor | None,
    rules: str,
    w_grad: Tensor | None = None,
    sums: Tensor | None = None,
    formed: bool = False,
    slope: Tensor | None = None,
    approximate: str = "none",
    frozen: bool = False,
    divisor: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`fastrel::zplus_linear` with operands of float32, bfloat16 or float16 and lanes of float32.

    Z is formed from both signed products, except in float32 where the layer's own output is given: one that was rounded to
    16 bits has no digits left for a difference.

    w_grad [grad_outs, ins]: where the gradient is of other outputs than relevance. sums: Z, formed before (`zplus_sums`); formed: then
    `rel` is S already. slope: what x is the gelu of; the gradient goes through that, too (frozen: by AttnLRP's rule). divisor: Z of the
    layer before, [n, ins], of which R' becomes the S.
    """
    in_bfloat16, rows = x.dtype == weight.dtype == torch.bfloat16, x.numel() // x.shape[-1]
    apart = grad is not None and w_grad is not None
    if sums is None and in_bfloat16 and configs.products_first(rows, weight.shape, "split", apart, capability(x.device)):
        own = None if apart else grad
        rel_in, grad_in = zplus_products.linear(x, weight, weight, None, None, rel, own, rules, parts=2)
        grad_in = zplus_products.matmul(grad, w_grad) if apart else grad_in
        return rel_in, _through(grad_in, slope, approximate, frozen)
    if apart and grad.shape[:-1] != rel.shape[:-1]:
        rel_in, _ = zplus_linear(x, weight, y, bias, rel, None, rules, sums=sums, formed=formed)
        return rel_in, zplus_products.matmul(grad, w_grad)
    later = (sums, formed, slope, approximate, frozen, divisor)
    y, w_grad = y if has_exact_output(weight, y) else None, weight if w_grad is None else w_grad
    return fused(kind_of(weight.dtype), x, weight, None, w_grad, y, bias, rel, grad, rules, *later)


@on_its_device
def zplus_linear_reduced(
    x: Tensor,
    w: Tensor,
    w_abs: Tensor,
    scales: Tensor,
    w_grad: Tensor | None,
    y: Tensor,
    bias: Tensor | None,
    rel: Tensor,
    grad: Tensor | None,
    sums: Tensor | None = None,
    formed: bool = False,
    slope: Tensor | None = None,
    approximate: str = "none",
    frozen: bool = False,
    divisor: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`fastrel::zplus_linear_reduced` in the prepared weight's dtype, bfloat16 or float8_e4m3fn. |W| is formed in registers.

    w_abs: W in bfloat16 (`reduced_weight`), by which few rows are multiplied, and all whose Z was formed before.
    w_grad [grad_outs, ins] and what comes after it: as `zplus_linear` takes them.
    """
    rows, where = x.numel() // x.shape[-1], capability(x.device)
    in_float8 = sums is None and configs.in_float8(rows, w.shape, where)
    if w.dtype == torch.float8_e4m3fn and w_abs.dtype == torch.bfloat16 and not in_float8:
        w = w_abs
    kind = REDUCED[w.dtype]
    apart = grad is not None and w_grad is not None and len(w_grad) != len(w)
    if sums is None and kind.name == "bfloat16" and configs.products_first(rows, w.shape, kind.name, apart, where):
        own = None if apart else grad
        rel_in, grad_in = zplus_products.linear(x, w, w_grad, y, bias, rel, own, "positive", parts=1)
        grad_in = zplus_products.reduced_matmul(grad, w_grad) if apart else grad_in
        return rel_in, _through(grad_in, slope, approximate, frozen)
    if apart and grad.shape[:-1] != rel.shape[:-1]:
        rel_in, _ = zplus_linear_reduced(x, w, w_abs, scales, None, y, bias, rel, None, sums=sums, formed=formed)
        return rel_in, zplus_products.reduced_matmul(grad, w_grad)
    later = (sums, formed, slope, approximate, frozen, divisor)
    return fused(kind, x, w, scales, w_grad, y, bias, rel, grad, "positive", *later)


def _through(grad: Tensor, x: Tensor | None, approximate: str, frozen: bool) -> Tensor:
    return grad if x is None or not grad.numel() else through_gelu(grad, x, approximate, frozen)
