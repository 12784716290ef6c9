"""Products of 16-bit operands with sums of float32, and weights as they take them: what backends for GPUs share."""

import torch
from torch import Tensor


def product(a: Tensor, b: Tensor) -> Tensor:
    """a [n, k] @ b [k, m] of 16 bits in float32; a CPU, where only tests come by, has no such product."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.device.type == "cuda" else a.float() @ b.float()


def prepared(weight: Tensor, purpose: str) -> tuple[Tensor, ...]:
    """Of a weight [outs, ins], one of "WHAT COUNT".

    magnitude: |W|. sides: [W⁺ W⁻] [outs, 2 · ins]. itself: W. COUNT: so many times above itself, or "wide": once, in float32.
    """
    what, count = purpose.split()
    if what == "magnitude":
        return (weight.abs(),)
    if what == "sides":
        weight = torch.cat([weight.clamp(min=0), weight.clamp(max=0)], 1)
    return (weight.float() if count == "wide" else torch.cat([weight] * int(count)),)
