"""Methods that read all attention blocks alike, each from the token's side: what it gives."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastrel.errors import InputError
from fastrel.transform.method import NEEDS_SAME_TOKENS


def check_same_tokens(name: str, row: Tensor, maps: Sequence[Tensor]) -> None:
    """Raise InputError unless the maps [..., B, h, Tq, Tk] are over the tokens that the head reads, row [K, B, T]."""
    batch, tokens = row.shape[1:]
    if any((m.shape[-4], *m.shape[-2:]) != (batch, tokens, tokens) for m in maps):
        raise InputError(f"{name} {NEEDS_SAME_TOKENS}")


def legrad(row: Tensor, gradients: Sequence[Tensor], maps: Sequence[Tensor]) -> Tensor:
    """Σ_blocks E_heads E_queries[(∇A)⁺], [K, B, T] (after Bousselham et al., ICCV 2025).

    The paper reads every block's own output out by the model's head and takes the gradient of that score in this block alone. Here
    ∇A is that of the model's own output, as for all other methods. Entries that a mask excludes (A is 0) have no gradient.
    gradients [K, B, h, T, T], maps A [B, h, T, T].

    Raises:
        InputError: the maps change the number of tokens.
    """
    check_same_tokens("legrad", row, maps)
    return torch.stack(
        [g.clamp(min=0).masked_fill(a == 0, 0).mean((2, 3)) for g, a in zip(gradients, maps, strict=True)]
    ).sum(0)


def attention_guided_cam(row: Tensor, gradients: Sequence[Tensor], scores: Sequence[Tensor]) -> Tensor:
    """Σ_blocks Σ_heads r (∇A)⁺ ⊙ σ(S), r the tokens that the head reads, [K, B, T] (Leem and Seo, AAAI 2024).

    With a class token r is its row alone, as in the paper. gradients [K, B, h, T, T], scores S [B, h, T, T] with A = softmax(S); where
    a mask excludes a key S is -inf, and nothing is given.

    Raises:
        InputError: the maps change the number of tokens.
    """
    check_same_tokens("attention_guided_cam", row, scores)
    return torch.stack(
        [
            (row[:, :, None, :, None] * g.clamp(min=0) * s.sigmoid()).sum((2, 3))
            for g, s in zip(gradients, scores, strict=True)
        ]
    ).sum(0)


def attcat(row: Tensor, tokens: Sequence[Tensor], received: Sequence[Tensor]) -> Tensor:
    """Σ_blocks E_heads,queries[A] ⊙ Σ_features(h ⊙ ∂y/∂h), h what the block reads, [K, B, T] (Qiang et al., NeurIPS 2022).

    Padding is left out of the mean. tokens [K, B, T], received [B, T].

    Raises:
        InputError: the maps change the number of tokens.
    """
    if any(one.shape[-2:] != row.shape[1:] for one in (*tokens, *received)):
        raise InputError(f"attcat {NEEDS_SAME_TOKENS}")
    return torch.stack([cat * own for cat, own in zip(tokens, received, strict=True)]).sum(0)


def alti(row: Tensor, contributions: Sequence[Tensor]) -> Tensor:
    """r C_last ⋯ C_first, r the tokens that the head reads, [K, B, T] (Ferrando et al., EMNLP 2022).

    contributions C [B, T, T] as `fastrel.reference.contributions` defines them, the first block's first.

    Raises:
        InputError: the maps change the number of tokens.
    """
    if any(c.shape[:2] != row.shape[1:] for c in contributions):
        raise InputError(f"alti {NEEDS_SAME_TOKENS}")
    for c in reversed(contributions):
        row = torch.einsum("kbi,bij->kbj", row.to(c.dtype), c)
    return row
