"""Steps of reverse graphs that backends look for, written with torch's own operators."""

import torch
from torch import Tensor


def gelu_backward(lane: Tensor, x: Tensor, approximate: str = "none") -> Tensor:
    """lane ⊙ gelu'(x)."""
    return torch.ops.aten.gelu_backward(lane, x.expand_as(lane), approximate=approximate)


def gelu(x: Tensor, approximate: str) -> Tensor:
    """gelu(x) again, in the dtype of x."""
    return torch.nn.functional.gelu(x, approximate=approximate)


def add_rows(dense: Tensor, part: Tensor, dim: int, start: int) -> Tensor:
    """dense with `part` added to its entries from `start` on along `dim`."""
    out = dense.clone()
    out.narrow(dim, start, part.shape[dim]).add_(part)
    return out
