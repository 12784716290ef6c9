"""Relevance rules of linear layers, sums and products: equations (5), (9) and (10) of Chefer, Gur and Wolf (CVPR 2021).

Notation: x is the input of a layer, R the relevance of its output, R' the relevance of its input. Every function is
batch-correct: dimension 0 of the activations is the batch, and nothing is summed across it. Relevances may carry extra
leading dimensions (several targets of one input).

Three rule sets. `official` reproduces the method's published code, including its `safe_divide`. `positive` applies eq. (5),
which keeps only contributions with x·w >= 0, to residual adds and attention products too, so that every denominator is
a sum of non-negative terms; 0/0 is 0. All relevance of A·V then goes on through V; that of A is read and ends there
(docs/numerics.md compares the alternatives). `original_lrp` is the published code of the baseline "LRP": like `official`,
but a linear layer divides by its two sums separately, which doubles relevance, and residual adds are not normalised.
"""

from typing import Literal

import torch
from torch import Tensor

Rules = Literal["positive", "official", "original_lrp"]

OFFICIAL_EPSILON = 1e-9


def safe_divide(a: Tensor, b: Tensor, rules: Rules = "positive") -> Tensor:
    """a / b, and 0 where b = 0. The published code adds 1e-9 to b whatever its sign."""
    if rules != "positive":
        shifted = b + OFFICIAL_EPSILON
        return torch.where(b == 0, 0.0, a / torch.where(shifted == 0, OFFICIAL_EPSILON, shifted))
    tiny = torch.finfo(b.dtype).tiny
    return torch.where(b < tiny, 0.0, a / b.clamp_min(tiny))


def linear(x: Tensor, weight: Tensor, rel: Tensor, rules: Rules = "positive") -> Tensor:
    """Eq. (5), the z+ rule; the bias takes no part.

    Z = x⁺W⁺ᵀ + x⁻W⁻ᵀ,  S = R ⊘ Z,  R' = x⁺ ⊙ (S W⁺) + x⁻ ⊙ (S W⁻).   x [..., in], weight [out, in], rel [..., out].
    original_lrp: a Z and an S for each of the two products.
    """
    x_pos, x_neg, w_pos, w_neg = x.clamp(min=0), x.clamp(max=0), weight.clamp(min=0), weight.clamp(max=0)
    z_pos, z_neg = x_pos @ w_pos.mT, x_neg @ w_neg.mT
    if rules == "original_lrp":
        s_pos, s_neg = safe_divide(rel, z_pos, rules), safe_divide(rel, z_neg, rules)
    else:
        s_pos = s_neg = safe_divide(rel, z_pos + z_neg, rules)
    return x_pos * (s_pos @ w_pos) + x_neg * (s_neg @ w_neg)


def add(u: Tensor, v: Tensor, rel: Tensor, rules: Rules = "positive") -> tuple[Tensor, Tensor]:
    """Residual add u + v. `official`: eq. (9), normalised over the sample (`original_lrp`: not). `positive`: eq. (5).

    positive: σ = sign(u+v), p_u = (σu)⁺, p_v = (σv)⁺, R_u = R p_u ⊘ (p_u + p_v): operands that agree in sign share,
    otherwise the one that wins takes all.
    """
    if rules == "positive":
        sign = torch.sign(u + v)
        p_u, p_v = (sign * u).clamp(min=0), (sign * v).clamp(min=0)
        s = safe_divide(rel, p_u + p_v)
        return p_u * s, p_v * s
    s = safe_divide(rel, u + v, rules)
    a, b = u * s, v * s
    if rules == "original_lrp":
        return a, b
    sample = tuple(range(-u.dim() + 1, 0))
    sum_a, sum_b, total = (t.sum(sample, keepdim=True) for t in (a, b, rel))
    weight_a = safe_divide(sum_a.abs(), sum_a.abs() + sum_b.abs(), rules) * total
    weight_b = safe_divide(sum_b.abs(), sum_a.abs() + sum_b.abs(), rules) * total
    return a * safe_divide(weight_a, sum_a, rules), b * safe_divide(weight_b, sum_b, rules)


def add_constant(x: Tensor, constant: Tensor, rel: Tensor, rules: Rules = "positive") -> Tensor:
    """x plus a mask or a position embedding, which depends on no input. `positive`: x takes all.

    official: the constant is the other operand of a residual add and its share is dropped; entries of -inf, as masks have
    them, take the share 0 of the relevance 0 that reaches them.
    """
    if rules == "positive":
        return rel
    finite = constant.masked_fill(constant.isinf(), torch.finfo(constant.dtype).min)
    return add(x, finite, rel, rules)[0]


