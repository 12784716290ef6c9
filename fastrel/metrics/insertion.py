"""Insertion and deletion (Petsiuk et al., RISE, BMVC 2018): how fast a class comes and goes with the pixels of a map."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastrel.errors import InputError
from fastrel.metrics.perturbation import exchanged, probability

STEPS = 20


def deletion(
    model: Callable[[Tensor], Tensor],
    images: Tensor,
    maps: Tensor,
    target: Tensor,
    *,
    steps: int = STEPS,
    baseline: Tensor | float = 0.0,
) -> np.ndarray:
    """The class' probability as the most relevant pixels go, averaged over the way: lower is better.

    Args:
        model: images [B, C, H, W] -> logits [B, classes].
        images: as the model sees them, [B, C, H, W].
        maps: [B, gh, gw] or [B, H, W]; scaled up bilinearly. Of equal values the first in reading order goes first.
        target: the class, [B].
        steps: the way from nothing to everything in so many equal steps; `steps` + 1 forward passes.
        baseline: what removed pixels become; 0, the mean colour of normalised images, is RISE's.

    Returns:
        The area under the curve of probabilities by the trapezoidal rule, [B] in 0 … 1.

    Raises:
        InputError: shapes that do not fit, or no steps.
    """
    return _area(model, images, baseline, maps, target, steps)


def insertion(
    model: Callable[[Tensor], Tensor],
    images: Tensor,
    maps: Tensor,
    target: Tensor,
    *,
    steps: int = STEPS,
    start: Tensor | None = None,
) -> np.ndarray:
    """The class' probability as the most relevant pixels come into a blurred picture, averaged over the way: higher is better.

    Args:
        model, images, maps, target, steps: as for `deletion`.
        start: what the pixels come into, [B, C, H, W]; default: `blurred(images)`, as in RISE.

    Returns:
        The area under the curve of probabilities by the trapezoidal rule, [B] in 0 … 1.

    Raises:
        InputError: shapes that do not fit, or no steps.
    """
    return _area(model, blurred(images) if start is None else start, images, maps, target, steps)


def blurred(images: Tensor, size: int = 11, sigma: float = 5.0) -> Tensor:
    """Images [B, C, H, W] under a Gaussian of `size` x `size` pixels, edges mirrored (RISE's substrate)."""
    at = torch.arange(size, dtype=images.dtype, device=images.device) - (size - 1) / 2
    weights = (-at.square() / (2 * sigma**2)).exp()
    weights = (weights / weights.sum()).expand(images.shape[1], 1, 1, size)
    padded = F.pad(images, [size // 2] * 4, mode="reflect")
    return F.conv2d(F.conv2d(padded, weights, groups=len(weights)), weights.mT, groups=len(weights))


def _area(
    model: Callable[[Tensor], Tensor], images: Tensor, others: Tensor | float, maps: Tensor, target: Tensor, steps: int
) -> np.ndarray:
    if steps < 1:
        raise InputError(f"steps must be at least 1, got {steps}")
    fractions = np.linspace(0, 1, steps + 1)
    with torch.no_grad():
        curve = [probability(model, x, target) for x in exchanged(images, others, maps, target, fractions.tolist())]
    return np.trapezoid(np.array(curve), fractions, axis=0)
