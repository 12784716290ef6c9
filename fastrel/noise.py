"""How far a map moves under rounding: explained again with every input and parameter changed by as little as its dtype can tell."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastrel.engine import Call
from fastrel.maps import TokenMap

#: Above this noise floor a map is said to be in the noise.
NOISY = 0.01

Maps = dict[str, TokenMap]


def perturbed(call: Call, seed: int) -> Call:
    """The call with every floating-point input and parameter multiplied by 1 + u·eps, u uniform in [-1, 1)."""
    generators: dict[torch.device, torch.Generator] = {}

    def shaken(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        generator = generators.setdefault(value.device, torch.Generator(value.device).manual_seed(seed))
        wide = torch.float64 if value.dtype == torch.float64 else torch.float32
        factor = torch.rand(value.shape, generator=generator, dtype=wide, device=value.device)
        factor.mul_(2).sub_(1).mul_(torch.finfo(value.dtype).eps).add_(1)
        return factor.mul_(value.detach()).to(value.dtype)

    return replace(call, values=[shaken(value) for value in call.values])


def floor(maps: Maps, others: Iterable[Maps]) -> Tensor:
    """The largest relative L2 distance between maps and perturbed ones, [B] or [B, K]: 0.01 is a hundredth of the map.

    Over the patches of an image; for text over all tokens but the highest, which in a rollout is usually the one that the
    head reads, holding its own 1. Warns where a map moves by more than 1 %: it then shows rounding as much as the model.
    """
    kept = {name: _visible(one, one) for name, one in maps.items()}
    first = next(iter(kept.values()))
    found = torch.zeros(first.shape[:-1], dtype=first.dtype, device=first.device)
    for other in others:
        for name, before in kept.items():
            moved, norm = _visible(other[name], maps[name]), before.norm(dim=-1)
            found = torch.maximum(found, (moved - before).norm(dim=-1) / norm.where(norm > 0, 1))
    if bool((found > NOISY).any()):
        warnings.warn(
            f"this map moves by {float(found.max()):.1%} under perturbations of rounding size, so its details "
            'are noise; rules="positive" and float64 models move less',
            stacklevel=4,
        )
    return found


def _visible(one: TokenMap, by: TokenMap) -> Tensor:
    """What of a map is compared: patches, or all tokens but the highest of `by`."""
    if one.grid is not None:
        return one.grid.flatten(-2)
    return one.relevance.scatter(-1, by.relevance.argmax(-1, keepdim=True), 0.0)