def gate(rel: Tensor) -> Tensor:
    """Product u ⊙ v of two activations: R_u = R_v = R/2."""
    return rel / 2


def identity(rel: Tensor) -> Tensor:
    """Normalisation over features, activation functions, scaling by a constant: R' = R."""
    return rel


def attention_value(attn: Tensor, v: Tensor, rel: Tensor, rules: Rules = "positive") -> tuple[Tensor, Tensor]:
    """A·V. attn [..., Tq, Tk] >= 0, v [..., Tk, d], rel [..., Tq, d] -> R_A [..., Tq, Tk], R_V [..., Tk, d].

    official: S = R ⊘ (A V),  R_A = ½ A ⊙ (S Vᵀ),  R_V = ½ V ⊙ (Aᵀ S): half to each operand.
    positive: S = R ⊘ (A V⁺),  R_A = ½ A ⊙ (S V⁺ᵀ),  R_V = V⁺ ⊙ (Aᵀ S): all goes on through V (see `softmax`).
    """
    v = v.clamp(min=0) if rules == "positive" else v
    s = safe_divide(rel, attn @ v, rules)
    rel_v = v * (attn.mT @ s)
    return attn * (s @ v.mT) / 2, rel_v if rules == "positive" else rel_v / 2


def mixed_attention_value(attn: Tensor, v: Tensor, rel: Tensor, rules: Rules = "positive") -> tuple[Tensor, Tensor]:
    """A'·V with maps A' that are no softmax, or mixed over heads, whose entries may have both signs: the rule of `query_key`, R_A =
    R_Q, R_V = R_K. Where A' >= 0 it is that of `attention_value`.

    positive: relevance of A' ends there as well, so that V takes all of it: R_V = 2 R_K.
    """
    rel_a, rel_v = query_key(attn, v.mT, rel, rules)
    return rel_a, rel_v.mT * 2 if rules == "positive" else rel_v.mT


def softmax(rel: Tensor, rules: Rules = "positive") -> Tensor:
    """The softmax that makes A: relevance passes unchanged; under `positive` it ends here, V has carried all of it on."""
    return torch.zeros_like(rel) if rules == "positive" else rel


def query_key(q: Tensor, k: Tensor, rel: Tensor, rules: Rules = "positive") -> tuple[Tensor, Tensor]:
    """Q·Kᵀ (its scale takes no part), half of the relevance to each. q [..., Tq, d], k [..., Tk, d], rel [..., Tq, Tk].

    Under `positive` this is the rule of products of two activations that no attention softmax follows.

    positive: Z = Q⁺K⁺ᵀ + Q⁻K⁻ᵀ,  S = R ⊘ Z,  R_Q = ½ (Q⁺ ⊙ (S K⁺) + Q⁻ ⊙ (S K⁻)), R_K alike.
    """
    if rules != "positive":
        s = safe_divide(rel, q @ k.mT, rules)
        return q * (s @ k) / 2, k * (s.mT @ q) / 2
    q_pos, q_neg, k_pos, k_neg = q.clamp(min=0), q.clamp(max=0), k.clamp(min=0), k.clamp(max=0)
    s = safe_divide(rel, q_pos @ k_pos.mT + q_neg @ k_neg.mT)
    rel_q = q_pos * (s @ k_pos) + q_neg * (s @ k_neg)
    rel_k = k_pos * (s.mT @ q_pos) + k_neg * (s.mT @ q_neg)
    return rel_q / 2, rel_k / 2


def clone(x: Tensor, rels: list[Tensor], rules: Rules = "positive") -> Tensor:
    """One value used several times: relevances add up. `official` writes x ⊙ Σ (R_i ⊘ x), whose 1e-9 matters."""
    if rules == "positive":
        return torch.stack(rels).sum(0)
    return x * torch.stack([safe_divide(rel, x, rules) for rel in rels]).sum(0)


def mean(x: Tensor, rel: Tensor, dims: list[int], rules: Rules = "positive") -> Tensor:
    """Mean of x over `dims`, which rel keeps with size 1. `official`: R' = x ⊙ (R ⊘ mean)/n.

    positive: σ = sign(Σx), p = (σx)⁺, R' = p ⊙ (R ⊘ Σp), eq. (5) as for the residual add.
    """
    if rules != "positive":
        average = x.mean(dims, keepdim=True)
        return x * safe_divide(rel, average, rules) * (average.numel() / x.numel())
    part = (torch.sign(x.sum(dims, keepdim=True)) * x).clamp(min=0)
    return part * safe_divide(rel, part.sum(dims, keepdim=True))
