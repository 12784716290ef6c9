"""Softmax attention: both lanes through it, and the step it makes in the rollout."""

from typing import Any

import torch
from torch import Tensor

from fastrel.ops.library import define
from fastrel.reference import rules as R

#: What an attention block contributes to the rollout, M [B, Tq, Tk], from its A, ∇A and R_A [B, h, Tq, Tk].
UPDATES = ("gradient_relevance", "gradient_attention", "gradcam", "relevance", "attention")


def attention_probabilities(
    q: Tensor, k: Tensor, mask: Tensor | None, scale: float, is_causal: bool, query_start: int
) -> Tensor:
    """A = softmax(scale · QKᵀ + mask) [B, h, Tq, Tk]; q may be the rows from `query_start` on of a longer query."""
    scores = attention_scores(q, k, mask, scale, is_causal, query_start)
    # A row whose keys are all masked attends to nothing, as in torch's fused attention; NaN in a score stays NaN.
    return scores.softmax(-1).masked_fill((scores == -torch.inf).all(-1, keepdim=True), 0.0)


def attention_scores(q: Tensor, k: Tensor, mask: Tensor | None, scale: float, is_causal: bool, query_start: int) -> Tensor:
    """scale · QKᵀ + mask [B, h, Tq, Tk], -inf where a key is excluded."""
    scores = (q @ k.mT) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    if is_causal:
        queries = torch.arange(query_start, query_start + q.shape[-2], device=q.device)
        scores = scores.masked_fill(queries[:, None] < torch.arange(k.shape[-2], device=q.device), -torch.inf)
    return scores


def carries_scores(rules: str) -> bool:
    """Whether relevance goes on from A to the scores, and so to Q and K: not under `positive` (reference `softmax`)."""
    return rules != "positive"


def _through_mask(q: Tensor, k: Tensor, mask: Tensor | None, rel: Tensor, scale: float, rules: R.Rules) -> Tensor:
    """The published code adds the mask to the scores by a residual add, and drops the mask's share.

    Its masks are finite. -inf, by which others exclude a key, takes no part: no relevance is there.
    """
    if mask is None:
        return rel
    scores = (q @ k.mT) * scale
    bias = torch.where(mask, 0.0, -10000.0) if mask.dtype == torch.bool else mask.masked_fill(mask == -torch.inf, 0.0)
    return R.add_constant(scores, bias.to(scores.dtype).expand_as(scores), rel, rules)


def mask_factor(sums: Tensor) -> Tensor:
    """What the official rules scale the scores' relevance by where a mask was added: of Σ u S, Σ bias S and ΣR [..., 3] per sample.

    Eq. (9): A (|A|/(|A|+|B|)) ρ/A without its A, which Q and K have taken in already, linearly.
    """
    own, of_mask, rel = sums.unbind(-1)
    weight = R.safe_divide(own.abs(), own.abs() + of_mask.abs(), "official") * rel
    return R.safe_divide(weight, own, "official")


def _update(attn: Tensor | None, grad: Tensor | None, rel: Tensor | None, update: str) -> Tensor:
    """M, with a leading K where the lanes have one: the mean over heads of the clamped product that `update` names."""
    if update == "attention":
        assert attn is not None
        return attn.mean(-3)
    if update == "relevance":
        assert rel is not None
        return rel.clamp(min=0).mean(-3)
    assert grad is not None
    if update == "gradcam":
        assert attn is not None
        return (_head_weights(grad) * attn).mean(-3).clamp(min=0)
    other = rel if update == "gradient_relevance" else attn
    assert other is not None
    return (grad * other).clamp_(min=0).mean(-3)


def _head_weights(grad: Tensor) -> Tensor:
    """Grad-CAM's weight of each head: its mean gradient over the keys other than the query's own, [..., h, Tq, 1].

    grad [..., h, Tq, Tk], query i being token i.
    """
    own = torch.eye(*grad.shape[-2:], dtype=torch.bool, device=grad.device)
    return grad.masked_fill(own, 0).sum(-1, keepdim=True) / max(1, grad.shape[-1] - 1)


def _rollout_row(row: Tensor, m: Tensor, normalize: bool) -> tuple[Tensor, Tensor]:
    """One step of eq. (14) on one row: r (I + M) = kept + through, kept = w, through = w M.

    w = r, or r/(1 + Σ_k M[·, k]) where rows of I + M are scaled to sum 1 (`kept` is empty where it is r itself).
    row [K, *B, Tq], m [(K,) *B, Tq, Tk] -> kept [K, *B, Tq], through [K, *B, Tk].
    """
    kept = row / (1 + m.sum(-1)) if normalize else row
    through = (kept.unsqueeze(-2) @ m).squeeze(-2)
    return kept if normalize else row.new_empty(0), through


