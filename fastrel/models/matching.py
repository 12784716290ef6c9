"""How well a picture and a text fit, by a model that reads them together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastrel.errors import InputError


def score_of(output: Any) -> tuple[str, Callable[[Any], Tensor]]:
    """What the score of each pair is called in an output like this one, and what reads it there, [B].

    Raises:
        InputError: it holds no such score.
    """
    if getattr(output, "logits_per_image", None) is not None:
        return "similarity", lambda out: out.logits_per_image.diagonal()
    for name in ("itm_score", "logits"):
        found = getattr(output, name, None)
        if isinstance(found, torch.Tensor) and found.dim() == 2 and found.shape[1] == 2:
            return "match", lambda out, name=name: getattr(out, name)[:, 1] - getattr(out, name)[:, 0]
    raise InputError(
        f"{type(output).__name__} holds neither logits_per_image nor scores [B, 2] of a match; explain it in Python: "
        "fastrel.Explainer(model)(**inputs, target=lambda out: …)"
    )
