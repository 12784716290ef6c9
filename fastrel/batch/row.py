"""What is found out about one item and target."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass
class Row:
    """An item's map for one target, or the reason why there is none.

    map: [gh, gw] where the tokens lie on a picture; relevance: [T], of all tokens; tokens: T strings of texts; logits: [C].
    window: which piece of a text that is read in pieces. logit, probability: of the target; predicted: the class of the
    highest logit. noise: the map's noise floor, where it was asked for.
    """

    item: str
    sha256: str | None = None
    window: int = 0
    target: int | None = None
    target_name: str | None = None
    logit: float | None = None
    probability: float | None = None
    predicted: int | None = None
    map: np.ndarray | None = None
    relevance: np.ndarray | None = None
    tokens: list[str] | None = None
    logits: np.ndarray | None = None
    noise: float | None = None
    notes: tuple[str, ...] = ()
    error: str | None = None
