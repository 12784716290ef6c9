"""What several adapters share."""

from __future__ import annotations

from typing import Any

from torch import nn

from fastrel.explainer import Explainer


def explainer_of(model: nn.Module | Explainer, options: dict[str, Any]) -> Explainer:
    """An explainer of a model; one that is given with these options changed."""
    return model.using(**options) if isinstance(model, Explainer) else Explainer(model, **options)
