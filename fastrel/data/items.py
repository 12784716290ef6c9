"""What a data set is made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image


@dataclass(frozen=True)
class ImageItem:
    """A picture. `classes`: those that count as its label, any of them; empty where there is none.

    `mask()` is the object, [H, W] of bool and of the picture's size, where the data set has one. Other processes read the item, so
    that both functions must be picklable.
    """

    name: str
    group: str  # items of one group share a picture: for statistics they are one observation
    picture: Callable[[], Image.Image]
    classes: tuple[int, ...] = ()
    mask: Callable[[], np.ndarray] | None = None


@dataclass(frozen=True)
class TextItem:
    """A text of T words with its class; rationale [T] of bool: the words that a human marked as the reason for it."""

    name: str
    group: str
    words: tuple[str, ...]
    label: int
    rationale: np.ndarray
