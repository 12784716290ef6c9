"""The relevance rules as autograd functions: the forward pass is the plain operator, the backward pass propagates relevance.

    y = fastrel.functional.linear(x, weight, bias)
    torch.autograd.grad(y, x, grad_outputs=R)   # the relevance of x, by eq. (5)

Activations have their batch first; parameters and masks get no relevance (None). `rules`: "positive" or "official"; the published
code's 1e-9 at values used several times is left out, because autograd adds up there. `fastrel.propagation` makes an existing
eager model use these functions. Formulas come from `fastrel.reference` alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastrel.reference import convolution as C
from fastrel.reference import operators as O
from fastrel.reference import pooling as P
from fastrel.reference import rules as R

Rules = R.Rules


class _Value(torch.autograd.Function):
    """A value whose backward pass is a relevance rule: rule(R, *tensors) -> relevance of each tensor, None for constants."""

    @staticmethod
    def forward(ctx: Any, value: list[Tensor], rule: Callable[..., Any], keep: bool, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors if keep else ())
        ctx.rule, ctx.shapes = rule, [x.shape for x in tensors]
        return value[0]

    @staticmethod
    def backward(ctx: Any, rel: Tensor) -> tuple[Tensor | None, ...]:
        # Under autocast a layer's input and its weight may have other dtypes; rules compute in the widest, in float32 at least.
        given = (rel, *ctx.saved_tensors)
        dtype = functools.reduce(torch.promote_types, (x.dtype for x in given if x.is_floating_point()), torch.float32)
        with torch.autocast(rel.device.type, enabled=False):
            parts = ctx.rule(*(x.to(dtype) if x.is_floating_point() else x for x in given))
        parts = (parts,) if isinstance(parts, Tensor) else parts
        padded = [*parts, *[None] * (len(ctx.shapes) - len(parts))]
        return None, None, None, *(p if p is None else p.sum_to_size(s) for p, s in zip(padded, ctx.shapes, strict=True))


def _propagate(f: Callable[..., Tensor], rule: Callable[..., Any], *tensors: Tensor, keep: bool = True) -> Tensor:
    """f(*tensors) with rule(R, *tensors) backwards; `keep=False`: with rule(R), so that tensors may change meanwhile."""
    with torch.no_grad():
        value = f(*tensors)
        value = value.clone() if any(value is x for x in tensors) or value._is_view() else value
    return _Value.apply([value], rule, keep, *tensors)


# Layers.


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, rules: Rules = "positive") -> Tensor:
    """x Wᵀ + b; backward eq. (5), the z+ rule, without the bias. x [B, *, in], weight [out, in], bias [out] -> [B, *, out]."""
    return _propagate(lambda x, w: F.linear(x, w, bias), lambda rel, x, w: R.linear(x, w, rel, rules), x, weight.detach())


def convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1,
    groups: int = 1, rules: Rules = "positive",
) -> Tensor:  # fmt: skip
    """Convolution of x [B, C, *tokens] with weight [D, C / groups, *window] -> [B, D, *windows]; backward eq. (5)."""
    options = (stride, padding, dilation, groups)
    return _propagate(
        lambda x, w: C.CONVOLUTIONS[w.dim()](x, w, bias, *options),
        lambda rel, x, w: C.convolution(x, w, rel, rules, *options),
        x,
        weight.detach(),
    )


def transposed_convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0, output_padding: Any = 0,
    groups: int = 1, dilation: Any = 1, rules: Rules = "positive",
) -> Tensor:  # fmt: skip
    """Transposed convolution of x [B, C, *tokens] with weight [C, D / groups, *window]; backward eq. (5)."""
    options = (stride, padding, output_padding, groups, dilation)
    return _propagate(
        lambda x, w: C.TRANSPOSED[w.dim()](x, w, bias, *options),
        lambda rel, x, w: C.transposed_convolution(x, w, rel, rules, *options),
        x,
        weight.detach(),
    )


def pixel_convolution(x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1) -> Tensor:
    """The convolution that reads an image x [B, 3, H, W], without padding; backward the z^B rule."""
    pair = (stride, stride) if isinstance(stride, int) else tuple(stride)
    return _propagate(
        lambda x, w: F.conv2d(x, w, bias, pair), lambda rel, x, w: C.pixel_convolution(x, w, rel, pair), x, weight.detach()
    )


def layers(x: Tensor, weight: Tensor, rules: Rules = "positive") -> Tensor:
    """x W, one layer for each head or group; backward eq. (5). x [B, *, T, in], weight [*, in, out] -> [B, *, T, out]."""
    return _propagate(torch.matmul, lambda rel, x, w: R.linear(x, w.mT, rel, rules), x, weight.detach())


def experts(x: Tensor, weight: Tensor, offsets: Tensor, rules: Rules = "positive") -> Tensor:
    """x [S, in] -> [S, out]: rows up to `offsets[0]` times weight[0], from there up to `offsets[1]` times weight[1] and so on, of
    weight [E, in, out]; rows that none takes are 0. Backward eq. (5)."""
    ends = offsets.tolist()
    rest = len(x) - (ends[-1] if ends else 0)
    taken = [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]

    def forward(x: Tensor, w: Tensor) -> Tensor:
        return torch.cat([*(x[rows] @ one for rows, one in zip(taken, w, strict=True)), x.new_zeros(rest, w.shape[2])])

    def rule(rel: Tensor, x: Tensor, w: Tensor) -> Tensor:
        parts = [R.linear(x[rows], one.mT, rel[rows], rules) for rows, one in zip(taken, w, strict=True)]
        return torch.cat([*parts, x.new_zeros(rest, x.shape[1])])

    return _propagate(forward, rule, x, weight.detach())


def add(u: Tensor, v: Tensor, rules: Rules = "positive", *, batch_dim: int = 0) -> Tensor:
    """u + v of two activations, a residual add; backward eq. (5) (positive) or eq. (9) (official), over all but `batch_dim`."""

    def rule(rel: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        u, v, rel = (x.expand_as(rel).movedim(batch_dim, 0) for x in (u, v, rel))
        rel_u, rel_v = R.add(u, v, rel, rules)
        return rel_u.movedim(0, batch_dim), rel_v.movedim(0, batch_dim)

    return _propagate(torch.add, rule, u, v)


def add_constant(x: Tensor, constant: Tensor, rules: Rules = "positive") -> Tensor:
    """x plus a constant [*x], a mask or a position embedding; backward the official rules give the constant a share."""
    return _propagate(
        torch.add, lambda rel, x, c: R.add_constant(x.expand_as(rel), c.expand_as(rel), rel, rules), x, constant.detach()
    )


def mul(u: Tensor, v: Tensor) -> Tensor:
    """u ⊙ v of two activations, a gate; backward half to each."""
    return _propagate(torch.mul, lambda rel: (R.gate(rel), R.gate(rel)), u, v, keep=False)


def identity(y: Tensor, x: Tensor) -> Tensor:
    """The value y, computed from x by whatever passes relevance unchanged; backward R goes to x."""
    return _propagate(lambda _: y.detach(), R.identity, x, keep=False)


def multiply_constant(x: Tensor, factor: Any) -> Tensor:
    """x times a parameter, mask or number; relevance passes unchanged."""
    return identity(x.detach() * factor, x)


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


def mean(x: Tensor, dims: Sequence[int], keepdim: bool = False, rules: Rules = "positive") -> Tensor:
    """Mean over tokens; backward by share (`fastrel.reference.rules.mean`)."""
    return reduction(lambda x: x.mean(tuple(dims), keepdim), x, dims, keepdim, rules)


def reduction(
    f: Callable[[Tensor], Tensor], x: Tensor, dims: Sequence[int], keepdim: bool = False, rules: Rules = "positive"
) -> Tensor:
    """f(x), a sum or a spread over `dims`; backward by share, as for a mean."""
    over, kept = _over(x, dims, keepdim)
    return _propagate(f, lambda rel, x: R.mean(x, kept(rel), over, rules), x)


def logsumexp(x: Tensor, dims: Sequence[int], keepdim: bool = False) -> Tensor:
    """log Σ exp over `dims`; backward by softmax (`fastrel.reference.pooling.logsumexp`)."""
    over, kept = _over(x, dims, keepdim)
    return _propagate(lambda x: x.logsumexp(over, keepdim), lambda rel, x: P.logsumexp(x, kept(rel), over), x)


def _over(x: Tensor, dims: Sequence[int], keepdim: bool) -> tuple[list[int], Callable[[Tensor], Tensor]]:
    """Dimensions that are reduced, in order, and what gives a reduced value size 1 in them."""
    over = sorted(d % x.dim() for d in dims)

    def kept(rel: Tensor) -> Tensor:
        for dim in () if keepdim else over:
            rel = rel.unsqueeze(dim)
        return rel

    return over, kept


def pooling(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """f(x), averages over windows, windows added up or interpolation; backward by share, as for a mean."""
    return _propagate(f, lambda rel, x: O.pooling(f, x, rel), x)


def generic(f: Callable[..., Tensor], *xs: Tensor) -> Tensor:
    """f(*xs), any differentiable function of activations; backward x ⊙ ((R ⊘ f) J), in equal parts."""

    def rule(rel: Tensor, *xs: Tensor) -> tuple[Tensor, ...]:
        def of_one(i: int) -> Callable[[Tensor], Tensor]:
            return lambda leaf: f(*xs[:i], leaf, *xs[i + 1 :])

        return tuple(O.generic(of_one(i), x, rel, len(xs)) for i, x in enumerate(xs))

    return _propagate(f, rule, *xs)


# Attention.


def matmul(a: Tensor, b: Tensor, rules: Rules = "positive", *, attention: bool = False, mixed: bool = False) -> Tensor:
    """a @ b of two activations [B, …]; backward the rule of Q·Kᵀ, or of A·V where `attention` says that a is a map over tokens.

    `mixed`: a map mixed over heads. Under the positive rules all relevance of A·V goes to V, and what A gets is for reading: see `end`.
    """

    def rule(rel: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        if attention:
            return (R.mixed_attention_value if mixed else R.attention_value)(a, b, rel, rules)
        rel_a, rel_b = R.query_key(a, b.mT, rel, rules)
        return rel_a, rel_b.mT

    return _propagate(torch.matmul, rule, a, b)


def softmax(scores: Tensor, dim: int = -1) -> Tensor:
    """Relevance passes unchanged. A row without any key attends to nothing."""
    given = scores.detach()
    return identity(given.softmax(dim).masked_fill((given == -torch.inf).all(dim, keepdim=True), 0.0), scores)


def end(attn: Tensor, rules: Rules = "positive") -> Tensor:
    """An attention map as A·V takes it: backward stops here under the positive rules, whose relevance V has carried on."""
    return _propagate(lambda a: a, lambda rel: R.softmax(rel, rules), attn, keep=False)


def add_mask(scores: Tensor, mask: Tensor, rules: Rules = "positive") -> Tensor:
    """scores [B, …] + mask, an additive bias or True where a key is kept; backward the official rules give the mask a share."""
    if mask.dtype == torch.bool:
        return add_constant(scores, torch.zeros_like(mask, dtype=scores.dtype).masked_fill(~mask, -torch.inf), rules)
    return add_constant(scores, mask.to(scores.dtype), rules)


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

    Backward A·V, softmax (identity, or the end of it) and Q·Kᵀ; the scale takes no part. A mask that is an activation, a bias made
    of the input, is the other operand of a residual add.
    """
    scores = multiply_constant(matmul(q, k.mT, rules), q.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        kept = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
        scores = add_mask(scores, kept, rules)
    if mask is not None:
        learned = mask.requires_grad and not isinstance(mask, nn.Parameter)
        scores = add(scores, mask, rules) if learned else add_mask(scores, mask, rules)
    attn = end(softmax(scores), rules)
    if maps is not None:
        maps.append(attn)
    return matmul(attn, v, rules, attention=True)


def multi_head_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
    *,
    rules: Rules = "positive",
    maps: list[Tensor] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """torch's function of this name, without dropout: query [Tq, B, D], key and value [Tk, B, D], or without B.

    Raises:
        ValueError: static_k or static_v are given, which torch's modules never do.
    """
    if static_k is not None or static_v is not None:
        raise ValueError("static_k and static_v have no relevance")
    batched = query.dim() == 3
    same = query is key and key is value
    if not batched:
        query, key, value = (x.unsqueeze(1) for x in (query, key, value))
        key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
    biases: Any = (None, None, None) if in_proj_bias is None else in_proj_bias.chunk(3)
    if same and not use_separate_proj_weight:
        assert in_proj_weight is not None
        projected = linear(query, in_proj_weight, in_proj_bias, rules).chunk(3, -1)
    else:
        weights: Any = (q_proj_weight, k_proj_weight, v_proj_weight)
        if in_proj_weight is not None:
            weights = in_proj_weight.chunk(3)
        projected = tuple(linear(x, w, b, rules) for x, w, b in zip((query, key, value), weights, biases, strict=True))
    q, k, v = (x.unflatten(-1, (num_heads, -1)).permute(1, 2, 0, 3) for x in projected)  # [B, h, T, d]
    extra: list[tuple[Tensor, Tensor]] = []
    if bias_k is not None and bias_v is not None:
        extra.append(tuple(b.detach().view(1, num_heads, 1, -1).expand(len(k), -1, -1, -1) for b in (bias_k, bias_v)))  # type: ignore
    if add_zero_attn:
        extra.append((torch.zeros_like(k[:, :, :1]), torch.zeros_like(v[:, :, :1])))
    k, v = (torch.cat([x, *(pair[i] for pair in extra)], 2) for i, x in enumerate((k, v)))
    mask: Tensor | None = None
    for given in (attn_mask, None if key_padding_mask is None else key_padding_mask[:, None, None]):
        if given is None:
            continue
        if given.dtype == torch.bool:
            given = torch.zeros_like(given, dtype=q.dtype).masked_fill(given, -torch.inf)
        given = given.unflatten(0, (-1, num_heads)) if given.dim() == 3 else given
        given = F.pad(given, (0, len(extra)))
        mask = given if mask is None else mask + given
    found: list[Tensor] = []
    out = scaled_dot_product_attention(q, k, v, mask, rules=rules, maps=found)
    if maps is not None:
        maps += found
    merged = linear(out.permute(2, 0, 1, 3).flatten(2), out_proj_weight, out_proj_bias, rules)
    attn = mean(found[0], [1], rules=rules) if average_attn_weights else found[0]
    if not batched:
        merged, attn = merged.squeeze(1), attn.squeeze(0)
    return merged, attn if need_weights else None


__all__ = [
    "add",
    "add_constant",
    "add_mask",
    "convolution",
    "end",
    "gelu",
    "generic",
    "identity",
    "layer_norm",
    "linear",
    "matmul",
    "mean",
    "mul",
    "multi_head_attention_forward",
    "multiply_constant",
    "pixel_convolution",
    "pooling",
    "relu",
    "scaled_dot_product_attention",
    "softmax",
]
