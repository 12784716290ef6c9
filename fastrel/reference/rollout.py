"""Eqs. (13) and (14): the attention maps of the blocks chained into one, and what it is per attention that a token receives."""

from collections.abc import Sequence

import torch
from torch import Tensor


def gradient_relevance(gradient: Tensor, relevance: Tensor) -> Tensor:
    """Eq. (13) without the identity: E_heads[(∇A ⊙ R_A)⁺]. [B, h, T, T] -> [B, T, T]."""
    return (gradient * relevance).clamp(min=0).mean(1)


def rollout(maps: list[Tensor], *, start_layer: int = 0, normalize: bool = False) -> Tensor:
    """Eq. (14): C = (I + M_last) ⋯ (I + M_start), the block nearest the output on the left.

    maps: one [B, T, T] per block, from the input. With `normalize`, the rows of each I + M are scaled to sum 1.
    Returns C [B, T, T]; its row for the token that the head reads is the explanation.
    """
    joint: Tensor | None = None
    for m in maps[start_layer:]:
        step = m + torch.eye(m.shape[-1], dtype=m.dtype, device=m.device)
        if normalize:
            step = step / step.sum(-1, keepdim=True)
        joint = step if joint is None else step @ joint
    assert joint is not None, f"start_layer {start_layer} leaves no block of {len(maps)}"
    return joint


def attention_received(attention: Tensor) -> Tensor:
    """How much attention each token receives: mean over heads and over the queries that see it, [B, h, T, T] -> [B, T].

    Queries that no one attends to are padding, and do not count; a token that no one attends to receives 0.
    """
    mean = attention.mean(1)
    sees = (mean > 0) & (mean.sum(1) > 0)[:, :, None]
    return (mean * sees).sum(1) / sees.sum(1).clamp(min=1)


def per_attention(row: Tensor, received: Sequence[Tensor]) -> Tensor:
    """A row of C [..., B, T] divided by the attention that each token receives, mean over the blocks' [B, T]; 0/0 = 0."""
    mean = torch.stack(list(received)).mean(0)
    return torch.where(mean > 0, row / torch.where(mean > 0, mean, 1), 0)
