"""Whether a map is the one expected, before it is timed. No trivial map passes: not 0, not 1 at the token read, not uniform."""

from __future__ import annotations

import torch
from torch import Tensor

#: Largest distance by precision. Below "float32" the bounds of docs/numerics.md with room for the device's own order of sums.
BOUNDS = {"float32": 1e-3, "mixed": 2e-2, "low": 5e-2}


def distance(ours: Tensor, expected: Tensor) -> float:
    """The largest relative L2 distance of a sample [..., T], without what a row holds whatever the model does.

    The rollout starts as 1 at the token that is read, or evenly over the tokens: the first token is left out and each map's mean
    is taken off. A map that is constant there is at a distance of 1. NaN: infinity.
    """
    ours, expected = (x.detach().double().cpu()[..., 1:] for x in (ours, expected))
    ours, expected = (x - x.mean(-1, keepdim=True) for x in (ours, expected))
    found = (ours - expected).norm(dim=-1) / expected.norm(dim=-1).clamp_min(torch.finfo(torch.float64).tiny)
    return float(found.max()) if bool(found.isfinite().all()) else float("inf")


def check(ours: Tensor, expected: Tensor, precision: str = "float32") -> float:
    """The distance.

    Raises:
        AssertionError: it is more than the precision allows.
    """
    found = distance(ours, expected)
    assert found <= BOUNDS[precision], (
        f"not the map expected: {found:.1e} from it, and {precision} allows {BOUNDS[precision]:.0e}"
    )
    return found
