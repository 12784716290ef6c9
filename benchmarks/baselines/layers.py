"""Layers as the official code of Chefer, Gur and Wolf (CVPR 2021) has them: each keeps what it read and asks autograd for relevance.

Written anew by the published structure, so that it costs what that costs: a layer's product is computed again from the inputs
that a hook kept, and its relevance is the input times autograd's gradient of that product. One sample at a time: sums are over all
entries. Relevances have the shape of the value that they belong to.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def safe_divide(a: Tensor, b: Tensor) -> Tensor:
    """a / b, and 0 where b is 0; 1e-9 is added to b whatever its sign."""
    shifted = b + 1e-9
    shifted = shifted + (shifted == 0).to(b.dtype) * 1e-9
    return a / shifted * (b != 0).to(b.dtype)


def _kept(x: Any) -> Any:
    return [_kept(y) for y in x] if isinstance(x, (list, tuple)) else x.detach().requires_grad_()


def keep_inputs(layer: nn.Module, given: tuple[Any, ...], output: Any) -> None:
    """The hook: a layer's first argument, or the list that it is, as leaves of autograd."""
    layer.kept = _kept(given[0])


class Kept(nn.Module):
    """A layer without parameters that keeps what it reads; relevance passes unchanged."""

    def __init__(self) -> None:
        super().__init__()
        self.register_forward_hook(keep_inputs)

    def relprop(self, rel: Tensor) -> Any:
        """R of the output -> R of the input, or of each of the inputs."""
        return rel


class Activation(Kept):
    """A function of entries, such as gelu."""

    def __init__(self, f: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.f = f

    def forward(self, x: Tensor) -> Tensor:
        return self.f(x)


class Softmax(Kept):
    """Attention maps from scores."""

    def forward(self, x: Tensor) -> Tensor:
        return x.softmax(-1)


class LayerNorm(nn.LayerNorm):
    """Relevance passes unchanged."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_forward_hook(keep_inputs)

    def relprop(self, rel: Tensor) -> Tensor:
        return rel


class Matmul(Kept):
    """a b of two activations, [a, b]: operand times gradient of the product by R ⊘ (a b)."""

    def forward(self, operands: list[Tensor]) -> Tensor:
        return operands[0] @ operands[1]

    def relprop(self, rel: Tensor) -> list[Tensor]:
        product = self.forward(self.kept)
        gradients = torch.autograd.grad(product, self.kept, safe_divide(rel, product), retain_graph=True)
        return [x * gradient for x, gradient in zip(self.kept, gradients, strict=True)]


class Add(Kept):
    """u + v, [u, v]: eq. (9), normalised over the sample."""

    def forward(self, operands: list[Tensor]) -> Tensor:
        return torch.add(*operands)

    def relprop(self, rel: Tensor) -> list[Tensor]:
        total = self.forward(self.kept)
        gradients = torch.autograd.grad(total, self.kept, safe_divide(rel, total), retain_graph=True)
        parts = [x * gradient for x, gradient in zip(self.kept, gradients, strict=True)]
        sums = [part.sum() for part in parts]
        size = sums[0].abs() + sums[1].abs()
        shares = [safe_divide(own.abs(), size) * rel.sum() for own in sums]
        return [part * safe_divide(share, own) for part, share, own in zip(parts, shares, sums, strict=True)]


class Clone(Kept):
    """One value used twice: x ⊙ Σ (R_i ⊘ x)."""

    def forward(self, x: Tensor) -> list[Tensor]:
        return [x, x]

    def relprop(self, rels: list[Tensor]) -> Tensor:
        shares = [safe_divide(rel, self.kept) for rel in rels]
        (gradient,) = torch.autograd.grad([self.kept] * len(rels), self.kept, shares, retain_graph=True)
        return self.kept * gradient


class FirstToken(Kept):
    """The class token of [B, T, D], [B, 1, D]: x ⊙ gradient by R ⊘ x."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.index_select(x, 1, torch.tensor(0, device=x.device))

    def relprop(self, rel: Tensor) -> Tensor:
        picked = self.forward(self.kept)
        (gradient,) = torch.autograd.grad(picked, self.kept, safe_divide(rel, picked), retain_graph=True)
        return self.kept * gradient


class Linear(nn.Linear):
    """Eq. (5) as the case α = 1, β = 0 of the αβ-rule: products of x⁺, x⁻ with W⁺, W⁻, all four of them, and autograd's of each."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_forward_hook(keep_inputs)

    def relprop(self, rel: Tensor, alpha: float = 1) -> Tensor:
        w_pos, w_neg = self.weight.clamp(min=0), self.weight.clamp(max=0)
        x_pos, x_neg = self.kept.clamp(min=0), self.kept.clamp(max=0)

        def share(w_of_pos: Tensor, w_of_neg: Tensor) -> Tensor:
            """Of the products x⁺ w_of_posᵀ and x⁻ w_of_negᵀ, R ⊘ their sum back to x."""
            products = F.linear(x_pos, w_of_pos), F.linear(x_neg, w_of_neg)
            s = safe_divide(rel, products[0] + products[1])
            parts = (
                x * torch.autograd.grad(z, x, s, retain_graph=True)[0]
                for z, x in zip(products, (x_pos, x_neg), strict=True)
            )
            return sum(parts, torch.zeros_like(x_pos))

        return alpha * share(w_pos, w_neg) - (alpha - 1) * share(w_neg, w_pos)
