"""A Quantus `explain_func`."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from fastrel.explainer import Explainer


class Explain:
    """`explain_func=Explain(method="…")` for Quantus' metrics of pictures.

    The model is captured when it first comes, and again when another one does (metrics that randomise a model copy it).

    Args:
        options: of `Explainer`.
    """

    def __init__(self, **options: Any) -> None:
        self.options = options
        self._explainer: Explainer | None = None

    def __call__(self, model: nn.Module, inputs: Any, targets: Any, **kwargs: Any) -> np.ndarray:
        """Heatmaps in pixels [B, 1, H, W] of pictures [B, C, H, W] for one class each; `kwargs["device"]`: where."""
        if self._explainer is None or self._explainer.model is not model:
            self._explainer = Explainer(model, **self.options)
        first = next(model.parameters(), torch.empty(0))
        images = torch.as_tensor(np.asarray(inputs), dtype=first.dtype, device=kwargs.get("device") or first.device)
        classes = torch.as_tensor(np.asarray(targets), dtype=torch.long, device=images.device)
        return self._explainer(images, target=classes).heatmap().unsqueeze(1).cpu().numpy()
