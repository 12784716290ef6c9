"""ROAD (Rong et al., ICML 2022): deletion where what is removed is filled from its neighbours, so that its outline tells nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from fastrel.errors import InputError, needed
from fastrel.metrics.perturbation import probability, removed

FRACTIONS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 0.9)
NOISE = 0.01

#: Row, column and weight of the eight neighbours that a removed pixel is the mean of: the direct ones count twice.
_NEIGHBOURS = tuple(
    (down, right, 1 / 6 if 0 in (down, right) else 1 / 12)
    for down in (-1, 0, 1)
    for right in (-1, 0, 1)
    if (down, right) != (0, 0)
)


def road(
    model: Callable[[Tensor], Tensor],
    images: Tensor,
    maps: Tensor,
    target: Tensor,
    *,
    order: Literal["positive", "negative"] = "positive",
    fractions: Sequence[float] = FRACTIONS,
    noise: float = NOISE,
    seed: int = 0,
) -> np.ndarray:
    """The class' probability as pixels go, the most (`positive`: lower is better) or the least relevant first.

    Args:
        model: images [B, C, H, W] -> logits [B, classes].
        images: as the model sees them, [B, C, H, W].
        maps: [B, gh, gw] or [B, H, W]; scaled up bilinearly. Of equal values the first in reading order goes first.
        target: the class, [B].
        order: "positive": the most relevant pixels first; "negative": the least relevant.
        fractions: the shares of pixels to remove, each in 0 … 1.
        noise: standard deviation of what is added to filled pixels, in the images' units.
        seed: of that noise, which is the same for every sample, whatever else is in the batch.

    Returns:
        The probability at each fraction, [S, B] in 0 … 1. ROAD's score is its mean over fractions.

    Raises:
        InputError: shapes that do not fit, fractions outside 0 … 1, or scipy is not there.
    """
    found = []
    with torch.no_grad():
        for gone in removed(images, maps, target, fractions, descending=order == "positive"):
            filled = torch.stack([imputed(x, own[0], noise, seed) for x, own in zip(images, gone, strict=True)])
            found.append(probability(model, filled, target))
    return np.array(found)


def imputed(image: Tensor, gone: Tensor, noise: float = NOISE, seed: int = 0) -> Tensor:
    """An image whose removed pixels are each the weighted mean of their neighbours, removed ones included, plus noise.

    That is a sparse linear system per channel, solved exactly. Without a pixel left the image becomes 0 before the noise.

    Args:
        image: [C, H, W].
        gone: which pixels are removed, [H, W] of bool.
        noise: standard deviation of the normal noise on them.
        seed: of it.

    Returns:
        [C, H, W], the dtype and device of the image.

    Raises:
        InputError: shapes that do not fit, or scipy is not there.
    """
    if image.dim() != 3 or gone.shape != image.shape[1:]:
        raise InputError(f"an image [C, H, W] and removed pixels [H, W], got {tuple(image.shape)} and {tuple(gone.shape)}")
    rows, columns = np.nonzero(gone.cpu().numpy())
    if not len(rows):
        return image.clone()
    values = image.double().cpu().numpy()
    filled = _means_of_neighbours(values, rows, columns) if len(rows) < gone.numel() else np.zeros((len(values), len(rows)))
    filled += noise * np.random.default_rng(seed).standard_normal(filled.shape)
    out = image.clone()
    out[:, rows, columns] = torch.from_numpy(filled).to(image)
    return out


def _means_of_neighbours(values: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """x [C, N] at the N places with Σ_j w_j x_j = x Σ_j w_j over the neighbours j inside the image; others have `values` [C, H, W]."""
    with needed("ROAD", "evaluate"):
        from scipy.sparse import csc_matrix
        from scipy.sparse.linalg import spsolve
    height, width = values.shape[1:]
    unknown = np.full((height, width), -1)
    unknown[rows, columns] = np.arange(len(rows))
    diagonal, right_side = np.zeros(len(rows)), np.zeros((len(rows), len(values)))
    entries: list[tuple[Any, Any, Any]] = []
    for down, right, weight in _NEIGHBOURS:
        y, x = rows + down, columns + right
        inside = np.nonzero((y >= 0) & (y < height) & (x >= 0) & (x < width))[0]
        diagonal[inside] += weight
        other = unknown[y[inside], x[inside]]
        both, known = other >= 0, inside[other < 0]
        entries.append((inside[both], other[both], np.full(both.sum(), -weight)))
        right_side[known] += weight * values[:, y[known], x[known]].T
    entries.append((np.arange(len(rows)), np.arange(len(rows)), diagonal))
    at, of, value = (np.concatenate(parts) for parts in zip(*entries, strict=True))
    return spsolve(csc_matrix((value, (at, of))), right_side).reshape(len(rows), -1).T
