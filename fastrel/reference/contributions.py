"""How much of what an attention block makes of a token comes from each token: the contributions of ALTI."""

import torch
from torch import Tensor

#: Vectors of so many entries are held at once.
_ENTRIES = 1 << 24


def contributions(
    attention: Tensor,
    value: Tensor,
    weight: Tensor,
    stream: Tensor,
    total: Tensor,
    output: Tensor,
    norm: tuple[Tensor | None, float] | None = None,
) -> Tensor:
    """c_ij = (‖y_i‖₁ − ‖y_i − T_i(x_j)‖₁)⁺ of query i and token j, rows scaled to sum 1, 0/0 = 0 (Ferrando et al., EMNLP 2022).

    T_i(x_j) = L(Σ_h A^h_ij W^h v^h_j + δ_ij x_i) is the part of y_i that comes from token j. With a layer norm after the residual add
    L(u) = γ ⊙ (u − mean(u)) / σ(total_i); without one it is the identity.

    attention A [B, h, T, T], value v [B, h, T, d], weight W [D, h·d], stream x, total, output y [B, T, D], norm (γ [D], ε).
    Returns [B, T, T].
    """
    batch, heads, tokens, _ = value.shape
    parts = torch.einsum("bhjd,ohd->bjho", value, weight.unflatten(-1, (heads, -1)))
    if norm is not None:
        gamma, eps = norm
        gamma = torch.ones_like(output[0, 0]) if gamma is None else gamma
        parts, stream = ((x - x.mean(-1, keepdim=True)) * gamma for x in (parts, stream))
        scale = (total.var(-1, correction=0) + eps).rsqrt()
        attention, stream = attention * scale[:, None, :, None], stream * scale[..., None]
    found = []
    step = max(1, _ENTRIES // (batch * tokens * output.shape[-1]))
    for start in range(0, tokens, step):
        queries = slice(start, min(start + step, tokens))
        vectors = torch.einsum("bhij,bjho->bijo", attention[:, :, queries], parts)
        torch.diagonal(vectors[:, :, queries], 0, 1, 2).add_(stream[:, queries].mT)
        sizes = output[:, queries].abs().sum(-1, keepdim=True)
        found.append((sizes - vectors.sub_(output[:, queries, None]).abs_().sum(-1)).clamp(min=0))
    unseen = (attention == 0).all(1) & ~torch.eye(tokens, dtype=torch.bool, device=value.device)
    shares = torch.cat(found, 1).masked_fill(unseen, 0)
    sums = shares.sum(-1, keepdim=True)
    return shares / sums.masked_fill(sums == 0, 1)
