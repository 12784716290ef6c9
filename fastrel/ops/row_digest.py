"""A number per row of a weight that tells whether any of its bits has changed: `fastrel.weights` keeps what was made of it."""

import torch
from torch import Tensor

from fastrel.ops.library import define

#: Numbers that are hashed at a time, so that what lies between stays in the caches.
CHUNK = 1 << 17


def _reference(weight: Tensor, keys: Tensor) -> Tensor:
    """Σ_j x_j² mod 2⁶⁴ with x_j = (w_j ⊕ (w_j ≫ 15)) + keys_j mod 2³², w_j the bits of a row's float32 number j.

    weight [rows, n] float32, keys [n] int32 -> [rows] int64. x_j and x_j² are one-to-one in w_j.
    """
    parts = []
    for words in weight.contiguous().view(torch.int32).split(max(1, CHUNK // max(1, weight.shape[1]))):
        shifted = (words >> 15).bitwise_and_(0x1FFFF)  # of bits, not of a signed number
        x = ((words ^ shifted) + keys).long().bitwise_and_(0xFFFFFFFF)
        parts.append(x.mul_(x).sum(1))
    return torch.cat(parts) if parts else keys.new_empty(0, dtype=torch.int64)


def _fake(weight: Tensor, keys: Tensor) -> Tensor:
    return weight.new_empty(weight.shape[0], dtype=torch.int64)


row_digest = define("row_digest(Tensor weight, Tensor keys) -> Tensor", _reference, _fake)
