"""pytorch-grad-cam's call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastrel.adapters.common import explainer_of
from fastrel.errors import InputError
from fastrel.explainer import Explainer
from fastrel.outputs import logits_in


class RelevanceCAM:
    """`with RelevanceCAM(model) as cam: heat = cam(images, targets)`; no target layers and no reshape_transform are needed.

    Args:
        model: the model, or an `Explainer` of it.
        options: of `Explainer`.
    """

    def __init__(self, model: nn.Module | Explainer, **options: Any) -> None:
        self.explainer = explainer_of(model, options)

    def __call__(self, input_tensor: Tensor, targets: Sequence[Callable[[Tensor], Tensor]] | None = None) -> np.ndarray:
        """Heatmaps [B, H, W], each from 0 to 1, as `show_cam_on_image` takes them.

        Args:
            input_tensor: pictures [B, C, H, W].
            targets: one function of one sample's output per sample, as `ClassifierOutputTarget(281)`; None: the predicted class.

        Raises:
            InputError: as many targets as samples there must be.
        """
        if targets is not None and len(targets) != len(input_tensor):
            raise InputError(f"{len(targets)} targets for {len(input_tensor)} pictures; give one for each")

        def scores(output: Any) -> Tensor:
            logits = logits_in(output)
            return torch.stack([target(one) for target, one in zip(targets or (), logits, strict=True)])

        heat = self.explainer(input_tensor, target=None if targets is None else scores).heatmap().float().cpu().numpy()
        heat = heat - heat.min((1, 2), keepdims=True)
        top = heat.max((1, 2), keepdims=True)
        return heat / np.where(top > 0, top, 1)

    def __enter__(self) -> RelevanceCAM:
        return self

    def __exit__(self, *_: object) -> None:
        return None
