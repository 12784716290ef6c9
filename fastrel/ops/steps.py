"""Steps of reverse graphs that backends look for, written with torch's own operators."""

import math

import torch
from torch import Tensor


def gelu_backward(lane: Tensor, x: Tensor, approximate: str = "none") -> Tensor:
    """lane ⊙ gelu'(x)."""
    return torch.ops.aten.gelu_backward(lane, x.expand_as(lane), approximate=approximate)


def gelu_ratio(lane: Tensor, x: Tensor, approximate: str = "none") -> Tensor:
    """lane ⊙ gelu(x) / x: AttnLRP's rule for activation functions. gelu(x) = x Φ(x), so there is nothing to divide."""
    if approximate == "tanh":
        inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)
        return lane * (0.5 * (1 + inner.tanh()))
    return lane * (0.5 * (1 + torch.erf(x * math.sqrt(0.5))))


def add_rows(dense: Tensor, part: Tensor, dim: int, start: int) -> Tensor:
    """dense with `part` added to its entries from `start` on along `dim`."""
    out = dense.clone()
    out.narrow(dim, start, part.shape[dim]).add_(part)
    return out
