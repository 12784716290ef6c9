"""The map, cut at its mean, as a segmentation of the object."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from fastrel.errors import needed
from fastrel.metrics.pointing import check_shapes


@dataclass(frozen=True)
class SegmentationScores:
    """Scores per sample, each [B] in 0 … 1.

    Attributes:
        pixel_accuracy: share of pixels on the right side of the threshold.
        mean_iou: intersection over union, mean of object and background.
        mean_ap: average precision, mean of object and background.
    """

    pixel_accuracy: np.ndarray
    mean_iou: np.ndarray
    mean_ap: np.ndarray


def segmentation(maps: Tensor, masks: Tensor) -> SegmentationScores:
    """Score maps against masks, as the paper does on ImageNet-Segmentation.

    The map's own mean is the threshold. Average precision is that of the map for the object, and of its negative for the
    background. A part that a mask does not have (no object, or nothing else) is left out of the means. Needs scikit-learn.

    Args:
        maps: [B, gh, gw], of any scale; scaled up bilinearly to the mask.
        masks: [B, H, W]; what is not 0 is the object.

    Returns:
        The scores of each sample.

    Raises:
        InputError: shapes that do not fit.
    """
    with needed("average precision", "evaluate"):
        from sklearn.metrics import average_precision_score

    check_shapes(maps, masks)
    heat = F.interpolate(maps[:, None].double(), size=masks.shape[1:], mode="bilinear", align_corners=False)[:, 0]
    heats, objects = heat.cpu().numpy(), masks.cpu().numpy() != 0
    accuracy, iou, ap = [], [], []
    for values, truth in zip(heats, objects, strict=True):
        found = values > values.mean()
        parts = [(truth, found, values), (~truth, ~found, -values)]
        parts = [part for part in parts if part[0].any()]
        accuracy.append((found == truth).mean())
        iou.append(np.mean([(t & f).sum() / (t | f).sum() for t, f, _ in parts]))
        ap.append(np.mean([average_precision_score(t.ravel(), v.ravel()) for t, _, v in parts]))
    return SegmentationScores(np.array(accuracy), np.array(iou), np.array(ap))
