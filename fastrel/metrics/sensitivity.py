"""Sensitivity-n (Ancona et al., ICLR 2018): does the relevance of a set of patches say what their removal changes?"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from fastrel.errors import InputError
from fastrel.metrics.perturbation import check_shapes

SETS = 100


def sensitivity_n(
    model: Callable[[Tensor], Tensor],
    images: Tensor,
    maps: Tensor,
    target: Tensor,
    *,
    sizes: Sequence[int],
    sets: int = SETS,
    baseline: Tensor | float = 0.0,
    seed: int = 0,
) -> np.ndarray:
    """Pearson's correlation, over random sets of n patches, of the sum of their relevance and the fall of the logit without them.

    Args:
        model: images [B, C, H, W] -> logits [B, classes].
        images: as the model sees them, [B, C, H, W].
        maps: one value per patch, [B, gh, gw]; height and width of the images are multiples of theirs.
        target: the class, [B].
        sizes: the numbers n of patches in a set, each in 1 … gh·gw - 1.
        sets: random sets per size, the same for all samples and for all maps with this grid; forward passes per size.
        baseline: what removed pixels become: a number, or a tensor that broadcasts to the images.
        seed: of the sets.

    Returns:
        [B, sizes] in -1 … 1, higher is better; 0 where a map or the logit is the same for all sets.

    Raises:
        InputError: shapes that do not fit, sizes out of range, or fewer than two sets.
    """
    check_shapes(images, maps, target)
    (rows, columns), (height, width) = maps.shape[1:], images.shape[2:]
    if height % rows or width % columns:
        raise InputError(f"a map of {rows}x{columns} patches for images of {height}x{width}: these are no multiples")
    if not all(0 < n < rows * columns for n in sizes) or sets < 2:
        raise InputError(f"sizes {tuple(sizes)} must be in 1 … {rows * columns - 1} and sets, {sets}, at least 2")
    others = torch.as_tensor(baseline, dtype=images.dtype, device=images.device).expand_as(images)
    generator = np.random.default_rng(seed)
    relevance = maps.double().cpu().numpy().reshape(len(maps), -1)
    found = []
    with torch.no_grad():
        logit = lambda x: model(x).gather(1, target[:, None])[:, 0].double().cpu().numpy()  # noqa: E731
        whole = logit(images)
        for n in sizes:
            sums, falls = [], []
            for _ in range(sets):
                chosen = np.zeros(rows * columns, bool)
                chosen[generator.choice(rows * columns, n, replace=False)] = True
                cells = torch.from_numpy(chosen.reshape(rows, columns)).to(images.device)
                gone = cells.repeat_interleave(height // rows, 0).repeat_interleave(width // columns, 1)
                sums.append(relevance[:, chosen].sum(1))
                falls.append(whole - logit(torch.where(gone, others, images)))
            found.append(_correlation(np.array(sums), np.array(falls)))
    return np.array(found).T


def _correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Pearson's correlation along the first dimension, [S, B] -> [B]; 0 where one of them is constant."""
    a, b = a - a.mean(0), b - b.mean(0)
    size = np.sqrt((a**2).sum(0) * (b**2).sum(0))
    return np.where(size > 0, (a * b).sum(0) / np.where(size > 0, size, 1), 0.0)
