"""Perturbation: remove pixels in the order of the map and watch the prediction."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastrel.errors import InputError

FRACTIONS = tuple(i / 10 for i in range(10))


@dataclass(frozen=True)
class Curve:
    """What is left of the prediction as more is removed.

    Attributes:
        fractions: share of the pixels removed at each step, [S], each in 0 … 1.
        correct: whether the class is still the highest, [S, B] of bool.
    """

    fractions: np.ndarray
    correct: np.ndarray

    @property
    def accuracy(self) -> np.ndarray:
        """Share of samples still right, [S]."""
        return self.correct.mean(1)

    @property
    def auc(self) -> float:
        """Area under the accuracy curve by the trapezoidal rule, in percent (accuracy 1 at every fraction from 0 to 0.9 gives 90)."""
        return float(np.trapezoid(self.accuracy, self.fractions) * 100)


def perturb(
    model: Callable[[Tensor], Tensor],
    images: Tensor,
    maps: Tensor,
    target: Tensor,
    *,
    order: Literal["positive", "negative"] = "positive",
    fractions: Sequence[float] = FRACTIONS,
    baseline: Tensor | float = 0.0,
) -> Curve:
    """Remove the most relevant pixels first (`positive`: a good map makes the accuracy fall fast) or the least relevant.

    Args:
        model: images [B, C, H, W] -> logits [B, classes].
        images: as the model sees them, [B, C, H, W].
        maps: [B, gh, gw] or [B, H, W]; scaled up bilinearly. Equal values are removed in reading order.
        target: the class that counts as right, [B]: the predicted one, or the label.
        order: "positive": the most relevant pixels first; "negative": the least relevant.
        fractions: the shares of pixels to remove, each in 0 … 1. The paper's are 0, 0.1, … 0.9.
        baseline: what removed pixels become, as the model sees it: a number, or a tensor that broadcasts to the images
            (a black pixel of normalised images is (0 - mean) / std).

    Returns:
        Whether each sample is still right at each fraction.

    Raises:
        InputError: shapes that do not fit, or fractions outside 0 … 1.
    """
    with torch.no_grad():
        correct = [
            (model(x).argmax(1) == target).cpu().numpy()
            for x in exchanged(images, baseline, maps, target, fractions, descending=order == "positive")
        ]
    return Curve(np.array(fractions), np.array(correct))


def exchanged(
    images: Tensor,
    others: Tensor | float,
    maps: Tensor,
    target: Tensor,
    fractions: Sequence[float],
    descending: bool = True,
) -> Iterator[Tensor]:
    """The images with a growing fraction of their pixels taken from `others`, in the order of maps [B, gh, gw].

    Raises:
        InputError: as `removed`.
    """
    others = torch.as_tensor(others, dtype=images.dtype, device=images.device).expand_as(images)
    for taken in removed(images, maps, target, fractions, descending):
        yield torch.where(taken, others, images)


def removed(
    images: Tensor, maps: Tensor, target: Tensor, fractions: Sequence[float], descending: bool = True
) -> Iterator[Tensor]:
    """Which pixels have gone at each fraction, in the order of maps [B, gh, gw]: [B, 1, H, W] of bool.

    Raises:
        InputError: shapes that do not fit, or fractions outside 0 … 1.
    """
    check_shapes(images, maps, target)
    if not all(0 <= f <= 1 for f in fractions):
        raise InputError(f"fractions {tuple(fractions)} are not all in 0 … 1")
    height, width = images.shape[2:]
    heat = F.interpolate(maps[:, None], size=(height, width), mode="bilinear", align_corners=False).flatten(1)
    ranking = heat.argsort(dim=1, descending=descending, stable=True)
    place = torch.empty_like(ranking).scatter_(1, ranking, torch.arange(height * width, device=heat.device).expand_as(heat))
    for fraction in fractions:
        yield (place < round(fraction * height * width)).reshape(-1, 1, height, width)


def check_shapes(images: Tensor, maps: Tensor, target: Tensor) -> None:
    """Raise InputError unless there is a map [gh, gw] and a class for each image."""
    if maps.dim() != 3 or len(maps) != len(images) or target.shape != (len(images),):
        raise InputError(f"maps {tuple(maps.shape)} and target {tuple(target.shape)} for images {tuple(images.shape)}")


def probability(model: Callable[[Tensor], Tensor], images: Tensor, target: Tensor) -> np.ndarray:
    """The probability of each image's class, [B] in float64."""
    return model(images).softmax(1).gather(1, target[:, None])[:, 0].double().cpu().numpy()
