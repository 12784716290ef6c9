"""The HDF5 files that ViRelAy and CoRelAy read. Needs h5py: pip install "fastrel[evaluate]"."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any

import h5py
import numpy as np
import torch.nn.functional as F

from fastrel.errors import InputError
from fastrel.explanation import Explanation


def save_inputs(path: str | os.PathLike[str], images: Any, labels: Sequence[int]) -> None:
    """The data set's own file: "data" [N, C, H, W] as given, "label" [N].

    Raises:
        InputError: as many labels as images there must be.
    """
    images = np.asarray(images)
    if len(images) != len(labels):
        raise InputError(f"{len(labels)} labels for {len(images)} images")
    with h5py.File(path, "w") as file:
        file["data"], file["label"] = images, np.asarray(labels, dtype=np.uint32)


def save_attributions(
    path: str | os.PathLike[str], explanations: Iterable[Explanation], index: Sequence[int] | None = None
) -> None:
    """Batches explained, one class per sample: "attribution" [N, 1, H, W] (heatmaps in pixels), "label" [N, classes] (1 for the class
    explained), "prediction" [N, classes] (logits), "index" [N] into the data set, default 0 … N − 1.

    Raises:
        InputError: an explanation of a function or of several classes; as many indices as samples there must be.
    """
    batches = list(explanations)
    if any(one.target is None or one.target.dim() != 1 for one in batches):
        raise InputError("ViRelAy wants one class per sample: explain with target=None, a class or [B] classes")
    heat, label, logits = (
        np.concatenate([make(one) for one in batches])
        for make in (
            lambda one: one.heatmap().unsqueeze(1).float().cpu().numpy(),
            lambda one: F.one_hot(one.target, one.logits.shape[1]).float().cpu().numpy(),
            lambda one: one.logits.float().cpu().numpy(),
        )
    )
    places = np.arange(len(heat)) if index is None else np.asarray(index)
    if len(places) != len(heat):
        raise InputError(f"{len(places)} indices for {len(heat)} samples")
    with h5py.File(path, "w") as file:
        file["index"], file["attribution"] = places.astype(np.uint32), heat
        file["label"], file["prediction"] = label, logits
