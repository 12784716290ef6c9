"""Integrated gradients, by captum."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastrel.errors import needed

STEPS = 50


def integrated_gradients(score: Callable[[Tensor], Tensor], image: Tensor) -> Tensor:
    """Gradients of score(image) [B] averaged on the straight way from zeros to image [B, C, H, W], times image, [B, H, W].

    Raises:
        InputError: captum is not installed.
    """
    with needed("integrated_gradients", "captum"):
        from captum.attr import IntegratedGradients
    with torch.enable_grad():
        attributions = IntegratedGradients(score).attribute(image, n_steps=STEPS, internal_batch_size=max(8, len(image)))
    return attributions.detach().sum(1)
