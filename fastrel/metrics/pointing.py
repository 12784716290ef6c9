"""Does the map lie on the object?"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fastrel.errors import InputError


def check_shapes(maps: Tensor, masks: Tensor) -> None:
    """Raise InputError unless maps are [B, gh, gw] and masks [B, H, W]."""
    if maps.dim() != 3 or masks.dim() != 3 or len(maps) != len(masks):
        raise InputError(f"expected maps [B, gh, gw] and masks [B, H, W], got {tuple(maps.shape)} and {tuple(masks.shape)}")


def _patch_cover(maps: Tensor, masks: Tensor) -> Tensor:
    """Share of each patch that the mask covers, [B, gh, gw]."""
    check_shapes(maps, masks)
    return F.adaptive_avg_pool2d(masks[:, None].to(maps.dtype), (maps.shape[1], maps.shape[2]))[:, 0]


def pointing_game(maps: Tensor, masks: Tensor) -> Tensor:
    """Whether the highest patch is more than half inside the mask (the pointing game of Zhang et al., ECCV 2016, on patches).

    Args:
        maps: [B, gh, gw], of any scale; of equal patches the first counts.
        masks: [B, H, W], of bool or of shares in 0 … 1.

    Returns:
        [B] of bool.

    Raises:
        InputError: shapes that do not fit.
    """
    cover = _patch_cover(maps, masks).flatten(1)
    return cover.gather(1, maps.flatten(1).argmax(1, keepdim=True))[:, 0] > 0.5


def energy_inside(maps: Tensor, masks: Tensor) -> Tensor:
    """Share of the positive relevance that lies inside the mask; a patch that is partly inside counts by the share covered.

    Args:
        maps: [B, gh, gw], of any scale.
        masks: [B, H, W], of bool or of shares in 0 … 1.

    Returns:
        [B] in 0 … 1; 0 for a map without positive relevance.

    Raises:
        InputError: shapes that do not fit.
    """
    positive = maps.clamp(min=0)
    inside = (positive * _patch_cover(maps, masks)).flatten(1).sum(1)
    total = positive.flatten(1).sum(1)
    return inside / total.where(total > 0, 1)
