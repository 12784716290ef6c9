"""Integrated gradients, by captum."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastrel.errors import InputError

STEPS = 50


def integrated_gradients(score: Callable[[Tensor], Tensor], image: Tensor) -> Tensor:
    """Gradients of score(image) [B] averaged on the straight way from zeros to image [B, C, H, W], times image, [B, H, W].

    Raises:
        InputError: captum is not installed.
    """
    try:
        from captum.attr import IntegratedGradients
    except ImportError as error:
        raise InputError('integrated_gradients needs captum: pip install "fastrel[captum]"') from error
    with torch.enable_grad():
        attributions = IntegratedGradients(score).attribute(image, n_steps=STEPS, internal_batch_size=max(8, len(image)))
    return attributions.detach().sum(1)