def _attention_relevance(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    rel: Tensor | None,
    grad: Tensor | None,
    row: Tensor | None,
    scale: float,
    is_causal: bool,
    query_start: int,
    rules: R.Rules,
    update: str,
    normalize: bool,
    inputs: bool,
    halves: bool = False,
) -> tuple[Tensor, ...]:
    """All lanes through one attention, A recomputed from q and k.

    q [*B, h, Tq, d], k, v [*B, h, Tk, d], rel and grad [K, *B, h, Tq, d], row [K, *B, Tq] -> rel_q, rel_k, rel_v, grad_q,
    grad_k, grad_v (where `inputs`; rel_q and rel_k not under `positive`), kept, through (where there is a row).
    halves: AttnLRP's rule for products, half of the gradient to each operand: a half of A V's to V, a quarter to Q and to K.
    """
    rel_q = rel_k = rel_v = grad_q = grad_k = grad_v = kept = through = None
    attn = attention_probabilities(q, k, mask, scale, is_causal, query_start)
    rel_attn = grad_attn = None
    if rel is not None:
        rel_attn, rel_v = R.attention_value(attn, v, rel, rules)
        if not inputs:
            rel_v = None
        elif carries_scores(rules):
            rel_q, rel_k = R.query_key(q, k, _through_mask(q, k, mask, rel_attn, scale, rules), rules)
    if grad is not None:
        grad_attn = grad @ v.mT
        if inputs:
            share = 0.5 if halves else 1.0
            grad_v = attn.mT @ (grad * share)
            weighted = attn * grad_attn
            grad_scores = (weighted - attn * weighted.sum(-1, keepdim=True)) * (scale * share * share)
            grad_q, grad_k = grad_scores @ k, grad_scores.mT @ q
    if row is not None:
        kept, through = _rollout_row(row, _update(attn, grad_attn, rel_attn, update), normalize)
    outputs = (rel_q, rel_k, rel_v, grad_q, grad_k, grad_v, kept, through)
    return tuple(q.new_empty(0) if t is None else t for t in outputs)


def _attention_relevance_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    rel: Tensor | None,
    grad: Tensor | None,
    row: Tensor | None,
    scale: float,
    is_causal: bool,
    query_start: int,
    rules: R.Rules,
    update: str,
    normalize: bool,
    inputs: bool,
    halves: bool = False,
) -> tuple[Tensor, ...]:
    def like(lane: Tensor | None, value: Tensor) -> Tensor:
        return q.new_empty(0) if lane is None or not inputs else lane.new_empty((lane.shape[0], *value.shape))

    scores = rel if carries_scores(rules) else None
    rel_qkv = (like(scores, q), like(scores, k), like(rel, v))
    grad_qkv = tuple(like(grad, value) for value in (q, k, v))
    kept = row.new_empty(row.shape) if row is not None and normalize else q.new_empty(0)
    through = q.new_empty(0) if row is None else row.new_empty((*row.shape[:-1], k.shape[-2]))
    return (*rel_qkv, *grad_qkv, kept, through)


def _attention_relevance_cpu_fake(q: Tensor, *args: Any) -> tuple[Tensor, ...]:
    """The C++ kernel leaves the heads of a token side by side, ready to be merged."""
    *lanes, kept, through = _attention_relevance_fake(q, *args)
    merged = [x.transpose(2, 3).contiguous().transpose(2, 3) if x.dim() == 5 else x for x in lanes]
    return (*merged, kept, through)


attention_relevance = define(
    "attention_relevance(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? rel, Tensor? grad, Tensor? row, float scale,"
    " bool is_causal, int query_start, str rules, str update, bool normalize, bool inputs, bool halves=False)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _attention_relevance,
    _attention_relevance_fake,
    cpu_fake=_attention_relevance_cpu_fake,
)


def _attention_update_fake(attn: Tensor | None, grad: Tensor | None, rel: Tensor | None, update: str) -> Tensor:
    given = attn if update == "attention" else rel if update == "relevance" else grad
    assert given is not None
    return given.new_empty((*given.shape[:-3], *given.shape[-2:]))


#: Eq. (13) for attention maps that exist as tensors.
attention_update = define(
    "attention_update(Tensor? attn, Tensor? grad, Tensor? rel, str update) -> Tensor", _update, _attention_update_fake
)


def _rollout_row_fake(row: Tensor, m: Tensor, normalize: bool) -> tuple[Tensor, Tensor]:
    kept = row.new_empty(row.shape) if normalize else row.new_empty(0)
    return kept, row.new_empty((*row.shape[:-1], m.shape[-1]))


#: One step of eq. (14) on the row that the head reads.
rollout_row = define(
    "rollout_row(Tensor row, Tensor m, bool normalize) -> (Tensor, Tensor)",
    _rollout_row,
    _rollout_row_fake,
    cpu_kernel=False,
)
