"""The relevance rules as autograd functions: the forward pass is the plain operator, the backward pass propagates relevance.

    y = fastrel.functional.linear(x, weight, bias)
    torch.autograd.grad(y, x, grad_outputs=R)   # the relevance of x, by eq. (5)

Activations have their batch first; parameters and masks get no relevance (None). `rules`: "positive" or "official"; the published
code's 1e-9 at values used several times is left out, because autograd adds up there. `fastrel.propagation` makes an existing
eager model use these functions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrel import backends, ops
from fastrel.ops.attention import mask_factor
from fastrel.reference import rules as R

Rules = R.Rules


def _run(op: Any, rules: str, *args: Any) -> Any:
    """A fused operator by the best backend for its operands; while gradients are recorded, in differentiable plain PyTorch."""
    if torch.is_grad_enabled():
        return op(*args)
    return backends.function_for(op, args, rules)(*args)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, rules: Rules) -> Tensor:
        y = F.linear(x, weight, bias)
        ctx.save_for_backward(x, weight, y, bias)
        ctx.rules = rules
        return y

    @staticmethod
    def backward(ctx: Any, rel: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, y, bias = ctx.saved_tensors
        return _run(ops.zplus_linear, ctx.rules, x, weight, y, bias, rel[None], None, ctx.rules)[0][0], None, None, None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, rules: Rules = "positive") -> Tensor:
    """x Wᵀ + b; backward eq. (5), the z+ rule, without the bias. x [B, *, in], weight [out, in], bias [out] -> [B, *, out]."""
    return _Linear.apply(x, weight, bias, rules)


class _Add(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor, v: Tensor, rules: Rules) -> Tensor:
        ctx.save_for_backward(u, v)
        ctx.rules = rules
        return u + v

    @staticmethod
    def backward(ctx: Any, rel: Tensor) -> tuple[Tensor | None, ...]:
        u, v = ctx.saved_tensors
        rel_u, rel_v = _run(ops.residual_add, ctx.rules, u.expand_as(rel), v.expand_as(rel), rel[None], 0, ctx.rules)
        return rel_u[0].sum_to_size(u.shape), rel_v[0].sum_to_size(v.shape), None


def add(u: Tensor, v: Tensor, rules: Rules = "positive") -> Tensor:
    """u + v of two activations, a residual add; backward eq. (5) (positive) or eq. (9) (official)."""
    return _Add.apply(u, v, rules)


class _Mul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor, v: Tensor) -> Tensor:
        ctx.shapes = u.shape, v.shape
        return u * v

    @staticmethod
    def backward(ctx: Any, rel: Tensor) -> tuple[Tensor | None, ...]:
        return tuple(0.5 * rel.sum_to_size(shape) for shape in ctx.shapes)


def mul(u: Tensor, v: Tensor) -> Tensor:
    """u ⊙ v of two activations, a gate; backward half to each."""
    return _Mul.apply(u, v)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, rules: Rules, attention: bool) -> Tensor:
        ctx.save_for_backward(a, b)
        ctx.rules, ctx.attention = rules, attention
        return a @ b

    @staticmethod
    def backward(ctx: Any, rel: Tensor) -> tuple[Tensor | None, ...]:
        a, b = ctx.saved_tensors
        if ctx.attention:
            return *R.attention_value(a, b, rel, ctx.rules), None, None
        rel_a, rel_b = R.query_key(a, b.mT, rel, ctx.rules)
        return rel_a, rel_b.mT, None, None


class _End(torch.autograd.Function):
    """An attention map: its relevance is read here, and under the positive rules it ends here."""

    @staticmethod
    def forward(ctx: Any, attn: Tensor, rules: Rules) -> Tensor:
        ctx.rules = rules
        return attn.view_as(attn)

    @staticmethod
    def backward(ctx: Any, rel: Tensor) -> tuple[Tensor | None, ...]:
        return R.softmax(rel, ctx.rules), None


def matmul(a: Tensor, b: Tensor, rules: Rules = "positive", *, attention: bool = False) -> Tensor:
    """a @ b of two activations [B, …]; backward the rule of Q·Kᵀ, or of A·V where `attention` says that a is a map over tokens.

    Under the positive rules all relevance of A·V goes to V, and what A gets is for reading: see `end`.
    """
    return _Product.apply(a, b, rules, attention)


def end(attn: Tensor, rules: Rules = "positive") -> Tensor:
    """An attention map as A·V takes it: backward stops here under the positive rules, whose relevance V has carried on."""
    return _End.apply(attn, rules)


class _MaskedScores(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, bias: Tensor, rules: Rules) -> Tensor:
        ctx.save_for_backward(scores, bias)
        ctx.rules = rules
        return scores + bias

    @staticmethod
    def backward(ctx: Any, rel: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.rules == "positive":
            return rel, None, None
        scores, bias = ctx.saved_tensors
        s = R.safe_divide(rel, scores + bias, ctx.rules)
        own, of_mask = scores * s, torch.where(rel == 0, 0.0, bias * s)
        sums = torch.stack([x.flatten(1).sum(1) for x in (own, of_mask, rel)], -1)
        return own * mask_factor(sums).reshape(-1, *(1,) * (own.dim() - 1)), None, None


def add_mask(scores: Tensor, mask: Tensor, rules: Rules = "positive") -> Tensor:
    """scores [B, …] + mask, an additive bias or True where a key is kept; backward the official rules give the mask a share."""
    if mask.dtype == torch.bool:
        bias = torch.zeros(mask.shape, dtype=scores.dtype, device=mask.device).masked_fill(
            ~mask, torch.finfo(scores.dtype).min
        )
    else:
        bias = mask.to(scores.dtype)
    return _MaskedScores.apply(scores, bias, rules)


def scaled_dot_product_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    rules: Rules = "positive",
    maps: list[Tensor] | None = None,
) -> Tensor:
    """softmax(scale Q Kᵀ + mask) V, q [B, h, Tq, d], k, v [B, h, Tk, d]; appends its map A [B, h, Tq, Tk] to `maps`.

    Backward A·V, softmax (identity, or the end of it) and Q·Kᵀ; the scale takes no part.
    """
    scores = multiply_constant(matmul(q, k.mT, rules), q.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        kept = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
        scores = add_mask(scores, kept, rules)
    if mask is not None:
        scores = add_mask(scores, mask, rules)
    attn = end(softmax(scores), rules)
    if maps is not None:
        maps.append(attn)
    return matmul(attn, v, rules, attention=True)


class _Identity(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, *xs: Tensor) -> Tensor:
        ctx.shapes = [x.shape for x in xs]
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, rel: Tensor) -> tuple[Tensor | None, ...]:
        return None, *(rel.sum_to_size(shape) for shape in ctx.shapes)


def identity(y: Tensor, x: Tensor) -> Tensor:
    """The value y, computed from x by whatever passes relevance unchanged; backward R goes to x."""
    return _Identity.apply(y.detach(), x)


def multiply_constant(x: Tensor, factor: Any) -> Tensor:
    """x times a parameter, mask or number; relevance passes unchanged."""
    return identity(x.detach() * factor, x)


def softmax(scores: Tensor, dim: int = -1) -> Tensor:
    """Relevance passes unchanged. A row without any key attends to nothing."""
    return identity(scores.detach().softmax(dim).nan_to_num(0.0), scores)


def layer_norm(
    x: Tensor, shape: Sequence[int], weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """Relevance passes unchanged."""
    return identity(F.layer_norm(x.detach(), tuple(shape), weight, bias, eps), x)


def gelu(x: Tensor, approximate: str = "none") -> Tensor:
    """Relevance passes unchanged, as through every activation function (`identity`)."""
    return identity(F.gelu(x.detach(), approximate=approximate), x)


def relu(x: Tensor) -> Tensor:
    """Relevance passes unchanged."""
    return identity(x.detach().relu(), x)


class _Mean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dims: list[int], keepdim: bool, rules: Rules) -> Tensor:
        ctx.save_for_backward(x)
        ctx.dims, ctx.keepdim, ctx.rules = dims, keepdim, rules
        return x.mean(dims, keepdim)

    @staticmethod
    def backward(ctx: Any, rel: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        if not ctx.keepdim:
            for dim in sorted(d % x.dim() for d in ctx.dims):
                rel = rel.unsqueeze(dim)
        return R.mean(x, rel, ctx.dims, ctx.rules), None, None, None


def mean(x: Tensor, dims: Sequence[int], keepdim: bool = False, rules: Rules = "positive") -> Tensor:
    """Mean over tokens; backward by share (`fastrel.reference.rules.mean`)."""
    return _Mean.apply(x, list(dims), keepdim, rules)


__all__ = [
    "add",
    "add_mask",
    "end",
    "gelu",
    "identity",
    "layer_norm",
    "linear",
    "matmul",
    "mean",
    "mul",
    "multiply_constant",
    "relu",
    "scaled_dot_product_attention",
    "softmax",
]
