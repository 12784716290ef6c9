"""`attention_relevance` by torch's own products, with maps in memory, some samples at a time.

For heads of float32 too wide for three TF32 products in registers: tiles of them are padded to 128 features and multiplied without
tensor cores, the vendor's products take them as they are. `configs.heads_by_library` says where that takes less time.
"""

import torch
from fastrel.triton_kernels.attention_update import attention_update
from fastrel.triton_kernels.rollout_row import rollout_row
from torch import Tensor

from fastrel.ops.attention import attention_probabilities
from fastrel.reference.rules import safe_divide

#: Numbers that a map of all samples, heads and targets may have at a time.
CHUNK = 64 << 20


def attention(
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
    update: str,
    normalize: bool,
    inputs: bool,
    halves: bool = False,
) -> tuple[Tensor, ...]:
    """`fastrel::attention_relevance` under the positive rules, in float32."""
    q, k, v = q.float(), k.float(), v.float()
    given = rel if rel is not None else grad if grad is not None else row
    (batch, heads, queries, _), targets = q.shape, 1 if given is None else len(given)
    step = max(1, CHUNK // (targets * heads * queries * k.shape[2]))
    options = (scale, is_causal, query_start, update, normalize, inputs, halves)
    parts = []
    for start in range(0, batch, step):
        size = min(step, batch - start)
        values = (x.narrow(0, start, size) for x in (q, k, v))
        own_mask = mask if mask is None or mask.dim() < 4 or len(mask) == 1 else mask.narrow(0, start, size)
        lanes = (None if x is None else x.narrow(1, start, size) for x in (rel, grad, row))
        parts.append(_samples(*values, own_mask, *lanes, *options))
    return tuple(x[0] if len(x) == 1 or not x[0].numel() else torch.cat(x, 1) for x in zip(*parts, strict=True))


def _samples(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, rel: Tensor | None, grad: Tensor | None, row: Tensor | None,
    scale: float, is_causal: bool, query_start: int, update: str, normalize: bool, inputs: bool, halves: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    none, relevant = q.new_empty(0), v.clamp(min=0)
    rel_v = grad_q = grad_k = grad_v = kept = through = none
    if mask is None and not is_causal:
        attn = ((q * scale) @ k.mT).softmax(-1)
    else:
        attn = attention_probabilities(q, k, mask, scale, is_causal, query_start)
    rel_attn = grad_attn = None
    if rel is not None:
        s = safe_divide(rel, attn @ relevant, "positive")
        rel_attn = ((0.5 * s) @ relevant.mT).mul_(attn) if row is not None else None
        rel_v = (attn.mT @ s).mul_(relevant) if inputs else none
    if grad is not None:
        grad_attn = grad @ v.mT
    if row is not None:
        kept, through = rollout_row(row, attention_update(attn, grad_attn, rel_attn, update), normalize)
    if grad is not None and grad_attn is not None and inputs:
        grad_v = attn.mT @ grad
        delta = (grad * (attn @ v)).sum(-1, keepdim=True)
        through_scores = grad_attn.sub_(delta).mul_(attn)
        factor = scale
        if halves:
            grad_v, factor = grad_v.mul_(0.5), 0.25 * scale
        grad_q, grad_k = (through_scores @ k).mul_(factor), (through_scores.mT @ q).mul_(factor)
    return none, none, rel_v, grad_q, grad_k, grad_v, kept, through
