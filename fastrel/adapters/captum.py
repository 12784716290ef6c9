"""captum's interface. Needs captum: pip install "fastrel[captum]"."""

from __future__ import annotations

from typing import Any

import torch
from captum.attr import Attribution
from torch import Tensor, nn

from fastrel.adapters.common import explainer_of
from fastrel.errors import InputError
from fastrel.explainer import Explainer
from fastrel.inputs import input_names
from fastrel.maps import TokenMap
from fastrel.outputs import logits_in


class Relevance(Attribution):
    """`attribute(inputs, target)`, as of captum's own methods.

    Args:
        model: the model, or an `Explainer` of it.
        options: of `Explainer`.
    """

    def __init__(self, model: nn.Module | Explainer, **options: Any) -> None:
        self.explainer = explainer_of(model, options)
        super().__init__(self.explainer.model)

    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: Any = None,
        additional_forward_args: Any = None,
    ) -> Tensor | tuple[Tensor, ...]:
        """Attributions in the shapes of the inputs.

        Args:
            inputs: one input or several, given to the model in this order; then `additional_forward_args`, which get none.
            target: as in captum: None (the predicted class) · a class · [B] classes · a tuple, or B tuples, of indices into an
                output of more dimensions.

        Returns:
            for pictures [B, C, H, W] the heatmap in pixels, in equal parts on the channels, which sum to it; for ids [B, T] and
            tokens [B, T, D] the relevance of each token, in equal parts on its features.

        Raises:
            InputError: an input without a map, or with one that does not lie on it.
        """
        given = inputs if isinstance(inputs, tuple) else (inputs,)
        more = additional_forward_args if isinstance(additional_forward_args, tuple) else (additional_forward_args,)
        args = (*given, *(() if additional_forward_args is None else more))
        maps = self.explainer(*args, target=_target(target)).maps
        names = input_names(self.explainer.model, args, {})
        found = tuple(_on(name, x, maps) for name, x in zip(names, given, strict=False))
        return found if isinstance(inputs, tuple) else found[0]


def _on(name: str, x: Tensor, maps: dict[str, TokenMap]) -> Tensor:
    """The map of an input in its shape."""
    if name not in maps:
        raise InputError(
            f"input {name!r} has no map of its own (there are {', '.join(maps)}); give it by additional_forward_args"
        )
    if maps[name].grid is not None and x.dim() == 4:
        spread = maps[name].heatmap().unsqueeze(1)
    else:
        spread = maps[name].relevance.reshape(*maps[name].relevance.shape, *[1] * (x.dim() - 2))
    if spread.dim() != x.dim() or any(a not in (b, 1) for a, b in zip(spread.shape, x.shape, strict=True)):
        raise InputError(
            f"the map of {name!r}, {tuple(maps[name].relevance.shape)}, does not lie on an input {tuple(x.shape)}"
        )
    return (spread * (spread.numel() / x.numel())).expand_as(x).contiguous()


def _target(target: Any) -> Any:
    """captum's target as fastrel's: indices into outputs of more dimensions are functions."""
    several = isinstance(target, list) and bool(target) and isinstance(target[0], tuple)
    if not several and not isinstance(target, tuple):
        return target

    def entries(output: Any) -> Tensor:
        logits = logits_in(output)
        samples = torch.arange(len(logits), device=logits.device)
        chosen: list[Any] = [target] if isinstance(target, tuple) else target
        return logits[(samples, *(torch.tensor(one, device=logits.device) for one in zip(*chosen, strict=True)))]

    return entries
